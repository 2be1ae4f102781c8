"""Make the tables of figures from the JSON files of a folder: `python -m benchmarks.table [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import comparison, figures, shell, training
from benchmarks.figures import PREALLOCATED, Result

RESULTS = Path(__file__).with_name("results")


def ops_table(result: Result) -> str:
    """Times of each op and its rivals, as Markdown."""
    head = (
        "op", "shape", "served by", "ours (ms)", "against eager", "against eager, preallocated",
        "against torch.compile", "share of a copy's bandwidth",
    )  # fmt: skip
    rows = []
    for bench in result.values["benchmarks"]:
        info = bench["extra_info"]
        ratios = (figures.op_ratio(info, *names) for names in (("eager",), PREALLOCATED, ("compile",)))
        rows.append(
            (
                info["op"], info["shape"], info["backend"], f"{1000 * info['medians']['ours']:.2f}",
                *(times(ratio) for ratio in ratios), f"{100 * info['share_of_copy']:.0f} %",
            )
        )  # fmt: skip
    return markdown(head, rows)


def volume_table(result: Result) -> str:
    """One volume from file to files part by part, against the rivals, and over S, N and slices, as Markdown."""
    values = result.values
    blocks = []
    if "parts" in values:
        cpu = values.get("parts_cpu", {})
        rows = [
            (name, f"{s:.2f}", f"{cpu[name]:.2f}" if name in cpu else "")
            for name, s in values["parts"].items()
        ]
        blocks.append(markdown(("part", "wall (s)", "CPU (s)"), rows))
    if values.get("rivals"):
        rivals = [(name, times(value, 2)) for name, value in values["rivals"].items()]
        rivals += [(name, f"not run: {why}") for name, why in values.get("missing", {}).items()]
        blocks.append(markdown(("rival on the same network and N", "its time over ours"), rivals))
    for key, stored in values.get("comparisons", {}).items():
        compared = [
            (
                name,
                f"{1000 * f['wall_s']:.0f}",
                f"{1000 * f['cpu_s']:.0f}",
                times(f["wall_ratio"], 2),
                times(f["cpu_ratio"], 2),
            )
            for name, f in comparison.medians(stored).items()
        ]
        compared += [(name, f"not run: {why}", "", "", "") for name, why in stored["missing"].items()]
        title = f"{key}, {len(stored['rounds'])} rounds"
        blocks.append(markdown((title, "wall (ms)", "CPU (ms)", "wall over ours", "CPU over ours"), compared))
    for section in ("computation", "scaling"):
        if section in values:
            seconds = [(name, *_clocks(value)) for name, value in values[section].items()]
            blocks.append(markdown((section, "wall (s)", "CPU (s)"), seconds))
    if values.get("shell"):
        rows = [(name, *_clocks(value)) for name, value in values["shell"].items()]
        blocks.append(markdown(("from the shell", "wall (s)", "CPU (s)"), rows))
    return "\n\n".join(blocks)


def _clocks(value: Any) -> tuple[str, str]:
    """Wall and CPU seconds, as files keep them now and kept them before."""
    if isinstance(value, Mapping):
        return f"{value['wall_s']:.3f}", f"{value['cpu_s']:.3f}"
    return f"{value:.3f}", ""


def shell_table(result: Result) -> str:
    """CPU and wall seconds of a volume from the shell in two checkouts, as Markdown."""
    pairs = result.values.get("pairs", [])
    rows = []
    for name in dict.fromkeys(pair["input"] for pair in pairs):
        f = shell.medians([pair for pair in pairs if pair["input"] == name])
        rows.append(
            (
                name, str(f["volumes"]), f"{f['base_cpu_s']:.1f} / {f['now_cpu_s']:.1f}", times(f["cpu_s_ratio"], 2),
                times(f["wall_s_ratio"], 2), f"{f['base_peak_mib']:.0f} / {f['now_peak_mib']:.0f}", f"{f['dice']:.4f}",
            )
        )  # fmt: skip
    base = result.values["base_commit"]
    head = (
        "input", "volumes", f"CPU seconds a volume, {base} / now", "ratio", "ratio of wall time",
        "peak memory (MiB)", "lowest Dice of the masks",
    )  # fmt: skip
    return markdown(head, rows)


def training_table(result: Result) -> str:
    """Seconds a step of every stage, as Markdown."""
    rounds = result.values.get("rounds", [])
    rows = []
    for stage, f in (training.medians(rounds) if rounds else {}).items():
        base = f"{f['base_cpu_s']:.2f} / " if "base_cpu_s" in f else ""
        busy = f"{100 * f['gpu_busy']:.0f} %" if "gpu_busy" in f else ""
        rows.append(
            (
                stage,
                f"{base}{f['now_cpu_s']:.2f}",
                times(f.get("cpu_s_ratio"), 2),
                f"{1 / f['now_wall_s']:.1f}",
                busy,
            )
        )
    base = result.values["base_commit"]
    cpu = "CPU seconds a step" + (f", {base} / now" if base else "")
    return markdown(("stage", cpu, "ratio", "steps a second by the wall clock", "GPU busy"), rows)


def rows_table(result: Result) -> str:
    """Rows of figures, as the quality curves and the ablation are, as Markdown."""
    names = list(result.values["rows"][0])
    shown = [
        tuple(f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n]) for n in names)
        for row in result.values["rows"]
    ]
    return markdown([n.replace("_", " ") for n in names], shown)


def times(ratio: float | None, digits: int = 1) -> str:
    """A ratio as text."""
    return "not run" if ratio is None else f"{ratio:.{digits}f}x"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


TABLES = {
    "ops": ops_table, "volume": volume_table, "shell": shell_table, "training": training_table, "rows": rows_table,
}  # fmt: skip


def table_of(path: Path) -> str | None:
    """The table of one file by what it holds, or None where it is no file of these benchmarks."""
    result = figures.read(path)
    if result is None or result.kind not in TABLES:
        return None
    return f"### {path.stem}\n\n{TABLES[result.kind](result)}"


def main(arguments: Sequence[str] = ()) -> None:
    """Print a table for every results file of a folder, benchmarks/results by default."""
    for path in sorted(Path(arguments[0] if arguments else RESULTS).glob("*.json")):
        table = table_of(path)
        if table is not None:
            print(table, end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
