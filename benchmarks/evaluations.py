"""Evaluate weights and keep the figures: `python -m benchmarks.evaluations DATA [--patients split.json] [--weights W]`.

Does what `ddmd evaluate` does, and writes benchmarks/results/evaluation-WEIGHTS-DATA-DATE.json, from which
`python -m benchmarks.cards` makes the tables of the model cards. Of volumes without a mask, the detected volume is kept.
With `--part validation` it writes evaluation-WEIGHTS-DATA-validation-DATE.json: those patients chose thresholds.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
from pathlib import Path
from typing import Any

from benchmarks.timing import machine
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.evaluate import evaluate
from ddmd.inference.detector import Detector
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text
from ddmd.models import checkpoint

RESULTS = Path(__file__).with_name("results")
COLUMNS = ("patient", "lesion_ml", "detected_ml", "false_positive_ml", "dice", "dice_oracle", "baseline_dice_oracle",
           "lesion_recall", "false_positives", "score", "uncertainty_auroc", "bernoulli_auroc", "decision_auroc")  # fmt: skip


def without_mask(data: Path, name: str, split: dict[str, str] | None, part: str) -> list[dict[str, Any]]:
    """Detected volume and score of the cases without a mask: those that a split lists in the part, or else all."""
    detector, rows = Detector.load(name), []
    for case in find_cases(data):
        if case.masks is None and (split is None or split.get(case.patient) == part):
            detection = detector.detect(
                case.volume(detector.description.required_sequences, detector.description.optional_sequences)
            )
            ml = sum(lesion.volume_ml for lesion in detection.lesions)
            rows.append({"patient": case.name, "detected_ml": ml, "score": detection.score})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--patients", type=Path, help="split.json of a run: only the patients of one part")
    parser.add_argument("--part", default="test", choices=["test", "validation"], help="of the split")
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = evaluate(options.data, weights=options.weights, split=options.patients, part=options.part)
    split = read_split(options.patients) if options.patients else None
    result = {
        "machine": machine(), "date": str(datetime.date.today()), "weights": report.provenance["weights"],
        "weights_sha256": hashlib.sha256(checkpoint.find(options.weights).read_bytes()).hexdigest(),
        "threshold": report.provenance["threshold"], "sampling": report.provenance["sampling"], "pooled": report.pooled,
        "intervals": report.intervals, "patients": [{k: row[k] for k in COLUMNS} for row in report.patients],
        "without_mask": without_mask(options.data, options.weights, split, options.part),
    }  # fmt: skip
    for failure in report.failures:
        print(f"{failure.case} failed: {failure.error}: {failure.message}")
    data = options.data.name + ("" if options.part == "test" else f"-{options.part}")
    target = options.output / f"evaluation-{report.provenance['weights']}-{data}-{result['date']}.json"
    write_text(target, json_text(result))
    print(target)


if __name__ == "__main__":
    main()
