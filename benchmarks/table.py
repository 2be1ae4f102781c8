"""Make the tables of figures from the JSON files of a folder: `python -m benchmarks.table [FOLDER]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
FEW = 12  # patients that are listed one by one


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


def evaluation_table(path: Path) -> str:
    """Figures of an evaluation, and its patients where they are few, as Markdown."""
    found = json.loads(path.read_text())

    def show(value: float | str | None) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [f"### {path.stem}", "", "| figure | pooled | mean over patients [95 %] |", "|---|---|---|"]
    for name in dict.fromkeys((*found["pooled"], *found["intervals"])):
        mean, low, high = found["intervals"].get(name, (None, None, None))
        spread = "" if mean is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name.replace('_', ' ')} | {show(found['pooled'].get(name))} | {spread} |")
    rows = found["patients"]
    if len(rows) <= FEW:
        lines += ["", f"| {' | '.join(n.replace('_', ' ') for n in rows[0])} |", "|---" * len(rows[0]) + "|"]
        lines += [f"| {' | '.join(show(v) for v in row.values())} |" for row in rows]
    lines += [f"\n{row['patient']}: {row['found_ml']:.1f} ml found, no mask" for row in found["without_mask"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> None:
    """Print a table for every results file of a folder, benchmarks/results by default."""
    kinds = {
        "volume": volume_table, "quality": rows_table, "ablation": rows_table, "evaluation": evaluation_table,
    }  # fmt: skip
    for path in sorted(Path(arguments[0] if arguments else RESULTS).glob("*.json")):
        print(kinds.get(path.stem.split("-")[0], ops_table)(path), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
