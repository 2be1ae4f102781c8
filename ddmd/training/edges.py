"""Where a lesion ends by its brightness: what the teacher's probability of a pixel becomes at a clear edge."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

CORE = 0.9  # share of a component's highest probability; pixels that reach it tell how bright the lesion is
RING_PX = (2.0, 8.0)  # distance in the slice of the pixels that tell how bright the surroundings are
RING_MAX_PROBABILITY = 0.2  # of those pixels
MIN_RING_PIXELS = 20
REACH_PX = 6.0  # an edge is looked for this far from a component
CLARITY = (1.0, 2.0)  # contrast over the spread around: unclear up to the first, clear from the second
HALF_CONTRAST_LOGITS = 3.0  # that half the contrast adds to a pixel's logit
CONTRAST_RANGE = (-0.5, 1.5)  # darker or brighter pixels count as these
SMOOTHING_PX = 0.5  # standard deviation in the slice, before brightness is read
LOGIT_LIMIT = 1e-3  # probabilities are kept this far from 0 and 1


def follow_edges(
    probability: np.ndarray, components: np.ndarray, image: np.ndarray, head: np.ndarray
) -> np.ndarray:
    """The probability (Z, H, W), moved to the edges of bright components.

    Of each component, the median brightness of its core and of a ring around it are taken. A pixel half way between
    both keeps its probability. The logit of one as bright as the core gains `HALF_CONTRAST_LOGITS`, that of one as dark
    as the ring loses as many, and brighter and darker ones up to twice that. Only the component and what is within
    `REACH_PX` of it change, in the head; between two components, the one with the higher label has its say. Where the
    contrast is less than the ring's own spread, nothing changes: such a lesion has no edge that brightness shows. From
    there to twice the spread, changes rise to their full size. The ring is whatever lies there: cortex, fluid or scalp
    make an edge less clear.

    Distances are in pixels of the grid, which is about 1 mm.

    Parameters
    ----------
    probability : (Z, H, W) float32 in [0, 1]
    components : (Z, H, W) bool, what is taken for lesion.
    image : (Z, H, W), a sequence on which lesions are bright.
    head : (Z, H, W) bool, what is not air.
    """
    followed = probability.astype(np.float32, copy=True)
    bright = ndimage.gaussian_filter(image.astype(np.float32), (0, SMOOTHING_PX, SMOOTHING_PX))
    parts, _count = ndimage.label(components, np.ones((3, 3, 3)))
    reach = int(np.ceil(RING_PX[1]))
    for number, box in enumerate(ndimage.find_objects(parts), 1):
        rows = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in box[1:])
        near = (box[0], *rows)
        inside = parts[near] == number
        clarity, contrast = _contrast(bright[near], probability[near], inside, components[near], head[near])
        if clarity == 0:
            continue
        p = np.clip(probability[near], LOGIT_LIMIT, 1 - LOGIT_LIMIT)
        gain = 2 * HALF_CONTRAST_LOGITS * clarity * (np.clip(contrast, *CONTRAST_RANGE) - 0.5)
        moved = 1 / (1 + np.exp(-np.log(p / (1 - p)) - gain))
        reached = _distance(inside) <= REACH_PX
        reached &= inside | ~components[near]  # another component's pixels are its own
        followed[near] = np.where(reached & head[near], moved, followed[near])
    return followed


def _contrast(
    bright: np.ndarray, probability: np.ndarray, inside: np.ndarray, others: np.ndarray, head: np.ndarray
) -> tuple[float, np.ndarray]:
    """How clear a component's edge is, in [0, 1], and the brightness: 0 as its surroundings, 1 as its core."""
    core = inside & (probability >= CORE * probability[inside].max())
    away = _distance(inside)
    ring = (away > RING_PX[0]) & (away <= RING_PX[1]) & head & ~others & (probability < RING_MAX_PROBABILITY)
    if ring.sum() < MIN_RING_PIXELS:
        return 0.0, bright
    lesion, around, spread = np.median(bright[core]), np.median(bright[ring]), bright[ring].std()
    if not lesion - around > CLARITY[0] * spread:
        return 0.0, bright
    low, high = CLARITY
    clarity = min(1.0, ((lesion - around) / max(spread, 1e-6) - low) / (high - low))
    return float(clarity), (bright - around) / (lesion - around)


def _distance(inside: np.ndarray) -> np.ndarray:
    """Distance in pixels to the component in each slice; infinite in slices without it."""
    away = np.full(inside.shape, np.inf, np.float32)
    for z in np.flatnonzero(inside.any(axis=(1, 2))):
        away[z] = ndimage.distance_transform_edt(~inside[z])
    return away
