"""How good detections are: metrics per patient and pooled, with intervals, beside the obvious baselines."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.stats import bootstrap

from ddmd.baselines import smoothed_intensity
from ddmd.data.datasets import Case, find_cases, read_split
from ddmd.detection import Rule, components, find_lesions
from ddmd.detector import Detector
from ddmd.ensemble import detect_slices
from ddmd.sampling import SamplingConfig
from ddmd.volume import Volume

BINS = 501  # of probability, uncertainty and baseline: what is kept of a patient's voxels
BASELINE_RANGE = (-4.0, 6.0)  # of the smoothed robust z-score
UNCERTAINTY_RANGE = (
    -10.0,
    0.0,
)  # decimal logarithm of the variance: ranks small ones apart, alike for all patients
SLICE_SCORE_MM2 = 25.0  # a slice's score is the mean probability of so much of it, the most probable
THRESHOLDS = np.linspace(0.05, 0.95, 19)  # of probability: at each the whole rule is tried
LEFT_OUT = (0.0, 0.01, 0.02, 0.05, 0.10)  # shares of the least certain voxels


class EvaluationError(ValueError):
    """Data that cannot be evaluated on; the message says what to do."""


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
class Patient:
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


def _rates(c: np.ndarray) -> dict[str, float]:
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


def dices(confusions: np.ndarray) -> np.ndarray:
    """Dice of rows that begin with true positive, false positive, false negative; 0 where all are 0."""
    true, false, missed = np.asarray(confusions, float)[..., :3].T
    return 2 * true / np.maximum(2 * true + false + missed, 1)


def _by_threshold(
    probability: np.ndarray, truth: np.ndarray, inside: np.ndarray, voxel_ml: float, rule: Rule
) -> np.ndarray:
    at = np.argwhere((probability >= THRESHOLDS[0]) | truth)
    low, high = (at.min(0), at.max(0) + 1) if len(at) else (np.zeros(3, int), np.ones(3, int))
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    rules = [replace(rule, threshold=float(threshold)) for threshold in THRESHOLDS]
    found = [components(probability[box], voxel_ml, r) > 0 for r in rules]
    counts = np.array([_confusion(f, truth[box], inside[box]) for f in found])
    counts[:, 3] += int(inside.sum() - inside[box].sum())
    return counts


def judge(
    name: str,
    patient: str,
    volume: Volume,
    probability: np.ndarray,
    uncertainty: np.ndarray,
    truth: np.ndarray,
    rule: Rule,
) -> Patient:
    """Compare one patient's maps (X, Y, Z) with the annotator's mask."""
    import torch
    from monai.metrics import compute_hausdorff_distance

    voxel_ml = float(np.prod(volume.spacing)) / 1000
    found, lesions = find_lesions(probability, uncertainty, volume.affine, rule)
    inside = volume.brain | truth
    confusion = _confusion(found, truth, inside)
    empty = not truth.any()
    baseline = smoothed_intensity(volume)
    counts = Counts.of(probability[inside], truth[inside], 0.0, 1.0)
    by_threshold = _by_threshold(probability, truth, inside, voxel_ml, rule)
    base = Counts.of(baseline[inside], truth[inside], *BASELINE_RANGE)
    row: dict[str, Any] = {"patient": name, **_rates(confusion)}
    row["lesion_ml"], row["found_ml"] = float(truth.sum()) * voxel_ml, float(found.sum()) * voxel_ml
    row["dice_oracle"] = _oracle(confusion, by_threshold) if not empty else float("nan")
    row["baseline_dice_oracle"] = float(base.dice_curve().max()) if not empty else float("nan")
    row["auprc"] = counts.auprc()
    if not empty and found.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of MONAI, about its own arguments
            distance = compute_hausdorff_distance(
                torch.from_numpy(found)[None, None], torch.from_numpy(truth)[None, None], include_background=True,
                percentile=95, spacing=list(volume.spacing),
            )  # fmt: skip
        row["hd95_mm"] = float(distance)
    else:
        row["hd95_mm"] = float("nan")
    parts, number = ndimage.label(truth, np.ones((3, 3, 3)))
    hit = len(set(np.unique(parts[found])) - {0})
    row["lesions"], row["lesion_recall"] = number, hit / number if number else float("nan")
    found_parts, found_number = ndimage.label(found, np.ones((3, 3, 3)))
    row["false_positives"] = found_number - len(set(np.unique(found_parts[truth])) - {0})
    row["score"] = max((lesion.peak_probability for lesion in lesions), default=float(probability.max()))
    bearing: np.ndarray = np.any(truth, axis=(0, 1))
    row["dice_bearing"] = _rates(
        _confusion(found[:, :, bearing], truth[:, :, bearing], inside[:, :, bearing])
    )["dice"]
    wrong = found[inside] != truth[inside]
    order = np.argsort(-uncertainty[inside], kind="stable")
    kept = []
    for share in LEFT_OUT:
        some = order[int(share * len(order)) :]
        kept.append(_confusion(found[inside][some], truth[inside][some], np.ones(len(some), bool))[:3])
    edges = np.minimum((probability[inside] * 10).astype(int), 9)
    calibration = np.stack(
        [
            np.bincount(edges, w, minlength=10)
            for w in (None, probability[inside], truth[inside].astype(float))
        ],
        1,
    )
    z = int(truth.sum(axis=(0, 1)).argmax()) if not empty else int(probability.sum(axis=(0, 1)).argmax())
    filled = volume.brain.any(axis=(0, 1))
    return Patient(
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
        bearing=_confusion(found[:, :, bearing], truth[:, :, bearing], inside[:, :, bearing]),
        picture={
            "image": volume.normalised("flair")[:, :, z].T if "flair" in volume.images else probability[:, :, z].T,
            "found": found[:, :, z].T, "truth": truth[:, :, z].T, "uncertainty": uncertainty[:, :, z].T,
        },
    )  # fmt: skip


def _oracle(own: np.ndarray, by_threshold: np.ndarray) -> float:
    """The highest Dice that any threshold gives, the rule's own among them."""
    return float(dices(np.vstack((own, by_threshold))).max())


