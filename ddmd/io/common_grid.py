"""Images of one examination on one grid: what their grids differ in, and resampling from one to the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from ddmd.io.errors import VolumeError
from ddmd.io.geometry import GRID_TOLERANCE_MM, Geometry, grid_gap
from ddmd.io.inputs import InputImage


def refuse_differences(
    chosen: Mapping[str, InputImage], differences: Mapping[str, str | None], label: str
) -> None:
    for s, difference in differences.items():
        if difference is not None:
            raise VolumeError(
                f"{chosen[s].label} and {label} are on different grids: {difference}. Register them, or "
                "pass --resample (resample=True) to bring them onto one grid as they lie in the scanner"
            )


def grid_difference(one: Geometry, other: Geometry) -> str | None:
    """What two grids differ in, in words; None where they are the same."""
    parts = []
    if one.shape != other.shape:
        parts.append(f"shape {one.shape} against {other.shape}")
    sizes, others = (np.round(np.linalg.norm(g.affine[:3, :3], axis=0), 3).tolist() for g in (one, other))
    if sizes != others:
        parts.append(f"voxels {sizes} mm against {others} mm")
    if not parts:
        gap = grid_gap(one.shape, one.affine, other.affine)
        if gap < GRID_TOLERANCE_MM:
            return None
        parts.append(f"position or orientation, by up to {gap:.1f} mm")
    return ", ".join(parts)


def resampled_to(
    values: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray
) -> np.ndarray:
    """Values on another grid, by linear interpolation; NaN where a voxel that is no number takes part."""
    matrix = np.linalg.inv(affine) @ target

    def interpolated(image: np.ndarray, outside: float) -> np.ndarray:
        result: np.ndarray = ndimage.affine_transform(
            image, matrix[:3, :3], matrix[:3, 3], output_shape=shape[:3], order=1, cval=outside
        )
        return result

    finite = np.isfinite(values)
    if not finite.any():
        return np.full(shape[:3], np.nan, np.float32)
    filled = np.where(finite, values, np.float32(0))
    resampled = interpolated(filled, float(filled.min())).astype(np.float32)
    if not finite.all():
        resampled[interpolated((~finite).astype(np.float32), 0.0) > 0] = np.nan
    return resampled
