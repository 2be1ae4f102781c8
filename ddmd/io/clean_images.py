"""Images without NaN, refused where they hold no brain; the brain in them, and what a user should know of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation

from ddmd.io.background import background_value
from ddmd.io.brain import BrainEstimate, estimate_brain
from ddmd.io.common_grid import grid_difference
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import Geometry
from ddmd.io.inputs import array_image, input_images
from ddmd.io.intensities import intensities_of

SURE = 0.9  # less sure than this whether the skull is on, a note says so
MIN_VALUES = 8  # different intensities in the brain; a mask or a label map has fewer


def given_brain(brain: Any, grid: Geometry, label: str, orientation: np.ndarray) -> np.ndarray:
    """A given brain mask as bool (X, Y, Z) in canonical order; refused where it is on another grid or empty."""
    if isinstance(brain, np.ndarray):
        image = array_image(brain, grid.affine, "brain mask")
    else:
        (image,) = input_images(brain)
    difference = grid_difference(image.geometry, grid)
    if difference is not None:
        raise VolumeError(
            f"{image.label}: the brain mask and {label} are on different grids: {difference}; resample the mask "
            "onto the image"
        )
    mask = np.nan_to_num(intensities_of(image.stored())[0]) > 0
    if not mask.any():
        raise VolumeError(f"{image.label}: the brain mask is empty; give one whose brain is above 0")
    canonical: np.ndarray = np.ascontiguousarray(apply_orientation(mask, orientation))
    return canonical


def brain_notes(estimate: BrainEstimate, label: str) -> list[str]:
    """What a user should know of the brain: nothing where it was surely stripped."""
    if estimate.skull_on and estimate.confidence == 1.0:
        return [f"{label}: {estimate.describe()}; results are less reliable outside the brain"]
    if estimate.skull_on:
        return [
            f"{label}: the skull seems to be on ({estimate.confidence:.0%} sure); results are less reliable "
            "outside the brain. Pass --strip (strip=True) or a brain mask for better ones, or --skull off "
            "(skull='off') if it is off"
        ]
    if estimate.confidence < SURE:
        return [
            f"{label}: the skull seems to be off ({estimate.confidence:.0%} sure); pass --skull on (skull='on') "
            "if it is on"
        ]
    return []


def _check_contrast(inside: np.ndarray, label: str) -> None:
    """Raise VolumeError where the values in the brain are those of a mask or a label map."""
    found = len(np.unique(inside[:: max(1, len(inside) // 50_000)]))
    if found < MIN_VALUES:
        raise VolumeError(
            f"{label}: the brain holds {found} different value{'s' if found > 1 else ''}; this is a mask or a "
            "label map; give the image"
        )


def clean_images(
    data: dict[str, np.ndarray],
    labels: dict[str, str],
    notes: list[str],
    affine: np.ndarray,
    skull: str,
    mask: np.ndarray | None,
) -> tuple[BrainEstimate, dict[str, np.ndarray]]:
    """The brain and images without NaN; refuses what holds no brain."""
    estimate: BrainEstimate | None = None
    images = {}
    for s, values in data.items():
        low, high = float(values.min()), float(values.max())
        whole = bool(
            np.isfinite((low, high)).all()
        )  # NaN is the least and the greatest value, where there is one
        finite = np.ones(values.shape, bool) if whole else np.isfinite(values)
        if not finite.any():
            raise VolumeError(f"{labels[s]}: no voxel is a number; export it again")
        if not whole:
            low, high = float(values[finite].min()), float(values[finite].max())
        if low == high:
            what = "all zero" if low == 0 else f"constant ({low:g})"
            raise VolumeError(f"{labels[s]}: the volume is {what}; there is no image in it; export it again")
        background = background_value(values, finite)
        filled = values if whole else np.where(finite, values, np.float32(background))
        if estimate is None:
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            estimate = estimate_brain(filled, spacing, background, skull=skull, mask=mask)
            if not estimate.mask.any():
                raise VolumeError(f"{labels[s]}: no brain found in the volume; check that it is a head MRI")
        _check_contrast(filled[estimate.mask], labels[s])
        bad = 0 if whole else int((~finite & estimate.mask).sum())
        if bad:
            raise VolumeError(f"{labels[s]}: {bad} voxels inside the brain are NaN or Inf; export it again")
        if not whole:
            notes.append(
                f"{labels[s]}: {int((~finite).sum())} NaN or Inf voxels outside the brain, set to background"
            )
        images[s] = filled
    assert estimate is not None
    return estimate, images
