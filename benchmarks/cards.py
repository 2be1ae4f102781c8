"""Write the tables of README, docs/quality.md and the model cards from the newest results: `python -m benchmarks.cards`.

Text between `<!-- NAME -->` and `<!-- end -->` is replaced; everything else stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.table import RESULTS
from ddmd.evaluation.summary import FIGURES
from ddmd.io.atomic import write_text
from ddmd.models import checkpoint

CARDS = checkpoint.PRETRAINED
ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
QUALITY = ROOT / "docs" / "quality.md"
SHIPPED = ("flair-image-labels", "flair-pixel-labels")
TESTED = ("lgg", "volumes", "unseen")  # data sets, by patients that chose nothing
VALIDATED = ("lgg-validation", "volumes-validation")  # by patients that chose thresholds and recipes


@dataclass(frozen=True)
class Kind:
    """A kind of case: which names it has, and what a reader should know of where it fails."""

    label: str
    names: str  # regular expression of the names of its cases
    fails: str


KINDS = (
    Kind("Glioma, single slices, skull on", r"TCGA", "lesions hardly brighter than their surroundings"),
    Kind("Glioma, volumes", r"brats", "the faint rim is left out"),
    Kind("Multiple sclerosis", r"ms-", "many small lesions are missed; thick slices with the skull on"),
    Kind("White matter hyperintensities", r"wmh", "small ones are missed one by one"),
    Kind("Stroke", r"stroke|isles", "no real ones in training"),
    Kind("Tumour, skull on, unknown scanner", r"brainix", "the base of the skull is marked"),
)


def newest(name: str) -> dict[str, dict[str, Any]]:
    """data set -> the last evaluation of some weights on it; of the test parts of lgg and volumes at least.

    Raises
    ------
    ValueError
        If there is none of lgg or of volumes.
    """
    paths = {
        data: sorted(RESULTS.glob(f"evaluation-{name}-{data}-????-??-??.json")) for data in TESTED + VALIDATED
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
        mean = "" if None in interval else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)
        if pooled or mean:
            lines.append(f"| {label} | {pooled} | {mean} |")
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
        f"against error, AUROC, on the {len(first['patients'])} volumes with lesions: "
        f"{pooled['uncertainty_auroc']:.3f}; p(1 - p) {pooled['bernoulli_auroc']:.3f}, decision uncertainty "
        f"{pooled['decision_auroc']:.3f}. Pooled Dice without the 5 % least certain voxels "
        f"{pooled['dice_without_5_percent']:.3f}, with them {pooled['dice']:.3f}.",
    ])  # fmt: skip


def by_case(
    name: str, data_sets: Sequence[str] = TESTED
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Case -> its row in the newest evaluations of some weights: with a mask, and without."""
    evaluations = [evaluation for data, evaluation in newest(name).items() if data in data_sets]
    return (
        {row["patient"]: row for evaluation in evaluations for row in evaluation["patients"]},
        {row["patient"]: row for evaluation in evaluations for row in evaluation["without_mask"]},
    )


