"""Small made-up volumes and a small untrained system, for tests that need some."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from matplotlib.image import imsave

from ddmd.models import checkpoint
from ddmd.models.autoencoder import AutoencoderConfig
from ddmd.models.denoiser import DenoiserConfig


def head(
    rng: np.random.Generator, shape=(40, 48, 12), spacing=(4.0, 4.0, 6.0)
) -> tuple[np.ndarray, np.ndarray]:
    """A stripped, asymmetric brain-like blob (X, Y, Z) float32 on background 0, and its affine."""
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum((g / r) ** 2 for g, r in zip(grid, (0.8, 0.85, 0.9), strict=True)) < 1
    values = 100 + 10 * rng.standard_normal(shape) + 20 * grid[0] + 10 * grid[1]
    blob = sum((g - c) ** 2 for g, c in zip(grid, (0.35, 0.1, 0.0), strict=True)) < 0.06
    values = np.where(blob, values + 120, values) * inside
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * np.array(shape) / 2
    return values.astype(np.float32), affine


def write(path, values, affine) -> str:
    nib.save(nib.Nifti1Image(values, affine), path)
    return str(path)


def tiny_system(seed: int = 0, sequences: tuple[str, ...] = ("flair",)) -> checkpoint.System:
    """An untrained system of a few thousand weights that marks about half of everything."""
    torch.manual_seed(seed)
    count = len(sequences)
    autoencoder = AutoencoderConfig(count, members=2, width=4, code=2)
    denoiser = DenoiserConfig(count, 1, (8, 8, 8, 8), 8, mirrored=True)
    description = checkpoint.Description(
        name="tiny",
        sequences=sequences,
        grid={"mm": 4.0, "multiple": 16},
        schedule={"steps": 1000, "kind": "cosine", "prediction": "sample"},
        autoencoder=vars(autoencoder),
        denoiser={**vars(denoiser), "widths": list(denoiser.widths)},
        discrepancy_scale=4.0,
        sampling={"sampler": "ddim", "steps": 3, "samples": 2, "eta": 0.0},
        min_lesion_ml=0.5,
        min_peak=0.0,
    )
    system = checkpoint.build(description)
    torch.nn.init.constant_(system.condition.to_evidence.bias, 0.0)
    torch.nn.init.normal_(system.denoiser.to_output.weight, std=0.2)
    for module in system.parts().values():
        module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return system


def write_slices(
    root: Path, rng: np.random.Generator, patients: int = 3, garbage_masks: bool = False
) -> Path:
    """A small folder of slices with labels.csv; every second slice of a patient has a lesion."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rows = []
    for p in range(patients):
        values, _ = head(rng, (64, 64, 6))
        for z in range(6):
            name = f"p{p}_{z + 1}.png"
            plane = np.clip(values[:, :, z].T / 2, 0, 255).astype(np.uint8)
            imsave(root / "images" / name, plane, cmap="gray", vmin=0, vmax=255)
            if garbage_masks:
                (root / "masks" / name).write_bytes(b"nobody may open this")
            else:
                imsave(root / "masks" / name, plane > 90, cmap="gray", vmin=0, vmax=1)
            rows.append({"file": name, "patient": f"p{p}", "slice": z + 1, "has_lesion": z % 2})
    with open(root / "labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root
