"""How near each voxel is to being decided otherwise: an uncertainty of the mask, made of the probability."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddmd.inference.postprocess import OUTLINE_MM, LesionCriteria, large_lesions, outline_reach
from ddmd.io.background import bounding_box
from ddmd.io.geometry import voxel_sides

LEAST = 1e-6  # probabilities are kept this far from 0 and 1, so that their odds are finite


def decision_uncertainty(
    probability: NDArray[np.floating],
    mask: NDArray[np.bool_],
    affine: NDArray[np.floating],
    criteria: LesionCriteria,
) -> NDArray[np.float32]:
    """q (1 - q), where the odds of q are those of the probability over those of the probability that decides.

    That is the threshold, and where the outline of a large lesion may lie, a share of it. p (1 - p) is highest
    where the probability is one half, whatever the threshold; this is highest where the mask ends. What only the
    outline of a large lesion took in counts as accepted, so that outlines are looked for a little too far out.

    Parameters
    ----------
    probability : (X, Y, Z) float32 in [0, 1]
    mask : (X, Y, Z) bool
        True in the lesions that the criteria found.
    affine : (4, 4), voxels to mm
    criteria : LesionCriteria

    Returns
    -------
    (X, Y, Z) float32 in [0, 0.25]

    Examples
    --------
    >>> p = np.array([[[0.7, 0.5, 0.01]]], np.float32)
    >>> decision_uncertainty(p, p > 0.7, np.eye(4), LesionCriteria(0.7)).round(2)
    array([[[0.25, 0.21, 0.  ]]], dtype=float32)
    """
    odds = _odds(np.clip(probability, LEAST, 1 - LEAST).astype(np.float32))
    odds /= np.float32(_odds(criteria.threshold))
    if criteria.outline_share < 1 and mask.any():
        reach = int(np.ceil(OUTLINE_MM / min(voxel_sides(affine))))
        box = bounding_box(mask | (probability >= criteria.outline), reach)
        assert box is not None, "the mask is not empty"
        accepted = mask[box] & (probability[box] >= criteria.threshold)
        accepted &= large_lesions(accepted, probability[box], affine, criteria)
        near = outline_reach(accepted, affine)
        odds[box][near] *= np.float32(_odds(criteria.threshold) / _odds(criteria.outline))
    uncertainty: NDArray[np.float32] = odds / (1 + odds) ** 2
    return uncertainty


def _odds(probability: Any) -> Any:
    return probability / (1 - probability)
