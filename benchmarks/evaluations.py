"""Evaluate weights and keep the figures: `python -m benchmarks.evaluations DATA [--patients split.json] [--weights W]`.

What `ddmd evaluate` does, written as benchmarks/results/evaluation-WEIGHTS-DATA-DATE.json, from which
`python -m benchmarks.cards` makes the tables of the model cards. Volumes without a mask are detected too: how much
is found in each is all that can be said of them.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import machine
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.evaluate import evaluate, plain
from ddmd.inference.detector import Detector
from ddmd.models import checkpoint

RESULTS = Path(__file__).with_name("results")
SHOWN = ("patient", "lesion_ml", "found_ml", "dice", "dice_oracle", "baseline_dice_oracle", "lesion_recall",
         "false_positives")  # fmt: skip


def without_mask(data: Path, name: str, split: dict[str, str]) -> list[dict[str, Any]]:
    """Millilitres found in the cases that have no mask to compare with."""
    detector, rows = Detector.load(name), []
    for case in find_cases(data):
        if case.masks is None and split.get(case.patient, "test") == "test":
            volume = case.volume(detector.description.sequences)
            found = detector.detect(volume)
            ml = float(np.asarray(found.mask.dataobj).sum() * np.prod(volume.spacing)) / 1000
            rows.append({"patient": case.name, "found_ml": ml})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--patients", type=Path, help="split.json of a run: only its test part")
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = evaluate(options.data, weights=options.weights, split=options.patients)
    split = read_split(options.patients) if options.patients else {}
    trained_on = {k: v for k, v in split.items() if v != "test"}
    result = {
        "machine": machine(), "date": str(datetime.date.today()), "weights": report.how["weights"],
        "weights_sha256": hashlib.sha256(checkpoint.find(options.weights).read_bytes()).hexdigest(),
        "threshold": report.how["threshold"], "sampling": report.how["sampling"], "pooled": report.pooled,
        "intervals": report.intervals, "patients": [{k: row[k] for k in SHOWN} for row in report.patients],
        "without_mask": without_mask(options.data, options.weights, trained_on),
    }  # fmt: skip
    target = options.output / f"evaluation-{report.how['weights']}-{options.data.name}-{result['date']}.json"
    target.write_text(json.dumps(plain(result), indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
