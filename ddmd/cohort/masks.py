"""Lesion masks of volumes: reading one onto the grid of its image, and choosing among several."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from ddmd.cohort.errors import DatasetError
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import GRID_TOLERANCE_MM, grid_gap
from ddmd.io.inputs import input_images
from ddmd.io.intensities import values_of
from ddmd.io.sequences import stem

_SAYS_LESION = re.compile(r"lesion|tumou?r|wmh|roi|consensus|(^|[-_.\s])(seg|gt)$", re.IGNORECASE)
_CONSENSUS, _LESION = re.compile("consensus", re.IGNORECASE), re.compile("lesion", re.IGNORECASE)
_RATER = re.compile(
    r"(^|[-_.\s])(rater|reader|observer|annotator|expert)s?[-_\s]?(\d+|[a-h])?(?![a-z])", re.IGNORECASE
)


def is_rater(path: Path) -> bool:
    """Whether the name of a mask says that it is of one rater.

    >>> [is_rater(Path(n)) for n in ("rater1.nii.gz", "p1_lesion_observer-2.nii.gz", "lesion.nii.gz")]
    [True, True, False]
    """
    return bool(_RATER.search(stem(path)))


def choose_masks(masks: Sequence[Path]) -> tuple[tuple[Path, ...] | None, tuple[Path, ...]]:
    """The lesion mask among those of one examination, and the masks of single raters.

    A consensus comes first, then a name that says lesion; raters stand behind. Several that are equally good
    are all returned. Tissue classes, as fMRIPrep and FreeSurfer write them, are no lesion mask.

    Returns
    -------
    (the mask, or None where there is none; the masks of raters by name)
    """
    raters = tuple(sorted(p for p in masks if is_rater(p) and "consensus" not in stem(p).lower()))
    chosen = [p for p in masks if p not in raters] or list(raters)
    for better in (_CONSENSUS, _LESION, _SAYS_LESION):
        chosen = [p for p in chosen if better.search(stem(p))] or chosen
    chosen = [p for p in chosen if "space-" not in stem(p)] or chosen
    if len(chosen) > 1 and len({re.sub(r"\d+$", "", stem(p)) for p in chosen}) == 1:
        raters = tuple(sorted({*raters, *chosen}))  # mask1, mask2
    if len(chosen) == 1 and re.search("dseg$", stem(chosen[0])) and not _SAYS_LESION.search(stem(chosen[0])):
        return None, raters
    return tuple(sorted(chosen)) or None, raters


def read_mask(path: Path, image_path: Path) -> np.ndarray:
    """Read a lesion mask onto the canonical grid of its image.

    Voxels of a label above 0 are lesion. A mask that holds the grid of the image in another orientation
    (axes swapped or flipped) is brought to it.

    Parameters
    ----------
    path : NIfTI mask with whole, non-negative values
    image_path : the NIfTI image that it was drawn on

    Returns
    -------
    bool (X, Y, Z), in closest-canonical (RAS+) order

    Raises
    ------
    DatasetError
        If the grids differ by more than `GRID_TOLERANCE_MM`, or the values are not those of a mask.
    """
    try:
        (mask,), (image,) = input_images(path), input_images(image_path)
        values = values_of(mask.stored())
    except VolumeError as error:
        raise DatasetError(str(error)) from None
    _check_values(values, path)
    shape, image_affine = image.geometry.shape, image.geometry.affine
    mask_affine = mask.geometry.affine
    orientation = _orientation_onto(values.shape, mask_affine, shape, image_affine)
    if orientation is None:
        difference = _difference(values.shape, mask_affine, shape, image_affine)
        raise DatasetError(
            f"{path} is not on the grid of {image_path}: {difference}; resample the mask onto the grid of the "
            "image, or correct its header"
        )
    native = apply_orientation(values > 0, orientation)
    return np.ascontiguousarray(apply_orientation(native, io_orientation(image_affine)))


def _check_values(values: np.ndarray, path: Path) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise DatasetError(
            f"{path}: {int((~finite).sum())} voxels of the mask are NaN or Inf; write 0 where there is no lesion"
        )
    lowest = float(values.min())
    if lowest < 0:
        raise DatasetError(f"{path}: the mask holds {lowest:g}; labels are 0 (no lesion) and above")
    broken = np.abs(values - np.rint(values)) > 1e-3
    if broken.any():
        raise DatasetError(
            f"{path}: the mask holds {float(values[broken][0]):g}, and labels are whole numbers; write a binary "
            "mask (probabilities by a threshold, resampled masks by nearest neighbour)"
        )


def _orientation_onto(
    shape: Sequence[int], affine: np.ndarray, target_shape: Sequence[int], target: np.ndarray
) -> np.ndarray | None:
    """Swaps and flips of axes that bring a grid onto another; None where none does."""
    for axes in itertools.permutations(range(3)):
        if tuple(shape[axes.index(i)] for i in range(3)) != tuple(target_shape):
            continue
        for flips in itertools.product((1, -1), repeat=3):
            orientation = np.array([axes, flips], dtype=float).T
            turned = affine @ inv_ornt_aff(orientation, tuple(shape))
            if grid_gap(tuple(target_shape), turned, target) < GRID_TOLERANCE_MM:
                return orientation
    return None


def _difference(
    shape: Sequence[int], affine: np.ndarray, target_shape: Sequence[int], target: np.ndarray
) -> str:
    parts = []
    if sorted(shape) != sorted(target_shape):
        parts.append(f"{'x'.join(map(str, shape))} voxels against {'x'.join(map(str, target_shape))}")
    sizes, others = (np.round(nib.affines.voxel_sizes(a), 3).tolist() for a in (affine, target))
    if not np.allclose(sorted(sizes), sorted(others), rtol=1e-3):
        parts.append(f"voxels of {sizes} mm against {others} mm")
    centres = [a @ [*((np.array(n) - 1) / 2), 1.0] for a, n in ((affine, shape), (target, target_shape))]
    away = float(np.linalg.norm(centres[0] - centres[1]))
    gap = grid_gap(tuple(target_shape), affine, target)
    if away >= GRID_TOLERANCE_MM:
        parts.append(f"its centre is {away:.1f} mm away")
    elif not parts:
        parts.append(f"its corners are up to {gap:.1f} mm away")
    return ", ".join(parts)
