"""How near each voxel is to being decided otherwise: an uncertainty of the mask, made of the probability."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ddmd.inference.postprocess import ROUNDING, LesionCriteria
from ddmd.io.background import bounding_box

REACH_MM = 10.0  # so far from a large lesion its outline decides
LEAST = 1e-6  # probabilities are kept this far from 0 and 1, so that their odds are finite


def decision_uncertainty(
    probability: NDArray[np.floating],
    labels: NDArray[np.integer],
    spacing: tuple[float, float, float],
    criteria: LesionCriteria,
) -> NDArray[np.float32]:
    """q (1 - q), where the odds of q are those of the probability over those of the probability that decides.

    That is the threshold, and up to `REACH_MM` from a large lesion its outline. p (1 - p) is highest where the
    probability is one half, whatever the threshold; this is highest where the mask ends.

    Parameters
    ----------
    probability : (X, Y, Z) float32 in [0, 1]
    labels : (X, Y, Z) int
        The lesions that the criteria found, numbered from 1.
    spacing : of the voxels in mm
    criteria : LesionCriteria

    Returns
    -------
    (X, Y, Z) float32 in [0, 0.25]

    Examples
    --------
    >>> p = np.array([[[0.7, 0.5, 0.01]]], np.float32)
    >>> decision_uncertainty(p, p > 0.7, (1.0, 1.0, 1.0), LesionCriteria(0.7)).round(2)
    array([[[0.25, 0.21, 0.  ]]], dtype=float32)
    """
    odds = _odds(np.clip(probability, LEAST, 1 - LEAST).astype(np.float32))
    odds /= np.float32(_odds(criteria.threshold))
    large = _near_large(labels, spacing, criteria)
    if large is not None:
        box, near = large
        odds[box][near] *= np.float32(_odds(criteria.threshold) / _odds(criteria.outline))
    uncertainty: NDArray[np.float32] = odds / (1 + odds) ** 2
    return uncertainty


def _odds(probability: Any) -> Any:
    return probability / (1 - probability)


def _near_large(
    labels: NDArray[np.integer], spacing: tuple[float, float, float], criteria: LesionCriteria
) -> tuple[tuple[slice, ...], NDArray[np.bool_]] | None:
    """A box, and what in it is near a large lesion; None where there is none."""
    if criteria.outline_share == 1 or not labels.any():
        return None
    volumes = np.bincount(labels.ravel()) * float(np.prod(spacing)) / 1000
    large = volumes >= criteria.large_ml * (1 - ROUNDING)
    large[0] = False
    inside = large[labels]
    box = bounding_box(inside)
    if box is None:
        return None
    reach = [int(np.ceil(REACH_MM / side)) for side in spacing]
    grown = tuple(slice(max(0, a.start - r), a.stop + r) for a, r in zip(box, reach, strict=True))
    return grown, ndimage.distance_transform_edt(~inside[grown], sampling=spacing) <= REACH_MM
