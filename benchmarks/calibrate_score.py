"""Fit the score of a volume to validation patients: `python -m benchmarks.calibrate_score DATA [--weights W ...]`.

DATA holds TCGA-LGG slices. Each validation patient gives two volumes: all slices, and the slices without lesion that
are two or more from one that has it. Prints the parameters for `ddmd.inference.postprocess.SCORE_CALIBRATION`, and
AUROC and Brier score with the parameters fitted to the other patients (leave one patient out).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import split_by_patient
from ddmd.inference.detector import Detector
from ddmd.inference.lesion_contrast import BrightImage
from ddmd.inference.postprocess import EVIDENCE_LIMIT, label_components, lesion_evidence
from ddmd.models import checkpoint

MARGIN = 2  # slices beside one with lesion that are in neither volume
STARTS = [(slope, centre) for slope in (0.3, 1.0, 3.0) for centre in (0.0, 2.0, 4.0)]


@dataclass(frozen=True)
class Example:
    """One volume: its evidence, whether lesions were detected in it, and whether it holds one."""

    patient: str
    evidence: float
    detected: bool
    has_lesion: bool


def examples(weights: str, data: Path, seed: int) -> list[Example]:
    """Two volumes a validation patient, detected by some weights."""
    detector = Detector.load(weights)
    criteria, config = detector.lesion_criteria(None), detector.sampling_config()
    cases = find_cases(data, name="lgg")
    parts, rows = split_by_patient(cases, seed=seed), []
    for case in cases:
        if parts[case.patient] != "validation":
            continue
        prepared = detector.prepare(
            case.volume(detector.description.required_sequences, detector.description.optional_sequences)
        )
        maps = detector.to_volume(prepared, detector.maps(prepared, config))
        voxel_ml = prepared.volume.voxel_volume_ml
        image = BrightImage.of(prepared.volume)
        marked = case.lesion().any((0, 1))
        far = np.convolve(marked, np.ones(2 * MARGIN + 1), "same") == 0
        for has_lesion, chosen in ((True, np.ones_like(marked)), (False, far)):
            part = maps.probability[:, :, chosen]
            bright = image.part((slice(None), slice(None), chosen)) if image is not None else None
            detected = bool(label_components(part, prepared.volume.affine, criteria, bright).any())
            rows.append(Example(case.patient, lesion_evidence(part, voxel_ml), detected, has_lesion))
    return rows


def scores(rows: list[Example], slope: float, centre: float) -> np.ndarray:
    """As `lesion_score`, of many volumes."""
    evidence = np.clip([r.evidence for r in rows], EVIDENCE_LIMIT, 1 - EVIDENCE_LIMIT)
    curve = 1 / (1 + np.exp(-slope * (np.log(evidence / (1 - evidence)) - centre)))
    return (np.array([r.detected for r in rows]) + curve) / 2


def fit(rows: list[Example]) -> tuple[float, float]:
    """Slope and centre of highest likelihood, with the targets of Platt (1999), which keep few data from certainty."""
    has_lesion = np.array([r.has_lesion for r in rows])
    positive, negative = int(has_lesion.sum()), int((~has_lesion).sum())
    target = np.where(has_lesion, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters: np.ndarray) -> float:
        score = np.clip(scores(rows, *parameters), 1e-9, 1 - 1e-9)
        return float(-(target * np.log(score) + (1 - target) * np.log(1 - score)).mean())

    best = min((minimize(loss, start, method="Nelder-Mead") for start in STARTS), key=lambda r: r.fun)
    return float(best.x[0]), float(best.x[1])


def main() -> None:
    from sklearn.metrics import brier_score_loss, roc_auc_score

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", nargs="+", default=list(checkpoint.available()))
    parser.add_argument("--seed", type=int, default=0, help="of the split, as in the recipes")
    options = parser.parse_args()
    rows = [row for name in options.weights for row in examples(name, options.data, options.seed)]
    slope, centre = fit(rows)
    cross_validated = np.zeros(len(rows))
    for patient in {r.patient for r in rows}:
        own = np.array([r.patient == patient for r in rows])
        others = fit([r for r in rows if r.patient != patient])
        cross_validated[own] = scores([r for r in rows if r.patient == patient], *others)
    truth = [r.has_lesion for r in rows]
    print(
        f"slope {slope:.2f}, centre {centre:.2f}, fitted to {len(rows)} volumes, {sum(truth)} with a lesion"
    )
    print(f"leave one patient out: AUROC {roc_auc_score(truth, cross_validated):.3f}, Brier score "
          f"{brier_score_loss(truth, cross_validated):.3f}; Brier score of 0.5 for all: 0.250")  # fmt: skip


if __name__ == "__main__":
    main()
