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
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.metrics import BINS, Histogram
from ddmd.inference.detector import Detector
from ddmd.inference.session import SamplingConfig
from ddmd.inference.volume_maps import Prepared
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


def measure(rows: Sequence[Row], case: Case) -> list[Histogram]:
    """Of each system, the probability in lesion and in other tissue of one case, which is read once."""
    prepared: dict[tuple[tuple[str, ...], tuple[str, ...]], Prepared] = {}
    histograms = []
    for row in rows:
        description = row.detector.description
        needs = description.required_sequences, description.optional_sequences
        if needs not in prepared:
            prepared[needs] = row.detector.prepare(case.volume(*needs))
        volume = prepared[needs]
        probability = row.detector.to_volume(volume, row.detector.maps(volume, row.config)).probability
        truth = case.lesion()
        inside = volume.volume.search_region | truth
        histograms.append(Histogram.count(probability[inside], truth[inside], 0.0, 1.0))
    return histograms


def pooled(histograms: Sequence[Histogram], kinds: Sequence[str]) -> dict[str, Histogram]:
    """The histograms of each kind in one."""
    return {
        kind: reduce(add, (h for h, own in zip(histograms, kinds, strict=True) if own == kind))
        for kind in sorted(set(kinds))
    }


def figures(
    validation: Sequence[Histogram],
    validation_kinds: Sequence[str],
    test: Sequence[Histogram],
    test_kinds: Sequence[str],
) -> dict[str, Any]:
    """Dice of each kind of test patients, at the threshold that validation patients choose."""
    curves = [h.dice_curve()[THRESHOLD_BINS] for h in pooled(validation, validation_kinds).values()]
    position = int(np.mean(curves, axis=0).argmax())
    by_kind = {kind: h.dice_curve()[THRESHOLD_BINS] for kind, h in pooled(test, test_kinds).items()}
    return {
        "threshold": (position + THRESHOLD_BINS.start) / (BINS - 1),
        "dice": {kind: float(curve[position]) for kind, curve in by_kind.items()},
        "dice_oracle": {kind: float(curve.max()) for kind, curve in by_kind.items()},
        "auprc": reduce(add, test).average_precision(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--patients", type=Path, required=True, help="split.json of a run")
    parser.add_argument("--kinds", type=Path, help="{patient: kind} as JSON; by default a data set is a kind")
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--pixel-weights", default="flair-pixel-labels")
    parser.add_argument("--cases", type=int, help="how many of each data set and part, the first ones")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    split = read_split(options.patients)
    kinds = read_kinds(options.kinds) if options.kinds else {}
    parts: dict[str, list[Case]] = {"validation": [], "test": []}
    for folder in options.data:
        cases = [case for case in find_cases(folder) if case.masks is not None]
        for part, chosen in parts.items():
            chosen += [case for case in cases if split.get(case.patient) == part][: options.cases]
    systems = rows_of(options.weights, options.pixel_weights)
    measured: dict[str, list[list[Histogram]]] = {part: [] for part in parts}
    for part, chosen in parts.items():
        for case in chosen:
            measured[part].append(measure(systems, case))
            print(f"{part}\t{case.name}", flush=True)
    rows = []
    for number, system in enumerate(systems):
        histograms = {part: [row[number] for row in own] for part, own in measured.items()}
        of_kind = {part: [kind_of(case, kinds) for case in chosen] for part, chosen in parts.items()}
        row = {"system": system.name} | figures(
            histograms["validation"], of_kind["validation"], histograms["test"], of_kind["test"]
        )
        rows.append(row)
        dice = "\t".join(f"{kind} {value:.3f}" for kind, value in row["dice"].items())
        print(f"{system.name}\tthreshold {row['threshold']:.3f}\t{dice}\tAUPRC {row['auprc']:.3f}")
    today = datetime.date.today()
    name = systems[0].detector.description.name
    target = options.output / f"shipped-ablation-{name}-{today}.json"
    patients = {part: [case.name for case in chosen] for part, chosen in parts.items()}
    write_text(target, json_text({"date": str(today), "weights": name, "patients": patients, "rows": rows}))
    print(target)


if __name__ == "__main__":
    main()
