"""Whether the skull is seen as on or off, and how much of the brain is kept, on real volumes in many disguises.

python -m benchmarks.brain_estimate DATA               every volume of DATA/volumes in every disguise
python -m benchmarks.brain_estimate DATA --step 2      every second voxel in plane: four times faster
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ddmd.io.brain import BrainEstimate, estimate_brain
from ddmd.io.sequences import sequence_of

SKULL_ON = ("brainix-unregistered", "ms-isbi01", "ms-isbi02", "ms-isbi03")
KEPT, DICE = 0.95, 0.9  # of the brain of a stripped volume
RESAMPLED_MM = 2.0


@dataclass(frozen=True)
class Scan:
    """Canonical intensities (X, Y, Z), voxel size in mm, brain mask, and whether the skull is on."""

    values: np.ndarray
    spacing: tuple[float, ...]
    brain: np.ndarray
    skull_on: bool


@dataclass(frozen=True)
class Row:
    """What was estimated of one volume in one disguise."""

    name: str
    disguise: str
    scan: Scan
    estimate: BrainEstimate
    seconds: float

    @property
    def kept(self) -> float:
        """Share of the true brain that is within the estimated one."""
        return float((self.estimate.mask & self.scan.brain).sum() / self.scan.brain.sum())

    @property
    def dice(self) -> float:
        """Dice of the estimated and the true brain."""
        both = self.estimate.mask.sum() + self.scan.brain.sum()
        return float(2 * (self.estimate.mask & self.scan.brain).sum() / both)

    @property
    def right(self) -> bool:
        """Whether the skull is judged rightly and a stripped brain is found."""
        if self.estimate.skull_on != self.scan.skull_on:
            return False
        return self.scan.skull_on or (self.kept >= KEPT and self.dice >= DICE)


def read_scan(path: Path, step: int = 1) -> Scan:
    """A volume of the development data, every `step`-th voxel in plane."""
    image = nib.as_closest_canonical(nib.load(path))
    values = np.asarray(image.dataobj).astype(np.float32)[::step, ::step]
    spacing = np.array(image.header.get_zooms()[:3], np.float64) * (step, step, 1)
    mask_path = path.parent / "brain.nii.gz"
    if mask_path.exists():
        mask = np.asarray(nib.as_closest_canonical(nib.load(mask_path)).dataobj) > 0
        mask = mask[::step, ::step]
    else:  # stripped: the background is one exact value; brainix: no mask of the brain
        mask = values != values[0, 0, 0]
    return Scan(values, tuple(spacing), mask, path.parent.name in SKULL_ON)


def disguises(scan: Scan, rng: np.random.Generator, wanted: str = "") -> Iterator[tuple[str, Scan]]:
    """One scan in disguise: each change of the intensities, then each of the background or grid; `wanted` in the name."""
    for first, values, background in _intensities(scan):
        for second, change in CHANGES.items():
            if wanted not in f"{first}, {second}":
                continue
            changed = change(values, background, scan, rng)
            if changed is not None:
                new, brain, spacing = changed
                yield f"{first}, {second}", Scan(new.astype(np.float32), spacing, brain, scan.skull_on)


def _intensities(scan: Scan) -> Iterator[tuple[str, np.ndarray, float]]:
    """Name, intensities and value of the background."""
    values, brain = scan.values, scan.brain
    level = float(np.median(values[~brain][::31]))
    inside = values[brain]
    z = (values - inside.mean()) / inside.std()
    yield "as is", values, level
    yield "negated", -values, -level
    if scan.skull_on:
        yield "z-scored", z, float(np.median(z[~brain]))
        nonzero = values[values != 0]
        yield "z-scored but for 0", np.where(values != 0, (values - nonzero.mean()) / nonzero.std(), 0), 0.0
        head = ndimage.binary_dilation(
            values > np.percentile(values, 40) + 0.1 * np.ptp(inside), iterations=3
        )
        yield "air set to 0", np.where(head, values, 0), 0.0
        return
    for constant in (0.0, -5.0, 7.0):
        yield f"z-scored on {constant:g}", np.where(brain, z, np.float32(constant)), constant


Changed = tuple[np.ndarray, np.ndarray, tuple[float, ...]]
Change = Callable[[np.ndarray, float, Scan, np.random.Generator], Changed | None]


def _noise(share: float) -> Change:
    def change(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed:
        scale = float(np.percentile(np.abs(values[scan.brain] - background), 99))
        noise = rng.normal(0, share * scale, values.shape)
        new = values + noise if scan.skull_on else np.where(scan.brain, values, background + noise)
        return new, scan.brain, scan.spacing

    return change


def _halves(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed | None:
    if scan.skull_on:
        return None
    halves = np.where(rng.random(values.shape) < 0.5, 0.0, 1e-7)
    return np.where(scan.brain, values - background, halves), scan.brain, scan.spacing


def _spline(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed:
    shift = [0.3, 0.3, 0.3 if scan.spacing[2] < 3 else 0.0]
    return ndimage.shift(values, shift, order=3, mode="nearest"), scan.brain, scan.spacing


def _smooth(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed:
    return ndimage.gaussian_filter(values, 1 / np.array(scan.spacing)), scan.brain, scan.spacing


def _resample(order: int) -> Change:
    def change(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed:
        old = np.array(scan.spacing)
        new = np.where(old < RESAMPLED_MM, RESAMPLED_MM, np.where(old < 3, 1.5 * old, old))
        smaller = ndimage.zoom(values, old / new, order=order, mode="nearest", grid_mode=True)
        brain = (
            ndimage.zoom(scan.brain.astype(np.float32), old / new, order=1, mode="nearest", grid_mode=True)
            > 0.5
        )
        spacing = old * np.array(values.shape) / np.array(smaller.shape)
        return smaller, brain, tuple(spacing)

    return change


def _pad(relative: float, all_round: bool = False) -> Change:
    def change(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed:
        scale = float(np.percentile(np.abs(values[scan.brain] - background), 99))
        width = ((6, 6),) * 3 if all_round else ((0, 0), (0, 0), (5, 5))
        padded = np.pad(values, width, constant_values=background + relative * scale)
        return padded, np.pad(scan.brain, width), scan.spacing

    return change


def _rounded(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed:
    scale = float(np.percentile(np.abs(values[scan.brain] - background), 99))
    return np.rint((values - background) * (1000 / scale)), scan.brain, scan.spacing


def _crop(share: tuple[float, float, float]) -> Change:
    """The middle of the box of the head or the stripped brain; 1 is the whole box."""

    def change(values: np.ndarray, background: float, scan: Scan, rng: np.random.Generator) -> Changed:
        if not scan.skull_on and share[0] < 1.0:
            return None  # all is brain: nothing to find
        within = scan.values > 0.1 * np.percentile(scan.values, 99) if scan.skull_on else scan.brain
        inside = np.argwhere(within)
        low, high = inside.min(0), inside.max(0) + 1
        middle, half = (low + high) / 2, (high - low) / 2 * share
        box = tuple(slice(max(int(m - h), 0), int(np.ceil(m + h))) for m, h in zip(middle, half, strict=True))
        return values[box], scan.brain[box], scan.spacing

    return change


CHANGES: dict[str, Change] = {
    "unchanged": lambda values, background, scan, rng: (values, scan.brain, scan.spacing),
    "noise 1e-6": _noise(1e-6),
    "noise 1e-3": _noise(1e-3),
    "noise 1e-2": _noise(1e-2),
    "half 0, half 1e-7": _halves,
    "cubic spline shift": _spline,
    "smoothed 1 mm": _smooth,
    "resampled, linear": _resample(1),
    "resampled, cubic": _resample(3),
    "slab of background": _pad(0.0),
    "slab of -1": _pad(-1.0),
    "slab of +1": _pad(1.0),
    "pad all round": _pad(-0.5, all_round=True),
    "rounded": _rounded,
    "cropped to the brain": _crop((1.0, 1.0, 1.0)),
    "middle slices": _crop((1.2, 1.2, 0.3)),
    "cropped to 80 % in plane": _crop((0.8, 0.8, 1.0)),
    "cropped to 70 %": _crop((0.7, 0.7, 0.7)),
}


def sweep(
    root: Path, step: int, names: list[str] | None = None, wanted: str = "", seed: int = 0
) -> Iterator[Row]:
    """Estimate each FLAIR image of root/volumes in each disguise whose name contains `wanted`."""
    for folder in sorted((root / "volumes").iterdir()):
        if names and folder.name not in names:
            continue
        rng = np.random.default_rng(seed)
        path = next(p for p in sorted(folder.glob("*.nii.gz")) if sequence_of(p) == "flair")
        for disguise, scan in disguises(read_scan(path, step), rng, wanted):
            started = time.process_time()
            estimate = estimate_brain(scan.values, scan.spacing)
            yield Row(folder.name, disguise, scan, estimate, time.process_time() - started)


def main() -> None:
    """Print one row a volume and disguise that fails, or all, and the sums."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--step", type=int, default=1, help="of the voxels in plane")
    parser.add_argument("--names", nargs="+", help="folders; default: all")
    parser.add_argument("--disguise", default="", help="part of the names of the disguises wanted")
    parser.add_argument("--all", action="store_true", help="print what is right, too")
    options = parser.parse_args()
    print("| volume | disguise | right | skull | sure | brain kept | Dice | CPU s |")
    print("|---" * 8 + "|")
    total = wrong = unsure = 0
    seconds = 0.0
    for row in sweep(options.data, options.step, options.names, options.disguise):
        total, wrong, seconds = total + 1, wrong + (not row.right), seconds + row.seconds
        unsure += row.estimate.confidence < 0.8
        if options.all or not row.right or row.estimate.confidence < 0.8:
            skull = "on" if row.estimate.skull_on else "off"
            print(
                f"| {row.name} | {row.disguise} | {'yes' if row.right else 'NO'} | {skull} "
                f"| {row.estimate.confidence:.2f} | {row.kept:.3f} | {row.dice:.3f} | {row.seconds:.2f} |",
                flush=True,
            )
    print(f"\n{total} disguises, {wrong} wrong, {unsure} less than 80 % sure, {seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
