"""What a detection found: maps on the input's own grid, a score, a table of lesions, files, a picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ddmd.inference.postprocess import Lesion

SUFFIXES = {
    "mask": "desc-lesion_mask",
    "probability": "desc-lesion_probseg",
    "uncertainty": "desc-lesion_uncertainty",
    "inter_discrepancy": "desc-inter_discrepancy",
    "intra_discrepancy": "desc-intra_discrepancy",
}
MEANING = {
    "mask": "1 where the probability reaches the threshold, in components of at least the smallest volume and peak",
    "probability": "mean over the S drawn masks, smoothed through the plane, in [0, 1]",
    "uncertainty": "variance over the S drawn masks, 1/(S-1), smoothed through the plane",
    "inter_discrepancy": "X = mean over sequences of |mu_B - mu_A|, in robust z-scores times 0.5",
    "intra_discrepancy": "Y = root mean square deviation of the ensemble trained on normal slices, same unit",
}


class OutputError(ValueError):
    """Results that cannot be written where they were asked for; the message says what to do."""


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name) or "volume"


def planned(name: str, folder: str | Path) -> dict[str, Path]:
    """The files a detection of this name is saved as, by what they hold."""
    stem = Path(folder) / _plain(name)
    paths = {key: Path(f"{stem}_{suffix}.nii.gz") for key, suffix in SUFFIXES.items()}
    return paths | {"lesions": Path(f"{stem}_lesions.tsv"), "overlay": Path(f"{stem}_overlay.png")}


def check_output(name: str, folder: str | Path, overwrite: bool) -> None:
    """Raise OutputError where results could not be written to the folder, before computing them."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder for the results")
    there = [path.name for path in planned(name, folder).values() if path.exists()]
    if there and not overwrite:
        raise OutputError(
            f"{folder}: holds earlier results ({there[0]}); pass --overwrite (overwrite=True) or another folder"
        )
    above = folder
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot be written to; choose another folder, or ask for the right to")


