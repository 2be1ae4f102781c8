"""Where the brain is in a volume, and whether the skull is still on."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SCALP_MM = 13.0  # scalp, skull and cerebrospinal fluid outside the brain
MAX_BRAIN_ML = 2200.0  # no stripped brain is bigger


def background_value(values: np.ndarray, finite: np.ndarray) -> float:
    """The commonest value on the faces of the volume."""
    faces = np.zeros(values.shape, bool)
    for axis in range(3):
        for end in (0, -1):
            faces[(slice(None),) * axis + (end,)] = True
    border = values[faces & finite]
    if not len(border):
        return float(values[finite].min())
    found, counts = np.unique(border, return_counts=True)
    return float(found[counts.argmax()])


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def estimate_brain(
    values: np.ndarray, spacing: np.ndarray, background: float, affine: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Brain (X, Y, Z) bool of a finite canonical volume, and whether the skull is on.

    Stripped volumes have one exact background value round a brain-sized rest. Where the skull is on,
    the head is what is brighter than air, and the brain is guessed as what lies SCALP_MM inside it.
    """
    voxel_ml = float(np.prod(spacing)) / 1000
    rest = values != background
    # holes of value exactly background inside the brain, slice by slice, cheaply
    empty_share = 1.0 - rest.mean()
    ml = rest.sum() * voxel_ml
    if empty_share > 0.2 and ml <= MAX_BRAIN_ML:
        steps = ndimage.binary_opening(rest) if rest.size < 5e5 else rest
        main = _largest(steps if steps.any() else rest)
        filled = np.stack([ndimage.binary_fill_holes(main[:, :, z]) for z in range(main.shape[2])], 2)
        if not _has_scalp(values, filled, spacing, background):
            return filled, False
    return _inside_head(values, spacing), True


def _has_scalp(values: np.ndarray, head: np.ndarray, spacing: np.ndarray, background: float) -> bool:
    """Whether a dark skull lies between a brighter rim and the inside, on the middle slices."""
    zs = np.flatnonzero(head.any(axis=(0, 1)))
    z = int(zs[len(zs) // 2])
    depth = ndimage.distance_transform_edt(np.pad(head[:, :, z], 1), sampling=spacing[:2])[1:-1, 1:-1]
    plane = values[:, :, z] - background
    bands = [(0.0, 7.0), (5.0, 16.0), (20.0, 1e9)]
    levels = [np.percentile(plane[(depth > a) & (depth <= b)], q) if ((depth > a) & (depth <= b)).any() else 0.0
              for (a, b), q in zip(bands, (85, 15, 50), strict=True)]  # fmt: skip
    rim, gap, inside = levels
    return bool(gap < 0.35 * inside and rim > 0.6 * inside and inside > 0)


def _inside_head(values: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (1, 99))
    counts, edges = np.histogram(np.clip(values, low, high), 128)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    mean_below = np.cumsum(counts * centres) / np.maximum(below, 1)
    total = float((counts * centres).sum())
    above = below[-1] - below
    mean_above = (total - np.cumsum(counts * centres)) / np.maximum(above, 1)
    otsu = centres[(below * above * (mean_below - mean_above) ** 2).argmax()]
    head = _largest(ndimage.binary_opening(values > low + 0.5 * (otsu - low)))
    head = np.stack([ndimage.binary_fill_holes(head[:, :, z]) for z in range(head.shape[2])], 2)
    brain = np.zeros_like(head)
    for z in np.flatnonzero(head.any(axis=(0, 1))):
        depth = ndimage.distance_transform_edt(np.pad(head[:, :, z], 1), sampling=spacing[:2])[1:-1, 1:-1]
        brain[:, :, z] = depth > SCALP_MM
    return brain if brain.any() else head
