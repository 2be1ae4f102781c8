"""Where the voxels of an image lie: units, affines, what no head has, and headers without anything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import nibabel as nib
import numpy as np

from ddmd.io.errors import VolumeError

MAX_AXIS = 1024  # voxels along an axis
MAX_VOXELS = 1 << 27  # 512 x 512 x 512
MIN_VOXEL_MM, MAX_VOXEL_MM = 0.1, 12.0
MAX_FIELD_OF_VIEW_MM = 600.0  # along any axis
MIN_FIELD_OF_VIEW_MM = (
    40.0  # along the longest axis: less is a brain in cm that is taken for mm, or a mouse's
)
GRID_TOLERANCE_MM = 0.1  # sform and qform, or two sequences, may differ by this anywhere
ROUNDING = 1e-4  # relative, of sizes stored as float32

UNITS = {0: ("unknown unit, taken as mm", 1.0), 1: ("metre", 1e3), 2: ("mm", 1.0), 3: ("micron", 1e-3)}
UNIT_BITS = 7  # of xyzt_units; the others are the unit of time
_GEOMETRY_FIELDS = (
    "sform_code", "srow_x", "srow_y", "srow_z", "qform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z",
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """A grid of voxels in the world.

    shape : voxels along the three axes of the input.
    affine : float64 (4, 4), voxels of the input to mm.
    native : image without voxels, whose header has shape, affine, form codes and units of the input and
        nothing else.
    notes : what a user should know of it.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    native: nib.Nifti1Image
    notes: tuple[str, ...] = ()

    @classmethod
    def of_image(cls, image: nib.Nifti1Pair, name: str) -> Geometry:
        """The geometry of a NIfTI image.

        Raises
        ------
        VolumeError
            As `affine_of`, and if the image is not one 3-D volume.
        """
        shape = check_shape(image.shape, name)
        affine = affine_of(image, name)
        _check_longest(shape, affine, name, unit_of(image.header)[0])
        return cls(shape, affine, _native(image, shape), _notes(image, name))

    @classmethod
    def of_array(cls, shape: tuple[int, ...], affine: Any, name: str) -> Geometry:
        """The geometry of an array (X, Y, Z) with its affine (4, 4), voxels to mm."""
        try:
            given = np.asarray(affine)
            if given.dtype.kind == "c":
                raise TypeError("complex numbers")
            matrix = given.astype(np.float64)
        except (TypeError, ValueError):
            raise VolumeError(f"{name}: the affine is not a finite 4x4 matrix; pass numbers") from None
        three = check_shape(shape, name)
        check_affine(matrix, name)
        check_extent(three, matrix, name)
        _check_longest(three, matrix, name, "mm")
        return cls(three, matrix, nib.Nifti1Image(_no_voxels(three), matrix))


def _no_voxels(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), shape)


def _native(image: nib.Nifti1Pair, shape: tuple[int, int, int]) -> nib.Nifti1Image:
    kind = nib.Nifti2Image if isinstance(image.header, nib.Nifti2Header) else nib.Nifti1Image
    header: Any = kind.header_class()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    for field in _GEOMETRY_FIELDS:
        header[field] = image.header[field]
    header["pixdim"][:4] = image.header["pixdim"][:4]
    header["xyzt_units"] = int(image.header["xyzt_units"]) & UNIT_BITS
    make: Any = kind
    return cast(nib.Nifti1Image, make(_no_voxels(shape), image.affine, header))


def _notes(image: nib.Nifti1Pair, name: str) -> tuple[str, ...]:
    header, notes = image.header, []
    code = int(header["xyzt_units"]) & UNIT_BITS
    if code not in UNITS:
        notes.append(f"{name}: the header's unit of length, {code}, is not one of NIfTI; taken as mm")
    elif code in (1, 3):
        notes.append(f"{name}: converted from {UNITS[code][0]} to mm")
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        notes.append(
            f"{name}: the header has neither an sform nor a qform; axes are taken as right to left, back to front "
            "and bottom to top, and left and right may be swapped"
        )
    return tuple(notes)


def voxel_sides(affine: np.ndarray) -> tuple[float, float, float]:
    """Lengths in mm of a voxel's sides, of an affine (4, 4) from voxels to mm."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def voxel_volume_ml(affine: np.ndarray) -> float:
    """Volume of a voxel in ml; less than the product of its sides where the axes are not at right angles."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def unit_of(header: Any) -> tuple[str, float]:
    """The unit of length in a NIfTI header, and how many mm it is; what is not known is mm."""
    return UNITS.get(int(header["xyzt_units"]) & UNIT_BITS, UNITS[0])


def check_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """The shape of one 3-D volume.

    Raises
    ------
    VolumeError
        If it is something else, empty or larger than any brain MRI.
    """
    shape = tuple(int(n) for n in shape)
    if any(n < 1 for n in shape):
        raise VolumeError(f"{name}: shape {shape} has an empty axis; export it again")
    if len(shape) < 3 or any(n > 1 for n in shape[3:]):
        what = "a series of volumes" if len(shape) > 3 else "not a volume"
        raise VolumeError(
            f"{name}: shape {shape} is {what}; give one 3-D volume (fslsplit, or nibabel's slicer)"
        )
    if max(shape) > MAX_AXIS or np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise VolumeError(
            f"{name}: shape {shape} is absurd for a brain MRI (at most {MAX_AXIS} voxels along an axis "
            f"and {MAX_VOXELS} in all); check the header, or resample it"
        )
    return shape[0], shape[1], shape[2]


