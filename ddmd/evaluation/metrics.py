"""One patient's figures: maps compared with an annotator's mask, and what is kept of them to be pooled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import ndimage

from ddmd.evaluation.baselines import smoothed_intensity
from ddmd.inference.postprocess import LesionCriteria, find_lesions, label_components
from ddmd.io.volume import Volume

BINS = 501  # of probability, uncertainty and baseline: what is kept of a patient's voxels
BASELINE_RANGE = (-4.0, 6.0)  # of the smoothed robust z-score
UNCERTAINTY_RANGE = (-10.0, 0.0)  # decimal logarithm of the variance: ranks small ones apart, alike for all
SLICE_SCORE_MM2 = 25.0  # a slice's score is the mean probability of so much of it, the most probable
THRESHOLDS = np.linspace(0.05, 0.95, 19)  # of probability: at each the whole rule is tried
LEFT_OUT = (0.0, 0.01, 0.02, 0.05, 0.10)  # shares of the least certain voxels


@dataclass
class Counts:
    """Histograms of voxels inside the brain, by a score, of lesion and of other tissue."""

    lesion: np.ndarray
    other: np.ndarray

    @classmethod
    def of(cls, score: np.ndarray, truth: np.ndarray, low: float, high: float) -> Counts:
        bins = np.clip(((score - low) / (high - low) * (BINS - 1)).astype(np.int64), 0, BINS - 1)
        return cls(np.bincount(bins[truth], minlength=BINS), np.bincount(bins[~truth], minlength=BINS))

    def __add__(self, more: Counts) -> Counts:
        return Counts(self.lesion + more.lesion, self.other + more.other)

    def dice_curve(self) -> np.ndarray:
        """Dice with the threshold at each bin's lower edge."""
        true = np.cumsum(self.lesion[::-1])[::-1]
        false = np.cumsum(self.other[::-1])[::-1]
        return 2 * true / np.maximum(true + false + self.lesion.sum(), 1)

    def best(self) -> int:
        """The bin whose lower edge, as the threshold, has the highest Dice."""
        return int(self.dice_curve().argmax())

    def _sklearn(self, metric: Callable[..., float]) -> float:
        if not self.lesion.sum() or not self.other.sum():
            return float("nan")
        score = np.tile(np.arange(BINS), 2)
        label = np.repeat((1, 0), BINS)
        return float(metric(label, score, sample_weight=np.concatenate((self.lesion, self.other))))

    def auprc(self) -> float:
        from sklearn.metrics import average_precision_score

        return self._sklearn(average_precision_score)

    def auroc(self) -> float:
        from sklearn.metrics import roc_auc_score

        return self._sklearn(roc_auc_score)


@dataclass
class CaseMetrics:
    """One patient's figures: `row` goes to the table; the rest is pooled."""

    row: dict[str, Any]  # "patient" is the case's name
    patient: str  # whose examination it is: the unit of the bootstrap
    probability: Counts
    baseline: Counts
    uncertainty: Counts  # "lesion" are voxels where the mask is wrong
    confusion: np.ndarray  # true positive, false positive, false negative, true negative
    by_threshold: np.ndarray  # (THRESHOLDS, 4): the same by the rule with each threshold
    left_out: np.ndarray  # (LEFT_OUT, 3): true positive, false positive, false negative
    calibration: np.ndarray  # (10, 3): voxels, sum of probability, lesions
    slice_score: np.ndarray
    slice_label: np.ndarray
    bearing: np.ndarray  # confusion on lesion-bearing slices
    picture: dict[str, np.ndarray] = field(default_factory=dict)


def _confusion(found: np.ndarray, truth: np.ndarray, inside: np.ndarray) -> np.ndarray:
    found, truth = found[inside], truth[inside]
    true = int((found & truth).sum())
    false, missed = int(found.sum()) - true, int(truth.sum()) - true
    return np.array([true, false, missed, found.size - true - false - missed])


def confusion_metrics(c: np.ndarray) -> dict[str, float]:
    """Dice, IoU, precision, recall and accuracies of (true positive, false positive, false negative, rest)."""
    true, false, missed, rest = (float(v) for v in c)
    total = max(true + false + missed + rest, 1.0)
    ratio: Callable[[float, float], float] = lambda a, b: a / b if b else float("nan")  # noqa: E731
    return {
        "dice": ratio(2 * true, 2 * true + false + missed),
        "iou": ratio(true, true + false + missed),
        "precision": ratio(true, true + false),
        "recall": ratio(true, true + missed),
        "accuracy": (true + rest) / total,
        "accuracy_of_empty_mask": (rest + false) / total,
    }


def dice_scores(confusions: np.ndarray) -> np.ndarray:
    """Dice of rows that begin with true positive, false positive, false negative; 0 where all are 0."""
    true, false, missed = np.asarray(confusions, float)[..., :3].T
    return 2 * true / np.maximum(2 * true + false + missed, 1)


def best_dice(own: np.ndarray, by_threshold: np.ndarray) -> float:
    """The highest Dice that any threshold gives, the rule's own among them."""
    return float(dice_scores(np.vstack((own, by_threshold))).max())