@dataclass(frozen=True)
class Detection:
    """The result of `ddmd.detect`. Images are on the input's grid, with its affine and form codes.

    mask : uint8; probability : float32 in [0, 1]; uncertainty : float32, variance over the samples;
    inter_discrepancy, intra_discrepancy : float32, the paper's X and Y.
    score : float in [0, 1], how sure it is that there is a lesion at all.
    lesions : largest first. notes : what the user should know. how : weights, sampling, threshold.
    """

    mask: nib.Nifti1Image
    probability: nib.Nifti1Image
    uncertainty: nib.Nifti1Image
    inter_discrepancy: nib.Nifti1Image
    intra_discrepancy: nib.Nifti1Image
    image: nib.Nifti1Image
    score: float
    lesions: tuple[Lesion, ...]
    notes: tuple[str, ...]
    how: Mapping[str, Any]
    name: str

    def save(self, folder: str | Path, overwrite: bool = False) -> dict[str, Path]:
        """Write the maps, a JSON sidecar each, and the table of lesions.

        Each file is written under a temporary name and renamed when all are complete.

        Returns
        -------
        {"mask": path, "probability": path, ..., "lesions": path}

        Raises
        ------
        OutputError
            If the folder cannot be written to, or holds results of this name and overwrite is False.
        """
        check_output(self.name, folder, overwrite)
        paths = planned(self.name, folder)
        del paths["overlay"]
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            pending: list[tuple[Path, Path]] = []
            try:
                for key in SUFFIXES:
                    path = paths[key]
                    temporary = path.with_name(f".partial-{path.name}")
                    pending.append((temporary, path))
                    nib.save(getattr(self, key), temporary)
                    sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
                    text = json.dumps(
                        {"Meaning": MEANING[key], **self.how, "Notes": list(self.notes)}, indent=1
                    )
                    pending.append(_write_text(sidecar, text + "\n"))
                pending.append(_write_text(paths["lesions"], self._table()))
                for temporary, path in pending:
                    os.replace(temporary, path)
            finally:
                for temporary, _ in pending:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written to ({error}); choose another folder") from None
        return paths

    def _table(self) -> str:
        text = io.StringIO()
        names = [f.name for f in fields(Lesion) if f.name != "centre_mm"]
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(["lesion", "x_mm", "y_mm", "z_mm", *names])
        for number, lesion in enumerate(self.lesions, 1):
            row = asdict(lesion)
            centre = [f"{v:.1f}" for v in row.pop("centre_mm")]
            writer.writerow([number, *centre, *(f"{row[n]:.4g}" for n in names)])
        return text.getvalue()

    def overlay(self, path: str | Path) -> Path:
        """Draw a PNG mosaic: axial slices, the mask's outline in red, the uncertainty in colour below.

        Slices are those with most lesion, in order from the feet up, or evenly spaced where none was
        found.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        images = (self.image, self.mask, self.uncertainty, self.probability)
        image, mask, uncertainty, probability = (
            np.asanyarray(nib.as_closest_canonical(i).dataobj).astype(np.float32) for i in images
        )
        spacing = nib.as_closest_canonical(self.image).header.get_zooms()
        tissue = image[image != image.flat[0]]
        low, high = np.percentile(tissue if tissue.size else image, (1, 99.5))
        shown = _slices_to_show(mask, image)
        figure = Figure(figsize=(2.2 * len(shown), 4.9), facecolor="black")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(shown), squeeze=False)
        top = max(float(uncertainty.max()), 1e-3)
        heat = None
        for column, z in enumerate(shown):
            for row in range(2):
                ax = axes[row, column]
                ax.imshow(image[:, :, z].T, cmap="gray", vmin=low, vmax=high, origin="lower",
                          aspect=spacing[1] / spacing[0])  # fmt: skip
                ax.axis("off")
            if mask[:, :, z].any():
                axes[0, column].contour(mask[:, :, z].T, [0.5], colors="red", linewidths=1)
            seen = np.ma.masked_less((uncertainty * (probability > 0.01))[:, :, z].T, 0.02 * top)
            heat = axes[1, column].imshow(seen, cmap="inferno", vmin=0, vmax=top, origin="lower",
                                          aspect=spacing[1] / spacing[0], alpha=0.85)  # fmt: skip
            axes[0, column].set_title(f"slice {z + 1}", color="white", fontsize=8)
        total = sum(lesion.volume_ml for lesion in self.lesions)
        title = f"{self.name}: {len(self.lesions)} lesions, {total:.1f} ml, score {self.score:.2f}"
        figure.suptitle(title, color="white", fontsize=10)
        figure.subplots_adjust(0.01, 0.02, 0.94, 0.88, 0.02, 0.02)
        if heat is not None:
            bar = figure.colorbar(heat, cax=figure.add_axes((0.95, 0.05, 0.008, 0.36)))
            bar.ax.tick_params(colors="white", labelsize=6)
            bar.ax.set_title("variance", color="white", fontsize=6)
        path = Path(path)
        temporary = path.with_name(f".partial-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            canvas.print_figure(temporary, format="png", dpi=110)
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written to ({error}); choose another place") from None
        finally:
            temporary.unlink(missing_ok=True)
        return path


def _write_text(path: Path, text: str) -> tuple[Path, Path]:
    temporary = path.with_name(f".partial-{path.name}")
    temporary.write_text(text)
    return temporary, path


def _slices_to_show(mask: np.ndarray, image: np.ndarray, count: int = 6) -> list[int]:
    area = mask.sum(axis=(0, 1))
    depth = mask.shape[2]
    count = min(count, depth)
    if area.any():
        held = np.flatnonzero(area)
        if len(held) > count:
            shares = np.cumsum(area[held]) / area.sum()
            held = held[np.searchsorted(shares, (np.arange(count) + 0.5) / count)]
        return sorted({int(z) for z in held})
    filled = np.flatnonzero((image != image.flat[0]).any(axis=(0, 1)))
    filled = filled if len(filled) else np.arange(depth)
    return [int(z) for z in filled[np.linspace(0, len(filled) - 1, count + 2).round().astype(int)[1:-1]]]
