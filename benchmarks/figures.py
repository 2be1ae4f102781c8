"""Figures out of the result files of a folder, whatever the age of their form; none where a thing was not measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import comparison

PREALLOCATED = ("eager, preallocated", "careful")  # the second is its name in older files
LIBRARIES = ("diffusers", "MONAI")


@dataclass(frozen=True)
class Result:
    """One result file: `kind` is "ops", "volume", "shell", "training", "observed", "shapes" or "rows", device "cpu" or "cuda"."""

    path: Path
    kind: str
    device: str
    values: Mapping[str, Any]

    @property
    def date(self) -> str:
        """The date in the file's name."""
        return self.path.stem[-10:]


def read(path: Path) -> Result | None:
    """A result file, or None where it is no file of the benchmarks of speed."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or path.stem.startswith("evaluation-"):
        return None
    kind = values.get("kind")
    benchmarks = values.get("benchmarks")
    if isinstance(benchmarks, list) and benchmarks and all(_is_op(one) for one in benchmarks):
        return Result(path, "ops", benchmarks[0]["extra_info"].get("device", "cpu"), values)
    if kind is None and all(isinstance(values.get(key), dict) for key in ("parts", "rivals", "scaling")):
        kind = "volume"  # as files were before they said so
    rows = values.get("rows")
    if kind is None and isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        kind = "rows"
    if not isinstance(kind, str):
        return None
    machine = str(values.get("machine", ""))
    return Result(path, kind, values.get("device", "cuda" if machine.startswith("nvidia") else "cpu"), values)


def _is_op(benchmark: Any) -> bool:
    info = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
    return (
        isinstance(info, dict)
        and {"op", "shape", "backend", "medians", "share_of_copy"} <= info.keys()
        and "ours" in info["medians"]
    )


def newest(folder: Path, kind: str, device: str, having: str | None = None) -> Result | None:
    """The file of the last date of a kind and device; where dates are the same, the last that says its commit.

    Parameters
    ----------
    folder : of result files
    kind, device : as in `Result`
    having : an entry that the file must have
    """
    found = [result for path in folder.glob("*.json") if (result := read(path)) is not None]
    fitting = [
        result
        for result in found
        if (result.kind, result.device) == (kind, device) and (having is None or having in result.values)
    ]
    # files of before do not say their commit
    rank = {result.path: (result.date, bool(commit_of(result)), result.path.name) for result in fitting}
    return max(fitting, key=lambda result: rank[result.path], default=None)


def commit_of(result: Result) -> str:
    """The commit that was measured, in short; empty where the file does not say."""
    values = result.values
    commit = values.get("commit") or values.get("now_commit") or (values.get("commit_info") or {}).get("id")
    return str(commit or "")[:7]


def described(result: Result | None) -> str:
    """What a result was measured on: machine, commit and date."""
    if result is None:
        return "not measured"
    machine = str(result.values.get("machine") or result.path.stem[:-11])
    return ", ".join(part for part in (machine, commit_of(result), result.date) if part)


# --------------------------------------------------------------------------- ops


def op_ratio(info: Mapping[str, Any], *names: str) -> float | None:
    """Time of a rival, the first of the names that ran, over ours; what allocates is held against ours that does."""
    medians = info["medians"]
    name = next((name for name in names if name in medians), None)
    if name is None:
        return None
    own = medians["ours"] if name in PREALLOCATED else medians.get("ours, allocating", medians["ours"])
    return float(medians[name] / own)


def share_of_copy(ops: Result | None, op: str, dtype: str = "") -> float | None:
    """The lowest share of a copy's bandwidth over the shapes of an op."""
    infos = [] if ops is None else [one["extra_info"] for one in ops.values["benchmarks"]]
    shares = [i["share_of_copy"] for i in infos if i["op"] == op and dtype in i["shape"]]
    return min(shares, default=None)


def lowest_op_ratio(ops: Result | None, names: tuple[str, ...]) -> float | None:
    """The lowest ratio of these ops against eager torch with preallocated buffers and torch.compile."""
    infos = [] if ops is None else [one["extra_info"] for one in ops.values["benchmarks"]]
    ratios = [
        ratio
        for info in infos
        if info["op"] in names
        for rival in (PREALLOCATED, ("compile",))
        if (ratio := op_ratio(info, *rival)) is not None
    ]
    return min(ratios, default=None)


# --------------------------------------------------------------------------- whole detections


def rival_ratios(volume: Result | None, steps: int, whole: bool = False) -> dict[str, float]:
    """Rival -> its time over ours at N steps: wall on a GPU, CPU seconds on a CPU.

    Parameters
    ----------
    volume : file of `benchmarks.end_to_end`
    steps : N
    whole : whether all slices of the volume are compared, not the middle ones
    """
    if volume is None:
        return {}
    suffix = f", N = {steps}"
    stored = volume.values.get("comparisons", {})
    keys = [key for key in stored if key.removesuffix(", the slowest").endswith(suffix)]
    clock = "wall_ratio" if volume.device == "cuda" else "cpu_ratio"
    ratios: dict[str, float] = {}
    for key in keys:
        if (int(key.split()[0]) > 32) == whole:
            of_sides = comparison.medians(stored[key])
            ratios |= {name: of_side[clock] for name, of_side in of_sides.items() if name != "ours"}
    if ratios:
        return ratios
    if whole != (volume.values.get("slices_compared", 0) > 32):
        return {}
    older: Mapping[str, float] = volume.values.get("rivals", {})
    return {name.removesuffix(suffix): ratio for name, ratio in older.items() if name.endswith(suffix)}


def best_rival(volume: Result | None, steps: int, whole: bool = False) -> float | None:
    """The lowest time of a library's loop over ours."""
    ratios = rival_ratios(volume, steps, whole)
    return min((ratio for name, ratio in ratios.items() if name.startswith(LIBRARIES)), default=None)


def computation_s(volume: Result | None, samples: int, steps: int) -> float | None:
    """Wall seconds of the computation of all slices with S samples of N steps."""
    of_volume = {} if volume is None else volume.values.get("computation", {})
    for name, seconds in of_volume.items():
        if name.endswith(f", S = {samples}, N = {steps}") and int(name.split()[0]) > 32:
            return float(seconds["wall_s"])
    return None


def part(volume: Result | None, name: str, clock: str = "parts") -> float | None:
    """Seconds of a part of a volume: `clock` is "parts" for wall time, or "parts_cpu"."""
    value = None if volume is None else volume.values.get(clock, {}).get(name)
    return None if value is None else float(value)


def shell_cost(volume: Result | None) -> tuple[float | None, float | None]:
    """From the shell: wall seconds of one volume, and volumes a second of a folder, its start included."""
    shell = {} if volume is None else volume.values.get("shell", {})
    one = shell.get("one volume")
    many = next((k for k in shell if k.startswith("a folder of")), None)
    return (
        None if one is None else float(one["wall_s"]),
        None if many is None else int(many.split()[3]) / float(shell[many]["wall_s"]),
    )