def affine_of(image: nib.Nifti1Pair, name: str) -> np.ndarray:
    """An image's affine (4, 4), voxels to mm, after checking that it places voxels in the world, once.

    Where the header has both, the sform holds: it may have shears, which a qform cannot have.

    Raises
    ------
    VolumeError
        If it is singular, not finite or of no head's size, or sform and qform disagree.
    """
    affine, scale = checked_affine(image.header, image.affine, image.shape, name)
    header: Any = image.header
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        try:
            qform = scale @ header.get_qform()
        except Exception as error:
            raise VolumeError(
                f"{name}: the qform is damaged ({error}); remove it (image.set_qform(None, 0) in nibabel, then save)"
            ) from None
        gap = grid_gap(image.shape, affine, qform)
        shears = grid_gap(image.shape, affine, _without_shears(affine))
        # programs differ in which rotation they take for that of a sheared affine
        if not (gap < GRID_TOLERANCE_MM or (shears > GRID_TOLERANCE_MM and gap < 2 * shears)):
            raise VolumeError(
                f"{name}: sform and qform disagree by up to {gap:.1f} mm; say which holds and save: with "
                "nibabel, image.set_qform(None, 0) keeps the sform, image.set_sform(None, 0) the qform"
            )
    return affine


def checked_affine(
    header: Any, affine: Any, shape: tuple[int, ...], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """An affine (4, 4) in the unit of its header as one in mm, and the matrix (4, 4) that converts.

    Raises
    ------
    VolumeError
        If it is singular, not finite or of no head's size.
    """
    unit, millimetres = unit_of(header)
    scale = np.diag([millimetres, millimetres, millimetres, 1.0])
    with np.errstate(invalid="ignore", over="ignore"):
        converted: np.ndarray = scale @ np.asarray(affine, dtype=np.float64)
    check_affine(converted, name)
    check_extent(shape, converted, name, unit)
    return converted, scale


def _without_shears(affine: np.ndarray) -> np.ndarray:
    """The affine with the nearest rotation and the same voxel sizes, which is what a qform can hold."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / sizes)
    rigid = affine.copy()
    rigid[:3, :3] = (left @ right) * sizes
    return rigid


def check_affine(affine: np.ndarray, name: str) -> None:
    """Raise VolumeError where an affine, in mm, is not 4x4, not finite or singular."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise VolumeError(f"{name}: the affine is not a finite 4x4 matrix; correct the header")
    if not np.allclose(affine[3], (0, 0, 0, 1)):
        raise VolumeError(f"{name}: the affine's last row is not 0, 0, 0, 1; correct the header")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / np.where(sizes > 0, sizes, 1.0)
    if (sizes == 0).any() or abs(np.linalg.det(directions)) < 1e-3:
        raise VolumeError(
            f"{name}: the affine is singular (voxel sizes {[float(f'{s:.4g}') for s in sizes]} mm); correct the "
            "header"
        )


def check_extent(shape: tuple[int, ...], affine: np.ndarray, name: str, unit: str = "mm") -> None:
    """Raise VolumeError where voxels or the field of view, in mm, are of no head's size."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    for axis, (count, size) in enumerate(zip(shape[:3], sizes, strict=True)):
        if not MIN_VOXEL_MM * (1 - ROUNDING) <= size <= MAX_VOXEL_MM * (1 + ROUNDING):
            raise VolumeError(
                f"{name}: voxels of {size:.4g} mm along axis {axis} (unit of the header: {unit}); a brain MRI "
                f"has {MIN_VOXEL_MM:g} to {MAX_VOXEL_MM:g} mm; correct the affine or its unit, or resample it"
            )
        if count * size > MAX_FIELD_OF_VIEW_MM * (1 + ROUNDING):
            raise VolumeError(
                f"{name}: a field of view of {count * size:.4g} mm along axis {axis} (unit of the header: {unit}); "
                f"a brain MRI has at most {MAX_FIELD_OF_VIEW_MM:g} mm; correct the affine or its unit, or crop it"
            )


def _check_longest(shape: tuple[int, ...], affine: np.ndarray, name: str, unit: str) -> None:
    longest = float((np.array(shape[:3]) * np.linalg.norm(affine[:3, :3], axis=0)).max())
    if longest < MIN_FIELD_OF_VIEW_MM:
        raise VolumeError(
            f"{name}: a field of view of {longest:.4g} mm along its longest axis (unit of the header: {unit}); a "
            f"brain MRI has at least {MIN_FIELD_OF_VIEW_MM:g} mm; correct the affine or its unit"
        )


def grid_gap(shape: tuple[int, ...], one: np.ndarray, other: np.ndarray) -> float:
    """Largest distance, in mm, between where two affines put a corner of the grid."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]])).reshape(3, -1)
    corners = np.vstack((corners, np.ones(corners.shape[1])))
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())
