"""A made-up brain from the MNI tissue maps that nilearn ships, with lesions whose mask is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.random import Generator
from scipy import ndimage

SEQUENCES = ("t1", "t1ce", "t2", "flair")
# Signal of cerebrospinal fluid, grey matter, white matter and lesion, of white matter's 1.
CONTRAST = {
    "t1": (0.35, 0.75, 1.0, 0.62),
    "t1ce": (0.35, 0.77, 1.0, 0.65),
    "t2": (2.2, 1.35, 1.0, 1.75),
    "flair": (0.30, 1.12, 1.0, 1.75),
}
RIM = 1.55  # signal of the rim of a lesion after contrast
WHITE = 600.0  # signal of white matter, in the scanner's arbitrary unit


@dataclass(frozen=True)
class Lesion:
    """A blob with a wandering surface. contrast 1 is that of `CONTRAST`, 0 is invisible."""

    centre_mm: tuple[float, float, float]
    radius_mm: float
    contrast: float = 1.0


@dataclass(frozen=True)
class Phantom:
    """Images float32 by sequence, and uint8 masks of lesion and brain, all on one MNI grid."""

    images: dict[str, nib.Nifti1Image]
    lesion: nib.Nifti1Image
    brain: nib.Nifti1Image
    lesions: tuple[Lesion, ...]


@lru_cache(maxsize=2)
def _tissue(spacing_mm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Shares of fluid, grey and white matter (3, X, Y, Z), the brain, and the affine."""
    try:
        from nilearn import datasets
        from nilearn.image import resample_img
    except ImportError as error:
        raise ImportError(f"the phantom needs nilearn ({error}); pip install 'ddmd[phantom]'") from None
    resolution = 1 if spacing_mm < 2 else 2
    maps = [
        getattr(datasets, f"load_mni152_{name}")(resolution=resolution)
        for name in ("gm_template", "wm_template", "brain_mask")
    ]
    native = maps[0].affine
    if abs(spacing_mm - resolution) > 1e-6:
        affine = native.copy()
        affine[:3, :3] *= spacing_mm / resolution
        shape = tuple(int(np.ceil(n * resolution / spacing_mm)) for n in maps[0].shape)
        maps = [nib.Nifti1Image(np.asarray(m.dataobj, np.float32) * 0.999, m.affine) for m in maps]
        maps = [resample_img(m, affine, shape, "linear", force_resample=True, copy_header=True) for m in maps]
        native = affine
    grey, white, brain = (np.clip(np.asarray(m.dataobj, dtype=np.float32), 0, 1) for m in maps)
    inside = ndimage.binary_fill_holes(brain > 0.5)
    grey, white = grey * inside, white * inside
    total = np.maximum(grey + white, 1.0)
    grey, white = grey / total, white / total
    return np.stack((inside - grey - white, grey, white)), inside, native, inside & (white > 0.8)


def _smooth(shape: tuple[int, ...], scale: float, rng: Generator) -> np.ndarray:
    """Noise of unit scale that varies over about `scale` voxels."""
    coarse = [max(3, int(np.ceil(n / scale)) + 1) for n in shape]
    field = rng.standard_normal(coarse).astype(np.float32)
    zoom = [n / c for n, c in zip(shape, coarse, strict=True)]
    return ndimage.zoom(field, zoom, order=1, mode="nearest", grid_mode=True)


def _share(lesion: Lesion, shape: tuple[int, ...], affine: np.ndarray, rng: Generator) -> np.ndarray:
    """How much of each voxel is lesion (X, Y, Z)."""
    spacing = float(np.linalg.norm(affine[:3, 0]))
    grid = np.indices(shape, dtype=np.float32)
    centre = np.linalg.solve(affine[:3, :3], np.array(lesion.centre_mm) - affine[:3, 3])
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)))
    radius = lesion.radius_mm / spacing
    wander = 1.0 + 0.15 * _smooth(shape, max(radius * 0.8, 2.0), rng)
    return np.clip(0.5 + (radius * wander - distance) / 1.5, 0.0, 1.0)


