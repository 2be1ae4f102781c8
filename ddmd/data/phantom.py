"""A made-up brain from the MNI tissue maps that nilearn ships, with lesions whose mask is exact."""

from __future__ import annotations

import json
import os
import re
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
    "flair": (0.30, 1.12, 1.0, 1.65),
}
RIM = 1.55  # signal of the rim of a lesion after contrast
RIM_MM = 2.0  # how far below the lesion's surface it lies
EDGE_MM = 2.0  # over which a lesion fades into tissue
WHITE = 600.0  # signal of white matter, in the scanner's arbitrary unit
BRAIN_SIGNAL = 0.2  # of the T1 template: above it is brain, as in nilearn's own brain mask
WHITE_PLACES = 0.85  # share of random lesions that are centred in white matter
RADIUS_MM = (5.0, 14.0)  # of random lesions
# File names: what the sequences and the mask are called in each style.
_NAMES = {
    "plain": {"t1": "_t1", "t1ce": "_t1ce", "t2": "_t2", "flair": "_flair", "lesion": "_lesion"},
    "brats": {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f", "lesion": "-seg"},
    "bids": {"t1": "_T1w", "t1ce": "_ce-GAD_T1w", "t2": "_T2w", "flair": "_FLAIR",
             "lesion": "_label-lesion_mask"},
}  # fmt: skip


@dataclass(frozen=True)
class Lesion:
    """A blob with a wandering surface.

    centre_mm : in MNI space, inside the brain.
    radius_mm : of the ball that has the lesion's volume.
    contrast : 1 is that of `CONTRAST`, 0 is invisible, above 1 stands out more.
    """

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


@dataclass(frozen=True)
class _Anatomy:
    tissue: np.ndarray  # (3, X, Y, Z) float32: shares of fluid, grey and white matter; 0 outside
    brain: np.ndarray  # (X, Y, Z) bool
    affine: np.ndarray  # (4, 4)
    spacing: np.ndarray  # (3,) mm


@lru_cache(maxsize=2)
def _anatomy(spacing_mm: tuple[float, ...]) -> _Anatomy:
    """The MNI152 brain on a grid of this spacing, each voxel the mean of what it covers."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(f"the phantom needs nilearn ({error}); pip install 'ddmd[phantom]'") from None
    names = ("template", "gm_template", "wm_template")
    templates = [getattr(datasets, f"load_mni152_{name}")(resolution=1) for name in names]
    spacing, fine = np.array(spacing_mm), np.diag(templates[0].affine)[:3]
    shape = tuple(int(n) for n in np.ceil(np.array(templates[0].shape) * fine / spacing))
    step = spacing / fine  # coarse voxels in fine ones; the grids share their outer corner
    maps = []
    for template in templates:
        values = np.asarray(template.dataobj, dtype=np.float32)
        if np.any(step != 1.0):
            values = ndimage.gaussian_filter(values, 0.4 * (step - 1.0))
            values = ndimage.affine_transform(values, step, (step - 1) / 2, shape, order=1)
        maps.append(values)
    brain = ndimage.binary_fill_holes(maps[0] > BRAIN_SIGNAL)
    grey, white = (np.clip(m, 0.0, 1.0) * brain for m in maps[1:])
    total = np.maximum(grey + white, 1.0)
    grey, white = grey / total, white / total
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = templates[0].affine[:3, 3] - fine / 2 + spacing / 2
    return _Anatomy(np.stack((brain - grey - white, grey, white)), brain, affine, spacing)


def _texture(shape: tuple[int, ...], sigma: np.ndarray | float, rng: Generator) -> np.ndarray:
    """Smooth noise (X, Y, Z) of standard deviation 1; sigma in voxels."""
    field: np.ndarray = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma, mode="wrap")
    return field / max(float(field.std()), 1e-6)


def _bias_field(brain: np.ndarray, rng: Generator) -> np.ndarray:
    """A random polynomial of third order over the grid (X, Y, Z), at most 1 from 0 in the brain."""
    orders = np.indices((4, 4, 4)).sum(0)
    coefficients = rng.standard_normal((4, 4, 4)) * ((orders > 0) & (orders <= 3))
    x, y, z = (np.linspace(-1, 1, n) for n in brain.shape)
    field = np.polynomial.legendre.leggrid3d(x, y, z, coefficients).astype(np.float32)
    scaled: np.ndarray = field / np.abs(field[brain]).max()
    return scaled


def _grow(
    lesion: Lesion, anatomy: _Anatomy, rng: Generator
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray]:
    """A box around the lesion, how much of each voxel in it is lesion, and depth below its surface in mm."""
    centre = (np.array(lesion.centre_mm) - anatomy.affine[:3, 3]) / anatomy.spacing
    shape = np.array(anatomy.brain.shape)
    index = tuple(np.clip(np.rint(centre), 0, shape - 1).astype(int))
    if np.abs(centre - index).max() > 0.5 + 1e-6 or not anatomy.brain[index]:
        raise ValueError(f"centre_mm is {lesion.centre_mm}, outside the brain; choose a place inside it")
    if lesion.radius_mm <= 0:
        raise ValueError(f"radius_mm is {lesion.radius_mm}; allowed are values above 0")
    reach = 2 * lesion.radius_mm / anatomy.spacing + 3
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    offsets = (np.indices(high - low).T - (centre - low)) * anatomy.spacing  # (Z, Y, X, 3) mm
    distance = np.linalg.norm(offsets, axis=-1).T
    wander = _texture(distance.shape, 0.4 * lesion.radius_mm / anatomy.spacing, rng)
    # The surface wanders, and fluid holds it back
    distance = distance / np.clip(1 + 0.2 * wander, 0.5, 1.6) * (1 + 0.5 * anatomy.tissue[0][box])
    distance[~anatomy.brain[box]] = np.inf
    volume = 4 / 3 * np.pi * lesion.radius_mm**3
    wanted = max(1, round(volume / float(np.prod(anatomy.spacing))))
    if wanted >= np.isfinite(distance).sum():
        raise ValueError(f"radius_mm is {lesion.radius_mm}; the brain around {lesion.centre_mm} is smaller")
    surface = np.partition(distance.ravel(), (wanted - 1, wanted))[wanted - 1 : wanted + 1].mean()
    depth = surface - distance
    return box, np.clip(0.5 + depth / EDGE_MM, 0.0, 1.0).astype(np.float32), depth


def _choose(count: int, anatomy: _Anatomy, rng: Generator) -> list[Lesion]:
    """Places for `count` lesions that do not touch one another while there is room."""
    white = ndimage.binary_erosion(anatomy.tissue[2] > 0.8)
    pools = [
        np.argwhere(pool) for pool in (white, ndimage.binary_erosion(anatomy.tissue[0] < 0.3) & anatomy.brain)
    ]
    chosen: list[Lesion] = []
    for _ in range(count):
        radius = float(rng.uniform(*RADIUS_MM))
        pool = pools[0 if rng.random() < WHITE_PLACES else 1]
        for _ in range(50):
            where = pool[rng.integers(len(pool))] * anatomy.spacing + anatomy.affine[:3, 3]
            gaps = [np.linalg.norm(where - o.centre_mm) - 1.2 * (radius + o.radius_mm) for o in chosen]
            if min(gaps, default=1.0) > 0:
                break
        chosen.append(Lesion((float(where[0]), float(where[1]), float(where[2])), radius))
    return chosen


def phantom(
    *,
    seed: int = 0,
    spacing_mm: float | Sequence[float] = 2.0,
    lesions: int | Sequence[Lesion] = 3,
    sequences: Sequence[str] = SEQUENCES,
    noise: float = 0.03,
    bias: float = 0.2,
) -> Phantom:
    """Make a skull-stripped brain in MNI space.

    Parameters
    ----------
    seed : int
        Decides everything random.
    spacing_mm : float or three floats
        Voxel size, 1 to 8 mm along each axis; (1, 1, 5) has thick axial slices.
    lesions : int or sequence of Lesion
        How many of 5 to 14 mm radius, mostly in white matter; or which. 0 is healthy.
    sequences : of "t1", "t1ce", "t2", "flair"
    noise : float
        Standard deviation of the two parts of the Rician noise, of white matter's signal.
    bias : float
        Largest logarithm of the multiplicative bias field in the brain; 0 is none.

    Returns
    -------
    Phantom
        Its mask is every voxel of which at least half is lesion.

    Raises
    ------
    ValueError
        If a sequence is not known, the spacing is not 1 to 8 mm, a lesion does not lie in the
        brain, or a number is negative.
    ImportError
        If nilearn is missing.

    Examples
    --------
    >>> made = phantom(seed=1, spacing_mm=4.0, lesions=0, sequences=("flair",))
    >>> made.images["flair"].shape, int(made.lesion.get_fdata().sum())
    ((50, 59, 48), 0)
    """
    unknown = [s for s in sequences if s not in CONTRAST]
    if unknown:
        raise ValueError(f"sequences holds {', '.join(unknown)}; allowed are {', '.join(SEQUENCES)}")
    spacing = tuple(float(s) for s in np.broadcast_to(spacing_mm, 3))
    if not all(1.0 <= s <= 8.0 for s in spacing):
        raise ValueError(f"spacing_mm is {spacing_mm}; allowed are 1 to 8")
    for name, value in (("noise", noise), ("bias", bias)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; allowed are 0 and above")
    if isinstance(lesions, int | np.integer) and lesions < 0:
        raise ValueError(f"lesions is {lesions}; allowed are 0 and above")
    rng = np.random.default_rng(seed)
    anatomy = _anatomy(spacing)
    brain, shape = anatomy.brain, anatomy.brain.shape
    wanted = _choose(int(lesions), anatomy, rng) if isinstance(lesions, int | np.integer) else list(lesions)
    share, strength, rim = (np.zeros(shape, np.float32) for _ in range(3))
    for lesion in wanted:
        box, own, depth = _grow(lesion, anatomy, rng)
        strength[box] = np.where(own > share[box], lesion.contrast, strength[box])
        rim[box] = np.where(own > share[box], np.exp(-0.5 * ((depth - RIM_MM) / 1.2) ** 2), rim[box])
        share[box] = np.maximum(share[box], own)
    grain = 1.0 + 0.03 * _texture(shape, 1.2 / anatomy.spacing, rng)[brain]
    patches = 1.0 + 0.08 * _texture(shape, 2.5 / anatomy.spacing, rng)[brain] if wanted else 1.0
    tissue, share_in, weight = anatomy.tissue[:, brain], share[brain], (share * strength)[brain]
    images = {}
    for sequence in sequences:
        *levels, inner = CONTRAST[sequence]
        signal = np.tensordot(np.array(levels, np.float32), tissue, 1)
        enhanced = inner + (RIM - inner) * rim[brain] if sequence == "t1ce" else inner
        signal = signal + weight * (enhanced * patches - signal)
        signal = signal * grain * np.exp(bias * _bias_field(brain, rng)[brain])
        real, imaginary = noise * rng.standard_normal((2, len(share_in)), np.float32)
        values = np.zeros(shape, np.float32)
        values[brain] = WHITE * np.hypot(signal + real, imaginary)
        images[sequence] = _image(values, anatomy.affine)
    return Phantom(
        images,
        _image((share >= 0.5).astype(np.uint8), anatomy.affine),
        _image(brain.astype(np.uint8), anatomy.affine),
        tuple(wanted),
    )


def _image(values: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, "mni")
    image.set_qform(affine, "mni")
    image.header.set_xyzt_units("mm")
    return image


def write(
    phantom: Phantom, folder: str | Path, subject: str = "phantom", *, style: str = "plain"
) -> dict[str, Path]:
    """Write the images and the lesion mask as .nii.gz; returns their paths by sequence, and "lesion".

    Parameters
    ----------
    phantom : Phantom
    folder : folder to write to, made where there is none
    subject : what the files are called after
    style : "plain", "brats" or "bids"
        plain is <subject>_<sequence>.nii.gz; brats a folder a subject, named as in BraTS 2023;
        bids is sub-<subject>/anat, with the mask among the derivatives.

    Raises
    ------
    ValueError
        If there is no such style, or no letter or digit in a BIDS subject.
    """
    if style not in _NAMES:
        raise ValueError(f"style is {style!r}; allowed are {', '.join(_NAMES)}")
    folder = Path(folder)
    images = places = folder
    if style == "brats":
        images = places = folder / subject
    elif style == "bids":
        label = re.sub("[^0-9a-zA-Z]", "", subject)
        if not label:
            raise ValueError(f"subject is {subject!r}; a BIDS subject has letters or digits")
        subject = f"sub-{label}"
        images = folder / subject / "anat"
        places = folder / "derivatives" / "phantom" / subject / "anat"
        for root, kind in ((folder, "raw"), (folder / "derivatives" / "phantom", "derivative")):
            _describe(root, kind)
    paths = {}
    for name, image in {**phantom.images, "lesion": phantom.lesion}.items():
        place = places if name == "lesion" else images
        place.mkdir(parents=True, exist_ok=True)
        paths[name] = place / f"{subject}{_NAMES[style][name]}.nii.gz"
        temporary = place / f".partial-{paths[name].name}"
        nib.save(image, temporary)
        os.replace(temporary, paths[name])
    return paths


def _describe(root: Path, kind: str) -> None:
    """The description that every BIDS data set opens with."""
    root.mkdir(parents=True, exist_ok=True)
    about = {"Name": "ddmd phantom", "BIDSVersion": "1.9.0", "DatasetType": kind}
    if kind == "derivative":
        about |= {"GeneratedBy": [{"Name": "ddmd"}]}  # type: ignore[dict-item]
    temporary = root / ".partial-dataset_description.json"
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    os.replace(temporary, root / "dataset_description.json")
