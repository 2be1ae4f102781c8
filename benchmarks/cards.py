"""Write the tables of the model cards from the newest results: `python -m benchmarks.cards`.

What stands between `<!-- NAME -->` and `<!-- end -->` in a card is made here; the rest is prose.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS
from ddmd import weights

CARDS = Path(weights.__file__).with_name("embedded")
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


def newest(name: str, data: str) -> dict[str, Any] | None:
    """The last evaluation of some weights on some data."""
    paths = sorted(RESULTS.glob(f"evaluation-{name}-{data}-????-??-??.json"))
    return json.loads(paths[-1].read_text()) if paths else None


def figures(found: dict[str, Any]) -> str:
    """Every figure, pooled and as a mean over patients, as Markdown."""
    lines = ["| figure | pooled | mean over patients [95 %] |", "|---|---|---|"]
    for key, label in FIGURES.items():
        pooled = f"{found['pooled'][key]:.3f}" if key in found["pooled"] else ""
        spread = (
            "{:.3f} [{:.3f}, {:.3f}]".format(*found["intervals"][key]) if key in found["intervals"] else ""
        )
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
            f"{row['dice_oracle']:.3f} | {row['baseline_dice_oracle']:.3f} |"
        )
    empty = [f"{row['patient']}: {row['found_ml']:.1f} ml" for one in found for row in one["without_mask"]]
    pooled = found[0]["pooled"]
    return "\n".join([
        *lines, "", f"Flagged where there is nothing to find: {', '.join(empty) or 'not measured'}. Uncertainty "
        f"against error, AUROC, on {', '.join(row['patient'] for row in found[0]['patients'])}: "
        f"{pooled['uncertainty_auroc']:.3f}; pooled Dice without the 5 % least certain voxels "
        f"{pooled['dice_without_5_percent']:.3f}, with them {pooled['dice']:.3f}.",
    ])  # fmt: skip


def filled(card: str, name: str) -> str:
    """The card of these weights with its tables made anew."""
    found = {data: newest(name, data) for data in ("lgg", "volumes", "unseen")}
    there = [one for data in ("volumes", "unseen") if (one := found[data])]
    made = {"volumes": volumes(*there)} | ({"lgg": figures(found["lgg"])} if found["lgg"] else {})
    for block, text in made.items():
        card, count = re.subn(
            rf"(<!-- {block} -->\n).*?(\n<!-- end -->)",
            lambda m, text=text: m[1] + text + m[2],
            card,
            flags=re.S,
        )
        if count != 1:
            raise ValueError(f"the card of {name} has {count} blocks {block!r}; allowed is 1")
    return card


def main() -> None:
    for path in sorted(CARDS.glob("*.md")):
        path.write_text(filled(path.read_text(), path.stem))


if __name__ == "__main__":
    main()
