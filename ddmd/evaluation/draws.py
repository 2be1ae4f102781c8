"""Figures of draws: do sampled masks vary as annotators do, and do their intervals hold the truth?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ddmd.evaluation.metrics import Floats, Histogram, Mask, calibration_bins
from ddmd.inference.draws import INTERVAL_SCALE, calibrated_interval, lesion_existence

Draws = Floats | NDArray[np.uint8]
THRESHOLD_LEVELS = 1000  # of a probability, over which random thresholds are averaged
LOG_SCORE_RANGE = (-8.0, 0.0)  # decimal logarithm of an uncertainty
CHUNK_VOXELS = 1 << 20  # voxels of a matrix product at once: counts in it stay exact in float32


@dataclass(frozen=True)
class EnergyDistance:
    """How far the distribution of draws is from that of raters, and what it is made of.

    Parameters
    ----------
    distance : generalized energy distance, 2 E d(draw, rater) - E d(draw, draw') - E d(rater, rater')
    rater_distance : E d(draw, rater)
    diversity : E d(draw, draw')
    rater_diversity : E d(rater, rater')
    best_match_dice : mean over raters of the highest Dice of any draw
    """

    distance: float
    rater_distance: float
    diversity: float
    rater_diversity: float
    best_match_dice: float


@dataclass(frozen=True)
class DrawMetrics:
    """What draws say of one case.

    Parameters
    ----------
    row : name -> figure, for the table of cases
    existence : (CALIBRATION_BINS, 3), of the probability that a lesion exists; see `calibration_bins`
    covered : whether the annotator's volume lies in the interval of the draws' volumes
    """

    row: dict[str, float]
    existence: NDArray[np.float64]
    covered: bool

    def beside(self, row: dict[str, float]) -> DrawMetrics:
        """The same with further figures in the row."""
        return replace(self, row=self.row | row)


def intersections(a: Mask, b: Mask) -> NDArray[np.float64]:
    """Voxels (len(a), len(b)) that each mask of a (n, ...) shares with each of b (m, ...)."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    total = np.zeros((len(a), len(b)))
    for first in range(0, a.shape[1], CHUNK_VOXELS):
        part = slice(first, first + CHUNK_VOXELS)
        total += a[:, part].astype(np.float32) @ b[:, part].astype(np.float32).T
    return total


def iou_distances(a: Mask, b: Mask) -> NDArray[np.float64]:
    """1 - IoU (len(a), len(b)) of each mask of a (n, ...) with each of b (m, ...); 0 where both are empty."""
    shared = intersections(a, b)
    sizes = [m.reshape(len(m), -1).sum(1, dtype=np.int64) for m in (a, b)]
    union = sizes[0][:, None] + sizes[1][None] - shared
    distances: NDArray[np.float64] = np.where(union > 0, 1 - shared / np.maximum(union, 1), 0.0)
    return distances


def energy_distance(draws: Mask, raters: Mask) -> EnergyDistance:
    """Generalized energy distance of whole volumes, with d = 1 - IoU (Kohl et al., 2018, arXiv 1806.05034).

    Expectations are means over all pairs, a mask with itself among them.

    Parameters
    ----------
    draws : (S, X, Y, Z) bool
    raters : (R, X, Y, Z) bool

    Examples
    --------
    >>> masks = np.array([[True, False], [True, True]])
    >>> energy_distance(masks, masks).distance
    0.0
    """
    across = iou_distances(draws, raters)
    # Dice rises with IoU, so the best Dice is that of the least distance
    best = float(_dice(across.min(axis=0)).mean())
    return _with_terms(across, float(iou_distances(draws, draws).mean()), raters, best)


def _with_terms(
    across: NDArray[np.float64], diversity: float, raters: Mask, best_match_dice: float
) -> EnergyDistance:
    """The distance from its terms; across is (draws, raters), of each draw to each rater."""
    rater_distance, rater_diversity = float(across.mean()), float(iou_distances(raters, raters).mean())
    distance = 2 * rater_distance - diversity - rater_diversity
    return EnergyDistance(distance, rater_distance, diversity, rater_diversity, best_match_dice)


def _dice(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Dice of masks whose 1 - IoU is known."""
    return 2 * (1 - distance) / (2 - distance)


def threshold_energy_distance(probability: Floats, raters: Mask, count: int) -> EnergyDistance:
    """What masks of a probability at `count` uniformly random thresholds reach on average.

    The expectation over the thresholds, so that the baseline does not depend on luck: the distance of a few random
    thresholds scatters by 0.05. Masks of one map are nested, so |a and b| = min(|a|, |b|), and counting the voxels
    above each level gives all distances.

    Parameters
    ----------
    probability : (X, Y, Z) float32 in [0, 1]
    raters : (R, X, Y, Z) bool
    count : masks in a set, S

    Returns
    -------
    EnergyDistance
        Expectations over sets of S masks; the highest Dice is that of the best of the S.
    """
    bins = np.clip((probability * THRESHOLD_LEVELS).astype(np.int64), 0, THRESHOLD_LEVELS - 1).ravel()

    def above(own: NDArray[np.int64]) -> NDArray[np.float64]:
        """How many of the voxels a mask at the middle of each bin marks; it marks half of that bin."""
        voxels = np.bincount(own, minlength=THRESHOLD_LEVELS).astype(np.float64)
        return np.cumsum(voxels[::-1])[::-1] - voxels / 2

    sizes = above(bins)
    rater_sizes = raters.reshape(len(raters), -1).sum(1, dtype=np.int64).astype(np.float64)
    shared = np.stack([above(bins[rater.ravel()]) for rater in raters], 1)
    union = sizes[:, None] + rater_sizes - shared
    across = np.where(union > 0, 1 - shared / np.maximum(union, 1), 0.0)
    largest = np.maximum(sizes[:, None], sizes)
    among = np.where(largest > 0, 1 - np.minimum(sizes[:, None], sizes) / np.maximum(largest, 1), 0.0)
    diversity = (1 - 1 / count) * float(among.mean())  # a mask with itself among the pairs
    return _with_terms(across, diversity, raters, _expected_best(_dice(across), count))


def family_energy_distance(masks: Mask, raters: Mask, count: int) -> EnergyDistance:
    """What `count` masks taken at random from a large family reach on average.

    As `threshold_energy_distance`, for masks that need not be nested.

    Parameters
    ----------
    masks : (n, X, Y, Z) bool, the family
    raters : (R, X, Y, Z) bool
    count : masks in a set, S

    Returns
    -------
    EnergyDistance
        Expectations over sets of S masks; the highest Dice is that of the best of the S.
    """
    n = len(masks)
    across = iou_distances(masks, raters)
    among = float(iou_distances(masks, masks).sum()) / (n * (n - 1))  # of two different masks
    diversity = (1 - 1 / count) * among  # a mask with itself among the pairs
    return _with_terms(across, diversity, raters, _expected_best(_dice(across), count))


def _expected_best(dice: NDArray[np.float64], count: int) -> float:
    """Mean over raters of the expected highest of `count` values taken at random from each column of (n, R)."""
    # P(best of S is at most the i-th of n) = (i / n)^S
    share = (np.arange(len(dice) + 1) / len(dice)) ** count
    return float((np.sort(dice, axis=0).T @ np.diff(share)).mean())


def _unit(draws: Draws) -> int:
    """What stands for probability 1."""
    return 255 if draws.dtype == np.uint8 else 1


def between_share(draws: Draws) -> float:
    """Share of the spread of a voxel's label that lies between draws; the rest lies inside each draw.

    By the law of total variance, with p_s the probability of draw s and p their mean:
    p (1 - p) = var_s(p_s) + mean_s(p_s (1 - p_s)), summed over voxels.

    Parameters
    ----------
    draws : (S, X, Y, Z) float32 in [0, 1], or uint8, 255 for 1
    """
    between = inside = 0.0
    for z in range(draws.shape[-1]):
        plane = draws[..., z].astype(np.float64) / _unit(draws)
        between += float(plane.var(axis=0).sum())
        inside += float((plane * (1 - plane)).mean(axis=0).sum())
    total = between + inside
    return between / total if total else float("nan")


def error_aurocs(draws: Draws, probability: Floats, mask: Mask, truth: Mask) -> dict[str, float]:
    """How well three maps rank the errors of one mask: draws that contradict it, their variance, and p (1 - p).

    All three are of the same mask, that of the posterior mean, so that they differ in the ranking alone. Draws contradict
    the mask with probability 1 - q inside and q outside, where q is half their mean and half p: a few draws alone
    cannot rank the many voxels that none of them marks.

    Parameters
    ----------
    draws : (S, n) float32 in [0, 1], or uint8, 255 for 1
    probability : (n,) float32, the posterior mean p
    mask : (n,) bool, the mask made of it
    truth : (n,) bool

    Returns
    -------
    name -> AUROC, for the table of cases
    """
    wrong = mask != truth
    blended = 0.5 * (_mean(draws) + probability)
    scores = {
        "draws_contradiction_auroc": np.where(mask, 1 - blended, blended),
        "draws_variance_auroc": draws.var(axis=0, dtype=np.float32) / _unit(draws) ** 2,
        "posterior_mean_bernoulli_auroc": probability * (1 - probability),
    }
    return {
        name: Histogram.count(np.log10(score + 1e-12), wrong, *LOG_SCORE_RANGE).auroc()
        for name, score in scores.items()
    }


def _mean(draws: Draws) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = draws.mean(axis=0, dtype=np.float32) / np.float32(_unit(draws))
    return mean


def draw_metrics(
    draws: Draws,
    labels: NDArray[np.integer],
    truth: Mask,
    voxel_ml: float,
    raters: Mask | None = None,
    one_step: Draws | None = None,
    probability: Floats | None = None,
    thresholded: Mask | None = None,
    threshold: float = 0.5,
    scale: float = INTERVAL_SCALE,
) -> DrawMetrics:
    """Everything that draws say of one case, beside two baselines.

    The baselines are draws of one step, and the probability at as many random thresholds
    (`threshold_energy_distance`), also with components left out as draws leave them out.

    Parameters
    ----------
    draws : (S, X, Y, Z) float32 in [0, 1], or uint8, 255 for 1
    labels : (X, Y, Z) int, the detected lesions, numbered from 1
    truth : (X, Y, Z) bool, the annotator's mask
    voxel_ml : volume of a voxel in ml
    raters : (R, X, Y, Z) bool, masks of two annotators or more; energy distances need them
    one_step : draws of one denoising step, as `draws`
    probability : (X, Y, Z) float32, the posterior mean; by default the mean of the draws
    thresholded : (n, X, Y, Z) bool, masks of the probability at n thresholds, without what draws leave out
    threshold : from which a voxel of a draw is lesion
    scale : of the volume interval, see `calibrated_interval`
    """
    masks = draws >= threshold * _unit(draws)
    volumes = np.array([mask.sum() * voxel_ml for mask in masks])
    low, high = calibrated_interval(volumes, scale)
    true_ml = float(truth.sum()) * voxel_ml
    count = int(labels.max(initial=0))
    exists = np.zeros(count, bool)
    exists[np.unique(labels[truth & (labels > 0)]) - 1] = True
    row = {
        "draws_between_share": between_share(draws),
        "volume_low_ml": low,
        "volume_high_ml": high,
        "volume_interval_ml": high - low,
    }
    if raters is not None and len(raters) > 1:
        mean = _mean(draws) if probability is None else probability
        distances = {
            "draws": energy_distance(masks, raters),
            "random_thresholds": threshold_energy_distance(mean, raters, len(draws)),
        }
        if thresholded is not None:
            distances["random_thresholds_without_faint"] = family_energy_distance(
                thresholded, raters, len(draws)
            )
        if one_step is not None:
            distances["one_step_draws"] = energy_distance(one_step >= threshold * _unit(one_step), raters)
        for name, result in distances.items():
            row |= {f"{name}_{key}": value for key, value in asdict(result).items()}
    existence = calibration_bins(lesion_existence(labels, masks), exists)
    return DrawMetrics(row, existence, low <= true_ml <= high)
