"""From a probability map to lesions: connected components, lesion criteria, table, labelled map and score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ddmd.inference.lesion_contrast import BrightImage, bright_enough, lesion_contrasts
from ddmd.io.background import bounding_box
from ddmd.io.geometry import voxel_sides, voxel_volume_ml

EVIDENCE_LIMIT = 1e-3  # evidence is kept this far from 0 and 1, so that its odds are finite
SCORE_ML = 0.5  # the evidence of a volume is the mean probability of this much of its most probable tissue
UNCERTAIN = (0.25, 0.75)  # probabilities that are neither clearly lesion nor clearly none
NEIGHBOURS_26 = np.ones((3, 3, 3))
# along each axis: so far from what reaches the threshold the outline of a large lesion may lie
OUTLINE_MM = 5.0
ROUNDING = 1e-6  # relative: a component of exactly the least volume is a lesion, however its voxels' volume is rounded


@dataclass(frozen=True)
class Lesion:
    """One connected component (26 neighbours) of the mask.

    Parameters
    ----------
    volume_ml : float
    centre_mm : (x, y, z)
        Mean position of the voxels, in world coordinates (RAS+).
    peak_probability, mean_probability : float in [0, 1]
    mean_uncertainty : float
        Mean over the voxels of the variance over the samples.
    existence : float in [0, 1], optional
        Share of the draws that hit it: how probable it is that the lesion exists. Where draws were kept.
    volume_interval_ml : (low, high), optional
        90 % interval of its volume over the draws. Where draws were kept.
    """

    volume_ml: float
    centre_mm: tuple[float, float, float]
    peak_probability: float
    mean_probability: float
    mean_uncertainty: float
    existence: float | None = None
    volume_interval_ml: tuple[float, float] | None = None


@dataclass(frozen=True)
class LesionCriteria:
    """Which components of a probability map are lesions.

    Parameters
    ----------
    threshold : float in (0, 1)
        Probability from which a voxel may be lesion.
    min_ml : float
        Smaller components are not lesions.
    min_peak : float in [0, 1]
        A component that is nowhere as probable as this is not a lesion.
    min_relative_contrast : float in [0, 1]
        A component with less than so much of the contrast of the main one is not a lesion. Contrast is how much
        brighter a component is on FLAIR than its surroundings; the main one has the largest product of contrast and
        root of summed probability, see `ddmd.inference.lesion_contrast`. Without a FLAIR image it says nothing.
    large_ml : float
        Volume in ml from which a lesion is large. Lesions that voxels of at least `outline` join count together.
    outline_share : float in (0, 1]
        A large lesion reaches on to where the probability falls below so much of the threshold, by at most
        `OUTLINE_MM` along each axis. What the other criteria left out is part of it there. With 1 it ends where
        others do.
    """

    threshold: float
    min_ml: float = 0.0
    min_peak: float = 0.0
    min_relative_contrast: float = 0.0
    large_ml: float = 0.0
    outline_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold is {self.threshold}; allowed are values between 0 and 1")
        if not 0.0 < self.outline_share <= 1.0:
            raise ValueError(f"outline_share is {self.outline_share}; allowed is above 0 and at most 1")
        if not 0.0 <= self.min_relative_contrast <= 1.0:
            raise ValueError(f"min_relative_contrast is {self.min_relative_contrast}; allowed is 0 to 1")

    @property
    def outline(self) -> float:
        """The least probability of any voxel of a lesion."""
        return self.threshold * self.outline_share


@dataclass(frozen=True)
class LesionMap:
    """The lesions of one volume.

    Parameters
    ----------
    labels : (X, Y, Z) int32
        n in the voxels of the n-th lesion, counted from 1; 0 elsewhere.
    lesions : tuple of Lesion
        Largest first; the n-th has label n.
    """

    labels: NDArray[np.int32]
    lesions: tuple[Lesion, ...]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(X, Y, Z) bool, true in every lesion."""
        return self.labels > 0


def label_components(
    probability: NDArray[np.floating],
    affine: NDArray[np.floating],
    criteria: LesionCriteria,
    image: BrightImage | None = None,
) -> NDArray[np.int32]:
    """Connected components (26 neighbours) that meet the criteria.

    Parameters
    ----------
    probability : (X, Y, Z) float32 in [0, 1]
    affine : (4, 4), voxels to mm
    criteria : LesionCriteria
    image : BrightImage, optional
        Of which contrast is taken; without it that criterion is left out.

    Returns
    -------
    (X, Y, Z) int32
        Components numbered from 1, largest first (of equal sizes, the first in memory order first); 0 elsewhere.

    Examples
    --------
    >>> probability = np.zeros((4, 4, 4), np.float32)
    >>> probability[0, 0, 0], probability[2:, 2, 2] = 0.7, 0.9
    >>> affine = np.diag([5.0, 5.0, 4.0, 1.0])
    >>> label_components(probability, affine, LesionCriteria(0.5)).max()
    np.int32(2)
    >>> label_components(probability, affine, LesionCriteria(0.5, min_ml=0.15)).max()
    np.int32(1)
    """
    labels = np.zeros_like(probability, dtype=np.int32)
    boxed = _components(probability, affine, criteria, image)
    if boxed is not None:
        box, inside = boxed
        labels[box] = inside
    return labels


