"""From a probability map to lesions: components, criteria, score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

SCORE_ML = 0.5  # the image-level score is the mean of this much of the most probable tissue


@dataclass(frozen=True)
class Lesion:
    """One connected component (26 neighbours) of the mask. Centre in mm, world (RAS+) coordinates."""

    volume_ml: float
    centre_mm: tuple[float, float, float]
    peak_probability: float
    mean_probability: float
    mean_uncertainty: float


@dataclass(frozen=True)
class LesionCriteria:
    """What of a probability map is lesion.

    threshold : probability from which a voxel may be lesion.
    min_ml : smaller components are none.
    min_peak : nor are those that are nowhere as probable as this.
    """

    threshold: float
    min_ml: float = 0.0
    min_peak: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold is {self.threshold}; allowed are values between 0 and 1")


def components(probability: np.ndarray, voxel_ml: float, rule: LesionCriteria) -> np.ndarray:
    """The components (26 neighbours) that are lesion by the rule, numbered from 1: (X, Y, Z) int, 0 elsewhere."""
    parts, count = ndimage.label(probability >= rule.threshold, np.ones((3, 3, 3)))
    size = np.bincount(parts.ravel(), minlength=count + 1)
    peak, found = np.zeros(count + 1, probability.dtype), parts > 0
    np.maximum.at(peak, parts[found], probability[found])
    kept = (size * voxel_ml >= rule.min_ml) & (peak >= rule.min_peak)
    kept[0] = False
    numbered: np.ndarray = np.where(kept, np.arange(count + 1), 0)[parts]
    return numbered


def find_lesions(
    probability: np.ndarray, uncertainty: np.ndarray, affine: np.ndarray, rule: LesionCriteria
) -> tuple[np.ndarray, tuple[Lesion, ...]]:
    """The mask (X, Y, Z) bool by the rule, and its lesions, largest first.

    Parameters
    ----------
    probability, uncertainty : (X, Y, Z) float32
    affine : (4, 4), voxels to mm
    rule : LesionCriteria
    """
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    parts = components(probability, voxel_ml, rule)
    lesions = []
    for number, box in enumerate(ndimage.find_objects(parts), 1):
        if box is None:
            continue
        inside = parts[box] == number
        ml = float(inside.sum()) * voxel_ml
        p, u = probability[box][inside], uncertainty[box][inside]
        voxel = np.argwhere(inside).mean(0) + [axis.start for axis in box]
        centre = affine[:3, :3] @ voxel + affine[:3, 3]
        lesions.append(
            Lesion(ml, (float(centre[0]), float(centre[1]), float(centre[2])), float(p.max()),
                   float(p.mean()), float(u.mean()))
        )  # fmt: skip
    return parts > 0, tuple(sorted(lesions, key=lambda lesion: -lesion.volume_ml))


def image_score(probability: np.ndarray, voxel_ml: float) -> float:
    """Mean probability of the SCORE_ML most probable tissue: near 1 where there is a sure lesion."""
    count = min(max(1, round(SCORE_ML / voxel_ml)), probability.size)
    some = probability[~(probability <= 0)]  # far fewer than all; NaN stays, and makes the score NaN
    if some.size > count:
        some = np.partition(some, some.size - count)[-count:]
    return float(some.sum(dtype=np.float64)) / count
