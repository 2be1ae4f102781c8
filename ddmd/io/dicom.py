"""DICOM folders: the series in them, found by their tags."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ddmd.io.dicom_headers import (
    DICOM_EXTENSIONS,
    DicomHeader,
    is_dicom,
    read_header,
    require_dicom,
    without_patient,
)
from ddmd.io.errors import VolumeError
from ddmd.io.sequences import OTHER
from ddmd.io.text import printable

NAMED_IN_A_NOTE = 3
SPACING_TOLERANCE = 0.05  # of the distance between slices
DAMAGED = "cannot be read as DICOM"


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """Images of one series that make one volume.

    headers : slice by slice along the normal, or the one multi-frame file.
    duplicates : for each further file of a slice, the header that is kept and that file's own.
    name : of the case: folder and number of the series, without words that name the patient.
    folder : that the files are in.
    patient, study : which of those in the search it is of, counted from 1.
    problem : why it cannot be read as a volume, None where it can.
    """

    headers: tuple[DicomHeader, ...]
    duplicates: tuple[tuple[DicomHeader, DicomHeader], ...]
    name: str
    folder: Path
    patient: int
    study: int
    problem: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are converted."""
        return tuple(header.path for header in self.headers)

    @property
    def sequence(self) -> str | None:
        """One of `SEQUENCES`, OTHER, or None where the tags do not tell."""
        return self.headers[0].sequence

    @property
    def derived(self) -> bool:
        """Whether it was computed from another series."""
        return self.headers[0].derived

    @property
    def number(self) -> str:
        """The number of the series, in words."""
        number = self.headers[0].number
        return "series without a number" if number is None else f"series {number}"

    @property
    def label(self) -> str:
        """What messages begin with; what follows the last / tells nothing of the patient."""
        return os.path.join(self.folder, self.number)

    @cached_property
    def positions(self) -> np.ndarray:
        """(slices, 3) mm LPS, in the order of the slices."""
        positions: np.ndarray = np.concatenate([header.positions for header in self.headers])[
            self.frame_order
        ]
        return positions

    @cached_property
    def frame_order(self) -> np.ndarray:
        """Which frames, over all files, are the slices in the order of their places."""
        positions = np.concatenate([header.positions for header in self.headers])
        order: np.ndarray = np.argsort(positions @ _normal(self.headers[0]), kind="stable")
        return order

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        return self.headers[0].columns, self.headers[0].rows, len(self.positions)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4): column, row and slice to mm in RAS, as the tags say (DICOM PS3.3 C.7.6.2.1.1)."""
        first, positions = self.headers[0], self.positions
        affine = np.eye(4)
        affine[:3, 0] = first.orientation[:3] * first.pixel_spacing[1]
        affine[:3, 1] = first.orientation[3:] * first.pixel_spacing[0]
        affine[:3, 2] = (positions[-1] - positions[0]) / max(len(positions) - 1, 1)
        affine[:3, 3] = positions[0]
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@dataclass(frozen=True)
class DicomSearch:
    """The series that were found, in the order of patient, study and number, and notes on what was left aside."""

    series: tuple[DicomSeries, ...]
    notes: tuple[str, ...]


def _normal(header: DicomHeader) -> np.ndarray:
    normal: np.ndarray = np.cross(header.orientation[:3], header.orientation[3:])
    return normal


def dicom_files(root: Path) -> list[Path]:
    """Files below a folder that are DICOM by content or by name; hidden ones are not."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if path.is_dir():
                waiting.append(path)
            elif path.is_file() and (path.suffix.lower() in DICOM_EXTENSIONS or is_dicom(path)):
                found.append(path)
    return sorted(found, key=os.fspath)


