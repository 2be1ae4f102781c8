"""How Dice and uncertainty depend on the steps N, the samples S and the sampler; curves for the docs.

`python -m benchmarks.quality DATA --patients split.json [--part validation] [--cases K] [--weights W] [--output
FOLDER]` measures; `python -m benchmarks.pictures` draws what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.evaluate import summarise
from ddmd.evaluation.metrics import case_metrics
from ddmd.inference.detector import Detector
from ddmd.inference.ensemble import detect_slices
from ddmd.inference.session import SamplingConfig
from ddmd.models import checkpoint

STEPS = (1, 2, 3, 5, 10, 20)
ALL_THE_WAY = (5, 20, 100)
SAMPLES = (1, 2, 3, 6, 10, 20)
STOPS = (0.0, 0.9, 0.98)
CLOSE = 0.005  # of Dice: what the default may lose against N = 100
RESULTS = Path(__file__).with_name("results")


def settings(default: SamplingConfig) -> list[tuple[str, SamplingConfig]]:
    """What is swept, and each setting; all else as by default.

    N; N of steps that go all the way to x_0, by both fast samplers; S; and where steps end, with fresh noise at
    each or without, on the mirror image too or not.
    """
    change = dataclasses.replace
    chosen = [("N", change(default, steps=n)) for n in STEPS]
    chosen += [("S", change(default, samples=s)) for s in SAMPLES]
    for mirror in (False, True):
        chosen += [
            ("stop", change(default, steps=5, stop=s, eta=e, mirror=mirror))
            for s in STOPS
            for e in (0.0, 1.0)
        ]
    chosen += [
        ("N all the way", change(default, sampler=s, eta=0.0, stop=0.0, steps=n))
        for n in ALL_THE_WAY
        for s in ("ddim", "dpm++2m")
    ]
    return chosen


def measure(detector: Detector, cases: list[Any]) -> Iterator[dict[str, Any]]:
    """Figures of every setting over the same patients, at the threshold of the weights, one after the other."""
    told = detector.description
    prepared = [(case, detector.prepare(case.volume(told.sequences)), case.lesion()) for case in cases]
    for sweep, config in settings(detector.sampling_config()):
        spent, judged = 0.0, []
        for case, p, truth in prepared:
            begun = time.perf_counter()
            maps = detect_slices(detector.system, p.slices, config)
            spent += time.perf_counter() - begun
            found = detector.to_volume(p, maps)
            judged.append(
                case_metrics(case.name, case.patient, p.volume, found.probability, found.uncertainty, truth, detector.lesion_criteria())
            )  # fmt: skip
        pooled = summarise(judged, {}).pooled
        names = ("dice", "dice_oracle", "uncertainty_auroc", "dice_without_5_percent", "calibration_error")
        told_of = ("sampler", "steps", "samples", "eta", "stop", "mirror")
        row = {"sweep": sweep} | {k: getattr(config, k) for k in told_of}
        row["seconds"] = spent
        yield row | {name: pooled[name] for name in names}


def smallest(rows: list[dict[str, Any]]) -> int | None:
    """The fewest steps whose Dice is within CLOSE of that of 100 steps all the way, if any are."""
    most = max(r["dice"] for r in rows if r["sweep"] == "N all the way" and r["steps"] == max(ALL_THE_WAY))
    return min((r["steps"] for r in rows if r["sweep"] == "N" and r["dice"] >= most - CLOSE), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--patients", type=Path)
    parser.add_argument("--part", default="validation")
    parser.add_argument("--cases", type=int, help="how many, the first ones; all by default")
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    parts = read_split(options.patients) if options.patients else {}
    cases = [
        c for c in find_cases(options.data)
        if c.masks is not None and parts.get(c.patient, options.part) == options.part
    ][: options.cases]  # fmt: skip
    default, rows = detector.sampling_config(), []
    date = datetime.date.today()
    target = options.output / f"quality-{options.data.name}-{date}.json"
    result = {
        "machine": machine(), "date": str(date), "threads": torch.get_num_threads(),
        "weights": detector.description.name, "patients": len(cases), "part": options.part,
        "default": dataclasses.asdict(default), "rows": rows,
    }  # fmt: skip
    for row in measure(detector, cases):  # kept as they come: a run that is cut has measured something
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"fewest steps within {CLOSE} of the most: {smallest(rows)}; {target}")


if __name__ == "__main__":
    main()