def _slice_scores(probability: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Mean of the most probable SLICE_SCORE_MM2 of every slice (Z,)."""
    flat = probability.reshape(-1, probability.shape[2])
    count = min(max(1, round(SLICE_SCORE_MM2 / (spacing[0] * spacing[1]))), len(flat))
    return np.partition(flat, len(flat) - count, axis=0)[-count:].mean(axis=0)


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
    patients: Sequence[Patient], how: dict[str, Any], seed: int = 0, baseline_bin: int | None = None
) -> Report:
    """Pool patients: sums of counts, never means of ratios; intervals by bootstrap over patients.

    baseline_bin is the threshold of the smoothed intensity, chosen on other patients.
    """
    from sklearn.metrics import roc_auc_score

    if not patients:
        raise EvaluationError("no patient with a mask to compare with; name data that has some")
    total = sum((p.confusion for p in patients), np.zeros(4))
    pooled = _rates(total)
    probability = sum((p.probability for p in patients[1:]), patients[0].probability)
    baseline = sum((p.baseline for p in patients[1:]), patients[0].baseline)
    uncertainty = sum((p.uncertainty for p in patients[1:]), patients[0].uncertainty)
    by_threshold = sum((p.by_threshold for p in patients), np.zeros((len(THRESHOLDS), 4)))
    pooled["dice_oracle"] = _oracle(total, by_threshold)
    pooled["baseline_dice_oracle"] = float(baseline.dice_curve().max())
    if baseline_bin is not None:
        pooled["baseline_dice"] = float(baseline.dice_curve()[baseline_bin])
        for p in patients:
            p.row["baseline_dice"] = float(p.baseline.dice_curve()[baseline_bin])
    pooled["auprc"] = probability.auprc()
    pooled["dice_bearing"] = _rates(sum((p.bearing for p in patients), np.zeros(4)))["dice"]
    pooled["uncertainty_auroc"] = uncertainty.auroc()
    labels = np.concatenate([p.slice_label for p in patients])
    scores = np.concatenate([p.slice_score for p in patients])
    pooled["slice_auroc"] = (
        float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else float("nan")
    )
    left = sum((p.left_out for p in patients), np.zeros((len(LEFT_OUT), 3)))
    without = dices(left).tolist()
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
        "dice_by_threshold": dices(by_threshold).tolist(),
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
    weights: str = "ddmd-light",
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
    cases = [c for c in find_cases(data) if c.masks is not None]
    validation: list[Case] = []
    if split is not None:
        parts = read_split(split)
        validation = [c for c in cases if parts.get(c.patient) == "validation"]
        cases = [c for c in cases if parts.get(c.patient) == part]
    if not cases:
        raise EvaluationError(f"{data}: no case with a mask{f' in part {part}' if split else ''}")
    sampling = detector.configured(samples, steps)
    patients = []
    for case in cases:
        if progress is not None:
            progress(case.name)
        patients.append(judge_case(detector, case, threshold, sampling))
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


def judge_case(
    detector: Detector, case: Case, threshold: float | None = None, sampling: SamplingConfig | None = None
) -> Patient:
    """Detect in one case and compare with its mask."""
    prepared = detector.prepare(case.volume(detector.description.sequences))
    drawn = detect_slices(detector.system, prepared.slices, sampling or detector.configured())
    maps, volume, rule = detector.restored(prepared, drawn), prepared.volume, detector.rule(threshold)
    return judge(case.name, case.patient, volume, maps.probability, maps.uncertainty, case.lesion(), rule)


def write_report(report: Report, folder: str | Path) -> None:
    """Write metrics.json, per_patient.csv and report.html, each whole or not at all."""
    from ddmd.report import html

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
