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
import torch
from matplotlib.figure import Figure

from ddmd.cohort.cases import Case
from ddmd.data.phantom import phantom
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from ddmd.training.augmentation import Augmentation
from ddmd.training.batch_maker import BatchMaker
from ddmd.training.config import DataEntry, DenoiserStage, TrainConfig
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.lesion_parameters import KINDS, PainterConfig
from ddmd.training.prepared_case import PreparedCase

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
    """Lesions of every kind painted on slices of a healthy phantom, a kind a row; their masks outlined."""
    volume = Volume.read(phantom(seed=seed, lesions=0, sequences=("flair",)).images, require=("flair",))
    cut = extract(volume, ("flair",), SliceGrid())
    image, head = cut.image.numpy(), cut.brain[:, 0].numpy()
    rows = slice(len(cut) * 2 // 5, len(cut) * 4 // 5)
    offset_mm = cut.offset * volume.spacing[2]
    case = PreparedCase(
        Case("phantom", "phantom", "phantom", {}), image[rows].astype(np.float16), head[rows], head[rows],
        np.zeros(len(head[rows]), np.int8), cut.offset, offset_mm,
    )  # fmt: skip
    still = Augmentation(flip=0, affine=0, elastic=0, contrast=0, bias=0, strong_bias=0, blur=0, coarse=0, ringing=0, noise=0, saturation=0)  # fmt: skip
    stage = DenoiserStage(
        share_normal=0, share_painted=1, share_painted_beside=0, share_masked=0, hard_from=0.5
    )
    config = TrainConfig(data=(DataEntry("phantom"),), size=160, seed=seed, denoiser_stage=stage)
    slices = DeviceSlices([case], torch.device("cpu"), cut.grid.mm)
    figure = Figure(figsize=(1.8 * count, 1.9 * len(KINDS)))
    for kind, axes in enumerate(figure.subplots(len(KINDS), count)):
        painted = PainterConfig(kinds=tuple(float(i == kind) for i in range(len(KINDS))))
        batches = BatchMaker(slices, config, "lesions", {"phantom": 1.0}, augmentation_config=still, painter_config=painted, stripped=0)  # fmt: skip
        batch = batches.samples(100 * kind, count)
        for ax, planes, mask in zip(axes, batch["planes"], batch["mask"], strict=True):
            ax.axis("off")
            ax.imshow(planes[1].numpy(), cmap="gray", vmin=-2, vmax=2.5, origin="lower")
            if mask.any():
                ax.contour(mask[0].numpy(), [0.5], colors="red", linewidths=0.7)
        axes[0].set_title(KINDS[kind], loc="left", fontsize=9)
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
