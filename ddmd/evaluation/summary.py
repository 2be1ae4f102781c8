"""Cases pooled: sums of counts, means over patients with bootstrap intervals, and curves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from ddmd.evaluation.case_metrics import REJECTED_SHARES, THRESHOLDS, CaseMetrics
from ddmd.evaluation.metrics import (
    auroc,
    best_dice,
    calibration_error,
    confusion_metrics,
    dice_scores,
)

FIGURES = {
    "dice": "Dice",
    "dice_lesion_slices": "Dice, slices with lesion only",
    "dice_oracle": "Dice, oracle threshold",
    "baseline_dice": "one threshold on smoothed intensity, chosen on validation patients",
    "baseline_dice_oracle": "one threshold on smoothed intensity, oracle",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "pixel accuracy",
    "accuracy_of_empty_mask": "pixel accuracy of an empty mask",
    "auprc": "AUPRC",
    "hd95_mm": "HD95 (mm)",
    "lesion_recall": "lesion-wise recall",
    "false_positives": "false positives a volume",
    "false_positive_ml": "false-positive volume (ml)",
    "detected_ml": "detected volume (ml)",
    "slice_auroc": "slice-level AUROC",
    "score_auroc": "volume-level AUROC of the score",
    "score_brier": "Brier score of the score",
    "uncertainty_auroc": "uncertainty against error, AUROC",
    "bernoulli_auroc": "p(1 - p) against error, AUROC",
    "decision_auroc": "decision uncertainty against error, AUROC",
    "draws_contradiction_auroc": "share of draws that contradict the mask against its error, AUROC",
    "draws_variance_auroc": "variance of the draws against the same error, AUROC",
    "posterior_mean_bernoulli_auroc": "p(1 - p) of the posterior mean against the same error, AUROC",
    "dice_without_5_percent": "Dice without the 5 % least certain voxels",
    "calibration_error": "calibration error",
    "volume_interval_coverage": "coverage of the 90 % volume interval",
    "volume_interval_ml": "width of the 90 % volume interval (ml)",
    "existence_calibration_error": "calibration error of the probability that a lesion exists",
    "draws_between_share": "share of the spread that lies between draws",
    "draws_distance": "generalized energy distance of the draws to raters",
    "draws_rater_distance": "mean distance of a draw to a rater",
    "draws_diversity": "diversity of the draws",
    "draws_rater_diversity": "diversity of the raters",
    "draws_best_match_dice": "Dice of the best draw, mean over raters",
    "random_thresholds_distance": "generalized energy distance, p at random thresholds (expected)",
    "random_thresholds_rater_distance": "mean distance of p at a random threshold to a rater",
    "random_thresholds_diversity": "diversity of p at random thresholds",
    "random_thresholds_best_match_dice": "Dice of the best random threshold, mean over raters",
    "random_thresholds_without_faint_distance": "generalized energy distance, the same without faint components",
    "random_thresholds_without_faint_rater_distance": "mean distance of such a mask to a rater",
    "random_thresholds_without_faint_diversity": "diversity of such masks",
    "random_thresholds_without_faint_best_match_dice": "Dice of the best such mask, mean over raters",
    "one_step_draws_distance": "generalized energy distance, one-step draws",
    "one_step_draws_rater_distance": "mean distance of a one-step draw to a rater",
    "one_step_draws_diversity": "diversity of one-step draws",
    "one_step_draws_best_match_dice": "Dice of the best one-step draw, mean over raters",
}  # name of a figure -> what it is called in reports
FIGURE_COLUMNS = ("figure", "pooled", "mean over patients [95 %]")
POOLED_ONLY = {"accuracy", "accuracy_of_empty_mask", "auprc"}  # not averaged over patients
RESAMPLES = 2000


@dataclass(frozen=True)
class Failure:
    """A case that could not be evaluated."""

    case: str
    file: str
    error: str
    message: str


@dataclass(frozen=True)
class Report:
    """Figures of an evaluation.

    Parameters
    ----------
    pooled : figure -> value over the voxels, slices or volumes of all cases
    intervals : figure -> (mean over patients, low, high), 95 % by bootstrap over patients
    patients : one row a case
    curves : name -> values
    pictures : caption -> name -> (Y, X), of the worst, the median and the best case
    provenance : weights, threshold, sampling, data
    failures : the cases that could not be evaluated
    """

    pooled: dict[str, float]
    intervals: dict[str, tuple[float, float, float]]
    patients: list[dict[str, Any]]
    curves: dict[str, list[float]]
    pictures: dict[str, dict[str, NDArray[Any]]]
    provenance: Mapping[str, Any]
    failures: tuple[Failure, ...] = ()

    def table(self) -> Any:
        """The figures as a rich table."""
        from rich.table import Table

        table = Table(*FIGURE_COLUMNS, title=f"{len(self.patients)} cases")
        for row in self.figure_rows():
            table.add_row(*row)
        return table

    def figure_rows(self) -> list[tuple[str, str, str]]:
        """Of each figure, what it is called, its pooled value, and its mean over patients with the interval."""
        rows = []
        for name in self.names():
            pooled = f"{self.pooled[name]:.3f}" if name in self.pooled else ""
            mean = "{:.3f} [{:.3f}, {:.3f}]".format(*self.intervals[name]) if name in self.intervals else ""
            rows.append((FIGURES.get(name, name), pooled, mean))
        return rows

    def names(self) -> list[str]:
        """The figures that this report has, in the order of FIGURES."""
        known = {*self.pooled, *self.intervals}
        return [name for name in FIGURES if name in known] + sorted(known - set(FIGURES))


def bootstrap_interval(
    values: Sequence[float], patients: Sequence[str], seed: int = 0
) -> tuple[float, float, float]:
    """Mean over patients, each the mean of its cases, and its 95 % interval (percentile bootstrap; scipy).

    NaN is left out; three NaN where nothing else is there.
    """
    by_patient: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if np.isfinite(value):
            by_patient.setdefault(patient, []).append(value)
    if not by_patient:
        return (float("nan"),) * 3
    means = np.array([np.mean(own) for own in by_patient.values()])
    mean = float(means.mean())
    if len(means) == 1 or np.ptp(means) == 0:
        return mean, mean, mean
    interval = bootstrap(
        (means,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)


def summarise(
    cases: Sequence[CaseMetrics],
    provenance: Mapping[str, Any],
    seed: int = 0,
    baseline_bin: int | None = None,
    failures: Sequence[Failure] = (),
) -> Report:
    """Pool cases: sums of counts, never means of ratios; intervals by bootstrap over patients.

    Parameters
    ----------
    cases : CaseMetrics; none gives a report without figures
    provenance : weights, threshold, sampling, data
    seed : of the bootstrap
    baseline_bin : the threshold of the smoothed intensity, chosen on other patients
    failures : the cases that could not be evaluated
    """
    if not cases:
        return Report({}, {}, [], {}, {}, provenance, tuple(failures))
    rows = [dict(case.row) for case in cases]
    baseline = reduce(add, (case.baseline for case in cases))
    own_baseline = {}
    if baseline_bin is not None:
        own_baseline["baseline_dice"] = float(baseline.dice_curve()[baseline_bin])
        for row, case in zip(rows, cases, strict=True):
            row["baseline_dice"] = float(case.baseline.dice_curve()[baseline_bin])
    pooled = _pooled(cases, rows) | own_baseline
    pooled["baseline_dice_oracle"] = float(baseline.dice_curve().max())
    patients = [case.patient for case in cases]
    names = [name for name in FIGURES if any(name in row for row in rows) and name not in POOLED_ONLY]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of scipy, about few patients
        intervals = {
            name: bootstrap_interval([row.get(name, float("nan")) for row in rows], patients, seed)
            for name in names
        }
    return Report(pooled, intervals, rows, _curves(cases), _pictures(cases), provenance, tuple(failures))


def _pooled(cases: Sequence[CaseMetrics], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total = np.sum([case.confusion for case in cases], axis=0)
    scores = np.array([row["score"] for row in rows])
    has_lesion = np.array([row["lesion_ml"] > 0 for row in rows])
    pooled = confusion_metrics(total)
    pooled["dice_oracle"] = best_dice(total, np.sum([case.by_threshold for case in cases], axis=0))
    pooled["auprc"] = reduce(add, (case.probability for case in cases)).average_precision()
    lesion_slices = np.sum([case.lesion_slices for case in cases], axis=0)
    pooled["dice_lesion_slices"] = confusion_metrics(lesion_slices)["dice"]
    pooled["uncertainty_auroc"] = reduce(add, (case.uncertainty for case in cases)).auroc()
    pooled["bernoulli_auroc"] = reduce(add, (case.bernoulli for case in cases)).auroc()
    pooled["decision_auroc"] = reduce(add, (case.decision for case in cases)).auroc()
    slices = [np.concatenate([getattr(c, key) for c in cases]) for key in ("slice_label", "slice_score")]
    pooled["slice_auroc"] = auroc(slices[0], slices[1])
    pooled["score_auroc"] = auroc(has_lesion, scores)
    pooled["score_brier"] = float(np.mean((scores - has_lesion) ** 2))
    rejection = dice_scores(np.sum([case.rejection for case in cases], axis=0))
    pooled["dice_without_5_percent"] = float(rejection[REJECTED_SHARES.index(0.05)])
    pooled["calibration_error"] = calibration_error(np.sum([case.calibration for case in cases], axis=0))
    draws = [case.draws for case in cases if case.draws is not None]
    if draws:
        pooled["volume_interval_coverage"] = float(np.mean([one.covered for one in draws]))
        pooled["existence_calibration_error"] = calibration_error(
            np.sum([d.existence for d in draws], axis=0)
        )
    return pooled


def _curves(cases: Sequence[CaseMetrics]) -> dict[str, list[float]]:
    bins = np.sum([case.calibration for case in cases], axis=0)
    bins = bins[bins[:, 0] > 0]
    return {
        "threshold": THRESHOLDS.tolist(),
        "dice_by_threshold": dice_scores(np.sum([c.by_threshold for c in cases], axis=0)).tolist(),
        "rejected_share": list(REJECTED_SHARES),
        "dice_by_rejected_share": dice_scores(np.sum([c.rejection for c in cases], axis=0)).tolist(),
        "calibration_probability": (bins[:, 1] / bins[:, 0]).tolist(),
        "calibration_share": (bins[:, 2] / bins[:, 0]).tolist(),
    }


def _pictures(cases: Sequence[CaseMetrics]) -> dict[str, dict[str, NDArray[Any]]]:
    ranked = sorted((c for c in cases if np.isfinite(c.row["dice"])), key=lambda c: c.row["dice"])
    if not ranked:
        return {}
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    return {f"{k}: {c.row['patient']}, Dice {c.row['dice']:.2f}": c.picture for k, c in chosen.items()}
