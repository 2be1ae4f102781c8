"""Curves for the docs from the newest results files: `python -m benchmarks.pictures [RESULTS] [DOCS]`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"


def newest(folder: Path, kind: str) -> Path | None:
    """The file `kind`-...-DATE.json of the latest date."""
    found = sorted(folder.glob(f"{kind}-*.json"), key=lambda path: path.stem[-10:])
    return found[-1] if found else None


def quality(found: dict[str, Any]) -> Figure:
    """Dice over N of both fast samplers; Dice and AUROC of the uncertainty over S."""
    rows, default = found["rows"], found["default"]
    figure = Figure(figsize=(10, 3.4))
    left, right = figure.subplots(1, 2)
    for sampler in ("ddim", "ddpm", "dpm++2m"):
        own = [r for r in rows if r["sampler"] == sampler and r["samples"] == default["samples"]]
        own.sort(key=lambda r: r["steps"])
        left.plot([r["steps"] for r in own], [r["dice"] for r in own], marker="o", label=sampler)
    left.set(xlabel="steps N", ylabel="pooled Dice", xscale="log")
    left.legend()
    own = [r for r in rows if r["sampler"] == default["sampler"] and r["steps"] == default["steps"]]
    own.sort(key=lambda r: r["samples"])
    several = [r for r in own if r["samples"] > 1]
    right.plot([r["samples"] for r in own], [r["dice"] for r in own], marker="o", label="pooled Dice")
    right.plot(
        [r["samples"] for r in several], [r["uncertainty_auroc"] for r in several],
        marker="o", label="uncertainty against error, AUROC",
    )  # fmt: skip
    right.set(xlabel="samples S", ylim=(0, 1))
    right.legend()
    figure.tight_layout()
    return figure


def scaling(found: dict[str, Any]) -> Figure:
    """Where the seconds of a volume go, and how they grow with S, N, slices and batch."""
    figure = Figure(figsize=(11, 3.4))
    axes = figure.subplots(1, 5, width_ratios=[2, 1, 1, 1, 1])
    parts = {k: v for k, v in found["parts"].items() if k != "whole, file to files"}
    axes[0].barh(list(parts), list(parts.values()))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="seconds of one volume")
    whole = next(iter(found["scaling"]))
    slices, samples, steps = (int(n) for n in re.findall(r"\d+", whole))
    at = found["scaling"][whole]
    known = {"S": {samples: at}, "N": {steps: at}, "slices": {slices: at}, "batch": {}}
    for name, seconds in found["scaling"].items():
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        for key in known:
            if len(numbers) == 1 and key in name:
                known[key][numbers[0]] = seconds
    for ax, (key, points) in zip(axes[1:], known.items(), strict=True):
        ax.plot(sorted(points), [points[n] for n in sorted(points)], marker="o")
        ax.set(xlabel=key, ylim=(0, None))
    axes[1].set(ylabel=f"seconds of {slices} slices")
    figure.tight_layout()
    return figure


def main(arguments: Sequence[str] = ()) -> None:
    """Draw what has been measured."""
    results, docs = (Path(a) for a in (*arguments, *(RESULTS, DOCS)[len(arguments) :]))
    for kind, draw in (("quality", quality), ("volume", scaling)):
        path = newest(results, kind)
        if path is not None:
            draw(json.loads(path.read_text())).savefig(docs / f"{kind}.png", dpi=100)
            print(docs / f"{kind}.png", "from", path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
