"""One case: its maps compared with an annotator's mask, and what is kept of them to be pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddmd.evaluation.baselines import smoothed_intensity
from ddmd.evaluation.draws import DrawMetrics
from ddmd.evaluation.metrics import (
    Floats,
    Histogram,
    Mask,
    best_dice,
    calibration_bins,
    confusion,
    confusion_metrics,
    hausdorff_95,
    lesion_wise,
    rejection_curve,
    slice_scores,
)
from ddmd.inference.decision import decision_uncertainty
from ddmd.inference.lesion_contrast import BrightImage
from ddmd.inference.postprocess import LesionCriteria, find_lesions, label_components, lesion_score
from ddmd.io.background import bounding_box
from ddmd.io.volume import Volume

BASELINE_RANGE = (-4.0, 6.0)  # of the smoothed robust z-score
VARIANCE_RANGE = (-10.0, 0.0)  # decimal logarithm: ranks small variances apart, alike for all cases
SLICE_SCORE_MM2 = 25.0  # a slice's score is the mean probability of so much of it, the most probable
THRESHOLDS = np.linspace(0.05, 0.95, 19)  # of probability: at each all criteria are tried
REJECTED_SHARES = (0.0, 0.01, 0.02, 0.05, 0.10)  # of the least certain voxels


@dataclass(frozen=True)
class CaseMetrics:
    """What is kept of one case: `row` goes to the table of cases, the rest is pooled.

    Parameters
    ----------
    row : column -> value; "patient" is the name of the case
    patient : whose examination it is, the unit of the bootstrap
    probability : Histogram of the probability, lesion against other tissue
    baseline : the same of the smoothed intensity
    uncertainty, bernoulli, decision : Histograms of log10 of the variance over samples, of p (1 - p) and of
        `decision_uncertainty`, voxels where the
        mask is wrong against the others
    confusion : (4,), see `metrics.confusion`
    by_threshold : (len(THRESHOLDS), 4), the same with each threshold
    rejection : (len(REJECTED_SHARES), 3), see `metrics.rejection_curve`
    calibration : (10, 3), see `metrics.calibration_bins`
    slice_score, slice_label : (Z,), of slices that hold brain
    lesion_slices : (4,), `confusion` on slices that hold lesion
    picture : name -> (Y, X), one slice to draw
    draws : DrawMetrics, where draws were kept
    """

    row: dict[str, Any]
    patient: str
    probability: Histogram
    baseline: Histogram
    uncertainty: Histogram
    bernoulli: Histogram
    decision: Histogram
    confusion: NDArray[np.int64]
    by_threshold: NDArray[np.int64]
    rejection: NDArray[np.int64]
    calibration: NDArray[np.float64]
    slice_score: Floats
    slice_label: Mask
    lesion_slices: NDArray[np.int64]
    picture: dict[str, NDArray[Any]] = field(default_factory=dict)
    draws: DrawMetrics | None = None


def counts_by_threshold(
    probability: Floats,
    truth: Mask,
    inside: Mask,
    affine: NDArray[np.floating],
    criteria: LesionCriteria,
    image: BrightImage | None,
) -> NDArray[np.int64]:
    """`confusion` with each of THRESHOLDS, (len(THRESHOLDS), 4).

    Parameters
    ----------
    probability : (X, Y, Z) float32
    truth, inside : (X, Y, Z) bool, lesion and what is counted
    affine : (4, 4), voxels to mm
    criteria : LesionCriteria, whose threshold is replaced
    image : BrightImage, optional, as `label_components` takes it
    """
    # computed in the box that holds all candidates, their surroundings and lesions
    faintest = replace(criteria, threshold=float(THRESHOLDS[0])).outline
    marked = bounding_box((probability >= faintest) | truth) or (slice(0, 1),) * 3
    reach = image.radius if image is not None else (0, 0, 0)
    box = tuple(slice(max(0, a.start - r), a.stop + r) for a, r in zip(marked, reach, strict=True))
    part = image.part(box) if image is not None else None
    masks = (
        label_components(probability[box], affine, replace(criteria, threshold=float(threshold)), part) > 0
        for threshold in THRESHOLDS
    )
    counts = np.array([confusion(mask, truth[box], inside[box]) for mask in masks])
    counts[:, 3] += int(inside.sum() - inside[box].sum())
    return counts


def _log10(variance: Floats) -> Floats:
    logarithm: Floats = np.log10(variance + 1e-12)
    return logarithm


def case_metrics(
    name: str,
    patient: str,
    volume: Volume,
    probability: Floats,
    uncertainty: Floats,
    truth: Mask,
    criteria: LesionCriteria,
    draws: DrawMetrics | None = None,
) -> CaseMetrics:
    """Compare the maps (X, Y, Z) of one case with the annotator's mask.

    Parameters
    ----------
    name : of the case
    patient : whose examination it is
    volume : Volume, the image on the grid of the maps
    probability, uncertainty : (X, Y, Z) float32, mean and variance over the samples
    truth : (X, Y, Z) bool
    criteria : LesionCriteria
    draws : DrawMetrics, where draws were kept
    """
    image = BrightImage.of(volume)
    lesion_map = find_lesions(probability, uncertainty, volume.affine, criteria, image)
    mask, inside = lesion_map.mask, volume.search_region | truth
    counts = confusion(mask, truth, inside)
    empty = not truth.any()
    p, true_voxels, wrong = probability[inside], truth[inside], mask[inside] != truth[inside]
    histogram = Histogram.count(p, true_voxels, 0.0, 1.0)
    baseline = Histogram.count(smoothed_intensity(volume)[inside], true_voxels, *BASELINE_RANGE)
    variance = Histogram.count(_log10(uncertainty[inside]), wrong, *VARIANCE_RANGE)
    bernoulli = Histogram.count(_log10(p * (1 - p)), wrong, *VARIANCE_RANGE)
    decision_map = decision_uncertainty(probability, mask, volume.affine, criteria)[inside]
    decision = Histogram.count(_log10(decision_map), wrong, *VARIANCE_RANGE)
    by_threshold = counts_by_threshold(probability, truth, inside, volume.affine, criteria, image)
    has_lesion: Mask = np.any(truth, axis=(0, 1))
    lesion_slices = confusion(mask[:, :, has_lesion], truth[:, :, has_lesion], inside[:, :, has_lesion])
    row: dict[str, Any] = {
        "patient": name,
        **confusion_metrics(counts),
        "lesion_ml": float(truth.sum()) * volume.voxel_volume_ml,
        "detected_ml": float(mask.sum()) * volume.voxel_volume_ml,
        "false_positive_ml": float(counts[1]) * volume.voxel_volume_ml,
        "dice_oracle": float("nan") if empty else best_dice(counts, by_threshold),
        "baseline_dice_oracle": float("nan") if empty else float(baseline.dice_curve().max()),
        "auprc": histogram.average_precision(),
        "hd95_mm": hausdorff_95(mask, truth, volume.spacing),
        **lesion_wise(mask, truth),
        "score": lesion_score(probability, volume.voxel_volume_ml, bool(lesion_map.lesions)),
        "dice_lesion_slices": confusion_metrics(lesion_slices)["dice"],
        "uncertainty_auroc": variance.auroc(),
        "bernoulli_auroc": bernoulli.auroc(),
        "decision_auroc": decision.auroc(),
        **(draws.row if draws else {}),
    }
    filled = volume.search_region.any(axis=(0, 1))
    return CaseMetrics(
        row=row,
        patient=patient,
        probability=histogram,
        baseline=baseline,
        uncertainty=variance,
        bernoulli=bernoulli,
        decision=decision,
        confusion=counts,
        by_threshold=by_threshold,
        rejection=rejection_curve(mask[inside], true_voxels, uncertainty[inside], REJECTED_SHARES),
        calibration=calibration_bins(p, true_voxels),
        slice_score=slice_scores(probability, volume.spacing, SLICE_SCORE_MM2)[filled],
        slice_label=has_lesion[filled],
        lesion_slices=lesion_slices,
        picture=_picture(volume, probability, mask, truth),
        draws=draws,
    )


def _picture(volume: Volume, probability: Floats, mask: Mask, truth: Mask) -> dict[str, NDArray[Any]]:
    """The slice with most lesion, or the most probable one."""
    area = truth.sum(axis=(0, 1)) if truth.any() else probability.sum(axis=(0, 1))
    z = int(area.argmax())
    image = volume.normalised("flair") if "flair" in volume.images else probability
    planes: Sequence[tuple[str, NDArray[Any]]] = (("image", image), ("mask", mask), ("truth", truth))
    return {name: values[:, :, z].T.copy() for name, values in planes}
