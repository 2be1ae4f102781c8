"""Write the tables of the model cards and README's from the newest results: `python -m benchmarks.cards`.

What stands between `<!-- NAME -->` and `<!-- end -->` is made here; the rest is prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS
from ddmd.models import checkpoint

CARDS = checkpoint.PRETRAINED
README = Path(__file__).parents[1] / "README.md"
SHIPPED = ("flair-image-labels", "flair-pixel-labels")
KNOWN_AS = {"brainix-unregistered": "brainix, a source training never saw, skull on"}
FIGURES = {
    "dice": "Dice",
    "dice_bearing": "Dice, slices with lesion only",
    "dice_oracle": "Dice, oracle threshold",
    "baseline_dice": "one threshold on smoothed intensity, chosen on validation patients",
    "baseline_dice_oracle": "one threshold on smoothed intensity, oracle",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "pixel accuracy",
    "accuracy_of_empty_mask": "pixel accuracy of an empty mask",
    "auprc": "AUPRC",
    "hd95_mm": "HD95 (mm)",
    "lesion_recall": "lesion-wise recall",
    "false_positives": "false positives a volume",
    "slice_auroc": "slice-level AUROC",
    "uncertainty_auroc": "uncertainty against error, AUROC",
    "dice_without_5_percent": "Dice without the 5 % least certain voxels",
    "calibration_error": "calibration error",
}


def newest(name: str) -> dict[str, dict[str, Any]]:
    """data set -> the last evaluation of some weights on it; of lgg and volumes at least."""
    paths = {
        data: sorted(RESULTS.glob(f"evaluation-{name}-{data}-????-??-??.json"))
        for data in ("lgg", "volumes", "unseen")
    }
    for data in ("lgg", "volumes"):
        if not paths[data]:
            raise ValueError(f"no evaluation of {name} on {data} is kept; make it by benchmarks.evaluations")
    return {data: json.loads(found[-1].read_text()) for data, found in paths.items() if found}


def number(value: float | None) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.3f}"


def figures(found: dict[str, Any]) -> str:
    """Every figure, pooled and as a mean over patients, as Markdown."""
    lines = ["| figure | pooled | mean over patients [95 %] |", "|---|---|---|"]
    for key, label in FIGURES.items():
        pooled = number(found["pooled"].get(key))
        interval = found["intervals"].get(key, (None,))
        spread = "" if None in interval else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)
        lines.append(f"| {label} | {pooled} | {spread} |")
    return "\n".join(lines)


def volumes(*found: dict[str, Any]) -> str:
    """Volumes one by one, as Markdown, and what is said of all of them together."""
    lines = [
        "| volume | lesion (ml) | found (ml) | Dice | Dice, oracle threshold | one threshold on smoothed FLAIR, oracle |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted((row for one in found for row in one["patients"]), key=lambda row: row["patient"]):
        lines.append(
            f"| {row['patient']} | {row['lesion_ml']:.1f} | {row['found_ml']:.1f} | {row['dice']:.3f} | "
            f"{row['dice_oracle']:.3f} | {number(row['baseline_dice_oracle'])} |"
        )
    empty = [f"{row['patient']}: {row['found_ml']:.1f} ml" for one in found for row in one["without_mask"]]
    pooled = found[0]["pooled"]
    return "\n".join([
        *lines, "", f"Flagged where there is nothing to find: {', '.join(empty) or 'not measured'}. Uncertainty "
        f"against error, AUROC, on {', '.join(row['patient'] for row in found[0]['patients'])}: "
        f"{pooled['uncertainty_auroc']:.3f}; pooled Dice without the 5 % least certain voxels "
        f"{pooled['dice_without_5_percent']:.3f}, with them {pooled['dice']:.3f}.",
    ])  # fmt: skip


def overview() -> str:
    """Dice of both systems beside the single threshold, and millilitres where there is nothing, as Markdown."""
    found = [newest(name) for name in SHIPPED]
    lines = [
        f"| | one threshold on smoothed FLAIR, oracle | {' | '.join(SHIPPED)} |",
        "|---" * (2 + len(SHIPPED)) + "|",
    ]
    pooled = [one["lgg"]["pooled"] for one in found]
    label = f"TCGA-LGG slices, {len(found[0]['lgg']['patients'])} patients, pooled"
    lines.append(row_of(label, pooled[0]["baseline_dice_oracle"], pooled, "dice"))
    volume = [
        {
            row["patient"]: row
            for data in ("volumes", "unseen")
            if data in one
            for row in one[data]["patients"]
        }
        for one in found
    ]
    for name in sorted(volume[0], key=lambda name: (name in KNOWN_AS, name)):
        rows = [one[name] for one in volume]
        lines.append(row_of(KNOWN_AS.get(name, name), rows[0]["baseline_dice_oracle"], rows, "dice"))
    for row in found[0]["volumes"]["without_mask"]:
        same = [
            other for one in found for other in one["volumes"]["without_mask"]
            if other["patient"] == row["patient"]
        ]  # fmt: skip
        lines.append(row_of(f"{row['patient']}, ml flagged where there is nothing", None, same, "found_ml"))
    return "\n".join(lines)


def row_of(label: str, baseline: float | None, rows: Sequence[dict[str, Any]], key: str) -> str:
    """One line of the overview."""
    return f"| {label} | {number(baseline)} | {' | '.join(number(row[key]) for row in rows)} |"


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """A text with what stands in these blocks made anew.

    Raises
    ------
    ValueError
        If a block is not there, or more than once.
    """
    for block, made in blocks.items():
        text, count = re.subn(
            rf"(<!-- {block} -->\n).*?(\n<!-- end -->)",
            lambda m, made=made: m[1] + made + m[2],
            text,
            flags=re.S,
        )
        if count != 1:
            raise ValueError(f"block {block!r} is there {count} times; allowed is 1")
    return text


def texts() -> dict[Path, str]:
    """Every text with tables -> what it should be."""
    made = {README: filled(README.read_text(), {"dice": overview()})}
    for name in SHIPPED:
        found, path = newest(name), CARDS / f"{name}.md"
        there = [found[data] for data in ("volumes", "unseen") if data in found]
        blocks = {"lgg": figures(found["lgg"]), "volumes": volumes(*there)}
        made[path] = filled(path.read_text(), blocks)
    return made


def main() -> None:
    for path, text in texts().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
