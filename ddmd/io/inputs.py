"""What a caller may give as a volume: paths, images of nibabel, arrays, by sequence or in a list."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ddmd.io import nifti
from ddmd.io.dicom import (
    DicomSeries,
    choose_series,
    dicom_files,
    find_series,
    series_notes,
)
from ddmd.io.dicom_convert import read_series
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import Geometry
from ddmd.io.intensities import Stored
from ddmd.io.sequences import is_other_modality, sequence_of


@dataclass(frozen=True)
class InputImage:
    """One image that the caller gave, with its header read and its voxels not yet.

    label : path, or words for an image without one; messages begin with it.
    sequence : what the caller or the file's name says, None where neither does.
    other_modality : whether the name says that it is no sequence that is taken.
    notes : what a user should know of where it comes from.
    dicom : the series that it was converted from.
    """

    label: str
    sequence: str | None
    geometry: Geometry
    image: nib.Nifti1Pair | np.ndarray
    other_modality: bool = False
    notes: tuple[str, ...] = ()
    dicom: DicomSeries | None = None

    def stored(self) -> Stored:
        """The voxels, read now.

        Raises
        ------
        VolumeError
            As `ddmd.io.nifti.stored_voxels`.
        """
        if isinstance(self.image, np.ndarray):
            return Stored(nifti.in_memory(self.image, self.label).reshape(self.geometry.shape))
        return nifti.stored_voxels(self.image, self.label)


def input_images(
    source: Any,
    affine: Any = None,
    require: Sequence[str] = (),
    named: bool = False,
    optional: Sequence[str] = (),
) -> list[InputImage]:
    """The images that `Volume.read` was given.

    Parameters
    ----------
    source : path, image of nibabel, array (X, Y, Z), list of them, or {sequence: one of them}
        The path of a folder is one of DICOM files.
    affine : (4, 4), optional
        Of the arrays: voxels to mm.
    require : sequences that are looked for in a DICOM folder, by default FLAIR
    optional : sequences that are taken from a DICOM folder where they are there
    named : whether the caller says that a DICOM folder's only series is of the sequence

    Raises
    ------
    VolumeError
        If there is none, or one is of no kind that is taken or cannot be opened.
    """
    if isinstance(source, Mapping):
        images = [
            replace(_image(v, affine, _name(s)), sequence=_name(s), other_modality=False)
            for s, v in source.items()
        ]
    elif isinstance(source, list | tuple):
        images = [_image(part, affine) for part in source]
    elif _is_dicom_folder(source):
        images = _folder_images(source, require if optional else require or ("flair",), named, optional)
    else:
        images = [_image(source, affine)]
    if not images:
        raise VolumeError("no image given; give at least one")
    if affine is not None and not any(isinstance(i.image, np.ndarray) for i in images):
        raise VolumeError(f"{images[0].label}: has an affine of its own; affine= goes with an array")
    return images


def _name(sequence: Any) -> str:
    if not isinstance(sequence, str):
        raise VolumeError(f"sequence {sequence!r}: give its name; known are {', '.join(nifti.SEQUENCES)}")
    return sequence.lower()


def _is_dicom_folder(value: Any) -> bool:
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        return False
    return os.path.isdir(value) and bool(dicom_files(Path(value)))


def _folder_images(
    folder: Any, sequences: Sequence[str], named: bool, optional: Sequence[str] = ()
) -> list[InputImage]:
    """The series of these sequences in a DICOM folder; its only one where the caller has `named` that."""
    search = find_series(folder)
    there = {one.sequence for one in search.series}
    sequences = [*sequences, *(s for s in optional if s in there and s not in sequences)] or optional[:1]
    only = search.series[0] if named and len(search.series) == 1 else None
    chosen = [only or choose_series(search, sequence, folder) for sequence in sequences]
    first, *others = [_dicom_image(one, s, named) for one, s in zip(chosen, sequences, strict=True)]
    return [replace(first, notes=(*series_notes(chosen, search), *first.notes)), *others]


def _dicom_image(series: DicomSeries, sequence: str | None, named: bool = False) -> InputImage:
    """A series, converted."""
    image, notes = read_series(series, sequence if named else None)
    return InputImage(
        series.label,
        sequence,
        Geometry.of_image(image, series.label),
        image,
        notes=tuple(notes),
        dicom=series,
    )


def _image(value: Any, affine: Any, sequence: str | None = None) -> InputImage:
    if isinstance(value, DicomSeries):
        return _dicom_image(value, sequence or value.sequence)
    if _is_dicom_folder(value):
        return _folder_images(value, (sequence or "flair",), sequence is not None)[0]
    if isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str):
        if not os.fspath(value):
            raise VolumeError("the path is empty; name a file")
        image, label = nifti.open_image(value), str(Path(value))
        sequence, other = sequence_of(label), is_other_modality(label)
        return InputImage(label, sequence, Geometry.of_image(image, label), image, other)
    if isinstance(value, np.ndarray):
        return array_image(value, affine, "array")
    if isinstance(value, nib.spatialimages.SpatialImage):
        label = str(value.get_filename() or "image")
        opened = nifti.as_nifti(value, label)
        return InputImage(label, None, Geometry.of_image(opened, label), opened)
    raise VolumeError(f"{type(value).__name__}: give a path, a NIfTI image, or an array with its affine")


def array_image(values: Any, affine: Any, label: str, sequence: str | None = None) -> InputImage:
    """An array (X, Y, Z) with its affine (4, 4), voxels to mm, as an input.

    Raises
    ------
    VolumeError
        If either is missing, of another shape, or not made of real numbers.
    """
    if affine is None:
        raise VolumeError(f"{label}: an array needs its affine; pass affine=, 4x4, voxels to mm")
    values = np.asanyarray(values)
    if values.dtype.kind not in "iufb":
        raise VolumeError(f"{label}: voxels are {values.dtype}; give real numbers")
    return InputImage(label, sequence, Geometry.of_array(values.shape, affine, label), values)
