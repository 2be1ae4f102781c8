"""How good detections are: figures per patient and pooled, with intervals, beside the obvious baselines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.baselines import smoothed_intensity
from ddmd.evaluation.metrics import (
    BASELINE_RANGE,
    LEFT_OUT,
    THRESHOLDS,
    CaseMetrics,
    Counts,
    best_dice,
    case_metrics,
    confusion_metrics,
    dice_scores,
)
from ddmd.inference.detector import Detector
from ddmd.inference.ensemble import detect_slices
from ddmd.inference.session import SamplingConfig


class EvaluationError(ValueError):
    """Data that cannot be evaluated on; the message says what to do."""


@dataclass(frozen=True)
class Report:
    """Figures of an evaluation: `pooled` by name, `intervals` of means over patients, `patients` rows."""

    pooled: dict[str, float]
    intervals: dict[str, tuple[float, float, float]]
    patients: list[dict[str, Any]]
    curves: dict[str, list[float]]
    pictures: dict[str, dict[str, np.ndarray]]
    how: dict[str, Any]

    def table(self) -> Any:
        """A rich table of the figures."""
        from rich.table import Table

        table = Table("figure", "pooled", "mean over patients [95 %]", title=f"{len(self.patients)} patients")
        for name in dict.fromkeys((*self.pooled, *self.intervals)):
            pooled = f"{self.pooled[name]:.3f}" if name in self.pooled else ""
            mean = "{:.3f} [{:.3f}, {:.3f}]".format(*self.intervals[name]) if name in self.intervals else ""
            table.add_row(name.replace("_", " "), pooled, mean)
        return table


def _interval(values: Sequence[float], patients: Sequence[str], seed: int) -> tuple[float, float, float]:
    """Mean and its bootstrap 95 % interval (percentile; scipy) over patients, each the mean of its cases."""
    own: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if np.isfinite(value):
            own.setdefault(patient, []).append(value)
    if not own:
        return (float("nan"),) * 3
    known = np.array([np.mean(v) for v in own.values()])
    mean = float(known.mean())
    if len(known) == 1 or np.ptp(known) == 0:
        return mean, mean, mean
    found = bootstrap(
        (known,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return mean, float(found.low), float(found.high)


def summarise(
    patients: Sequence[CaseMetrics], how: dict[str, Any], seed: int = 0, baseline_bin: int | None = None
) -> Report:
    """Pool patients: sums of counts, never means of ratios; intervals by bootstrap over patients.

    baseline_bin is the threshold of the smoothed intensity, chosen on other patients.
    """
    from sklearn.metrics import roc_auc_score

    if not patients:
        raise EvaluationError("no patient with a mask to compare with; name data that has some")
    total = sum((p.confusion for p in patients), np.zeros(4))
    pooled = confusion_metrics(total)
    probability = sum((p.probability for p in patients[1:]), patients[0].probability)
    baseline = sum((p.baseline for p in patients[1:]), patients[0].baseline)
    uncertainty = sum((p.uncertainty for p in patients[1:]), patients[0].uncertainty)
    by_threshold = sum((p.by_threshold for p in patients), np.zeros((len(THRESHOLDS), 4)))
    pooled["dice_oracle"] = best_dice(total, by_threshold)
    pooled["baseline_dice_oracle"] = float(baseline.dice_curve().max())
    if baseline_bin is not None:
        pooled["baseline_dice"] = float(baseline.dice_curve()[baseline_bin])
        for p in patients:
            p.row["baseline_dice"] = float(p.baseline.dice_curve()[baseline_bin])
    pooled["auprc"] = probability.auprc()
    pooled["dice_bearing"] = confusion_metrics(sum((p.bearing for p in patients), np.zeros(4)))["dice"]
    pooled["uncertainty_auroc"] = uncertainty.auroc()
    labels = np.concatenate([p.slice_label for p in patients])
    scores = np.concatenate([p.slice_score for p in patients])
    pooled["slice_auroc"] = (
        float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else float("nan")
    )
    left = sum((p.left_out for p in patients), np.zeros((len(LEFT_OUT), 3)))
    without = dice_scores(left).tolist()
    pooled["dice_without_5_percent"] = without[LEFT_OUT.index(0.05)]
    bins = sum((p.calibration for p in patients), np.zeros((10, 3)))
    held = bins[bins[:, 0] > 0]
    gaps = np.abs(held[:, 1] - held[:, 2])
    pooled["calibration_error"] = float(gaps.sum() / held[:, 0].sum())
    names = ("dice", "iou", "precision", "recall", "dice_oracle", "baseline_dice_oracle", "dice_bearing",
             "hd95_mm", "lesion_recall", "false_positives", "found_ml")  # fmt: skip
    whose = [p.patient for p in patients]
    intervals = {
        name: _interval([p.row[name] for p in patients], whose, seed)
        for name in (*names, "baseline_dice")
        if name in patients[0].row
    }
    ranked = sorted((p for p in patients if np.isfinite(p.row["dice"])), key=lambda p: p.row["dice"])
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]} if ranked else {}
    curves = {
        "threshold": THRESHOLDS.tolist(),
        "dice_by_threshold": dice_scores(by_threshold).tolist(),
        "left_out": list(LEFT_OUT),
        "dice_by_left_out": without,
        "calibration_probability": (held[:, 1] / held[:, 0]).tolist(),
        "calibration_share": (held[:, 2] / held[:, 0]).tolist(),
    }
    pictures = {f"{k}: {p.row['patient']}, Dice {p.row['dice']:.2f}": p.picture for k, p in chosen.items()}
    return Report(pooled, intervals, [p.row for p in patients], curves, pictures, how)


def evaluate(
    data: str | Path,
    *,
    weights: str = "flair-image-labels",
    out: str | Path | None = None,
    split: str | Path | None = None,
    part: str = "test",
    device: str = "auto",
    threshold: float | None = None,
    samples: int | None = None,
    steps: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Detect in every case with a mask, and compare.

    Parameters
    ----------
    data : folder of slices with labels.csv, or of volumes, with masks; see `find_cases`
    weights : name of a shipped system, or a weights file
    out : folder for metrics.json, per_patient.csv and report.html, optional
    split : split.json of a training run; only patients of its `part` are evaluated, and the single
        threshold on smoothed intensity that stands beside is chosen on its validation patients
    device : "auto", "cpu", "cuda" or "cuda:N"
    threshold : float, optional
        By default the weights' own, chosen on validation patients.
    samples, steps : int, optional
        S and N; by default what the weights say.

    Raises
    ------
    EvaluationError
        If no case has a mask.
    DatasetError, WeightsError, VolumeError
        If data, weights or a volume cannot be used.
    """
    detector = Detector.load(weights, device)
    found = find_cases(data, require=detector.description.sequences)
    cases = [c for c in found if c.masks is not None]
    validation: list[Case] = []
    if split is not None:
        parts = read_split(split)
        validation = [c for c in cases if parts.get(c.patient) == "validation"]
        cases = [c for c in cases if parts.get(c.patient) == part]
    if not cases:
        raise EvaluationError(f"{data}: no case with a mask{f' in part {part}' if split else ''}")
    sampling = detector.sampling_config(samples, steps)
    patients = []
    for case in cases:
        if progress is not None:
            progress(case.name)
        patients.append(evaluate_case(detector, case, threshold, sampling))
    how = {
        "weights": detector.description.name,
        "threshold": detector.description.threshold if threshold is None else threshold,
        "sampling": vars(sampling),
        "data": Path(data).name,
        "patients": [c.name for c in cases],
    }
    report = summarise(patients, how, baseline_bin=_baseline_bin(detector, validation))
    if out is not None:
        write_report(report, out)
    return report