def _components(
    probability: NDArray[np.floating],
    affine: NDArray[np.floating],
    criteria: LesionCriteria,
    image: BrightImage | None,
) -> tuple[tuple[slice, ...], NDArray[np.int32]] | None:
    """The box that holds all candidates, and `label_components` in it; None where there are no candidates."""
    # scipy visits every voxel it is given: only the box that holds the candidates is
    box = bounding_box(probability >= criteria.outline)
    if box is None:
        return None
    inside = probability[box]
    candidates = inside >= criteria.threshold
    components, count = ndimage.label(candidates, NEIGHBOURS_26)
    if not count:
        return None
    component = components[candidates]
    sizes = np.bincount(component, minlength=count + 1)[1:]
    peaks = ndimage.maximum(inside[candidates], component, np.arange(1, count + 1))
    voxel_ml = voxel_volume_ml(affine)
    least = criteria.min_ml * (1 - ROUNDING)
    accepted = np.flatnonzero((sizes * voxel_ml >= least) & (peaks >= criteria.min_peak))
    if image is not None and criteria.min_relative_contrast and len(accepted) > 1:
        masses = ndimage.sum_labels(inside[candidates], component, accepted + 1)
        contrasts = _contrasts(box, components, accepted + 1, image)
        accepted = accepted[bright_enough(contrasts, masses, criteria.min_relative_contrast)]
    if criteria.outline_share < 1 and sizes[accepted].sum() * voxel_ml >= criteria.large_ml * (1 - ROUNDING):
        components = _with_outlines(np.isin(components, accepted + 1), inside, affine, criteria)
        sizes = np.bincount(components.ravel())[1:]
        accepted = np.flatnonzero(sizes)
    accepted = accepted[np.argsort(-sizes[accepted], kind="stable")]
    new_number = np.zeros(len(sizes) + 1, np.int32)
    new_number[accepted + 1] = np.arange(1, len(accepted) + 1)
    return box, new_number[components]


def _with_outlines(
    kept: NDArray[np.bool_],
    probability: NDArray[np.floating],
    affine: NDArray[np.floating],
    criteria: LesionCriteria,
) -> NDArray[np.int32]:
    """Components of what was accepted, large ones out to their outline."""
    large = large_lesions(kept, probability, affine, criteria)
    components, count = ndimage.label(kept | (large & outline_reach(kept & large, affine)), NEIGHBOURS_26)
    holds_accepted = np.bincount(components[kept], minlength=count + 1) > 0
    joined: NDArray[np.int32] = np.where(holds_accepted[components], components, 0)
    return joined


def large_lesions(
    accepted: NDArray[np.bool_],
    probability: NDArray[np.floating],
    affine: NDArray[np.floating],
    criteria: LesionCriteria,
) -> NDArray[np.bool_]:
    """Components of voxels with at least the outline's probability in which what was accepted is large.

    Parameters
    ----------
    accepted : (X, Y, Z) bool, voxels that reach the threshold, of components that meet the criteria
    probability : (X, Y, Z) float32 in [0, 1]
    affine : (4, 4), voxels to mm
    criteria : LesionCriteria

    Returns
    -------
    (X, Y, Z) bool
    """
    regions, count = ndimage.label(probability >= criteria.outline, NEIGHBOURS_26)
    volumes = np.bincount(regions[accepted], minlength=count + 1) * voxel_volume_ml(affine)
    large: NDArray[np.bool_] = (volumes > 0) & (volumes >= criteria.large_ml * (1 - ROUNDING))
    inside: NDArray[np.bool_] = large[regions]
    return inside


