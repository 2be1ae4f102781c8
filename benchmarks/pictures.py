"""Pictures for the docs: `python -m benchmarks.pictures [RESULTS] [DOCS]`.

Curves from the newest results files, and painted lesions on a slice of the phantom.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ddmd.cohort.cases import Case
from ddmd.data.phantom import phantom
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from ddmd.models.denoiser import DenoiserConfig
from ddmd.training.augmentation import Augmentation
from ddmd.training.batch_maker import BatchMaker
from ddmd.training.config import DataEntry, DenoiserStage, TrainConfig
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.lesion_parameters import KINDS, PainterConfig
from ddmd.training.prepared_case import PreparedCase

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"


def newest(folder: Path, kind: str) -> Path | None:
    """The file `kind`-...-DATE.json of the latest date that has what the picture shows."""
    dated = sorted(folder.glob(f"{kind}-*.json"), key=lambda path: (path.stem[-10:], path.name))
    needed = {"quality": {"rows"}, "volume": {"parts", "scaling"}}[kind]
    return next((path for path in reversed(dated) if needed <= json.loads(path.read_text()).keys()), None)


def _seconds(value: float | dict[str, float]) -> float:
    """Seconds as result files have them: of one clock before, and now of two."""
    return value["wall_s"] if isinstance(value, dict) else value


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
    seconds_of_default = _seconds(results["scaling"][default])
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
                points[key][numbers[0]] = _seconds(seconds)
    for ax, (key, curve) in zip(axes[1:], points.items(), strict=True):
        ax.plot(sorted(curve), [curve[n] for n in sorted(curve)], marker="o")
        ax.set(xlabel=key, ylim=(0, None))
    axes[1].set(ylabel=f"seconds of {slices} slices")
    figure.tight_layout()
    return figure


ALL = ("flair", "t1", "t1ce", "t2")
STILL = Augmentation(**{field.name: 0.0 for field in fields(Augmentation) if field.type == "float"})
# what each kind of lesion that the painter knows is for; `docs/training.md` explains them
TITLES = {
    "large": "large: one lesion with core, rim and mass effect (glioma)",
    "middling": "middling: a few lesions",
    "small": "small: up to 15, some in pairs (multiple sclerosis)",
    "many": "many: 15 to 40 small ones",
    "bands": "bands: confluent along the ventricles (white matter hyperintensities)",
    "caps": "caps: on the frontal and occipital horns, on both sides",
    "territory": "territory: a part of what one artery supplies (stroke)",
}


def painted(
    kind: int,
    count: int,
    seed: int,
    sequences: tuple[str, ...] = ("flair",),
    slice_mm: float = 2.0,
    **ranges: Any,
) -> dict[str, torch.Tensor]:
    """Samples with one kind of lesion, painted on slices of a healthy phantom; `ranges` are of `PainterConfig`."""
    made = phantom(seed=seed, lesions=0, sequences=sequences, spacing_mm=(1.0, 1.0, slice_mm))
    volume = Volume.read(made.images, require=sequences)
    cut = extract(volume, sequences, SliceGrid())
    image, head = cut.image.numpy(), cut.brain[:, 0].numpy()
    rows = slice(len(cut) * 45 // 100, len(cut) * 65 // 100)  # slices that show the lateral ventricles
    offset_mm = cut.offset * volume.spacing[2]
    dark = tuple(i for i, sequence in enumerate(sequences) if sequence != "t2")
    case = PreparedCase(
        Case("phantom", "phantom", "phantom", {}), image[rows].astype(np.float16), head[rows], head[rows],
        np.zeros(len(head[rows]), np.int8), cut.offset, offset_mm, fluid_dark=dark,
    )  # fmt: skip
    stage = DenoiserStage(
        share_normal=0, share_painted=1, share_painted_beside=0, share_masked=0, hard_from=1,
        share_complete=1, share_first_alone=0,
    )  # fmt: skip
    several = len(sequences) > 1
    config = TrainConfig(
        data=(DataEntry("phantom"),), sequences=sequences, size=176, seed=seed, denoiser_stage=stage,
        denoiser=DenoiserConfig(len(sequences), presence=several),
    )  # fmt: skip
    slices = DeviceSlices([case], torch.device("cpu"), cut.grid.mm)
    shares = tuple(float(i == kind) for i in range(len(KINDS)))
    if several:
        ranges["enhancing"] = (1.0, 1.0, 0.3)
    painter_config = PainterConfig(kinds=shares, **ranges)
    batches = BatchMaker(
        slices, config, "lesions", {"phantom": 1.0},
        augmentation_config=STILL, painter_config=painter_config, stripped=0,
    )  # fmt: skip
    batch = batches.samples(100 * kind, 8 * count)
    large = batch["mask"].flatten(1).sum(1) > 20  # a slice without ventricles has no caps
    chosen = torch.cat((torch.nonzero(large), torch.nonzero(~large)))[:count, 0]
    return {"planes": batch["planes"][chosen], "mask": batch["mask"][chosen]}


def painter(count: int = 6, seed: int = 0) -> Figure:
    """Lesions painted on a healthy phantom, their masks outlined: a row for each kind, places, faint, thick slices, four sequences."""
    samples = {TITLES[name]: painted(kind, count, seed) for kind, name in enumerate(KINDS)}
    samples |= {
        "small at the cortex: juxtacortical": painted(
            KINDS.index("small"), count, seed, periventricular=0.0, juxtacortical=1.0
        ),
        "faint: large": painted(KINDS.index("large"), count, seed, faint=1.0),
        "bands in slices of 7 mm: edges are the mean through the slice": painted(
            KINDS.index("bands"), count, seed, slice_mm=7.0
        ),
    }
    rows = [
        (title, [(planes[1], mask) for planes, mask in zip(batch["planes"], batch["mask"], strict=True)])
        for title, batch in samples.items()
    ]
    for name in ("large", "small"):
        batch = painted(KINDS.index(name), 1, seed, ALL)
        planes = batch["planes"][0, len(ALL) : 2 * len(ALL)]
        rows.append((f"{name} on {', '.join(ALL)}", [(plane, batch["mask"][0]) for plane in planes]))
    figure = Figure(figsize=(1.8 * count, 2.05 * len(rows)))
    for (title, shown), axes in zip(rows, figure.subplots(len(rows), count), strict=True):
        for ax in axes:
            ax.axis("off")
        axes[0].set_title(title, loc="left", fontsize=9)
        for ax, (plane, mask) in zip(axes, shown, strict=False):
            ax.imshow(plane.numpy(), cmap="gray", vmin=-2, vmax=2.5, origin="lower")
            if mask.any():
                ax.contour(mask[0].numpy(), [0.5], colors="red", linewidths=0.5)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=0.98, wspace=0.03, hspace=0.16)
    return figure


def main(arguments: Sequence[str] = ()) -> None:
    """Draw the newest results."""
    results, docs = (Path(a) for a in (*arguments, *(RESULTS, DOCS)[len(arguments) :]))
    for kind, draw in (("quality", quality), ("volume", scaling)):
        path = newest(results, kind)
        if path is not None:
            draw(json.loads(path.read_text())).savefig(docs / f"{kind}.png", dpi=100)
            print(docs / f"{kind}.png", "from", path.name)
    painter().savefig(docs / "painter.png", dpi=70)
    print(docs / "painter.png")


if __name__ == "__main__":
    main(sys.argv[1:])
