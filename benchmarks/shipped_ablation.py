"""What each part of the shipped weights brings, without training: draws, posterior mean, condition network, X.

`python -m benchmarks.shipped_ablation DATA ... --patients split.json [--weights W] [--pixel-weights P] [--cases K]`

Every row is a probability map of the same patients. Its threshold is the one with the highest Dice on validation
patients, the mean over kinds; no lesion criteria are used, so that rows differ in the map alone. "Without diffusion" is
the evidence of the condition network, "anomaly detection" the reconstruction error of the auto-encoders of A, both out
of the same weights: they were trained as parts of the whole. Prints Dice of the test patients, pooled for each kind,
and writes benchmarks/results/shipped-ablation-WEIGHTS-DATE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.case_metrics import VARIANCE_RANGE
from ddmd.evaluation.metrics import Histogram
from ddmd.inference.detector import Detector
from ddmd.inference.session import SamplingConfig
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text
from ddmd.models import checkpoint
from ddmd.training.threshold import kind_of, read_kinds

RESULTS = Path(__file__).with_name("results")
THRESHOLD_BINS = slice(5, 500)  # of a histogram: not 0, which every voxel reaches


@dataclasses.dataclass(frozen=True)
class Row:
    """One system of the table: its detector and how it samples."""

    name: str
    detector: Detector
    config: SamplingConfig


@dataclasses.dataclass(frozen=True)
class Measured:
    """One case by one system: its kind, the probability in lesion and other tissue, and the maps to rank errors by."""

    kind: str
    probability: Histogram
    values: np.ndarray  # (2, n): probability and variance inside
    truth: np.ndarray  # (n,)


def rows_of(weights: str, pixel_weights: str) -> list[Row]:
    """The systems that are compared."""
    whole, pixel = Detector.load(weights), Detector.load(pixel_weights)

    def only(system: str) -> Detector:
        description = dataclasses.replace(whole.description, system=system)
        return Detector(dataclasses.replace(whole.system, description=description))

    fast, one = whole.sampling_config(), whole.sampling_config(samples=1)
    return [
        Row("draws of many steps", whole, whole.sampling_config(quality="draws")),
        Row("posterior mean only", whole, fast),
        Row("without diffusion", only("supervised"), one),
        Row("anomaly detection", only("anomaly"), one),
        Row("pixel labels", pixel, pixel.sampling_config()),
    ]


def measure(row: Row, case: Case, kinds: Mapping[str, str]) -> Measured:
    """Detect in one case."""
    detector = row.detector
    prepared = detector.prepare(case.volume(detector.description.sequences))
    maps = detector.to_volume(prepared, detector.maps(prepared, row.config))
    truth = case.lesion()
    inside = prepared.volume.search_region | truth
    probability, truth = maps.probability[inside], truth[inside]
    values = np.stack((probability, maps.uncertainty[inside]))
    return Measured(kind_of(case, kinds), Histogram.count(probability, truth, 0.0, 1.0), values, truth)


def curves(cases: Sequence[Measured]) -> dict[str, np.ndarray]:
    """Of each kind, the pooled Dice at every threshold."""
    kinds = sorted({case.kind for case in cases})
    pooled = {kind: reduce(add, (case.probability for case in cases if case.kind == kind)) for kind in kinds}
    return {kind: histogram.dice_curve()[THRESHOLD_BINS] for kind, histogram in pooled.items()}


def error_auroc(cases: Sequence[Measured], threshold: float) -> tuple[float, float]:
    """AUROC of the variance, and of p (1 - p), against voxels where the mask is wrong."""
    ranked = []
    for score in (lambda p, variance: variance, lambda p, variance: p * (1 - p)):
        histograms = [
            Histogram.count(
                np.log10(score(*case.values) + 1e-12),
                (case.values[0] >= threshold) != case.truth,
                *VARIANCE_RANGE,
            )
            for case in cases
        ]
        ranked.append(reduce(add, histograms).auroc())
    return ranked[0], ranked[1]


def table(
    rows: Sequence[Row], validation: Sequence[Case], test: Sequence[Case], kinds: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """The figures of one system after the other."""
    for row in rows:
        chosen = np.mean(list(curves([measure(row, case, kinds) for case in validation]).values()), axis=0)
        position = int(chosen.argmax())
        threshold = (position + THRESHOLD_BINS.start) / 500
        measured = [measure(row, case, kinds) for case in test]
        by_kind = curves(measured)
        variance, bernoulli = error_auroc(measured, threshold)
        yield {
            "system": row.name,
            "threshold": threshold,
            "dice": {kind: float(curve[position]) for kind, curve in by_kind.items()},
            "dice_oracle": {kind: float(curve.max()) for kind, curve in by_kind.items()},
            "auprc": reduce(add, (case.probability for case in measured)).average_precision(),
            "uncertainty_auroc": variance,
            "bernoulli_auroc": bernoulli,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--patients", type=Path, required=True, help="split.json of a run")
    parser.add_argument("--kinds", type=Path, help="{patient: kind} as JSON; by default a data set is a kind")
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--pixel-weights", default="flair-pixel-labels")
    parser.add_argument("--cases", type=int, help="how many of each data set and part, the first ones")
    options = parser.parse_args()
    split = read_split(options.patients)
    kinds = read_kinds(options.kinds) if options.kinds else {}
    parts: dict[str, list[Case]] = {"validation": [], "test": []}
    for folder in options.data:
        cases = [case for case in find_cases(folder) if case.masks is not None]
        for part, chosen in parts.items():
            chosen += [case for case in cases if split.get(case.patient) == part][: options.cases]
    rows: list[dict[str, Any]] = []
    today = datetime.date.today()
    name = Detector.load(options.weights).description.name
    target = RESULTS / f"shipped-ablation-{name}-{today}.json"
    patients = {part: [case.name for case in chosen] for part, chosen in parts.items()}
    systems = rows_of(options.weights, options.pixel_weights)
    for row in table(systems, parts["validation"], parts["test"], kinds):
        rows.append(row)
        dice = "\t".join(f"{kind} {value:.3f}" for kind, value in row["dice"].items())
        print(f"{row['system']}\tthreshold {row['threshold']:.2f}\t{dice}\tAUPRC {row['auprc']:.3f}\t"
              f"AUROC {row['uncertainty_auroc']:.3f} beside {row['bernoulli_auroc']:.3f}", flush=True)  # fmt: skip
        write_text(
            target, json_text({"date": str(today), "weights": name, "patients": patients, "rows": rows})
        )
    print(target)


if __name__ == "__main__":
    main()