def phantom(
    *,
    seed: int = 0,
    spacing_mm: float = 2.0,
    lesions: int | Sequence[Lesion] = 3,
    sequences: Sequence[str] = SEQUENCES,
    noise: float = 0.03,
    bias: float = 0.15,
) -> Phantom:
    """Make a skull-stripped brain in MNI space.

    Parameters
    ----------
    seed : int
        Decides everything random.
    spacing_mm : float
        Voxel size, at least 1.
    lesions : int or sequence of Lesion
        How many, in white matter, of 5 to 14 mm radius; or which. 0 is healthy.
    sequences : of "t1", "t1ce", "t2", "flair"
    noise : float
        Standard deviation of the two parts of the Rician noise, of white matter's signal.
    bias : float
        Strength of the multiplicative bias field.

    Returns
    -------
    Phantom

    Raises
    ------
    ValueError
        If a sequence is not known or the spacing is below 1 mm.
    ImportError
        If nilearn is missing.
    """
    unknown = [s for s in sequences if s not in CONTRAST]
    if unknown:
        raise ValueError(f"sequences holds {', '.join(unknown)}; allowed are {', '.join(SEQUENCES)}")
    if not 1.0 <= spacing_mm <= 8.0:
        raise ValueError(f"spacing_mm is {spacing_mm}; allowed are 1 to 8")
    rng = np.random.default_rng(seed)
    tissue, inside, affine, deep = _tissue(float(spacing_mm))
    if isinstance(lesions, int):
        places = np.argwhere(ndimage.binary_erosion(deep))
        lesions = [
            Lesion(tuple(affine[:3, :3] @ places[rng.integers(len(places))] + affine[:3, 3]),
                   float(rng.uniform(5, 14)))
            for _ in range(lesions)
        ]  # fmt: skip
    shape = inside.shape
    share = np.zeros(shape, np.float32)
    strength = np.zeros(shape, np.float32)
    for lesion in lesions:
        own = _share(lesion, shape, affine, rng) * inside
        strength = np.where(own > share, lesion.contrast, strength)
        share = np.maximum(share, own)
    mask = share >= 0.5
    depth = ndimage.distance_transform_edt(mask) * spacing_mm
    rim = ((depth > 0) & (depth <= max(3.0, spacing_mm))).astype(np.float32)
    texture = 1.0 + 0.03 * _smooth(shape, 3.0 / spacing_mm + 1.0, rng)
    images = {}
    for sequence in sequences:
        *levels, inner = CONTRAST[sequence]
        signal = np.tensordot(np.array(levels, np.float32), tissue, 1)
        target: np.ndarray | float = inner
        if sequence == "t1ce":
            target = inner + (RIM - inner) * rim
        signal = (signal + share * strength * (target - signal)) * texture
        field = np.exp(bias * _smooth(shape, max(shape) / 2.5, rng))
        real = signal * field + noise * rng.standard_normal(shape, np.float32)
        imaginary = noise * rng.standard_normal(shape, np.float32)
        values = (WHITE * np.hypot(real, imaginary) * inside).astype(np.float32)
        images[sequence] = nib.Nifti1Image(values, affine)
    return Phantom(
        images,
        nib.Nifti1Image(mask.astype(np.uint8), affine),
        nib.Nifti1Image(inside.astype(np.uint8), affine),
        tuple(lesions),
    )


def write(phantom: Phantom, folder: str | Path, subject: str = "phantom") -> dict[str, Path]:
    """Write <subject>_<sequence>.nii.gz and <subject>_lesion.nii.gz; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, image in {**phantom.images, "lesion": phantom.lesion}.items():
        paths[name] = folder / f"{subject}_{name}.nii.gz"
        nib.save(image, paths[name])
    return paths
