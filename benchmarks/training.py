"""Training steps a second of two checkouts, in turn: each with its own pipeline and recipe, on the same data.

`python -m benchmarks.training BASE DATA [--now CHECKOUT] [--rounds R] [--steps N] [--threads T] [--weights FILE]`. BASE and
CHECKOUT are folders that hold the package `ddmd`, built; where BASE is `-`, this checkout is measured alone. DATA is a
folder of cases with image-level labels, or `made-up`. Every run is written to training-MACHINE-DATE.json at once; a
benchmark that was stopped goes on. On a GPU, nvidia-smi says how busy it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.made_up_cases import write_cases
from benchmarks.result_file import ROOT, ResultFile, commit
from benchmarks.timing import machine

RESULTS = Path(__file__).with_name("results")
WORKER = Path(__file__).with_name("training_steps.py")
WEIGHTS = ROOT / "ddmd" / "pretrained" / "ddmd-light.safetensors"  # that both checkouts can begin from
MADE_UP = "made-up"
WARM = 2  # steps of each stage that are not counted

Steps = dict[str, dict[str, float]]  # stage -> CPU and wall seconds a step


def run(checkout: Path, settings: dict[str, Any]) -> Steps:
    """Train in a new process with the package of one checkout."""
    threads = str(settings["threads"])
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "settings.json"
        asked.write_text(json.dumps(settings), encoding="utf-8")
        # -P: modules are not looked for beside the script, nor, by the empty folder, where this was started
        command = [sys.executable, "-P", str(WORKER), str(asked), str(Path(folder) / "run")]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}: training ended with {done.returncode}\n{done.stderr[-2000:]}")
    steps: Steps = json.loads(done.stdout.splitlines()[-1])
    return steps


def medians(rounds: Sequence[dict[str, Steps]]) -> dict[str, dict[str, float]]:
    """Of each stage the median seconds a step of each checkout, and of their ratios in one round.

    Examples
    --------
    >>> one = {"base": {"denoiser": {"cpu_s": 4.0, "wall_s": 8.0}}, "now": {"denoiser": {"cpu_s": 1.0, "wall_s": 2.0}}}
    >>> medians([one])["denoiser"]["cpu_s_ratio"]
    4.0
    """
    figures: dict[str, dict[str, float]] = {}
    for stage in rounds[0]["now"]:
        found: dict[str, float] = {}
        for field in ("cpu_s", "wall_s"):
            for which in rounds[0]:
                found[f"{which}_{field}"] = statistics.median(r[which][stage][field] for r in rounds)
            if "base" in rounds[0]:
                ratios = (r["base"][stage][field] / r["now"][stage][field] for r in rounds)
                found[f"{field}_ratio"] = statistics.median(ratios)
        busy = [r["now"][stage]["gpu_busy"] for r in rounds if "gpu_busy" in r["now"][stage]]
        if busy:
            found["gpu_busy"] = statistics.median(busy)
        figures[stage] = found
    return figures


def compare(
    base: Path | None,
    now: Path,
    settings: dict[str, Any],
    rounds: int,
    device: str = "auto",
    output: Path = RESULTS,
) -> Path:
    """Train with both checkouts, `rounds` times in turn; returns the path of the results."""
    name = machine(device, settings["threads"])
    described = {
        **settings, "kind": "training", "machine": name, "torch": torch.__version__,
        "data": Path(settings["data"]).name, "start": Path(settings["start"]).stem,
        "base_commit": None if base is None else commit(base), "now_commit": commit(now),
    }  # fmt: skip
    path = output / f"training-{name}-{datetime.date.today()}.json"
    results = ResultFile(path, described)
    checkouts = {"now": now} if base is None else {"base": base, "now": now}
    while len(done := results.get("rounds", [])) < rounds:
        one = {which: run(checkout, settings) for which, checkout in checkouts.items()}
        results.put("rounds", [*done, one])
        for which, stages in one.items():
            print(
                which, ", ".join(f"{k} {v['cpu_s']:.2f} CPU s a step" for k, v in stages.items()), flush=True
            )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--now", type=Path, default=ROOT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of each stage, after two that are not counted")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="from which both begin")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_cases(Path(folder) / MADE_UP) if options.data == MADE_UP else Path(options.data)
        settings = {
            "data": str(data.resolve()), "start": str(options.weights.resolve()), "batch": options.batch,
            "steps": options.steps, "warm": WARM, "threads": options.threads,
        }  # fmt: skip
        base = None if options.base == "-" else Path(options.base)
        print(compare(base, options.now, settings, options.rounds, output=options.output))


if __name__ == "__main__":
    main()
