"""Write the tables of README and of the model cards from the newest results: `python -m benchmarks.cards`.

Text between `<!-- NAME -->` and `<!-- end -->` is replaced; everything else stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS
from ddmd.evaluation.summary import FIGURES
from ddmd.io.atomic import write_text
from ddmd.models import checkpoint

CARDS = checkpoint.PRETRAINED
README = Path(__file__).parents[1] / "README.md"
SHIPPED = ("flair-image-labels", "flair-pixel-labels")
DESCRIPTIONS = {"brainix-unregistered": "brainix, a source training never saw, skull on"}


def newest(name: str) -> dict[str, dict[str, Any]]:
    """data set -> the last evaluation of some weights on it; of lgg and volumes at least.

    Raises
    ------
    ValueError
        If there is none of lgg or of volumes.
    """
    paths = {
        data: sorted(RESULTS.glob(f"evaluation-{name}-{data}-????-??-??.json"))
        for data in ("lgg", "volumes", "unseen")
    }
    for data in ("lgg", "volumes"):
        if not paths[data]:
            raise ValueError(f"no evaluation of {name} on {data} is kept; make it by benchmarks.evaluations")
    return {data: json.loads(dated[-1].read_text()) for data, dated in paths.items() if dated}


def number(value: float | None) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.3f}"


def figures(evaluation: Mapping[str, Any]) -> str:
    """Every figure of an evaluation, pooled and as a mean over patients, as Markdown."""
    lines = ["| figure | pooled | mean over patients [95 %] |", "|---|---|---|"]
    for name, label in FIGURES.items():
        if name not in evaluation["pooled"] and name not in evaluation["intervals"]:
            continue
        pooled = number(evaluation["pooled"].get(name))
        interval = evaluation["intervals"].get(name, (None,))
        spread = "" if None in interval else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)
        lines.append(f"| {label} | {pooled} | {spread} |")
    return "\n".join(lines)


def volumes(*evaluations: Mapping[str, Any]) -> str:
    """Volumes one by one, as Markdown, and a line on all volumes of the first evaluation together."""
    lines = [
        "| volume | lesion (ml) | detected (ml) | Dice | Dice, oracle threshold | one threshold on smoothed FLAIR, oracle |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = [row for evaluation in evaluations for row in evaluation["patients"]]
    for row in sorted(rows, key=lambda row: row["patient"]):
        lines.append(
            f"| {row['patient']} | {row['lesion_ml']:.1f} | {row['detected_ml']:.1f} | {number(row['dice'])} | "
            f"{number(row['dice_oracle'])} | {number(row['baseline_dice_oracle'])} |"
        )
    empty = [
        f"{row['patient']}: {row['detected_ml']:.1f} ml"
        for evaluation in evaluations
        for row in evaluation["without_mask"]
    ]
    first = evaluations[0]
    pooled = first["pooled"]
    return "\n".join([
        *lines, "", f"False-positive volume of healthy controls: {', '.join(empty) or 'not measured'}. Uncertainty "
        f"against error, AUROC, on {', '.join(row['patient'] for row in first['patients'])}: "
        f"{pooled['uncertainty_auroc']:.3f}; pooled Dice without the 5 % least certain voxels "
        f"{pooled['dice_without_5_percent']:.3f}, with them {pooled['dice']:.3f}.",
    ])  # fmt: skip


def overview() -> str:
    """Dice of the shipped systems beside the single threshold, and false-positive volumes, as Markdown."""
    evaluations = [newest(name) for name in SHIPPED]
    lines = [
        f"| | one threshold on smoothed FLAIR, oracle | {' | '.join(SHIPPED)} |",
        "|---" * (2 + len(SHIPPED)) + "|",
    ]
    pooled = [by_data["lgg"]["pooled"] for by_data in evaluations]
    label = f"TCGA-LGG slices, {len(evaluations[0]['lgg']['patients'])} patients, pooled"
    lines.append(table_row(label, pooled[0]["baseline_dice_oracle"], pooled, "dice"))
    by_name = [
        {
            row["patient"]: row
            for data in ("volumes", "unseen")
            if data in by_data
            for row in by_data[data]["patients"]
        }
        for by_data in evaluations
    ]
    for name in sorted(by_name[0], key=lambda name: (name in DESCRIPTIONS, name)):
        rows = [own.get(name, {}) for own in by_name]
        lines.append(table_row(DESCRIPTIONS.get(name, name), rows[0]["baseline_dice_oracle"], rows, "dice"))
    for row in evaluations[0]["volumes"]["without_mask"]:
        same = [
            next((o for o in by_data["volumes"]["without_mask"] if o["patient"] == row["patient"]), {})
            for by_data in evaluations
        ]
        lines.append(table_row(f"{row['patient']}, false-positive volume (ml)", None, same, "detected_ml"))
    return "\n".join(lines)


def table_row(label: str, baseline: float | None, rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """One line of the overview."""
    return f"| {label} | {number(baseline)} | {' | '.join(number(row.get(key)) for row in rows)} |"


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """A text with the contents of these blocks replaced.

    Raises
    ------
    ValueError
        If a block is missing, or appears more than once.
    """
    for block, content in blocks.items():
        text, count = re.subn(
            rf"(<!-- {block} -->\n).*?(\n<!-- end -->)",
            lambda m, content=content: m[1] + content + m[2],
            text,
            flags=re.S,
        )
        if count != 1:
            raise ValueError(f"block {block!r} appears {count} times; it must appear once")
    return text


def texts() -> dict[Path, str]:
    """path -> what its text should be, of every file with tables."""
    texts = {README: filled(README.read_text(), {"dice": overview()})}
    for name in SHIPPED:
        evaluations, path = newest(name), CARDS / f"{name}.md"
        on_volumes = [evaluations[data] for data in ("volumes", "unseen") if data in evaluations]
        blocks = {"lgg": figures(evaluations["lgg"]), "volumes": volumes(*on_volumes)}
        texts[path] = filled(path.read_text(), blocks)
    return texts


def main() -> None:
    for path, text in texts().items():
        write_text(path, text)


if __name__ == "__main__":
    main()
