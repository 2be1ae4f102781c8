"""A DICOM series as an image, by dcm2niix, and a map of that image on the slices of the series."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ddmd.io.dicom import DAMAGED, DicomSeries, file_note
from ddmd.io.dicom_headers import require_dicom
from ddmd.io.errors import VolumeError
from ddmd.io.text import printable

CONVERSION_SECONDS = 600


def read_series(series: DicomSeries, sequence: str | None = None) -> tuple[nib.Nifti1Image, list[str]]:
    """Convert a series by dcm2niix in a temporary folder, which is removed.

    Parameters
    ----------
    series : DicomSeries
    sequence : what the caller says that it is, where the caller does

    Returns
    -------
    The image, with its voxels in memory, and notes

    Raises
    ------
    VolumeError
        If the slices make no volume, a file is damaged, or dcm2niix cannot convert it to the grid that the
        tags describe.
    """
    require_dicom(series.label)
    notes = _check_pixels(series)
    if series.problem is not None:
        raise VolumeError(f"{series.label}: {series.problem}")
    first = series.headers[0]
    if sequence is None and first.by_name:
        notes.append(f"{series.label}: taken as FLAIR by its name; its header has no inversion time")
    if first.expected is not None and len(first.positions) == 1 and first.expected > len(series.headers):
        notes.append(
            f"{series.label}: the scanner counted {first.expected} images in this acquisition, and "
            f"{len(series.headers)} are here; slices at its ends may be missing"
        )
    image = _convert(series)
    voxel_map(series, image)
    return image, notes


def _check_pixels(series: DicomSeries) -> list[str]:
    """Refuse files that are cut short and slices that contradict each other; notes on duplicates."""
    pixels = {header.path: _pixels(header.path) for header in series.headers}
    for kept, other in series.duplicates:
        if _pixels(other.path) != pixels[kept.path]:
            raise VolumeError(
                f"{series.label}: {kept.path.name} and {other.path.name} are different images at one place "
                "(echoes, phases or time points); give one volume"
            )
    if not series.duplicates:
        return []
    names = [other.path for _, other in series.duplicates]
    return file_note(names, f"of {series.number} that hold a slice again", series.headers[0].identifiers)


def _pixels(path: Path) -> bytes:
    """SHA-256 of the pixels of a file.

    Raises VolumeError where they are incomplete.
    """
    import warnings

    import pydicom
    from pydicom.encaps import generate_frames
    from pydicom.pixels.utils import get_expected_length

    try:
        with warnings.catch_warnings(action="ignore"):
            dataset = pydicom.dcmread(path, force=True)
            syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
            data: bytes = dataset.PixelData
            if syntax is not None and syntax.is_encapsulated:
                frames = list(generate_frames(data, number_of_frames=int(dataset.get("NumberOfFrames") or 1)))
                complete = bool(frames) and all(len(frame) for frame in frames)
            else:
                complete = len(data) >= get_expected_length(dataset)
    except Exception as error:  # pydicom raises many kinds for a damaged file
        raise VolumeError(f"{path}: {DAMAGED} ({type(error).__name__}); copy it again") from None
    if not complete:
        raise VolumeError(f"{path}: cut short, pixels are missing; copy it again")
    return hashlib.sha256(data).digest()


def _convert(series: DicomSeries) -> nib.Nifti1Image:
    import dcm2niix

    with tempfile.TemporaryDirectory(prefix="ddmd-dicom-") as temporary:
        source, result = Path(temporary, "in"), Path(temporary, "out")
        source.mkdir()
        result.mkdir()
        for n, path in enumerate(series.files):
            (source / f"{n:05d}.dcm").symlink_to(os.path.abspath(path))
        command: list[Any] = [dcm2niix.bin, "-g", "i", "-b", "n", "-z", "n", "-w", "2", "-f", "volume"]
        environment = {**os.environ, "HOME": temporary}  # where it would keep its defaults
        try:
            done = subprocess.run(
                [*command, "-o", result, source], env=environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=CONVERSION_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VolumeError(f"{series.label}: dcm2niix failed ({type(error).__name__}: {error})") from None
        made = sorted(path for path in result.iterdir() if path.suffix == ".nii")
        if len(made) != 1:
            raise VolumeError(f"{series.label}: {_reason(done.stdout, len(made), temporary)}")
        loaded = nib.Nifti1Image.from_filename(made[0], mmap=False)
        values = np.array(np.asanyarray(loaded.dataobj))
        return nib.Nifti1Image(values, loaded.affine)


def _reason(output: bytes, count: int, temporary: str) -> str:
    """Why dcm2niix gave not one volume, in its own words."""
    if count > 1:
        return f"dcm2niix makes {count} volumes of it; give a series of one volume"
    lines = output.decode("utf-8", "replace").replace(temporary, "").splitlines()
    words = [line.strip() for line in lines if any(w in line for w in ("Error", "Warning", "nsupported"))]
    what = f" ({printable(words[0])[:200]})" if words else ""
    return f"dcm2niix cannot convert it{what}; convert it to uncompressed DICOM or to NIfTI first"


def voxel_map(
    series: DicomSeries, image: nib.Nifti1Image
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How voxels of an image lie on the columns, rows and slices of its series.

    Returns
    -------
    For columns, rows and slices, which axis of the image it is, and whether that runs the other way

    Raises
    ------
    VolumeError
        If the image does not lie on the grid that the tags describe.
    """
    wrong = VolumeError(
        f"{series.label}: the grid of the image is not the one that the DICOM tags describe; convert it to NIfTI "
        "by another program, and compare"
    )
    matrix = np.linalg.inv(image.affine) @ series.affine
    steps = np.rint(matrix[:3, :3])
    axes = np.abs(steps).argmax(axis=0)
    if sorted(axes) != [0, 1, 2] or np.abs(steps).sum() != 3:
        raise wrong
    shape = np.array(image.shape[:3])
    if tuple(shape[axes]) != series.shape:
        raise wrong
    reverse = steps[axes, range(3)] < 0
    exact = np.zeros((3, 4))
    exact[axes, range(3)] = np.where(reverse, -1, 1)
    exact[axes, 3] = np.where(reverse, shape[axes] - 1, 0)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in series.shape])).reshape(3, -1)
    corners = np.vstack((corners, np.ones(corners.shape[1])))
    if np.abs((matrix[:3] - exact) @ corners).max() > 0.1:
        raise wrong
    first, second, third = (int(axis) for axis in axes)
    return (first, second, third), (bool(reverse[0]), bool(reverse[1]), bool(reverse[2]))


def on_series(series: DicomSeries, image: nib.Nifti1Image) -> np.ndarray:
    """The voxels of an image as (slices, rows, columns) of its series."""
    axes, reverse = voxel_map(series, image)
    values = np.asanyarray(image.dataobj).reshape(image.shape[:3]).transpose(axes)
    flipped = values[tuple(slice(None, None, -1 if r else 1) for r in reverse)]
    return np.ascontiguousarray(flipped.transpose(2, 1, 0))
