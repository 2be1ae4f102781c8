"""Reading one NIfTI file or image, refusing what cannot be a brain MRI volume, before allocating."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np

from ddmd.io.sequences import SEQUENCES, sequence_of, stem

__all__ = [
    "SEQUENCES",
    "VolumeError",
    "affine_of",
    "check_affine",
    "grid_gap",
    "open_image",
    "sequence_of",
    "stem",
    "voxels",
]

MAX_AXIS = 1024  # voxels along an axis
MAX_VOXELS = 400_000_000
GRID_TOLERANCE_MM = 0.1  # sform and qform, or two sequences, may differ by this anywhere


class VolumeError(ValueError):
    """A volume that cannot be used; the message names the file and says what to do."""


def _expanded(path: Path) -> int | None:
    """Bytes a gz expands to, streamed; raises on truncation. None where it is not gz."""
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return None
    total = 0
    with gzip.open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            total += len(chunk)
    return total


def open_image(path: str | os.PathLike[str]) -> nib.Nifti1Image:
    """Open a NIfTI file and check its header against what the file holds; voxels are not read yet.

    Raises
    ------
    VolumeError
        If there is no such file, it is not NIfTI, is truncated, or claims an absurd size.
    """
    path = Path(path)
    if path.is_dir():
        raise VolumeError(f"{path}: is a folder; name the NIfTI files in it")
    if not path.exists():
        raise VolumeError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise VolumeError(f"{path}: the file is empty; copy or export it again")
    try:
        image: Any = nib.load(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError(f"{path}: the gz is damaged or truncated ({error}); copy it again") from None
    except Exception as error:  # nibabel raises many kinds for a file that is not its own
        raise VolumeError(
            f"{path}: not a NIfTI file ({type(error).__name__}: {error}); convert it, with dcm2niix for DICOM"
        ) from None
    if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image | nib.Nifti1Pair):
        raise VolumeError(f"{path}: {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    _check_size(image, str(path))
    needed = int(np.prod([int(n) for n in image.shape], dtype=object)) * image.get_data_dtype().itemsize
    needed += int(cast(Any, image.dataobj).offset)
    try:
        held = _expanded(path)
    except (EOFError, zlib.error, OSError) as error:
        raise VolumeError(f"{path}: the gz is damaged or truncated ({error}); copy it again") from None
    held = path.stat().st_size if held is None else held
    if held < needed and path.suffix != ".hdr":
        raise VolumeError(
            f"{path}: the header claims {needed} bytes of voxels and the file holds {held}; it is "
            "truncated or its header is wrong; copy or export it again"
        )
    return cast(nib.Nifti1Image, image)


def _check_size(image: nib.Nifti1Pair, name: str) -> None:
    shape = tuple(int(n) for n in image.shape)
    if any(n < 1 for n in shape):
        raise VolumeError(f"{name}: shape {shape} has an empty axis; export it again")
    if max(shape) > MAX_AXIS or np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise VolumeError(
            f"{name}: shape {shape} is absurd for a brain MRI (at most {MAX_AXIS} voxels along an axis "
            f"and {MAX_VOXELS} in all); check the header, or resample it"
        )


def affine_of(image: nib.Nifti1Image, name: str) -> np.ndarray:
    """The image's affine (4, 4), after checking that it places voxels in the world, once.

    Raises
    ------
    VolumeError
        If it is singular or not finite, or sform and qform disagree.
    """
    affine = np.asarray(image.affine, dtype=np.float64)
    check_affine(affine, name)
    header = image.header
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        try:
            qform = header.get_qform()
        except Exception as error:
            raise VolumeError(f"{name}: the qform is damaged ({error}); rewrite the header") from None
        gap = grid_gap(image.shape[:3], affine, qform)
        if not gap < GRID_TOLERANCE_MM:
            raise VolumeError(
                f"{name}: sform and qform disagree by up to {gap:.1f} mm; say which holds, by writing the "
                "header anew with one of them (image.set_qform(image.get_sform()) in nibabel)"
            )
    return affine


def check_affine(affine: np.ndarray, name: str) -> None:
    """Raise VolumeError where an affine is not 4x4, not finite or singular."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise VolumeError(f"{name}: the affine is not a finite 4x4 matrix; correct the header")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    volume = abs(np.linalg.det(affine[:3, :3]))
    if (sizes < 1e-3).any() or volume < 1e-3 * float(np.prod(sizes)):
        raise VolumeError(
            f"{name}: the affine is singular (voxel sizes {np.round(sizes, 4).tolist()} mm); correct the "
            "header"
        )


def grid_gap(shape: tuple[int, ...], one: np.ndarray, other: np.ndarray) -> float:
    """Largest distance, in mm, between where two affines put a corner of the grid."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]])).reshape(3, -1)
    corners = np.vstack((corners, np.ones(corners.shape[1])))
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())


def voxels(image: nib.Nifti1Image, name: str) -> np.ndarray:
    """The voxels as float32 (X, Y, Z); may hold NaN and Inf.

    Raises
    ------
    VolumeError
        If it is not one volume of real numbers, or cannot be read.
    """
    shape = tuple(image.shape)
    if len(shape) < 3 or any(n > 1 for n in shape[3:]):
        what = "a series of volumes" if len(shape) > 3 else "not a volume"
        raise VolumeError(
            f"{name}: shape {shape} is {what}; give one 3-D volume (fslsplit, or nibabel's slicer)"
        )
    _check_size(image, name)
    if image.get_data_dtype().kind not in "iuf":
        raise VolumeError(f"{name}: voxels are {image.get_data_dtype()}; export real numbers (magnitude)")
    try:
        values = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:
        raise VolumeError(f"{name}: the voxels cannot be read ({error}); copy the file again") from None
    return values.reshape(shape[:3])
