"""Figures that compare arrays: overlap, surface distance, lesions found, ranking and calibration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

BINS = 501  # of the histograms that stand for a case's voxels
CALIBRATION_BINS = 10

Mask = NDArray[np.bool_]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Histogram:
    """How many voxels have each value, apart for positive and negative ones; of several cases, they add up.

    Parameters
    ----------
    positive, negative : (BINS,) int64
    """

    positive: NDArray[np.int64]
    negative: NDArray[np.int64]

    @classmethod
    def count(cls, values: Floats, positive: Mask, low: float, high: float) -> Histogram:
        """Count values (n,) in BINS bins from `low` to `high`; those beyond go to the outermost bins."""
        bins = np.clip(((values - low) / (high - low) * (BINS - 1)).astype(np.int64), 0, BINS - 1)
        return cls(np.bincount(bins[positive], minlength=BINS), np.bincount(bins[~positive], minlength=BINS))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.positive + other.positive, self.negative + other.negative)

    def dice_curve(self) -> NDArray[np.float64]:
        """Dice (BINS,) with the threshold at each bin's lower edge."""
        true_positive = np.cumsum(self.positive[::-1])[::-1]
        false_positive = np.cumsum(self.negative[::-1])[::-1]
        total = true_positive + false_positive + self.positive.sum()
        curve: NDArray[np.float64] = 2 * true_positive / np.maximum(total, 1)
        return curve

    def best_bin(self) -> int:
        """The bin whose lower edge, as the threshold, has the highest Dice."""
        return int(self.dice_curve().argmax())

    def average_precision(self) -> float:
        """Area under the precision-recall curve (scikit-learn); NaN where one class is empty."""
        from sklearn.metrics import average_precision_score

        return self._apply(average_precision_score)

    def auroc(self) -> float:
        """Area under the ROC curve (scikit-learn); NaN where one class is empty."""
        from sklearn.metrics import roc_auc_score

        return self._apply(roc_auc_score)

    def _apply(self, metric: Callable[..., float]) -> float:
        if not self.positive.sum() or not self.negative.sum():
            return float("nan")
        values = np.tile(np.arange(BINS), 2)
        labels = np.repeat((1, 0), BINS)
        return float(metric(labels, values, sample_weight=np.concatenate((self.positive, self.negative))))


def confusion(mask: Mask, truth: Mask, inside: Mask) -> NDArray[np.int64]:
    """(4,) voxels inside: true positive, false positive, false negative, true negative."""
    mask, truth = mask[inside], truth[inside]
    true_positive = int((mask & truth).sum())
    false_positive = int(mask.sum()) - true_positive
    false_negative = int(truth.sum()) - true_positive
    rest = mask.size - true_positive - false_positive - false_negative
    return np.array([true_positive, false_positive, false_negative, rest])


def confusion_metrics(counts: ArrayLike) -> dict[str, float]:
    """Dice, IoU, precision, recall and accuracy of counts as `confusion` gives them; NaN for 0 / 0."""
    true_positive, false_positive, false_negative, rest = (float(v) for v in np.asarray(counts))
    total = max(true_positive + false_positive + false_negative + rest, 1.0)

    def ratio(a: float, b: float) -> float:
        return a / b if b else float("nan")

    return {
        "dice": ratio(2 * true_positive, 2 * true_positive + false_positive + false_negative),
        "iou": ratio(true_positive, true_positive + false_positive + false_negative),
        "precision": ratio(true_positive, true_positive + false_positive),
        "recall": ratio(true_positive, true_positive + false_negative),
        "accuracy": (true_positive + rest) / total,
        "accuracy_of_empty_mask": (rest + false_positive) / total,
    }


def dice_scores(counts: ArrayLike) -> NDArray[np.float64]:
    """Dice of rows (..., 3 or more) of true positive, false positive, false negative; 0 where all are 0."""
    true_positive, false_positive, false_negative = np.asarray(counts, np.float64)[..., :3].T
    dice: NDArray[np.float64] = (
        2 * true_positive / np.maximum(2 * true_positive + false_positive + false_negative, 1)
    )
    return dice


def best_dice(own: ArrayLike, by_threshold: ArrayLike) -> float:
    """The highest Dice that any threshold gives, the system's own among them."""
    return float(dice_scores(np.vstack((np.asarray(own), np.asarray(by_threshold)))).max())


def hausdorff_95(mask: Mask, truth: Mask, spacing_mm: Sequence[float]) -> float:
    """95th percentile of the distance between the surfaces, in mm (MONAI); NaN where one has none."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    if not truth.any() or not mask.any():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI, about its own arguments
        distance = compute_hausdorff_distance(
            torch.from_numpy(mask)[None, None], torch.from_numpy(truth)[None, None], include_background=True,
            percentile=95, spacing=list(spacing_mm),
        )  # fmt: skip
    return float(distance)


def lesion_wise(mask: Mask, truth: Mask) -> dict[str, float]:
    """Figures that count lesions: connected components with 26 neighbours.

    Returns
    -------
    {"lesions": lesions of the annotator, "lesion_recall": share of them that the mask touches,
    "false_positives": components of the mask that touch none}
    """
    corners = np.ones((3, 3, 3))
    true_labels, true_count = ndimage.label(truth, corners)
    mask_labels, mask_count = ndimage.label(mask, corners)
    touched = np.unique(true_labels[mask & truth]).size
    right = np.unique(mask_labels[mask & truth]).size
    return {
        "lesions": true_count,
        "lesion_recall": touched / true_count if true_count else float("nan"),
        "false_positives": mask_count - right,
    }


def rejection_curve(
    mask: Mask, truth: Mask, uncertainty: Floats, shares: Sequence[float]
) -> NDArray[np.int64]:
    """What is left where the least certain voxels are left out.

    Parameters
    ----------
    mask, truth, uncertainty : (n,) voxels inside the brain
    shares : of voxels left out, in [0, 1]

    Returns
    -------
    (len(shares), 3) int64
        True positive, false positive, false negative.
    """
    order = np.argsort(-uncertainty, kind="stable")
    rows = []
    for share in shares:
        kept = order[int(share * len(order)) :]
        rows.append(confusion(mask[kept], truth[kept], np.ones(len(kept), bool))[:3])
    return np.array(rows)


def calibration_bins(probability: Floats, event: Mask) -> NDArray[np.float64]:
    """(CALIBRATION_BINS, 3): how many, sum of the probabilities, events, in equal bins of probability."""
    bins = np.clip((probability * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    weights = (None, probability, event.astype(np.float64))
    return np.stack([np.bincount(bins, w, minlength=CALIBRATION_BINS).astype(np.float64) for w in weights], 1)


def calibration_error(bins: NDArray[np.float64]) -> float:
    """Expected calibration error: mean of |share of events - mean probability| over what is in the bins."""
    if not bins[:, 0].sum():
        return float("nan")
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def slice_scores(probability: Floats, spacing_mm: Sequence[float], area_mm2: float) -> Floats:
    """Mean probability (Z,) of the most probable `area_mm2` of each slice of (X, Y, Z)."""
    flat = probability.reshape(-1, probability.shape[2])
    count = min(max(1, round(area_mm2 / (spacing_mm[0] * spacing_mm[1]))), len(flat))
    scores: Floats = np.partition(flat, len(flat) - count, axis=0)[-count:].mean(axis=0)
    return scores


def auroc(labels: Mask, scores: ArrayLike) -> float:
    """Area under the ROC curve (scikit-learn); NaN where one class is empty."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else float("nan")
