"""The brain within a head: where lesions are painted, and what is left where a training slice is stripped."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

TISSUE = (-1.0, 1.8)  # half robust z-scores: brain and most lesions; neither bone and air nor fat
OPENED_MM = 5.0  # bridges to the scalp and the orbits are thinner than twice this
CLOSED_MM = 8.0  # sulci and fissures are narrower than twice this
SHARED = 0.6  # of a body that lies on the brain of the next slice: then it is brain, too
SPREAD_MM = 8.0  # by which the brain of a slice may stand out over that of the next


def brain_within(image: np.ndarray, head: np.ndarray, mm: float) -> np.ndarray:
    """Where the brain is, slice by slice away from the one that shows most of it.

    Opening parts the brain from what is around the skull; the largest body is the brain, and so is, slice after
    slice, what lies on it. Bright lesions are filled unless they reach the surface. As rough as that is, muscle
    just below the cerebellum may be taken for brain. Of a skull-stripped volume nearly all is found.

    Parameters
    ----------
    image : (Z, H, W) float32, half robust z-scores
    head : (Z, H, W) bool, what is not air
    mm : float, millimetres a pixel

    Returns
    -------
    (Z, H, W) bool
    """
    tissue = head & (image > TISSUE[0]) & (image < TISSUE[1])
    brain = np.zeros_like(head)
    parts, sizes = [], []
    for plane in tissue:
        labels, count = ndimage.label(ndimage.distance_transform_edt(plane) > OPENED_MM / mm)
        parts.append(labels)
        sizes.append(np.bincount(labels.ravel(), minlength=count + 1))
        sizes[-1][0] = 0  # what is no body
    widest = int(np.argmax([size.max() for size in sizes]))
    if not sizes[widest].any():
        return brain
    brain[widest] = _closed(parts[widest] == sizes[widest].argmax(), mm) & head[widest]
    for way in (1, -1):
        for z in range(widest + way, len(head) if way > 0 else -1, way):
            before = brain[z - way]
            shared = np.bincount(parts[z][before], minlength=len(sizes[z]))
            kept = (sizes[z] > 0) & (shared > SHARED * sizes[z])
            if not kept.any():
                break
            near = ndimage.distance_transform_edt(~before) <= SPREAD_MM / mm
            brain[z] = _closed(kept[parts[z]], mm) & near & head[z]
    return brain


def _closed(core: np.ndarray, mm: float) -> np.ndarray:
    """The opened bodies (H, W) given their edge back, closed and filled."""
    margin = int(np.ceil((OPENED_MM + CLOSED_MM) / mm)) + 2
    away = ndimage.distance_transform_edt(~np.pad(core, margin))
    wide = ndimage.distance_transform_edt(away <= (OPENED_MM + CLOSED_MM) / mm) > CLOSED_MM / mm
    return np.asarray(ndimage.binary_fill_holes(wide[margin:-margin, margin:-margin]))
