"""Cases to measure training with where no data is at hand: heads of noise, in half of whose slices is a bright spot."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, SLICES = 192, 24  # pixels of a slice, slices of a case


def write_cases(folder: Path, count: int = 6, seed: int = 0) -> Path:
    """Write a data set of PNG slices with image-level labels, as `ddmd train` takes it.

    Parameters
    ----------
    folder : a new folder: images/ and labels.csv
    count : of patients
    seed : of the noise

    Returns
    -------
    Path of the folder.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("file", "patient", "slice", "has_lesion"))
        for patient in range(count):
            for number in range(SLICES):
                radius = 0.8 * np.sqrt(1 - ((number - SLICES / 2) / SLICES) ** 2)
                head = (x / radius) ** 2 + (y / radius / 0.9) ** 2 < 1
                brightness = 90 + 20 * np.cos(6 * x) * np.cos(5 * y) + 6 * rng.standard_normal(head.shape)
                lesion = (x - 0.3) ** 2 + (y + 0.2) ** 2 < 0.02
                positive = SLICES // 4 <= number < 3 * SLICES // 4
                values = np.where(head, brightness + 70 * lesion * positive, 0)
                name = f"patient{patient}_{number + 1}.png"
                Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(images / name)
                table.writerow((name, f"patient{patient}", number + 1, int(positive)))
    return folder
