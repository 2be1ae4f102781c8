"""Draws of a volume: masks that differ from one another, and what only they tell: intervals and existence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ddmd.inference.lesion_contrast import BrightImage
from ddmd.inference.postprocess import NEIGHBOURS_26, LesionCriteria, label_components
from ddmd.io.background import bounding_box
from ddmd.io.geometry import voxel_sides, voxel_volume_ml

DRAW_THRESHOLD = 0.5  # from which a voxel of a draw is lesion
DRAW_LEVEL = 128  # the same of a draw as uint8, 255 for 1
INTERVAL = 0.9
VOLUME_FLOOR_ML = 0.05  # added to volumes before their logarithm is taken, so that 0 has one


def leave_out_faint(
    draws: NDArray[np.uint8], image: BrightImage, min_relative_contrast: float
) -> NDArray[np.uint8]:
    """Draws without the components that are too faint beside the main one of the same draw; see `LesionCriteria`.

    In a draw every voxel of a component counts alike: its volume takes the place of its summed probability.

    Parameters
    ----------
    draws : (S, X, Y, Z) uint8, 255 for probability 1; changed in place
        0 in components that are left out.
    image : BrightImage, on the same grid
    min_relative_contrast : float in [0, 1]

    Returns
    -------
    draws
    """
    criteria = LesionCriteria(DRAW_THRESHOLD, min_relative_contrast=min_relative_contrast)
    box = bounding_box(draws.max(axis=0) >= DRAW_LEVEL)
    if box is None:
        return draws
    near = tuple(
        slice(max(0, side.start - reach), side.stop + reach)
        for side, reach in zip(box, image.radius, strict=True)
    )
    for draw in draws[:, *near]:
        marked = draw >= DRAW_LEVEL
        kept = label_components(marked.astype(np.float32), np.eye(4), criteria, image.part(near)) > 0
        draw[marked & ~kept] = 0
    return draws


@dataclass(frozen=True)
class DrawSummary:
    """What the draws of one volume tell.

    Parameters
    ----------
    volumes_ml : (S,), lesion volume of each draw
    volume_interval_ml : (low, high), 90 % interval of the total lesion volume
    lesion_intervals_ml : n pairs (low, high), 90 % interval of the volume of each lesion
    existence : n floats in [0, 1], share of the draws that hit each lesion
    """

    volumes_ml: NDArray[np.float64]
    volume_interval_ml: tuple[float, float]
    lesion_intervals_ml: tuple[tuple[float, float], ...]
    existence: tuple[float, ...]


def volume_interval(volumes_ml: NDArray[np.floating], level: float = INTERVAL) -> tuple[float, float]:
    """Central interval of the draws' volumes: quantiles by linear interpolation.

    Examples
    --------
    >>> low, high = volume_interval(np.arange(21.0))
    >>> round(low, 3), round(high, 3)
    (1.0, 19.0)
    """
    low, high = np.quantile(volumes_ml, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


INTERVAL_SCALE = 1.31
"""Of volume intervals, fitted by `python -m benchmarks.calibrate_intervals`; fit it again to new weights.

