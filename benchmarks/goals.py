"""The figures of speed with their base, their goal and what was seen: `python -m benchmarks.goals [FOLDER] [--device D]`.

The goals are in benchmarks/results/goals.json; what was seen comes from the newest result files of the folder. A figure
that no file has is not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import figures, shell, training
from benchmarks.figures import Result

RESULTS = Path(__file__).with_name("results")
LOWER_IS_BETTER = ("s", "ms", "MiB")  # units


@dataclass(frozen=True)
class Goal:
    """One figure: what it is, its unit, what the base had (None: not measured) and what it should be."""

    key: str
    device: str
    figure: str
    unit: str
    base: float | None
    goal: float

    def reached(self, seen: float) -> bool:
        """Whether a value is as good as the goal, or better."""
        return seen <= self.goal if self.unit in LOWER_IS_BETTER else seen >= self.goal


def goals() -> list[Goal]:
    """All figures, in order."""
    values = json.loads((RESULTS / "goals.json").read_text(encoding="utf-8"))
    return [Goal(**one) for one in values["figures"]]


def seen(folder: Path, device: str) -> dict[str, float]:
    """Key of a goal -> what the newest files of a folder say of it on this device, of the commit measured last."""
    volume = figures.newest(folder, "volume", device)
    ops = figures.newest(folder, "ops", device)
    trained = figures.newest(folder, "training", device)
    found = _on_gpu(volume, ops, trained) if device == "cuda" else _on_cpu(folder, ops, trained)
    return {key: value for key, value in found.items() if value is not None}


def _on_gpu(volume: Result | None, ops: Result | None, trained: Result | None) -> dict[str, float | None]:
    peak = {} if volume is None else volume.values.get("peak_MiB", {})
    one, folder = figures.shell_cost(volume)
    found: dict[str, float | None] = {
        "file_to_files": figures.part(volume, "whole, file to files"),
        "folder": folder,
        "shell": one,
        "pairwise_share": figures.share_of_copy(ops, "pairwise_sqdist"),
        "group_norm_share": figures.share_of_copy(ops, "group_norm_silu", "bfloat16"),
        "peak_host": peak.get("host"),
        "peak_device": peak.get("device"),
    }
    for steps in (1, 5):
        found[f"rivals_n{steps}"] = figures.best_rival(volume, steps)
        found[f"rivals_n{steps}_volume"] = figures.best_rival(volume, steps, whole=True)
    for samples, steps in ((6, 1), (5, 10), (64, 1)):
        seconds = figures.computation_s(volume, samples, steps)
        found[f"compute_{samples}_{steps}"] = None if seconds is None else 1000 * seconds
    if trained is not None and trained.values.get("rounds"):
        stage = training.medians(trained.values["rounds"])["autoencoders_a"]
        found |= {"training_steps": 1 / stage["now_wall_s"], "training_busy": stage.get("gpu_busy")}
    return found


def _on_cpu(folder: Path, ops: Result | None, trained: Result | None) -> dict[str, float | None]:
    names = ("ensemble_update", "gaussian_kl", "pairwise_sqdist")
    found: dict[str, float | None] = {"cpu_ops": figures.lowest_op_ratio(ops, names)}
    shells = figures.newest(folder, "shell", "cpu")
    if shells is not None and shells.values.get("pairs"):
        medians = shell.medians(
            [p for p in shells.values["pairs"] if p["volumes"] > 1] or shells.values["pairs"]
        )
        found |= {"shell_ratio": medians["cpu_s_ratio"], "shell_peak": medians["now_peak_mib"]}
    if trained is not None and trained.values.get("rounds") and trained.values.get("base_commit"):
        stages = training.medians(trained.values["rounds"]).values()
        found["training_ratio"] = min(stage["cpu_s_ratio"] for stage in stages)
    return found


def table(folder: Path, devices: Sequence[str] = ("cuda", "cpu")) -> str:
    """Figure, base, goal, seen, and whether the goal is reached, as Markdown."""
    lines = ["| figure | base | goal | seen | reached |", "|---|---|---|---|---|"]
    for device in devices:
        values = seen(folder, device)
        for goal in (goal for goal in goals() if goal.device == device):
            value = values.get(goal.key)
            verdict = "" if value is None else ("yes" if goal.reached(value) else "no")
            cells = [
                _shown(goal.base, goal.unit),
                _shown(goal.goal, goal.unit),
                _shown(value, goal.unit),
                verdict,
            ]
            where = "GPU" if device == "cuda" else "CPU"
            lines.append(f"| {where}: {goal.figure} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured_on(folder, devices)])


def _measured_on(folder: Path, devices: Sequence[str]) -> str:
    """The files that were read."""
    found = [
        figures.newest(folder, kind, device)
        for device in devices
        for kind in ("volume", "ops", "training", "shell")
    ]
    names = [f"{one.kind}: {figures.described(one)}" for one in found if one is not None]
    return f"Seen in {'; '.join(names)}." if names else "Nothing was measured."


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    number = f"{value:.0f}" if abs(value) >= 20 else f"{value:.3g}"
    return f"{number}{unit}" if unit in ("x", "") else f"{number} {unit}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default both")
    options = parser.parse_args(arguments)
    print(table(options.folder, ("cuda", "cpu") if options.device is None else (options.device,)))


if __name__ == "__main__":
    main()
