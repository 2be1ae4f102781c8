"""Detect in every case that has a mask, and compare; a case that fails is a row of a list."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import FRACTIONS, read_split
from ddmd.evaluation.baselines import smoothed_intensity
from ddmd.evaluation.case_metrics import BASELINE_RANGE, CaseMetrics, case_metrics
from ddmd.evaluation.draws import DrawMetrics, draw_metrics, error_aurocs
from ddmd.evaluation.metrics import Histogram, Mask
from ddmd.evaluation.report import EvaluationError, check_report_folder, write_report
from ddmd.evaluation.summary import Failure, Report, summarise
from ddmd.inference.detector import Detector
from ddmd.inference.ensemble import Maps
from ddmd.inference.lesion_contrast import BrightImage
from ddmd.inference.postprocess import LesionCriteria, label_components
from ddmd.inference.session import SamplingConfig
from ddmd.inference.volume_maps import Prepared, VolumeMaps
from ddmd.io.text import printable, without_folders
from ddmd.io.volume import Volume
from ddmd.validation import choice, flag

__all__ = ["EvaluationError", "Report", "evaluate", "evaluate_case"]

EVEN_THRESHOLDS = (np.arange(50) + 0.5) / 50  # of which masks stand for those of random thresholds


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
    layout: str = "auto",
    overwrite: bool = False,
    quality: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Detect in every case with a mask, and compare.

    A case that cannot be evaluated, whatever the reason, is a row in the report's `failures`; the others go on.
    Cases known to hold no lesion count as cases with an empty mask.

    Parameters
    ----------
    data : folder of slices with labels.csv, or of volumes, with masks; see `find_cases`
    weights : name of a shipped system, or a weights file
    out : folder for metrics.json, per_patient.csv, report.html and, where a case failed, failures.csv; optional
    split : split.json of a training run; only patients of its `part` are evaluated, and the single
        threshold on smoothed intensity that stands beside is chosen on its validation patients
    device : "auto", "cpu", "cuda" or "cuda:N"
    threshold : float, optional
        By default the weights' own, chosen on validation patients.
    samples, steps : int, optional
        S and N; by default what the weights say.
    layout : of the data; see `find_cases`
    overwrite : whether `out` may hold an earlier evaluation
    quality : as `Detector.detect` takes it; "draws" measures the drawn masks, too
        Intervals, existence and, of cases with masks of several raters, energy distances, beside draws of one step.
    progress : called with the name of each case, optional

    Returns
    -------
    Report

    Raises
    ------
    EvaluationError
        If no case has a mask, the extra ddmd[evaluate] is missing, `out` cannot be used, or a part is asked for
        without a split.
    DatasetError, WeightsError
        If the data set as a whole or the weights cannot be used.
    """
    for module in ("monai", "sklearn"):
        if importlib.util.find_spec(module) is None:
            raise EvaluationError(f"evaluation needs {module}; run pip install 'ddmd[evaluate]'")
    overwrite = flag("overwrite", overwrite)
    choice("part", part, tuple(FRACTIONS))
    if split is None and part != "test":
        raise EvaluationError(
            f"part is {part!r}, and no split says who is in it; give split=, of a training run"
        )
    if out is not None:
        check_report_folder(out, overwrite)
    detector = Detector.load(weights, device)
    detector.lesion_criteria(threshold)  # refused before the work
    needs = detector.description.required_sequences, detector.description.optional_sequences
    cohort = find_cases(data, layout, require=needs[0], optional=needs[1])
    cases = [c for c in cohort if c.masks is not None or c.has_lesion is False]
    notes = [without_folders(note) for note in cohort.notes]
    unmarked = [c.name for c in cohort if c.masks is None and c.has_lesion is not False]
    if unmarked:
        notes.append(f"left aside: cases without a mask: {len(unmarked)} ({_some(unmarked)})")
    validation: list[Case] = []
    if split is not None:
        parts = read_split(split)
        notes += _notes_on_split(cases, parts, part)
        validation = [c for c in cases if parts.get(c.patient) == "validation"]
        cases = [c for c in cases if parts.get(c.patient) == part]
    if not cases:
        raise EvaluationError(f"{data}: no case with a mask{f' in part {part}' if split else ''}")
    sampling = detector.sampling_config(samples, steps, quality=quality)
    evaluated, failures = [], []
    for case in cases:
        if progress is not None:
            progress(case.name)
        try:
            evaluated.append(evaluate_case(detector, case, threshold, sampling, quality == "draws"))
        except Exception as error:  # whatever it is, it is this case's; the others go on
            file = (case.masks or next(iter(case.files.values())))[0]
            failures.append(Failure(case.name, str(file), type(error).__name__, str(error)))
    provenance = {
        "weights": detector.description.name,
        "threshold": detector.description.threshold if threshold is None else threshold,
        "sampling": vars(sampling),
        "data": Path(data).resolve().name,
        "patients": [c.name for c in cases],
        "notes": notes,
    }
    baseline_bin = _baseline_bin(detector, validation)
    report = summarise(evaluated, provenance, baseline_bin=baseline_bin, failures=failures)
    if out is not None:
        write_report(report, out)
    return report


