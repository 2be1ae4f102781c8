"""Make the tables of figures from the JSON files of a folder: `python -m benchmarks.table [FOLDER]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PREALLOCATED = ("eager, preallocated", "careful")  # the second is its name in older files


def ops_table(path: Path) -> str:
    """Times of each op and its rivals, as Markdown."""
    found = _read(path)
    lines = [
        f"### {path.stem}", "",
        "| op | shape | served by | ours (ms) | against eager | against eager, preallocated | against torch.compile | share of a copy's bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for bench in found["benchmarks"]:
        info = bench["extra_info"]
        medians = info["medians"]

        def ratio(*names: str, medians: dict[str, float] = medians) -> str:
            name = next((name for name in names if name in medians), None)
            if name is None:
                return "not run"
            # what allocates its results is held against ours that does
            own = (
                medians["ours"] if name in PREALLOCATED else medians.get("ours, allocating", medians["ours"])
            )
            return f"{medians[name] / own:.1f}x"

        lines.append(
            f"| {info['op']} | {info['shape']} | {info['backend']} | {1000 * medians['ours']:.2f} | {ratio('eager')} | "
            f"{ratio(*PREALLOCATED)} | {ratio('compile')} | {100 * info['share_of_copy']:.0f} % |"
        )
    return "\n".join(lines)


def volume_table(path: Path) -> str:
    """Seconds of one volume from file to files, part by part, and against the rivals, as Markdown."""
    found = _read(path)
    lines = [f"### {path.stem}", "", "| part | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in found["parts"].items()]
    lines += ["", "| rival on the same network and N | its time over ours |", "|---|---|"]
    lines += [f"| {name} | {value:.2f}x |" for name, value in found["rivals"].items()]
    lines += [f"| {name} | not run: {why} |" for name, why in found.get("missing", {}).items()]
    lines += ["", "| setting | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in found["scaling"].items()]
    return "\n".join(lines)


def rows_table(path: Path) -> str:
    """Rows of figures, as the quality curves and the ablation are, as Markdown."""
    found = _read(path)
    names = list(found["rows"][0])
    lines = [
        f"### {path.stem}",
        "",
        f"| {' | '.join(n.replace('_', ' ') for n in names)} |",
        "|---" * len(names) + "|",
    ]
    for row in found["rows"]:
        shown = (f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n]) for n in names)
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    return found if isinstance(found, dict) else {}


def table_of(path: Path) -> str | None:
    """The table of one file by what it holds, or None where it is no file of these benchmarks."""
    try:
        found = _read(path)
    except (OSError, ValueError):
        return None
    if path.stem.startswith("evaluation-"):
        return None  # `benchmarks.cards` writes these where they are read
    if all(isinstance(found.get(key), dict) for key in ("parts", "rivals", "scaling")):
        return volume_table(path)
    rows = found.get("rows")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        return rows_table(path)
    benchmarks = found.get("benchmarks")
    if isinstance(benchmarks, list) and benchmarks and all(_is_op(bench) for bench in benchmarks):
        return ops_table(path)
    return None


def _is_op(bench: Any) -> bool:
    info = bench.get("extra_info") if isinstance(bench, dict) else None
    return (
        isinstance(info, dict)
        and {"op", "shape", "backend", "medians", "share_of_copy"} <= info.keys()
        and "ours" in info["medians"]
    )


def main(arguments: Sequence[str] = ()) -> None:
    """Print a table for every results file of a folder, benchmarks/results by default."""
    for path in sorted(Path(arguments[0] if arguments else RESULTS).glob("*.json")):
        table = table_of(path)
        if table is not None:
            print(table, end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