def outline_reach(accepted: NDArray[np.bool_], affine: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Where the outline of a large lesion may lie: up to `OUTLINE_MM` along each axis from what was accepted.

    Parameters
    ----------
    accepted : (X, Y, Z) bool
    affine : (4, 4), voxels to mm

    Returns
    -------
    (X, Y, Z) bool
    """
    reach = [int(OUTLINE_MM / side * (1 + ROUNDING)) for side in voxel_sides(affine)]
    near: NDArray[np.bool_] = ndimage.maximum_filter(accepted, tuple(2 * r + 1 for r in reach))
    return near


def _contrasts(
    box: tuple[slice, ...],
    components: NDArray[np.integer],
    numbers: NDArray[np.integer],
    image: BrightImage,
) -> NDArray[np.float64]:
    """`lesion_contrasts` of the components in a box, whose surroundings may lie outside it."""
    margin = tuple(min(side.start, reach) for side, reach in zip(box, image.radius, strict=True))
    near = image.part(
        tuple(
            slice(side.start - before, side.stop + reach)
            for side, before, reach in zip(box, margin, image.radius, strict=True)
        )
    )
    labels = np.zeros(near.tissue.shape, np.int32)
    labels[tuple(slice(m, m + n) for m, n in zip(margin, components.shape, strict=True))] = components
    return lesion_contrasts(labels, numbers, near.values, near.tissue & (labels == 0), image.radius)


def find_lesions(
    probability: NDArray[np.floating],
    uncertainty: NDArray[np.floating],
    affine: NDArray[np.floating],
    criteria: LesionCriteria,
    image: BrightImage | None = None,
) -> LesionMap:
    """The lesions of a probability map: a labelled map, and a table whose rows are its labels.

    Parameters
    ----------
    probability, uncertainty : (X, Y, Z) float32
    affine : (4, 4), voxels to mm
    criteria : LesionCriteria
    image : BrightImage, optional
        As `label_components` takes it.

    Returns
    -------
    LesionMap
    """
    labels, lesions = np.zeros_like(probability, dtype=np.int32), []
    boxed = _components(probability, affine, criteria, image)
    boxes = []
    if boxed is not None:
        outer, part = boxed
        labels[outer] = part
        boxes = [_within(box, outer) for box in ndimage.find_objects(part)]
    for number, box in enumerate(boxes, 1):
        inside = labels[box] == number
        voxel = np.argwhere(inside).mean(0) + [axis.start for axis in box]
        x, y, z = (float(v) for v in affine[:3, :3] @ voxel + affine[:3, 3])
        p, u = probability[box][inside], uncertainty[box][inside]
        lesions.append(
            Lesion(
                volume_ml=int(inside.sum()) * voxel_volume_ml(affine),
                centre_mm=(x, y, z),
                peak_probability=float(p.max()),
                mean_probability=float(p.mean(dtype=np.float64)),
                mean_uncertainty=float(u.mean(dtype=np.float64)),
            )
        )
    return LesionMap(labels, tuple(lesions))


def _within(box: tuple[slice, ...], outer: tuple[slice, ...]) -> tuple[slice, ...]:
    """A box counted from the corner of another one, counted from where that one is."""
    return tuple(slice(b.start + o.start, b.stop + o.start) for b, o in zip(box, outer, strict=True))


def lesion_evidence(probability: NDArray[np.floating], voxel_ml: float) -> float:
    """Mean probability of the SCORE_ML most probable tissue, in [0, 1]; NaN where the map holds one.

    Tissue counts with probability 0 where the map is smaller than SCORE_ML.
    """
    count = max(1, round(SCORE_ML / voxel_ml))
    some = probability[~(probability <= 0)]  # far fewer than all; NaN stays
    if some.size > count:
        some = np.partition(some, some.size - count)[-count:]
    return float(some.sum(dtype=np.float64)) / count


@dataclass(frozen=True)
class ScoreCalibration:
    """Parameters of the score: a logistic curve of the logarithmic odds of the evidence."""

    slope: float
    centre: float


SCORE_CALIBRATION = ScoreCalibration(slope=0.82, centre=4.06)
"""Fitted by `python -m benchmarks.calibrate_score` to both shipped systems.

The data are the 9 validation patients of the TCGA-LGG slices. Each gives two volumes: all slices, which hold a
glioma, and the slices without lesion that are two or more from it. So half of the volumes hold a lesion; where
lesions are rarer, the score is too high. No healthy volunteers and no other kind of lesion were used.
"""


def lesion_score(
    probability: NDArray[np.floating],
    voxel_ml: float,
    has_lesions: bool,
    calibration: ScoreCalibration = SCORE_CALIBRATION,
) -> float:
    """How probable it is that a volume holds a lesion at all.

    Half of the score says whether any component met the lesion criteria, the other half how strong the evidence
    is: score = (has_lesions + sigmoid(slope (logit(evidence) - centre))) / 2. It rises with the evidence, and
    every volume with lesions scores higher than any volume without.

    Parameters
    ----------
    probability : (X, Y, Z) float32 in [0, 1]
    voxel_ml : volume of a voxel in ml
    has_lesions : whether `find_lesions` found any
    calibration : ScoreCalibration

    Returns
    -------
    float
        Above 0.5 with lesions, below 0.5 without; NaN where the map holds one.

    Examples
    --------
    >>> sure = np.full((10, 10, 10), 0.999, np.float32)
    >>> round(lesion_score(sure, 0.001, True), 2), round(lesion_score(0 * sure, 0.001, False), 2)
    (0.96, 0.0)
    """
    evidence = float(np.clip(lesion_evidence(probability, voxel_ml), EVIDENCE_LIMIT, 1 - EVIDENCE_LIMIT))
    exponent = calibration.slope * (np.log(evidence / (1 - evidence)) - calibration.centre)
    return float(has_lesions + 1 / (1 + np.exp(-exponent))) / 2
