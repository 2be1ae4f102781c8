"""`ddmd detect` from the shell in two checkouts, in turn: CPU seconds, wall time, peak memory, and whether masks agree.

`python -m benchmarks.shell BASE INPUT... [--now CHECKOUT] [--rounds R] [--threads T] [--weights FILE]`. BASE and CHECKOUT
are folders that hold the package `ddmd`, built; each INPUT is a volume, or a folder of volumes that is one run. Every
pair of runs is written to shell-MACHINE-DATE.json at once; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.result_file import ROOT, ResultFile, commit
from benchmarks.timing import machine

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Cost:
    """What one process took."""

    wall_s: float
    cpu_s: float  # user and system
    peak_mib: float


def run(
    checkout: Path,
    source: Path,
    output: Path,
    threads: int,
    weights: Path | None = None,
    options: Sequence[str] = (),
) -> Cost:
    """Detect in a new process with the package of one checkout.

    Parameters
    ----------
    checkout : folder that holds `ddmd`
    source : a volume, or a folder of volumes
    output : for the results
    threads : of torch
    weights : a file that both checkouts take, by default what each ships
    options : of the command, besides
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "ddmd", "detect", str(source.resolve()), "-o", str(output), *options]
    if weights is not None:
        command += ["--weights", str(weights.resolve())]
    begun = time.perf_counter()
    # in a folder without packages: Python looks for `ddmd` where it is started, first of all
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(command, env=environment, cwd=empty, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(f"{checkout}: ddmd detect {source} ended with {process.returncode}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def masks(folder: Path) -> list[np.ndarray]:
    """The lesion masks under a folder of results, in the order of their paths; names changed between versions."""
    found = sorted(folder.rglob("*_mask.nii.gz"))
    return [np.asanyarray(nib.load(path).dataobj) > 0 for path in found]  # type: ignore[attr-defined]


def dice_scores(one: list[np.ndarray], other: list[np.ndarray]) -> list[float]:
    """Dice of each mask with the one in its place; 1 where both are empty.

    Examples
    --------
    >>> [round(score, 3) for score in dice_scores([np.array([True, True])], [np.array([True, False])])]
    [0.667]
    """
    if not one or len(one) != len(other):
        raise RuntimeError(f"{len(one)} and {len(other)} masks; there must be as many of both")
    scores = []
    for mask, second in zip(one, other, strict=True):
        both = int(mask.sum()) + int(second.sum())
        scores.append(2 * int((mask & second).sum()) / both if both else 1.0)
    return scores


def run_pair(
    base: Path, now: Path, source: Path, threads: int, weights: Path | None = None
) -> dict[str, Any]:
    """One run of each checkout, one after the other: the cost of both, how many masks, and the Dice of each."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {"base": Path(folder) / "base", "now": Path(folder) / "now"}
        costs = {
            which: run(checkout, source, outputs[which], threads, weights)
            for which, checkout in (("base", base), ("now", now))
        }
        first, second = masks(outputs["base"]), masks(outputs["now"])
    both = {which: asdict(cost) for which, cost in costs.items()}
    return {"input": name_of(source), "volumes": len(second), **both, "dice": dice_scores(first, second)}


def name_of(source: Path) -> str:
    """What an input is called in the results, without the folders above it."""
    return source.name if source.is_dir() else f"{source.parent.name}/{source.name}"


def medians(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of one input, a volume: seconds, ratios of the rounds, MiB, and the lowest Dice.

    Examples
    --------
    >>> pair = {"volumes": 2, "dice": [1.0, 0.9], "base": {"wall_s": 8.0, "cpu_s": 6.0, "peak_mib": 900.0}}
    >>> pair["now"] = {"wall_s": 4.0, "cpu_s": 2.0, "peak_mib": 800.0}
    >>> figures = medians([pair])
    >>> figures["base_cpu_s"], figures["now_cpu_s"], figures["cpu_s_ratio"]
    (3.0, 1.0, 3.0)
    """
    volumes = pairs[0]["volumes"]
    figures: dict[str, Any] = {"volumes": volumes, "rounds": len(pairs)}
    for field in ("wall_s", "cpu_s", "peak_mib"):
        share = 1 if field == "peak_mib" else volumes
        for which in ("base", "now"):
            figures[f"{which}_{field}"] = statistics.median(pair[which][field] for pair in pairs) / share
        figures[f"{field}_ratio"] = statistics.median(p["base"][field] / p["now"][field] for p in pairs)
    return figures | {"dice": min(min(pair["dice"]) for pair in pairs)}


def compare(
    base: Path,
    now: Path,
    sources: Sequence[Path],
    rounds: int,
    threads: int,
    weights: Path | None = None,
    output: Path = RESULTS,
) -> Path:
    """Run both checkouts on every input, `rounds` times in turn; returns the path of the results."""
    settings = {
        "kind": "shell", "machine": machine("cpu", threads), "torch": torch.__version__, "threads": threads,
        "base_commit": commit(base), "now_commit": commit(now),
        "weights": "what each ships" if weights is None else weights.stem,
    }  # fmt: skip
    path = output / f"shell-{settings['machine']}-{datetime.date.today()}.json"
    results = ResultFile(path, settings)
    for _ in range(rounds):
        for source in sources:
            pairs = results.get("pairs", [])
            if sum(pair["input"] == name_of(source) for pair in pairs) >= rounds:
                continue
            pair = run_pair(base, now, source, threads, weights)
            results.put("pairs", [*pairs, pair])
            costs = ", ".join(
                f"{k} {pair[k]['cpu_s']:.1f} CPU s, {pair[k]['wall_s']:.1f} s" for k in ("base", "now")
            )
            print(f"{pair['input']}: {costs}", flush=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT")
    parser.add_argument("--now", type=Path, default=ROOT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="a file for both; by default what each ships")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = compare(
        options.base, options.now, options.inputs, options.rounds, options.threads, options.weights,
        options.output,
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