def _by_threshold(
    probability: np.ndarray, truth: np.ndarray, inside: np.ndarray, voxel_ml: float, rule: LesionCriteria
) -> np.ndarray:
    at = np.argwhere((probability >= THRESHOLDS[0]) | truth)
    low, high = (at.min(0), at.max(0) + 1) if len(at) else (np.zeros(3, int), np.ones(3, int))
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    rules = [replace(rule, threshold=float(threshold)) for threshold in THRESHOLDS]
    found = [label_components(probability[box], voxel_ml, r) > 0 for r in rules]
    counts = np.array([_confusion(f, truth[box], inside[box]) for f in found])
    counts[:, 3] += int(inside.sum() - inside[box].sum())
    return counts


def _hd95(found: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of the distance between the surfaces, in mm (MONAI); NaN where one has none."""
    import torch
    from monai.metrics import compute_hausdorff_distance

    if not truth.any() or not found.any():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI, about its own arguments
        distance = compute_hausdorff_distance(
            torch.from_numpy(found)[None, None], torch.from_numpy(truth)[None, None], include_background=True,
            percentile=95, spacing=list(spacing),
        )  # fmt: skip
    return float(distance)


def _lesion_wise(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Lesions (components, 26 neighbours), the share of them touched, and what was found that touches none."""
    corners = np.ones((3, 3, 3))
    parts, number = ndimage.label(truth, corners)
    found_parts, found_number = ndimage.label(found, corners)
    hit, right = (len(set(np.unique(p)) - {0}) for p in (parts[found], found_parts[truth]))
    return {
        "lesions": number,
        "lesion_recall": hit / number if number else float("nan"),
        "false_positives": found_number - right,
    }


def case_metrics(
    name: str,
    patient: str,
    volume: Volume,
    probability: np.ndarray,
    uncertainty: np.ndarray,
    truth: np.ndarray,
    rule: LesionCriteria,
) -> CaseMetrics:
    """Compare one patient's maps (X, Y, Z) with the annotator's mask."""
    voxel_ml = float(np.prod(volume.spacing)) / 1000
    lesion_map = find_lesions(probability, uncertainty, volume.affine, rule)
    found, lesions = lesion_map.mask, lesion_map.lesions
    inside = volume.brain | truth
    confusion = _confusion(found, truth, inside)
    empty = not truth.any()
    baseline = smoothed_intensity(volume)
    counts = Counts.of(probability[inside], truth[inside], 0.0, 1.0)
    by_threshold = _by_threshold(probability, truth, inside, voxel_ml, rule)
    base = Counts.of(baseline[inside], truth[inside], *BASELINE_RANGE)
    row: dict[str, Any] = {"patient": name, **confusion_metrics(confusion)}
    row["lesion_ml"], row["found_ml"] = float(truth.sum()) * voxel_ml, float(found.sum()) * voxel_ml
    row["dice_oracle"] = best_dice(confusion, by_threshold) if not empty else float("nan")
    row["baseline_dice_oracle"] = float(base.dice_curve().max()) if not empty else float("nan")
    row["auprc"] = counts.auprc()
    row["hd95_mm"] = _hd95(found, truth, volume.spacing)
    row |= _lesion_wise(found, truth)
    row["score"] = max((lesion.peak_probability for lesion in lesions), default=float(probability.max()))
    bearing: np.ndarray = np.any(truth, axis=(0, 1))
    on_bearing = _confusion(found[:, :, bearing], truth[:, :, bearing], inside[:, :, bearing])
    row["dice_bearing"] = confusion_metrics(on_bearing)["dice"]
    wrong = found[inside] != truth[inside]
    order = np.argsort(-uncertainty[inside], kind="stable")
    kept = []
    for share in LEFT_OUT:
        some = order[int(share * len(order)) :]
        kept.append(_confusion(found[inside][some], truth[inside][some], np.ones(len(some), bool))[:3])
    edges = np.minimum((probability[inside] * 10).astype(int), 9)
    summed = (None, probability[inside], truth[inside].astype(float))
    calibration = np.stack([np.bincount(edges, w, minlength=10) for w in summed], 1)
    z = int(truth.sum(axis=(0, 1)).argmax()) if not empty else int(probability.sum(axis=(0, 1)).argmax())
    filled = volume.brain.any(axis=(0, 1))
    return CaseMetrics(
        row=row,
        patient=patient,
        probability=counts,
        baseline=base,
        uncertainty=Counts.of(np.log10(uncertainty[inside] + 1e-12), wrong, *UNCERTAINTY_RANGE),
        confusion=confusion,
        by_threshold=by_threshold,
        left_out=np.array(kept),
        calibration=calibration,
        slice_score=_slice_scores(probability, volume.spacing)[filled],
        slice_label=bearing[filled],
        bearing=on_bearing,
        picture={
            "image": volume.normalised("flair")[:, :, z].T if "flair" in volume.images else probability[:, :, z].T,
            "found": found[:, :, z].T, "truth": truth[:, :, z].T, "uncertainty": uncertainty[:, :, z].T,
        },
    )  # fmt: skip


def _slice_scores(probability: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Mean of the most probable SLICE_SCORE_MM2 of every slice (Z,)."""
    flat = probability.reshape(-1, probability.shape[2])
    count = min(max(1, round(SLICE_SCORE_MM2 / (spacing[0] * spacing[1]))), len(flat))
    return np.partition(flat, len(flat) - count, axis=0)[-count:].mean(axis=0)