def spread(values: Sequence[float]) -> str:
    """Mean and range of the values, or nothing where there is none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def kinds() -> str:
    """Dice of the shipped systems by kind of lesion, beside the best single threshold, as Markdown.

    Test patients fill the first columns. The last but one has the means over validation patients.
    """
    systems = [by_case(name) for name in SHIPPED]
    chosen = [by_case(name, VALIDATED)[0] for name in SHIPPED]
    lines = [
        f"| kind | test cases | {' | '.join(f'`{name}`' for name in SHIPPED)} | one threshold | validation | "
        "where it fails |",
        "|---" * (5 + len(SHIPPED)) + "|",
    ]
    for kind in KINDS:
        validation = "; ".join(
            f"{fmean(dice):.2f}" for dice in (dices(rows, kind.names) for rows in chosen) if dice
        )
        if validation:
            validation += f" ({len(dices(chosen[0], kind.names))})"
        tested = [dices(rows, kind.names) for rows, _ in systems]
        baseline = dices(systems[0][0], kind.names, "baseline_dice_oracle")
        fails = kind.fails if tested[0] or validation else f"{kind.fails}; not measured"
        cells = [str(len(tested[0])), *map(spread, tested), spread(baseline), validation, fails]
        lines.append(f"| {kind.label} | {' | '.join(cells)} |")
    healthy = systems[0][1]
    marked = [
        f"{fmean(rows[name]['detected_ml'] for name in healthy if name in rows):.1f} ml marked"
        for _, rows in systems
    ]
    lines.append(f"| Healthy | {len(healthy)} | {' | '.join(marked)} | | | nothing is there to find |")
    return "\n".join(lines)


def dices(rows: Mapping[str, Mapping[str, Any]], names: str, key: str = "dice") -> list[float]:
    """Dice, or another figure, of the cases of a kind that have one."""
    return [
        row[key]
        for name, row in rows.items()
        if re.match(names, name, re.IGNORECASE) and row[key] is not None
    ]


def overview() -> str:
    """Dice of the shipped systems, case by case, beside the single threshold, and false-positive volumes."""
    systems = [by_case(name) for name in SHIPPED]
    lines = [
        f"| case | part | lesion (ml) | one threshold, oracle | {' | '.join(SHIPPED)} |",
        "|---" * (4 + len(SHIPPED)) + "|",
    ]
    for data_sets, part in ((TESTED, "test"), (VALIDATED, "validation")):
        systems = [by_case(name, data_sets) for name in SHIPPED]
        pooled = [
            evaluation["pooled"]
            for evaluation in (newest(name).get(data_sets[0]) for name in SHIPPED)
            if evaluation is not None
        ]
        slices = sum(name.startswith("TCGA") for name in systems[0][0])
        if slices:
            label = f"TCGA-LGG slices, {slices} patients, pooled | {part}"
            lines.append(table_row(label, "", pooled[0]["baseline_dice_oracle"], pooled))
        for name in sorted(name for name in systems[0][0] if not name.startswith("TCGA")):
            rows = [with_mask.get(name, {}) for with_mask, _ in systems]
            lesion_ml, oracle = f"{rows[0]['lesion_ml']:.1f}", rows[0]["baseline_dice_oracle"]
            lines.append(table_row(f"{name} | {part}", lesion_ml, oracle, rows))
        for name in systems[0][1]:
            rows = [without.get(name, {}) for _, without in systems]
            label = f"{name}, marked volume (ml) | {part}"
            lines.append(table_row(label, "0.0", None, rows, "detected_ml"))
    return "\n".join(lines)


def leave_one_out() -> str:
    """Dice of validation patients with the settings that the others choose, a system a column, as Markdown."""
    systems = []
    for name in SHIPPED:
        dated = sorted(RESULTS.glob(f"leave-one-out-{name}-????-??-??.json"))
        systems.append(json.loads(dated[-1].read_text())["patients"] if dated else {})
    lines = [
        f"| validation patient | {' | '.join(f'`{name}`, threshold | least peak | Dice' for name in SHIPPED)} |",
        "|---" * (1 + 3 * len(SHIPPED)) + "|",
    ]
    for patient in sorted({patient for system in systems for patient in system}):
        rows = [system.get(patient, {}) for system in systems]
        cells = [number(row.get(key)) for row in rows for key in ("threshold", "min_peak", "dice")]
        lines.append(f"| {patient} | {' | '.join(cells)} |")
    return "\n".join(lines)


def errors() -> str:
    """How well each map ranks the errors of a mask: AUROC, mean over the cases of a kind, as Markdown."""
    maps = ("uncertainty_auroc", "bernoulli_auroc", "decision_auroc")
    named = [f"`{name}`: variance | p(1 - p) | decision uncertainty" for name in SHIPPED]
    lines = [f"| | cases | {' | '.join(named)} |", "|---" * (2 + 3 * len(SHIPPED)) + "|"]
    for data_sets, part in ((TESTED, "test"), (VALIDATED, "validation")):
        systems = [by_case(name, data_sets)[0] for name in SHIPPED]
        for kind in KINDS:
            cells = []
            for rows in systems:
                for key in maps:
                    values = dices(rows, kind.names, key)
                    cells.append(number(fmean(values) if values else None))
            if any(cells):
                count = len(dices(systems[0], kind.names, maps[0]))
                lines.append(f"| {kind.label}, {part} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goals() -> str:
    """What was to be reached, and what was, with image-level labels, as Markdown."""
    image, pixel = (newest(name)["lgg"]["pooled"]["dice"] for name in SHIPPED)
    (tested, healthy), _ = (by_case(name) for name in SHIPPED)
    validated = by_case(SHIPPED[0], VALIDATED)[0]
    lines = [
        "| figure | goal | test patients | validation patients (whose masks chose settings) |",
        "|---|---|---|---|",
    ]
    pooled = newest(SHIPPED[0])["lgg-validation"]["pooled"]["dice"]
    lines.append(f"| TCGA-LGG slices, pooled Dice | 0.70 | {image:.3f} | {pooled:.3f} |")
    lines.append(f"| the same as a share of `{SHIPPED[1]}` | 0.90 | {image / pixel:.3f} | |")
    for label, names, goal in (
        ("glioma volumes, Dice", "brats", "0.86"), ("multiple sclerosis, Dice", "ms-", "0.55"),
        ("white matter hyperintensities, Dice", "wmh", "0.60"), ("stroke, Dice", "stroke|isles", "0.50"),
    ):  # fmt: skip
        cells = [spread(dices(rows, names)) or "no patient" for rows in (tested, validated)]
        lines.append(f"| {label} | {goal} | {' | '.join(cells)} |")
    marked = fmean(row["detected_ml"] for row in healthy.values())
    lines.append(f"| marked in the healthy control (ml) | below 1 | {marked:.1f} | |")
    below = [
        ", ".join(
            sorted(name for name in rows if other[name]["dice"] < rows[name]["dice"] and "TCGA" not in name)
        )
        for rows, other in ((tested, by_case(SHIPPED[1])[0]), (validated, by_case(SHIPPED[1], VALIDATED)[0]))
    ]
    lines.append(
        f"| volumes where `{SHIPPED[1]}` has a lower Dice than `{SHIPPED[0]}` | none | {' | '.join(one or 'none' for one in below)} |"
    )
    for key, label in (("uncertainty_auroc", "variance"), ("decision_auroc", "decision uncertainty")):
        cells = []
        for rows in (tested, validated):
            kinds_above = [
                fmean(dices(rows, kind.names, key)) > fmean(dices(rows, kind.names, "bernoulli_auroc"))
                for kind in KINDS
                if dices(rows, kind.names, key)
            ]
            cells.append(f"{sum(kinds_above)} of {len(kinds_above)}")
        lines.append(
            f"| kinds where the {label} ranks errors better than p(1 - p) | all | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


DRAWN = {
    "draws: energy distance": "draws",
    "random thresholds of p: energy distance": "random thresholds of the probability",
    "the same without faint components: energy distance": "random thresholds without faint components, as draws leave them out",
    "draws of one step: energy distance": "draws of one step",
    "raters: E d(rater, rater')": "between the annotators",
    "AUROC of draws that contradict the mask of the posterior mean": "AUROC against errors: draws that contradict the mask",
    "AUROC of the variance of draws, same mask": "AUROC against errors: variance of the draws",
    "AUROC of p(1 - p) of the posterior mean, same mask": "AUROC against errors: p(1 - p)",
    "no overlap: energy distance": "no overlap",
    "draws: E d(draw, rater)": "distance of draws to the annotators",
    "random thresholds of p: E d(draw, rater)": "distance of random thresholds to the annotators",
    "the same without faint components: E d(draw, rater)": "distance of random thresholds without faint components to them",
    "draws: E d(draw, draw')": "between draws",
    "random thresholds of p: E d(draw, draw')": "between random thresholds",
    "the same without faint components: E d(draw, draw')": "between random thresholds without faint components",
    "draws: best-match Dice": "Dice of the best draw",
    "the same without faint components: best-match Dice": "Dice of the best random threshold without faint components",
    "share of the spread between draws": "share of the spread that lies between draws",
    "calibration error of existence": "calibration error of the probability that a lesion exists",
}  # fmt: skip


def draws() -> str:
    """Drawn masks against two annotators, a case a column, as Markdown."""
    dated = sorted(RESULTS.glob(f"draws-{SHIPPED[0]}-????-??-??.json"))
    cases = json.loads(dated[-1].read_text())["cases"]
    lines = [f"| `{SHIPPED[0]}` | {' | '.join(cases)} | mean |", "|---" * (2 + len(cases)) + "|"]
    for key, label in DRAWN.items():
        values = [case[key] for case in cases.values()]
        known = [value for value in values if value is not None]
        lines.append(
            f"| {label} | {' | '.join(map(number, values))} | {number(fmean(known) if known else None)} |"
        )
    return "\n".join(lines)


def table_row(
    label: str, lesion_ml: str, baseline: float | None, rows: Sequence[Mapping[str, Any]], key: str = "dice"
) -> str:
    """One line of the overview."""
    return f"| {label} | {lesion_ml} | {number(baseline)} | {' | '.join(number(r.get(key)) for r in rows)} |"


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
    texts = {
        README: filled(README.read_text(), {"kinds": kinds()}),
        QUALITY: filled(
            QUALITY.read_text(),
            {
                "goals": goals(),
                "kinds": kinds(),
                "cases": overview(),
                "leave one out": leave_one_out(),
                "draws": draws(),
                "errors": errors(),
            },
        ),
    }
    for name in SHIPPED:
        evaluations, path = newest(name), CARDS / f"{name}.md"
        on_volumes = [evaluations[data] for data in ("volumes", "unseen") if data in evaluations]
        blocks = {"lgg": figures(evaluations["lgg"]), "volumes": volumes(*on_volumes)}
        if "volumes-validation" in evaluations:
            blocks["validation"] = volumes(evaluations["volumes-validation"])
        texts[path] = filled(path.read_text(), blocks)
    return texts


def main() -> None:
    for path, text in texts().items():
        write_text(path, text)


if __name__ == "__main__":
    main()
