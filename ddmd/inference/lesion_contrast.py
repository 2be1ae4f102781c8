"""How much brighter a component is than its surroundings, and which are too faint beside the main one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ddmd.io.volume import Volume

BRIGHT_SEQUENCE = "flair"  # on which lesions are brighter than what surrounds them
RING_MM = 4.0  # along rows and columns of a slice: about so far from a component its surroundings reach
ROUNDING = 1e-5  # relative: a component of exactly the least contrast stays, however the image is scaled


@dataclass(frozen=True)
class BrightImage:
    """A sequence on which lesions are bright, and where tissue is.

    Parameters
    ----------
    values : (X, Y, Z) float32
        In any unit, the same everywhere: contrasts are only compared with one another.
    tissue : (X, Y, Z) bool
    radius : voxels along each axis, as `lesion_contrasts` takes them
    """

    values: NDArray[np.floating]
    tissue: NDArray[np.bool_]
    radius: tuple[int, int, int]

    @classmethod
    def of(cls, volume: Volume) -> BrightImage | None:
        """The FLAIR image of a volume, without its bias field; None where it has none."""
        if BRIGHT_SEQUENCE not in volume.images:
            return None
        x, y, _z = (max(1, round(RING_MM / side)) for side in volume.spacing)
        return cls(volume.bias_corrected(BRIGHT_SEQUENCE), volume.search_region, (x, y, 0))

    def part(self, index: Any) -> BrightImage:
        """A part of it, by any index that leaves three axes."""
        return self.map(lambda values: values[index])

    def map(self, cut: Callable[[NDArray[Any]], NDArray[Any]]) -> BrightImage:
        """What a function that takes a part of an array makes of it."""
        return BrightImage(cut(self.values), cut(self.tissue), self.radius)


def lesion_contrasts(
    labels: NDArray[np.integer],
    numbers: Sequence[int] | NDArray[np.integer],
    image: NDArray[np.floating],
    around: NDArray[np.bool_],
    radius: tuple[int, int, int],
) -> NDArray[np.float64]:
    """Median of the image in each component, minus the median of its surroundings.

    Parameters
    ----------
    labels : (X, Y, Z) int, components numbered from 1
    numbers : (n,), the components that are looked at
    image : (X, Y, Z), finite
    around : (X, Y, Z) bool
        What may count as surroundings: tissue that is in no component.
    radius : voxels along each axis; a box of so many on each side of a voxel holds its surroundings

    Returns
    -------
    (n,) float64, in the image's unit
        NaN where a component has no surroundings.

    Examples
    --------
    >>> labels = np.zeros((5, 5, 1), int)
    >>> labels[2, 2] = 1
    >>> lesion_contrasts(labels, [1], 3.0 * labels + 10, labels == 0, (1, 1, 0))
    array([3.])
    """
    boxes = ndimage.find_objects(labels)
    contrasts = np.full(len(numbers), np.nan)
    for row, number in enumerate(numbers):
        near = tuple(
            slice(max(0, side.start - reach), side.stop + reach)
            for side, reach in zip(boxes[number - 1], radius, strict=True)
        )
        inside = labels[near] == number
        ring = ndimage.maximum_filter(inside, tuple(2 * reach + 1 for reach in radius)) & around[near]
        if ring.any():
            contrasts[row] = _median(image[near][inside]) - _median(image[near][ring])
    return contrasts


def bright_enough(
    contrasts: NDArray[np.floating], masses: NDArray[np.floating], least: float
) -> NDArray[np.bool_]:
    """Which components have at least `least` times the contrast of the main one, the one seen most clearly.

    That is the one with the largest contrast times root of summed probability: how clearly a disc is seen in noise is
    its contrast times the root of its area (Rose 1948, doi:10.1364/JOSA.38.000196). A large component that is hardly
    brighter than its surroundings, often a false one, is thus not what the others are compared with.

    All stay where none is brighter than its surroundings, and so do those whose contrast is not known.

    Parameters
    ----------
    contrasts : (n,), as `lesion_contrasts` gives them
    masses : (n,), summed probability
    least : share of the main component's contrast, 0 to 1

    Returns
    -------
    (n,) bool

    Examples
    --------
    >>> bright_enough(np.array([0.4, 2.0, 1.0, np.nan]), np.array([1.0, 9.0, 2.0, 1.0]), 0.5)
    array([False,  True,  True,  True])
    """
    bright = np.flatnonzero(contrasts > 0)
    if not len(bright):
        return np.ones(len(contrasts), bool)
    main = contrasts[bright[np.argmax(contrasts[bright] * np.sqrt(masses[bright]))]]
    kept: NDArray[np.bool_] = ~(contrasts < least * main * (1 - ROUNDING))
    return kept


def _median(values: NDArray[np.floating]) -> float:
    return float(np.median(values.astype(np.float64)))