def _baseline_bin(detector: Detector, cases: Sequence[Case]) -> int | None:
    """The best single threshold on smoothed intensity for `cases`."""
    total = None
    for case in cases:
        volume, truth = case.volume(detector.description.sequences), case.lesion()
        inside = volume.brain | truth
        counts = Counts.of(smoothed_intensity(volume)[inside], truth[inside], *BASELINE_RANGE)
        total = counts if total is None else total + counts
    return None if total is None else total.best()


def evaluate_case(
    detector: Detector, case: Case, threshold: float | None = None, sampling: SamplingConfig | None = None
) -> CaseMetrics:
    """Detect in one case and compare with its mask."""
    prepared = detector.prepare(case.volume(detector.description.sequences))
    drawn = detect_slices(detector.system, prepared.slices, sampling or detector.sampling_config())
    maps, volume, rule = (
        detector.to_volume(prepared, drawn),
        prepared.volume,
        detector.lesion_criteria(threshold),
    )
    return case_metrics(
        case.name, case.patient, volume, maps.probability, maps.uncertainty, case.lesion(), rule
    )


def write_report(report: Report, folder: str | Path) -> None:
    """Write metrics.json, per_patient.csv and report.html, each whole or not at all."""
    from ddmd.evaluation.report import html

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "pooled": report.pooled,
        "intervals": report.intervals,
        "curves": report.curves,
        "how": report.how,
    }
    texts = {"metrics.json": json.dumps(plain(metrics), indent=1) + "\n", "report.html": html(report)}
    for name, text in texts.items():
        (folder / f".partial-{name}").write_text(text)
    with open(folder / ".partial-per_patient.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(report.patients[0]))
        writer.writeheader()
        writer.writerows(report.patients)
    for name in (*texts, "per_patient.csv"):
        os.replace(folder / f".partial-{name}", folder / name)


def plain(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
