"""Pictures for the docs: `python -m benchmarks.pictures [RESULTS] [DOCS]`.

Curves from the newest results files, and painted lesions on a slice of the phantom.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ddmd.data.phantom import phantom
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from ddmd.training import LesionPainter

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"


def newest(folder: Path, kind: str) -> Path | None:
    """The file `kind`-...-DATE.json of the latest date."""
    dated = sorted(folder.glob(f"{kind}-*.json"), key=lambda path: (path.stem[-10:], path.name))
    return dated[-1] if dated else None


def quality(results: dict[str, Any]) -> Figure:
    """Dice over N of both fast samplers; Dice and AUROC of the uncertainty over S."""
    rows = results["rows"]
    figure = Figure(figsize=(10, 3.4))
    left, right = figure.subplots(1, 2)
    for sweep, sampler in dict.fromkeys((r["sweep"], r["sampler"]) for r in rows if r["sweep"][0] == "N"):
        own = [r for r in rows if (r["sweep"], r["sampler"]) == (sweep, sampler)]
        own.sort(key=lambda r: r["steps"])
        left.plot([r["steps"] for r in own], [r["dice"] for r in own], marker="o", label=sampler + sweep[1:])
    left.set(xlabel="steps N", ylabel="pooled Dice", xscale="log")
    left.legend()
    own = [r for r in rows if r["sweep"] == "S"]
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


def scaling(results: dict[str, Any]) -> Figure:
    """Seconds of each part of a volume, and how they grow with S, N, slices and batch."""
    figure = Figure(figsize=(11, 3.4))
    axes = figure.subplots(1, 5, width_ratios=[2, 1, 1, 1, 1])
    parts = {k: v for k, v in results["parts"].items() if k != "whole, file to files"}
    axes[0].barh(list(parts), list(parts.values()))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="seconds of one volume")
    default = next(iter(results["scaling"]))
    slices, samples, steps = (int(n) for n in re.findall(r"\d+", default))
    seconds_of_default = results["scaling"][default]
    points = {
        "S": {samples: seconds_of_default},
        "N": {steps: seconds_of_default},
        "slices": {slices: seconds_of_default},
        "batch": {},
    }
    for name, seconds in results["scaling"].items():
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        for key in points:
            if len(numbers) == 1 and key in name:
                points[key][numbers[0]] = seconds
    for ax, (key, curve) in zip(axes[1:], points.items(), strict=True):
        ax.plot(sorted(curve), [curve[n] for n in sorted(curve)], marker="o")
        ax.set(xlabel=key, ylim=(0, None))
    axes[1].set(ylabel=f"seconds of {slices} slices")
    figure.tight_layout()
    return figure


def painter(count: int = 6, seed: int = 0) -> Figure:
    """A healthy phantom's slice, and lesions painted on it: as by default above, hard ones below."""
    volume = Volume.read(phantom(seed=seed, lesions=0, sequences=("flair",)).images, require=("flair",))
    cut = extract(volume, ("flair",), SliceGrid())
    middle = len(cut) * 3 // 5
    planes = cut.planes(1)[middle, :, None].numpy()
    brain, paint, offset_mm = cut.brain[middle, 0].numpy(), LesionPainter(), cut.offset * volume.spacing[2]
    figure = Figure(figsize=(1.8 * (count + 1), 4.4))
    for row, axes in enumerate(figure.subplots(2, count + 1)):
        for number, ax in enumerate(axes):
            ax.axis("off")
            shown, mask = planes, np.zeros_like(brain)
            if number:
                rng = np.random.default_rng((seed, row, number))
                shown, mask = paint(planes, brain, cut.grid.mm, offset_mm, rng, hard=bool(row))
            ax.imshow(shown[1, 0], cmap="gray", vmin=-2, vmax=2.5, origin="lower")
            if mask.any():
                ax.contour(mask, [0.5], colors="red", linewidths=0.7)
    figure.tight_layout(pad=0.3)
    return figure


def main(arguments: Sequence[str] = ()) -> None:
    """Draw the newest results."""
    results, docs = (Path(a) for a in (*arguments, *(RESULTS, DOCS)[len(arguments) :]))
    for kind, draw in (("quality", quality), ("volume", scaling)):
        path = newest(results, kind)
        if path is not None:
            draw(json.loads(path.read_text())).savefig(docs / f"{kind}.png", dpi=100)
            print(docs / f"{kind}.png", "from", path.name)
    painter().savefig(docs / "painter.png", dpi=80)
    print(docs / "painter.png")


if __name__ == "__main__":
    main(sys.argv[1:])