def _notes_on_split(cases: Sequence[Case], parts: Mapping[str, str], part: str) -> list[str]:
    """Whom a split and the data do not have in common."""
    there = {case.patient for case in cases}
    unknown = sorted(there - parts.keys())
    lacking = sorted(patient for patient, own in parts.items() if own == part and patient not in there)
    notes = []
    if unknown:
        notes.append(
            f"left aside: patients who are in no part of the split: {len(unknown)} ({_some(unknown)})"
        )
    if lacking:
        notes.append(
            f"patients of the split's {part} part who have no mask here: {len(lacking)} ({_some(lacking)})"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")


def evaluate_case(
    detector: Detector,
    case: Case,
    threshold: float | None = None,
    sampling: SamplingConfig | None = None,
    draws: bool = False,
) -> CaseMetrics:
    """Detect in one case and compare with its mask; a case known to hold no lesion has an empty one."""
    prepared = detector.prepare(case_volume(detector, case))
    truth = case_truth(case, prepared.volume)
    config = sampling or detector.sampling_config()
    criteria = detector.lesion_criteria(threshold)
    sampled = detector.maps(prepared, config, keep_draws=draws)
    maps = detector.to_volume(prepared, sampled)
    measures = (
        _draw_metrics(detector, case, prepared, config, sampled, maps, truth, criteria) if draws else None
    )
    return case_metrics(
        case.name,
        case.patient,
        prepared.volume,
        maps.probability,
        maps.uncertainty,
        truth,
        criteria,
        measures,
    )


def case_volume(detector: Detector, case: Case) -> Volume:
    """What the weights take of a case."""
    return case.volume(detector.description.required_sequences, detector.description.optional_sequences)


def _draw_metrics(
    detector: Detector,
    case: Case,
    prepared: Prepared,
    config: SamplingConfig,
    sampled: Maps,
    maps: VolumeMaps,
    truth: Mask,
    criteria: LesionCriteria,
) -> DrawMetrics:
    """Figures of the draws of one case beside draws of one step; energy distances where several raters marked it."""
    volume = prepared.volume
    image = BrightImage.of(volume)
    labels = label_components(maps.probability, volume.affine, criteria, image)
    raters = case.rater_lesions()
    fast = detector.sampling_config(samples=config.samples, seed=config.seed, quality="fast")
    one_step = detector.maps(prepared, fast, keep_draws=len(raters) > 1)
    mean = detector.to_volume(prepared, one_step).probability
    inside = volume.search_region | truth
    draws = _whole(detector, prepared, sampled)
    one_step_mask = label_components(mean, volume.affine, criteria, image) > 0
    aurocs = error_aurocs(draws[:, inside], mean[inside], one_step_mask[inside], truth[inside])
    compared = len(raters) > 1
    least, thresholded = criteria.min_relative_contrast, None
    if compared and least and image is not None:
        levels = [LesionCriteria(float(level), min_relative_contrast=least) for level in EVEN_THRESHOLDS]
        thresholded = np.stack([label_components(mean, volume.affine, level, image) > 0 for level in levels])
    return draw_metrics(
        draws,
        labels,
        truth,
        volume.voxel_volume_ml,
        np.stack(raters) if compared else None,
        _whole(detector, prepared, one_step) if compared else None,
        mean,
        thresholded,
    ).beside(aurocs)


def _whole(detector: Detector, prepared: Prepared, sampled: Maps) -> NDArray[np.uint8]:
    """The draws (S, X, Y, Z) on the whole canonical grid."""
    part = detector.draws(prepared, sampled)
    assert part is not None
    return np.stack([prepared.slices.place(draw).astype(np.uint8) for draw in part])


def case_truth(case: Case, volume: Volume) -> Mask:
    """The mask of a case on the grid of its image.

    Raises
    ------
    EvaluationError
        If the mask has another shape; where it lies is compared by `Case.lesion`.
    """
    if case.masks is None and case.has_lesion is False:
        return np.zeros(volume.brain.shape, bool)
    truth = case.lesion()
    if truth.shape != volume.brain.shape:
        name = case.masks[0].name if case.masks else case.name
        raise EvaluationError(
            f"{name}: has {truth.shape} voxels and its image {volume.brain.shape}; resample the mask onto the image"
        )
    return truth


def _baseline_bin(detector: Detector, cases: Sequence[Case]) -> int | None:
    """The best single threshold on smoothed intensity for `cases`; those that cannot be read are left out."""
    histograms = []
    for case in cases:
        try:
            volume = case_volume(detector, case)
            truth = case_truth(case, volume)
        except Exception:  # a validation case that cannot be read has no say
            continue
        inside = volume.search_region | truth
        values = smoothed_intensity(volume)[inside]
        histograms.append(Histogram.count(values, truth[inside], *BASELINE_RANGE))
    return reduce(add, histograms).best_bin() if histograms else None
