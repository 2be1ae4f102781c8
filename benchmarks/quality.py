"""How Dice and uncertainty depend on the steps N, the samples S and the sampler; curves for the docs.

`python -m benchmarks.quality DATA --patients split.json [--part validation] [--cases K] [--weights W] [--output
FOLDER]` measures; `python -m benchmarks.pictures` draws what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.case_metrics import case_metrics
from ddmd.evaluation.summary import summarise
from ddmd.inference.detector import Detector
from ddmd.inference.session import SamplingConfig
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text
from ddmd.models import checkpoint

STEPS = (1, 2, 3, 5, 10, 20)
ALL_THE_WAY = (5, 20, 100)
SAMPLES = (1, 2, 3, 6, 10, 20)
STOPS = (0.0, 0.9, 0.98)
CLOSE = 0.005  # of Dice: what the default may lose against N = 100
SETTINGS = ("sampler", "steps", "samples", "eta", "stop", "mirror")
KEPT = ("dice", "dice_oracle", "uncertainty_auroc", "bernoulli_auroc", "dice_without_5_percent",
        "calibration_error")  # fmt: skip
RESULTS = Path(__file__).with_name("results")


def settings(default: SamplingConfig) -> list[tuple[str, SamplingConfig]]:
    """The sweeps: (name, configuration), one setting changed at a time.

    N; S; where the steps end, with fresh noise at each or without, with and without the mirror image; and N of
    steps that go all the way to x_0, by both fast samplers.
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


def measure(detector: Detector, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Figures of every setting over the same cases, at the threshold of the weights, one after the other."""
    description, criteria = detector.description, detector.lesion_criteria()
    needs = description.required_sequences, description.optional_sequences
    prepared = [(case, detector.prepare(case.volume(*needs)), case.lesion()) for case in cases]
    for sweep, config in settings(detector.sampling_config()):
        seconds, metrics = 0.0, []
        for case, p, truth in prepared:
            begun = time.perf_counter()
            drawn = detector.maps(p, config)
            seconds += time.perf_counter() - begun
            maps = detector.to_volume(p, drawn)
            metrics.append(
                case_metrics(
                    case.name, case.patient, p.volume, maps.probability, maps.uncertainty, truth, criteria
                )
            )
        pooled = summarise(metrics, {}).pooled
        row = {"sweep": sweep} | {key: getattr(config, key) for key in SETTINGS}
        row["seconds"] = seconds
        yield row | {name: pooled[name] for name in KEPT}


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
    for row in measure(detector, cases):  # written as they come, so that a run that is cut short keeps some
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write_text(target, json_text(result))
    print(f"fewest steps within {CLOSE} of the most: {smallest(rows)}; {target}")


if __name__ == "__main__":
    main()
