"""Dice of the shipped weights with and without the correction of bias fields: real volumes and phantoms.

python -m benchmarks.bias_field DATA                      real volumes of DATA/volumes, as they are
python -m benchmarks.bias_field DATA --added 0.6          with a multiplicative field added, peak to peak of its logarithm
python -m benchmarks.bias_field DATA --phantom-mm 2       phantoms of seeds 1 to 20 on a grid of 2 mm
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from ddmd.inference.detector import Detector
from ddmd.io.bias_field import estimate_bias_field
from ddmd.io.volume import Volume

METHODS = ("off", "auto", "on")


def canonical_mask(image: nib.Nifti1Image) -> np.ndarray:
    """Bool (X, Y, Z) in canonical order."""
    mask: np.ndarray = np.asarray(nib.as_closest_canonical(image).dataobj) > 0
    return mask


def real_cases(root: Path, added: float) -> Iterator[tuple[str, Volume, np.ndarray]]:
    """Name, stripped volume and lesion mask of each folder with a FLAIR image and a mask."""
    for folder in sorted((root / "volumes").iterdir()):
        if not (folder / "flair.nii.gz").exists() or not (folder / "lesion.nii.gz").exists():
            continue
        volume = Volume.read({"flair": folder / "flair.nii.gz"})
        if volume.skull:
            continue
        if added:
            zero = volume.zero_signal("flair")
            values = volume.images["flair"]
            field = smooth_field(volume.brain, np.random.default_rng(sum(map(ord, folder.name))), added)
            drifted = np.where(volume.brain, (values - zero) * np.exp(field) + zero, values)
            volume = dataclasses.replace(volume, images={"flair": drifted.astype(np.float32)})
        yield folder.name, volume, canonical_mask(nib.load(folder / "lesion.nii.gz"))


def smooth_field(brain: np.ndarray, rng: np.random.Generator, peak_to_peak: float) -> np.ndarray:
    """A random polynomial of second order over the grid, of this range in the brain."""
    orders = np.indices((3, 3, 3)).sum(0)
    coefficients = rng.standard_normal((3, 3, 3)) * ((orders > 0) & (orders <= 2))
    field = np.polynomial.legendre.leggrid3d(*(np.linspace(-1, 1, n) for n in brain.shape), coefficients)
    scaled: np.ndarray = field * (peak_to_peak / np.ptp(field[brain]))
    return scaled


def phantom_cases(mm: float, seeds: tuple[int, int], bias: float) -> Iterator[tuple[str, Volume, np.ndarray]]:
    """Phantoms from the first to the last seed."""
    from ddmd.data.phantom import phantom

    for seed in range(seeds[0], seeds[1] + 1):
        made = phantom(seed=seed, spacing_mm=mm, sequences=("flair",), bias=bias)
        yield (
            f"phantom {seed}, {mm:g} mm",
            Volume.read({"flair": made.images["flair"]}),
            canonical_mask(made.lesion),
        )


def main() -> None:
    """Print one row a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--added", type=float, default=0.0)
    parser.add_argument("--phantom-mm", type=float)
    parser.add_argument("--phantom-bias", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 20), help="first and last seed")
    parser.add_argument("--methods", nargs="*", default=METHODS, help="none: the evidence alone")
    parser.add_argument("--weights", default="flair-image-labels")
    options = parser.parse_args()
    detector = Detector.load(options.weights, device="cpu") if options.methods else None
    cases = (
        phantom_cases(options.phantom_mm, options.seeds, options.phantom_bias)
        if options.phantom_mm
        else real_cases(options.data, options.added)
    )
    print("| " + " | ".join(("case", "evidence", "peak to peak", *options.methods)) + " |")
    print("|---" * (3 + len(options.methods)) + "|")
    for name, volume, lesion in cases:
        field = estimate_bias_field(
            volume.images["flair"], volume.brain, volume.spacing, volume.zero_signal("flair")
        )
        row = []
        for method in options.methods if detector else ():
            mask = canonical_mask(detector.detect(dataclasses.replace(volume, bias=method)).mask)
            row.append(f"{2 * (mask & lesion).sum() / max(1, mask.sum() + lesion.sum()):.3f}")
        found = (f"{field.evidence:.2f}", f"{field.peak_to_peak:.2f}") if field else ("none", "none")
        print("| " + " | ".join((name, *found, *row)) + " |", flush=True)


if __name__ == "__main__":
    main()
