"""Make the tables of figures from the JSON files of a folder: `python -m benchmarks.table [FOLDER]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def ops_table(path: Path) -> str:
    """Times of each op and its rivals, as Markdown."""
    found = json.loads(path.read_text())
    lines = [
        f"### {path.stem}", "",
        "| op | shape | served by | ours (ms) | against eager | against careful eager | against torch.compile | share of a copy's bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for bench in found["benchmarks"]:
        info = bench["extra_info"]
        medians = info["medians"]

        def ratio(name: str, medians: dict[str, float] = medians) -> str:
            # what allocates its results is held against ours that does
            own = medians["ours"] if name == "careful" else medians.get("ours, allocating", medians["ours"])
            return f"{medians[name] / own:.1f}x" if name in medians else "not run"

        lines.append(
            f"| {info['op']} | {info['shape']} | {info['backend']} | {1000 * medians['ours']:.2f} | {ratio('eager')} | "
            f"{ratio('careful')} | {ratio('compile')} | {100 * info['share_of_copy']:.0f} % |"
        )
    return "\n".join(lines)


def volume_table(path: Path) -> str:
    """Seconds of one volume from file to files, part by part, and against the rivals, as Markdown."""
    found = json.loads(path.read_text())
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
    found = json.loads(path.read_text())
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


def main(arguments: Sequence[str] = ()) -> None:
    """Print a table for every results file of a folder, benchmarks/results by default.

    Evaluations are not among them: `benchmarks.cards` writes those where they are read.
    """
    kinds = {"volume": volume_table, "quality": rows_table, "ablation": rows_table}
    for path in sorted(Path(arguments[0] if arguments else RESULTS).glob("*.json")):
        kind = path.stem.split("-")[0]
        if kind != "evaluation":
            print(kinds.get(kind, ops_table)(path), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