The data are the 9 validation patients of the TCGA-LGG slices, gliomas all, and the weights `flair-image-labels`. The
90 % quantile of so few is the largest of the scales that hold each patient's volume. Unscaled intervals held 7 of 9,
and intervals with the scale of the other patients 8 of 9.
"""


def _log_ends(volumes_ml: NDArray[np.floating], level: float) -> tuple[float, float, float]:
    low, high = np.log(np.asarray(volume_interval(volumes_ml, level)) + VOLUME_FLOOR_ML)
    return float(low), float(np.log(np.median(volumes_ml) + VOLUME_FLOOR_ML)), float(high)


def calibrated_interval(
    volumes_ml: NDArray[np.floating], scale: float = INTERVAL_SCALE, level: float = INTERVAL
) -> tuple[float, float]:
    """The central interval of the draws' volumes, scaled so that it holds the annotator's volume.

    Both distances from the median are multiplied by the scale, on a logarithmic scale.

    Parameters
    ----------
    volumes_ml : (S,), volume in each draw
    scale : 1 gives `volume_interval`
    level : share of the draws between the ends before they are scaled

    Returns
    -------
    (low, high) in ml, at least 0

    Examples
    --------
    >>> low, high = calibrated_interval(np.geomspace(1.0, 100.0, 101), scale=0.5, level=1.0)
    >>> round(low, 1), round(high, 1)
    (3.2, 31.7)
    """
    if scale == 1.0:
        return volume_interval(volumes_ml, level)
    low, median, high = _log_ends(volumes_ml, level)
    ends = [float(np.exp(median + scale * (end - median))) - VOLUME_FLOOR_ML for end in (low, high)]
    return max(0.0, ends[0]), max(0.0, ends[1])


def scale_to_cover(volumes_ml: NDArray[np.floating], true_ml: float, level: float = INTERVAL) -> float:
    """The smallest scale with which `calibrated_interval` holds a volume; infinite where none does.

    Parameters
    ----------
    volumes_ml : (S,), volume in each draw
    true_ml : volume that an annotator marked
    level : as `calibrated_interval` takes it
    """
    low, median, high = _log_ends(volumes_ml, level)
    distance = float(np.log(true_ml + VOLUME_FLOOR_ML)) - median
    if distance == 0.0:
        return 0.0
    reach = high - median if distance > 0 else low - median
    return distance / reach if reach else float("inf")


def lesion_existence(labels: NDArray[np.integer], draws: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of the draws that mark any voxel of each lesion: (n,), the probability that it exists.

    Parameters
    ----------
    labels : (X, Y, Z) int, n lesions numbered from 1
    draws : (S, X, Y, Z) bool
    """
    count = int(labels.max(initial=0))
    marked = np.zeros(count + 1)
    voxels = labels > 0
    numbers = labels[voxels]
    for draw in draws:
        marked += np.bincount(numbers[draw[voxels]], minlength=count + 1) > 0
    share: NDArray[np.float64] = marked[1:] / len(draws)
    return share


def lesion_volumes(
    labels: NDArray[np.integer],
    draws: NDArray[np.bool_],
    affine: NDArray[np.floating],
) -> NDArray[np.float64]:
    """Volume (S, n) of each lesion in each draw: the components of the draw (26 neighbours) that touch it.

    A component that touches several lesions is shared out: each voxel goes to the nearest lesion.

    Parameters
    ----------
    labels : (X, Y, Z) int, n lesions numbered from 1
    draws : (S, X, Y, Z) bool
    affine : (4, 4), voxels to mm
    """
    count = int(labels.max(initial=0))
    volumes = np.zeros((len(draws), count))
    if not count:
        return volumes
    box = _box(draws.any(axis=0) | (labels > 0))
    labels = labels[box]
    nearest = labels
    if count > 1:
        places = ndimage.distance_transform_edt(
            labels == 0, sampling=voxel_sides(affine), return_distances=False, return_indices=True
        )
        nearest = labels[tuple(places)]
    for row, draw in zip(volumes, draws, strict=True):
        components, number = ndimage.label(draw[box], NEIGHBOURS_26)
        touching = np.zeros(number + 1, bool)
        touching[np.unique(components[labels > 0])] = True
        touching[0] = False
        own = nearest if count > 1 else np.ones_like(labels)
        row[:] = np.bincount(own[touching[components]], minlength=count + 1)[1:] * voxel_volume_ml(affine)
    return volumes


def summarise_draws(
    draws: NDArray[np.uint8],
    labels: NDArray[np.integer],
    affine: NDArray[np.floating],
    scale: float = INTERVAL_SCALE,
) -> DrawSummary:
    """Intervals and existence from draws on the grid of the detected lesions.

    Parameters
    ----------
    draws : (S, X, Y, Z) uint8, 255 for probability 1
    labels : (X, Y, Z) int, the detected lesions, numbered from 1
    affine : (4, 4), voxels to mm
    scale : of the intervals, see `calibrated_interval`
    """
    masks = draws >= DRAW_LEVEL
    volumes = np.count_nonzero(masks.reshape(len(masks), -1), axis=1) * voxel_volume_ml(affine)
    of_lesions = lesion_volumes(labels, masks, affine)
    return DrawSummary(
        volumes_ml=volumes,
        volume_interval_ml=calibrated_interval(volumes, scale),
        lesion_intervals_ml=tuple(calibrated_interval(one, scale) for one in of_lesions.T),
        existence=tuple(float(share) for share in lesion_existence(labels, masks)),
    )


def _box(voxels: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds all voxels that are true."""
    edges = []
    for axis in range(voxels.ndim):
        inside = np.flatnonzero(voxels.any(axis=tuple({0, 1, 2} - {axis})))
        edges.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(edges)
