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
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from ddmd import weights
from ddmd.data.datasets import find_cases, read_split
from ddmd.detector import Detector
from ddmd.ensemble import detect_slices
from ddmd.evaluation import judge, summarise
from ddmd.sampling import SamplingConfig

STEPS = (1, 2, 3, 5, 10, 20, 100)
SAMPLES = (1, 2, 3, 5, 10, 20)
STOPS = (0.0, 0.9, 0.97)
CLOSE = 0.005  # of Dice: what the default may lose against N = 100
RESULTS = Path(__file__).with_name("results")


def settings(default: SamplingConfig) -> list[tuple[str, SamplingConfig]]:
    """What is swept, and each setting: N over both fast samplers, S, and where steps end; all else as default."""
    change = dataclasses.replace
    chosen = [("N", change(default, steps=n)) for n in STEPS]
    chosen += [("N", change(default, sampler="dpm++2m", eta=0.0, steps=n)) for n in STEPS if n <= 20]
    chosen += [("S", change(default, samples=s)) for s in SAMPLES]
    for mirror in (False, True):
        chosen += [
            ("stop", change(default, steps=5, stop=s, eta=e, mirror=mirror))
            for s in STOPS
            for e in (0.0, 1.0)
        ]
    return chosen


def measure(detector: Detector, cases: list[Any]) -> list[dict[str, Any]]:
    """Figures of every setting over the same patients, at the threshold of the weights."""
    told = detector.description
    prepared = [(case, detector.prepare(case.volume(told.sequences)), case.lesion()) for case in cases]
    rows = []
    for sweep, config in settings(detector.configured()):
        begun, spent, judged = 0.0, 0.0, []
        for case, p, truth in prepared:
            begun = time.perf_counter()
            maps = detect_slices(detector.system, p.slices, config)
            spent += time.perf_counter() - begun
            found = detector.restored(p, maps)
            judged.append(
                judge(case.name, case.patient, p.volume, found.probability, found.uncertainty, truth, detector.rule())
            )  # fmt: skip
        pooled = summarise(judged, {}).pooled
        names = ("dice", "dice_oracle", "uncertainty_auroc", "dice_without_5_percent", "calibration_error")
        told_of = ("sampler", "steps", "samples", "eta", "stop", "mirror")
        row = {"sweep": sweep} | {k: getattr(config, k) for k in told_of}
        row["seconds"] = spent
        rows.append(row | {name: pooled[name] for name in names})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def smallest(rows: list[dict[str, Any]], sampler: str) -> int:
    """The fewest steps whose Dice is within CLOSE of that of the most steps."""
    own = [r for r in rows if r["sweep"] == "N" and r["sampler"] == sampler]
    own.sort(key=lambda r: r["steps"])
    return next(r["steps"] for r in own if r["dice"] >= own[-1]["dice"] - CLOSE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--patients", type=Path)
    parser.add_argument("--part", default="validation")
    parser.add_argument("--cases", type=int, help="how many, the first ones; all by default")
    parser.add_argument("--weights", default=weights.DEFAULT)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    parts = read_split(options.patients) if options.patients else {}
    cases = [
        c for c in find_cases(options.data)
        if c.masks is not None and parts.get(c.patient, options.part) == options.part
    ][: options.cases]  # fmt: skip
    rows, default = measure(detector, cases), detector.configured()
    result = {
        "machine": machine(), "date": str(datetime.date.today()), "threads": torch.get_num_threads(),
        "weights": detector.description.name, "patients": len(cases), "part": options.part,
        "default": dataclasses.asdict(default), "rows": rows,
        "smallest_steps": {s: smallest(rows, s) for s in (default.sampler, "dpm++2m")},
    }  # fmt: skip
    target = options.output / f"quality-{options.data.name}-{result['date']}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"fewest steps within {CLOSE} of the most: {result['smallest_steps']}; {target}")


if __name__ == "__main__":
    main()