def find_series(root: str | os.PathLike[str], files: Sequence[Path] | None = None) -> DicomSearch:
    """The series among the DICOM files of a folder, however nested and named.

    Parameters
    ----------
    root : folder
    files : those in it that are looked at, by default all

    Raises
    ------
    VolumeError
        If a package is missing, or there is no image.
    """
    root = Path(root)
    files = dicom_files(root) if files is None else files
    if not files:
        raise VolumeError(f"{root}: no DICOM file in it; name a folder that holds some, or a NIfTI file")
    require_dicom(str(root))
    headers: list[DicomHeader] = []
    damaged: list[Path] = []
    without_image: list[Path] = []
    for path in files:
        try:
            header = read_header(path)
        except ValueError:
            damaged.append(path)
            continue
        if header is None:
            without_image.append(path)
        else:
            headers.append(header)
    words = frozenset().union(*(header.identifiers for header in headers))
    notes = [
        *file_note(damaged, f"that {DAMAGED}", words),
        *file_note(without_image, "of DICOM without a slice of a volume", words),
    ]
    if not headers:
        raise VolumeError(f"{root}: no image of a volume among its DICOM files ({'; '.join(notes)})")
    return DicomSearch(tuple(_group(headers, root)), tuple(notes))


def file_note(paths: Sequence[Path], reason: str, words: Iterable[str]) -> list[str]:
    """A note on files that are left aside, without `words` that name the patient; nothing where there is none."""
    if not paths:
        return []
    names = [printable(without_patient(path.name, words)) for path in paths]
    shown = ", ".join(names[:NAMED_IN_A_NOTE]) + (", ..." if len(names) > NAMED_IN_A_NOTE else "")
    return [f"left aside: {len(paths)} {'file' if len(paths) == 1 else 'files'} {reason} ({shown})"]


def _group(headers: Sequence[DicomHeader], root: Path) -> list[DicomSeries]:
    groups: dict[tuple[str, ...], list[DicomHeader]] = {}
    for header in headers:
        key = [header.patient, header.study, header.series]
        if len(header.positions) > 1:
            key.append(header.instance)  # a multi-frame file is a volume of its own
        groups.setdefault(tuple(key), []).append(header)
    patients = {p: n for n, p in enumerate(sorted({h.patient for h in headers}), 1)}
    studies = {s: n for n, s in enumerate(sorted({(h.patient, h.study) for h in headers}), 1)}
    series = [
        _series(group, root, patients[group[0].patient], studies[group[0].patient, group[0].study])
        for group in groups.values()
    ]
    series.sort(key=lambda s: (s.patient, s.study, s.headers[0].number or 0, str(s.files[0])))
    for ending in ("_patient-{0.patient}", "_study-{0.study}", "_{1}"):
        counts = Counter(one.name for one in series)
        series = [
            one if counts[one.name] == 1 else replace(one, name=one.name + ending.format(one, n))
            for n, one in enumerate(series, 1)
        ]
    return series


def _series(headers: list[DicomHeader], root: Path, patient: int, study: int) -> DicomSeries:
    headers = sorted(headers, key=lambda header: os.fspath(header.path))
    first = headers[0]
    folder = Path(os.path.commonpath([header.path.parent for header in headers]))
    kept: dict[tuple[float, ...], DicomHeader] = {}
    duplicates = []
    for header in headers:
        place = tuple(np.round(header.positions[0], 2) + 0.0)
        if place in kept:
            duplicates.append((kept[place], header))
        else:
            kept[place] = header
    ordered = sorted(kept.values(), key=lambda header: float(header.positions[0] @ _normal(first)))
    try:
        inner = folder.relative_to(root).parts
    except ValueError:
        inner = ()
    base = os.path.basename(os.path.abspath(root if root.is_dir() else root.parent))
    number = "" if first.number is None else f"_series-{first.number}"
    name = without_patient("_".join(inner) or base, first.identifiers, f"patient-{patient}")
    return DicomSeries(
        tuple(ordered),
        tuple(duplicates),
        f"{printable(name)}{number}",
        folder,
        patient,
        study,
        _problem(ordered),
    )


