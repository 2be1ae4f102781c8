"""`ddmd detect` from the shell in two checkouts, in turn: CPU seconds, wall time, peak memory, and whether masks agree.

`python -m benchmarks.shell BASE INPUT... [--now CHECKOUT] [--rounds R] [--threads T] [--weights FILE]`. BASE and CHECKOUT
are folders that hold the package `ddmd`, built; each INPUT is a volume, or a folder of volumes that is one run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cost:
    """What one process took."""

    wall_s: float
    cpu_s: float  # user and system
    peak_mib: float


def run(checkout: Path, source: Path, output: Path, threads: int, weights: Path | None = None) -> Cost:
    """Detect in a new process with the package of one checkout.

    Parameters
    ----------
    checkout : folder that holds `ddmd`
    source : a volume, or a folder of volumes
    output : for the results
    threads : of torch
    weights : a file that both checkouts take, by default what each ships
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "ddmd", "detect", str(source.resolve()), "-o", str(output)]
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


def lowest_dice(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The lowest Dice of each mask with the one in its place; 1 where both are empty.

    Examples
    --------
    >>> round(lowest_dice([np.array([True, True])], [np.array([True, False])]), 3)
    0.667
    """
    if not one or len(one) != len(other):
        raise RuntimeError(f"{len(one)} and {len(other)} masks; there must be as many of both")
    values = []
    for mask, second in zip(one, other, strict=True):
        both = int(mask.sum()) + int(second.sum())
        values.append(2 * int((mask & second).sum()) / both if both else 1.0)
    return min(values)


def compare(
    base: Path, now: Path, source: Path, rounds: int, threads: int, weights: Path | None = None
) -> str:
    """A row of the table: medians of rounds that run both checkouts, one after the other."""
    costs: dict[Path, list[Cost]] = {base: [], now: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for which, checkout in enumerate((base, now)):
                output = Path(folder) / f"{which}-{number}"
                costs[checkout].append(run(checkout, source, output, threads, weights))
        dice = lowest_dice(masks(Path(folder) / "0-0"), masks(Path(folder) / "1-0"))
    old, new = (
        Cost(*(statistics.median(getattr(c, name) for c in costs[checkout]) for name in Cost.__annotations__))
        for checkout in (base, now)
    )
    cells = [f"{old.wall_s:.1f} / {new.wall_s:.1f}", f"{old.wall_s / new.wall_s:.2f}x"]
    cells += [f"{old.cpu_s:.1f} / {new.cpu_s:.1f}", f"{old.cpu_s / new.cpu_s:.2f}x"]
    cells += [f"{old.peak_mib:.0f} / {new.peak_mib:.0f}", f"{dice:.4f}"]
    name = source.name if source.is_dir() else f"{source.parent.name}/{source.name}"
    return f"| {name} | {' | '.join(cells)} |"


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
    options = parser.parse_args()
    print("| input | wall (s) | ratio | CPU (s) | ratio | peak (MiB) | lowest Dice of the masks |")
    print("|---|---|---|---|---|---|---|")
    for source in options.inputs:
        row = compare(options.base, options.now, source, options.rounds, options.threads, options.weights)
        print(row, flush=True)


if __name__ == "__main__":
    main()
