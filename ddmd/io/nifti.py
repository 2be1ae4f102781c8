"""Reading one NIfTI or MGH file or image, refusing what cannot be a brain MRI volume, before allocating."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.freesurfer.mghformat import MGHHeader

from ddmd.io.compression import (
    HEAD,
    FileState,
    check_file,
    is_compressed,
    read_bytes,
    read_head,
    refuse_stranger,
    short,
)
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import affine_of, check_affine, check_extent, check_shape, checked_affine, grid_gap
from ddmd.io.intensities import Stored, values_of
from ddmd.io.sequences import SEQUENCES, sequence_of, stem

__all__ = [
    "SEQUENCES", "VolumeError", "affine_of", "check_affine", "grid_gap", "open_image", "sequence_of", "stem",
    "stored_voxels", "voxels",
]  # fmt: skip

HEADER_BYTES = 540  # of NIfTI-2, the larger one
MAX_BYTES = 1 << 30  # of voxels as they are stored
MAX_OFFSET = 1 << 28  # bytes of header and extensions before them
_COMPRESSED = ("", ".gz", ".bz2", ".zst")
_MGH = (".mgz", ".mgh")


class FileVoxels:
    """The voxels of an image file, read when they are asked for, into memory of their own.

    As nibabel's own proxies, so that an image of nibabel takes it; never a memory map, whose process dies
    when the file is cut.
    """

    is_proxy = True

    def __init__(
        self,
        path: Path,
        state: FileState,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offset: int,
        slope: float = 1.0,
        intercept: float = 0.0,
        footer: bool = False,
    ) -> None:
        self.footer = footer  # whether the format has something behind the voxels
        self.path, self.state, self.shape, self.dtype = path, state, shape, dtype
        self.offset, self.slope, self.inter = offset, slope, intercept

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def get_unscaled(self) -> np.ndarray:
        """The voxels as they are stored, before slope and intercept.

        Raises
        ------
        VolumeError
            If the file is damaged, shorter than its header says, or was changed since it was opened.
        """
        return self.read()[0]

    def read(self) -> tuple[np.ndarray, int]:
        """The voxels as `get_unscaled` gives them, and how many bytes the file holds behind them."""
        size = int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize
        if size > MAX_BYTES:
            raise VolumeError(f"{self.path}: {size} bytes of voxels are no brain MRI (at most {MAX_BYTES})")
        data, surplus = read_bytes(self.path, self.offset, size, self.state)
        return data.view(self.dtype).reshape(self.shape, order="F"), 0 if self.footer else surplus

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raw = self.get_unscaled()
        if self.slope != 1.0 or self.inter != 0.0:
            raw = raw * self.slope + self.inter
        return raw if dtype is None else raw.astype(dtype, copy=False)

    def __getitem__(self, slicer: Any) -> np.ndarray:
        return cast(np.ndarray, np.asarray(self)[slicer])


def open_image(path: str | os.PathLike[str]) -> nib.Nifti1Image:
    """Open a NIfTI or MGH file and check its header; voxels are read, once, when they are asked for.

    Taken are .nii, pairs of .hdr and .img, .mgh and .mgz, plain or compressed by gzip, bzip2 or zstd (where
    Python has a module for it). What a file is compressed by is seen from its content.

    Parameters
    ----------
    path : the file, or either one of a pair

    Returns
    -------
    NIfTI image (MGH files as NIfTI, too) whose `dataobj` is a `FileVoxels`.

    Raises
    ------
    VolumeError
        If there is no such file, it is of another format, or claims what no brain MRI is.
    """
    try:
        path = Path(path)
    except TypeError:
        raise VolumeError(f"{type(path).__name__}: give a path") from None
    header_path, voxels_path = _pair(path)
    head, state = read_head(header_path, HEADER_BYTES)
    if path.suffix.lower() in _MGH:
        return _mgh_image(path, head, state)
    header = _header(path, head)
    if voxels_path != header_path:
        state = check_file(voxels_path)
    elif not header.is_single:
        raise VolumeError(
            f"{path}: the header of a pair whose voxels are in another file; name it .hdr or .img"
        )
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = np.dtype(header.get_data_dtype())
        offset = int(header.get_data_offset())
        slope, intercept = _scaling(header, path)
        affine = header.get_best_affine()
    except VolumeError:
        raise
    except Exception as error:
        raise VolumeError(
            f"{path}: the header is damaged ({_said(error)}); copy or export it again"
        ) from None
    _check_claims(path, shape, dtype, offset)
    if header.is_single and offset < header.single_vox_offset:
        raise VolumeError(
            f"{path}: voxels begin at byte {offset}, inside the header, by the header; copy or export it again"
        )
    _check_held(voxels_path, state, shape, dtype, offset)
    if header["sform_code"] <= 0 and not (pixdim := _stored_pixdim(header, head)).all():
        raise VolumeError(
            f"{path}: voxel sizes {pixdim.tolist()} in the header, which has no sform; correct them or export it again"
        )
    checked_affine(header, affine, shape, str(path))
    proxy = FileVoxels(voxels_path, state, shape, dtype, offset, slope, intercept)
    single: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    with _quiet():
        header["vox_offset"] = 0  # where the voxels begin in this file is for the proxy alone to know
        plain = single.header_class.from_header(header, check=False)
        image: nib.Nifti1Image = single(proxy, affine, plain)
    image.file_map["image"].filename = str(path)
    return image


def _pair(path: Path) -> tuple[Path, Path]:
    """The files of header and voxels: one and the same but for .hdr and .img."""
    match = re.search(r"\.(hdr|img)(\.gz|\.bz2|\.zst)?$", path.name, re.IGNORECASE)
    if match is None:
        check_file(path)
        return path, path
    base = path.name[: match.start()]
    is_header = match.group(1).lower() == "hdr"
    extensions = ("img", "IMG", "Img") if is_header else ("hdr", "HDR", "Hdr")
    names = [
        f"{base}.{e}{c}" for e in extensions for c in dict.fromkeys(((match.group(2) or ""), *_COMPRESSED))
    ]
    check_file(path)
    other = next((path.with_name(n) for n in names if path.with_name(n).exists()), None)
    if other is None:
        what = "voxels" if is_header else "header"
        raise VolumeError(f"{path}: its {what}, {names[0]}, is not beside it; copy both files")
    return (path, other) if is_header else (other, path)


def _header(path: Path, head: bytes) -> nib.Nifti1Header:
    refuse_stranger(path, head[:HEAD])
    if len(head) < 348:
        raise VolumeError(f"{path}: not a NIfTI file (too short for a header); give a .nii or .nii.gz")
    kind: Any
    if head[344:347] in (b"n+1", b"ni1"):
        kind = nib.Nifti1Header if head[344:347] == b"n+1" else nib.nifti1.Nifti1PairHeader
        size = 348
    elif head[4:7] in (b"n+2", b"ni2") and len(head) >= 540:
        kind = nib.Nifti2Header if head[4:7] == b"n+2" else nib.nifti2.Nifti2PairHeader
        size = 540
    elif head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        raise VolumeError(
            f"{path}: an Analyze file or a NIfTI file with a damaged magic; Analyze does not say left from right: "
            "export the volume again as .nii.gz"
        )
    else:
        raise VolumeError(
            f"{path}: not a NIfTI file (no NIfTI header at its beginning); export it as .nii.gz"
        )
    try:
        with _quiet():
            return cast(nib.Nifti1Header, kind(head[:size], check=True))
    except Exception as error:  # nibabel raises many kinds
        raise VolumeError(
            f"{path}: the header is damaged ({_said(error)}); copy or export it again"
        ) from None


def _stored_pixdim(header: nib.Nifti1Header, head: bytes) -> np.ndarray:
    """The three voxel sizes as they are in the file: nibabel has put 1 where there is 0."""
    stored = np.frombuffer(head, header.template_dtype.newbyteorder(header.endianness), 1)
    sizes: np.ndarray = stored["pixdim"][0, 1:4]
    return sizes


@contextmanager
def _quiet() -> Iterator[None]:
    """Without nibabel's remarks on what it mended in a header."""
    logger = nib.imageglobals.logger
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _said(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _scaling(header: nib.Nifti1Header, path: Path) -> tuple[float, float]:
    """Slope and intercept of the values: 1 and 0 where the slope is 0 or NaN, which is how none is written."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite(slope) or not np.isfinite(intercept):
        raise VolumeError(
            f"{path}: scl_slope is {slope:g} and scl_inter is {intercept:g}; correct the header or export it again"
        )
    return slope, intercept


def _check_claims(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> None:
    if any(n < 1 for n in shape) or len(shape) < 3:
        check_shape(shape, str(path))
    check_shape(shape[:3], str(path))
    if not 0 <= offset <= MAX_OFFSET:
        raise VolumeError(f"{path}: voxels begin at byte {offset}, by its header; copy or export it again")
    size = int(np.prod(shape[:3], dtype=object)) * dtype.itemsize
    if size > MAX_BYTES:
        raise VolumeError(
            f"{path}: {size} bytes of voxels are absurd for a brain MRI (at most {MAX_BYTES}); check the header, "
            "or store it as float32 or int16"
        )


def _check_held(
    path: Path, state: FileState, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int
) -> None:
    """Raise VolumeError where a file that is not compressed is shorter than its header says."""
    needed = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if state.size < needed and not is_compressed(path):
        raise short(path, needed, state.size)


def _mgh_image(path: Path, head: bytes, state: FileState) -> nib.Nifti1Image:
    """A FreeSurfer volume as a NIfTI image on its own grid."""
    try:
        with _quiet():
            header = MGHHeader(head[: MGHHeader.template_dtype.itemsize], check=True)
        shape, dtype = tuple(int(n) for n in header.get_data_shape()), np.dtype(header.get_data_dtype())
        affine, offset = header.get_affine(), int(header.get_data_offset())
    except Exception as error:
        raise VolumeError(f"{path}: not an MGH file ({_said(error)}); convert it, with mri_convert") from None
    _check_claims(path, shape, dtype, offset)
    check_affine(np.asarray(affine, dtype=np.float64), str(path))
    check_extent(shape, np.asarray(affine, dtype=np.float64), str(path))
    image = nib.Nifti1Image(FileVoxels(path, state, shape, dtype, offset, footer=True), affine)
    _set_scanner_forms(image, affine)
    image.file_map["image"].filename = str(path)
    return image


def _set_scanner_forms(image: nib.Nifti1Image, affine: np.ndarray) -> None:
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")


def as_nifti(image: Any, name: str) -> nib.Nifti1Pair:
    """An image of nibabel that the caller opened, as a NIfTI one.

    Raises
    ------
    VolumeError
        If it is neither NIfTI nor MGH.
    """
    if isinstance(image, nib.Nifti1Pair):  # the base of every NIfTI image
        return image
    if isinstance(image, nib.MGHImage):
        check_affine(np.asarray(image.affine, dtype=np.float64), name)
        check_extent(image.shape, np.asarray(image.affine, dtype=np.float64), name)
        converted = nib.Nifti1Image(image.dataobj, image.affine)
        _set_scanner_forms(converted, image.affine)
        return converted
    raise VolumeError(f"{name}: {type(image).__name__}, not NIfTI; convert it to .nii.gz")


def stored_voxels(image: nib.Nifti1Pair, name: str) -> Stored:
    """The voxels of an image as they are stored, (X, Y, Z), read into memory of their own.

    Raises
    ------
    VolumeError
        If it is not one volume of real numbers, or cannot be read.
    """
    shape = check_shape(image.shape, name)
    source: Any = image.dataobj
    dtype = np.dtype(source.dtype)
    if dtype.kind not in "iufb":
        raise VolumeError(f"{name}: voxels are {dtype}; export real numbers (magnitude)")
    slope, intercept, surplus = 1.0, 0.0, 0
    try:
        if isinstance(source, FileVoxels):
            raw, surplus = source.read()
            slope, intercept = source.slope, source.inter
        elif isinstance(source, ArrayProxy):
            raw = _of_proxy(source)
            slope, intercept = float(source.slope), float(source.inter)
        else:
            raw = in_memory(source, name)
    except VolumeError:
        raise
    except MemoryError:
        raise VolumeError(
            f"{name}: there is not enough memory to read it; free some, or resample it"
        ) from None
    except Exception as error:
        raise VolumeError(
            f"{name}: the voxels cannot be read ({_said(error)}); copy the file again"
        ) from None
    notes: tuple[str, ...] = ()
    if surplus:
        notes = (f"{name}: the file holds more bytes than its header says, which are not read",)
    return Stored(raw.reshape(shape, order="F" if raw.flags.f_contiguous else "C"), slope, intercept, notes)


def _of_proxy(source: ArrayProxy) -> np.ndarray:
    """The stored voxels of nibabel's proxy, without its memory map where its file is known by name."""
    if isinstance(source.file_like, str | os.PathLike):
        path = Path(source.file_like)
        proxy = FileVoxels(path, check_file(path), source.shape, source.dtype, int(source.offset))
        return proxy.get_unscaled()
    return np.array(source.get_unscaled())


def in_memory(values: np.ndarray, name: str) -> np.ndarray:
    """An array that no file lies under; masked values are NaN.

    Raises
    ------
    VolumeError
        If it is the memory map of a file that was cut.
    """
    values = np.asanyarray(values)
    if isinstance(values, np.ma.MaskedArray):
        return np.ma.filled(values.astype(np.float64), np.nan)
    owner = values
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and owner.filename is not None:
            path = Path(cast(Any, owner.filename))
            if check_file(path).size < owner.offset + owner.nbytes:
                raise VolumeError(
                    f"{name}: the file under this memory map, {path}, was truncated; copy it again"
                )
            return np.array(values, subok=False)
        owner = cast(Any, owner.base)
    return np.asarray(values)


def voxels(image: nib.Nifti1Pair, name: str) -> np.ndarray:
    """The voxels as float32 (X, Y, Z) in memory of their own; may hold NaN and Inf.

    Raises
    ------
    VolumeError
        If it is not one volume of real numbers, or cannot be read.
    """
    return values_of(stored_voxels(image, name))