def _problem(headers: Sequence[DicomHeader]) -> str | None:
    """Why slices make no volume, None where they do."""
    first = headers[0]
    for header in headers:
        if (header.rows, header.columns) != (first.rows, first.columns) or not (
            np.allclose(header.pixel_spacing, first.pixel_spacing, rtol=1e-3)
            and np.allclose(header.orientation, first.orientation, atol=1e-3)
        ):
            return "its slices differ in size or direction; give a series of parallel slices"
    normal, positions = _normal(first), np.concatenate([header.positions for header in headers])
    if not np.isfinite(positions).all() or not 0.99 < np.linalg.norm(normal) < 1.01:
        return "its slices have no place or direction in space; export it again"
    positions = positions[np.argsort(positions @ normal, kind="stable")]
    if len(positions) < 2:
        return "it has one slice; a volume has several"
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))
    if (gaps < 0.01).any():
        return "it has several images at one place (echoes, phases or time points); give one volume"
    if np.abs(gaps - usual).max() > max(SPACING_TOLERANCE * usual, 0.05):
        widest = int(gaps.argmax())
        if gaps[widest] > 1.5 * usual:
            return (
                f"a slice is missing: slices are {usual:.2f} mm apart, and {gaps[widest]:.2f} mm between slices "
                f"{widest + 1} and {widest + 2}; export the series again"
            )
        return f"its slices are not evenly spaced ({gaps.min():.2f} to {gaps.max():.2f} mm); export it again"
    if np.abs(steps - gaps[:, None] * normal).max() > max(SPACING_TOLERANCE * usual, 0.05):
        return "its slices are shifted against each other; resample it to a straight grid"
    return None


def describe(series: Iterable[DicomSeries]) -> str:
    """Series in words for people at the console: numbers, descriptions and what they were taken for."""
    parts = []
    for one in series:
        kind = "not recognised" if one.sequence is None else one.sequence
        count = f"{len(one.positions)} image{'s' if len(one.positions) > 1 else ''}"
        text = printable(without_patient(one.headers[0].description, one.headers[0].identifiers))
        parts.append(f"{one.number} '{text}' ({kind}, {count})")
    return ", ".join(parts)


def choose_series(search: DicomSearch, sequence: str, root: str | os.PathLike[str]) -> DicomSeries:
    """The one series of a sequence in a folder of one patient.

    Of several in one study, originals come before those that were computed, then the one with most slices.

    Raises
    ------
    VolumeError
        If there is none, or several patients or studies have one.
    """
    found = originals([one for one in search.series if one.sequence == sequence])
    if not found:
        raise VolumeError(
            f"{root}: no {sequence.upper()} series in it; found: {describe(search.series)}; give the folder of "
            "one series alone with the name of its sequence if it is one"
        )
    if len({one.study for one in found}) > 1:
        count = len({one.patient for one in found})
        what = (
            f"{count} patients" if count > 1 else f"{len({one.study for one in found})} studies of a patient"
        )
        raise VolumeError(
            f"{root}: {sequence.upper()} series of {what}; give the folder of one, or all to `ddmd detect` or "
            "detect_cohort"
        )
    return max(found, key=lambda one: (one.problem is None, len(one.positions)))


def originals(series: Sequence[DicomSeries]) -> list[DicomSeries]:
    """The series but those computed from others where their study has an original of the same sequence."""
    with_original = {(one.study, one.sequence) for one in series if not one.derived}
    return [one for one in series if not one.derived or (one.study, one.sequence) not in with_original]


def series_notes(chosen: Sequence[DicomSeries], search: DicomSearch) -> tuple[str, ...]:
    """What was left aside beside the chosen series; names no patient, and no free text of a header."""
    others = [
        f"{one.number} ({(one.sequence or 'not recognised').replace(OTHER, 'another kind')})"
        for one in search.series
        if one not in chosen
    ]
    return (*search.notes, *([f"left aside: {', '.join(others)}"] if others else []))
