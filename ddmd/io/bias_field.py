"""The slow drift of intensity that coils leave in an image, found in normal tissue and taken away."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import legendre

DEGREE = 3  # of the polynomial, all axes together
VOXELS = 40_000  # it is fitted to so many, drawn at random
BRIGHT, DARK = 1.5, 2.5  # robust standard deviations from the fit beyond which a voxel is not normal tissue
ROUNDS = 8
FAINT = (
    0.45  # standard deviation, in z-scores, up to which a field is left: lesions and anatomy make such, too
)


def bias_field(z: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """A smooth field (X, Y, Z) float32 to subtract from robust z-scores.

    A polynomial in the position, by least squares over normal tissue: what is brighter than the last
    fit by `BRIGHT` or darker by `DARK` robust standard deviations is left out of the next, so that
    neither a lesion nor a ventricle is fitted. A faint field may be anatomy or a large lesion, and is zero
    here. Outside the brain's box the field goes on as at its edge.

    Parameters
    ----------
    z : (X, Y, Z) float32, robust z-scores over the brain
    brain : (X, Y, Z) bool
    """
    at = np.argwhere(brain)
    low, high = at.min(0), at.max(0)
    axes = [
        np.clip(2.0 * (np.arange(n) - a) / max(b - a, 1) - 1.0, -1.0, 1.0)
        for n, a, b in zip(brain.shape, low, high, strict=True)
    ]
    if len(at) > VOXELS:
        at = at[np.random.default_rng(0).choice(len(at), VOXELS, replace=False)]
    size = DEGREE + 1
    orders = np.indices((size, size, size)).sum(0) <= DEGREE
    u, v, w = (axis[index] for axis, index in zip(axes, at.T, strict=True))
    terms = legendre.legvander3d(u, v, w, [DEGREE] * 3)[:, orders.ravel()]
    values = z[tuple(at.T)].astype(np.float64)
    kept = (values > -2.0) & (values < 1.0)
    coefficients = np.zeros(orders.shape)
    for _ in range(ROUNDS):
        if kept.sum() < 10 * terms.shape[1]:
            return np.zeros(brain.shape, np.float32)
        coefficients[orders] = np.linalg.lstsq(terms[kept], values[kept], rcond=None)[0]
        rest = values - terms @ coefficients[orders]
        spread = 1.4826 * np.median(np.abs(rest[kept] - np.median(rest[kept])))
        kept = (rest < BRIGHT * spread) & (rest > -DARK * spread)
    if (terms @ coefficients[orders]).std() <= FAINT:
        return np.zeros(brain.shape, np.float32)
    along = [legendre.legvander(axis, DEGREE).astype(np.float32) for axis in axes]
    field: np.ndarray = np.einsum("xi,yj,zk,ijk->xyz", *along, coefficients.astype(np.float32), optimize=True)
    return field
