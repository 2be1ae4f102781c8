"""What the header of a DICOM file says: whose image, of which series, where it lies, which sequence it is."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddmd.io.errors import VolumeError
from ddmd.io.sequences import OTHER, label_of_description

INSTALL = "pip install 'ddmd[dicom]'"
FLAIR_INVERSION_MS = (1400.0, 3200.0)  # 1800 to 2800 at 1.5 and 3 T; shorter at low field and in 3-D
FLAIR_ECHO_MS = 50.0  # at least; a T1 FLAIR has about 10
STIR_INVERSION_MS = 350.0  # at most: the inversion time at which fat has no signal
DICOM_EXTENSIONS = (".dcm", ".dicom", ".ima")
_READ = (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "PatientName", "PatientID",
    "OtherPatientIDs", "PatientBirthDate", "AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID",
    "SeriesNumber", "SeriesDescription", "ProtocolName", "SequenceName", "ScanningSequence", "EchoTime",
    "RepetitionTime", "InversionTime", "ContrastBolusAgent", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "ImagesInAcquisition", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class DicomHeader:
    """One image file of DICOM, read up to its pixels.

    positions : (frames, 3) mm, of the first pixel of each frame, in the patient's LPS axes.
    orientation : (6,), direction cosines along a row and along a column.
    pixel_spacing : (2,) mm, between rows and between columns.
    number : of the series; None where there is none.
    description : of the series, as the scanner or a person wrote it.
    sequence : one of `SEQUENCES`, OTHER, or None where the tags do not tell.
    by_name : whether only the name says that it is a FLAIR, because the tags of the inversion are missing.
    derived : whether it was computed from other images, as a reformatted one.
    expected : how many images the acquisition has, as the scanner says; None where it does not.
    identifiers : words that name the patient.
    """

    path: Path
    patient: str
    study: str
    series: str
    instance: str
    positions: np.ndarray
    orientation: np.ndarray
    pixel_spacing: np.ndarray
    rows: int
    columns: int
    number: int | None
    description: str
    sequence: str | None
    by_name: bool
    derived: bool
    expected: int | None
    identifiers: frozenset[str]


def require_dicom(what: str) -> None:
    """Raise VolumeError, saying what to install, where a package of the extra is missing.

    Parameters
    ----------
    what : what needs it; the message begins with it
    """
    from importlib.util import find_spec

    missing = [name for name in ("pydicom", "dcm2niix", "highdicom") if find_spec(name) is None]
    if missing:
        raise VolumeError(f"{what}: DICOM, which needs {', '.join(missing)}; {INSTALL}")


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file's first bytes are those of DICOM, with or without the preamble. Needs no package."""
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    if head[128:132] == b"DICM":
        return True
    if head[:2] not in (b"\x02\x00", b"\x08\x00") or len(head) < 132:  # group of the first element
        return False
    length = int.from_bytes(head[4:8], "little")
    return head[4:6].isalpha() or length < 256


def read_header(path: Path) -> DicomHeader | None:
    """Read the header of a file; None where it is DICOM without an image in space, as a report or an index.

    Raises
    ------
    ValueError
        If it is not readable.
    """
    import pydicom

    try:
        with _quiet():
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_READ), force=True)
            return _header(path, dataset)
    except Exception as error:  # pydicom raises many kinds for a damaged file
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _quiet() -> Any:
    """Without the warnings of pydicom about values that bend the standard: real scanners write them."""
    import warnings

    return warnings.catch_warnings(action="ignore")


def _header(path: Path, dataset: Any) -> DicomHeader | None:
    if not dataset.get("SOPClassUID") and not dataset.get("SeriesInstanceUID"):
        raise ValueError("no DICOM elements in it")
    if "Rows" not in dataset or dataset.get("Modality") == "SEG":
        return None
    frames = int(dataset.get("NumberOfFrames") or 1)
    groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[:frames]
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    if groups:
        positions = [_nested([group], "ImagePositionPatient") for group in groups]
        orientations = [_nested([group, *shared], "ImageOrientationPatient") for group in groups]
        spacing = _nested([*shared, groups[0]], "PixelSpacing")
    else:
        positions = [dataset.get("ImagePositionPatient")] * frames
        orientations = [dataset.get("ImageOrientationPatient")]
        spacing = dataset.get("PixelSpacing")
    if spacing is None or any(p is None for p in positions) or any(o is None for o in orientations):
        return None
    turned = np.array(orientations, np.float64)
    if np.ptp(turned, axis=0).max() > 1e-3:
        return None  # views of several directions, as a localizer has
    sequence, by_name = _sequence(dataset, [*shared, *groups[:1]])
    kinds = {str(word).upper() for word in _words(dataset.get("ImageType"))}
    number, expected = dataset.get("SeriesNumber"), dataset.get("ImagesInAcquisition")
    return DicomHeader(
        path=path,
        patient=f"{dataset.get('PatientID') or ''}|{dataset.get('PatientName') or ''}",
        study=str(dataset.get("StudyInstanceUID") or ""),
        series=str(dataset.get("SeriesInstanceUID") or ""),
        instance=str(dataset.get("SOPInstanceUID") or ""),
        positions=np.array(positions, np.float64),
        orientation=turned[0],
        pixel_spacing=np.array(spacing, np.float64),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        number=None if number in (None, "") else int(number),
        description=str(dataset.get("SeriesDescription") or dataset.get("ProtocolName") or ""),
        sequence=sequence,
        by_name=by_name,
        derived=bool(kinds & {"DERIVED", "MPR", "REFORMATTED", "PROJECTION IMAGE"}),
        expected=int(expected) if expected else None,
        identifiers=_identifiers(dataset),
    )


def _words(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _nested(groups: Iterable[Any], keyword: str) -> Any:
    """The value of an element in the functional groups of a multi-frame image; None where it is in none."""
    for group in groups:
        if keyword in group:
            return group[keyword].value
        for element in group:
            if element.VR == "SQ" and len(element.value) and keyword in element.value[0]:
                return element.value[0][keyword].value
    return None


def _milliseconds(dataset: Any, groups: list[Any], *keywords: str) -> float | None:
    for keyword in keywords:
        value = dataset.get(keyword)
        for number in _words(_nested(groups, keyword) if value is None else value):
            if float(number) > 0:
                return float(number)
    return None


def _sequence(dataset: Any, groups: list[Any]) -> tuple[str | None, bool]:
    """What `DicomHeader` says as sequence and by_name."""
    if dataset.get("Modality") not in (None, "", "MR"):
        return OTHER, False
    kinds = " ".join(str(word).upper() for word in _words(dataset.get("ImageType")))
    if re.search(r"LOCALIZER|PROJECTION|\bMIP\b|DIFFUSION|\bADC\b|\bPHASE\b|PHASE MAP", kinds):
        return OTHER, False
    names = [dataset.get("SeriesDescription"), dataset.get("ProtocolName")]
    label = next((found for name in names if name and (found := label_of_description(str(name)))), None)
    recovery = str(_nested(groups, "InversionRecovery") or "") == "YES"
    return sequence_of_timing(
        label,
        inversion_ms=_milliseconds(dataset, groups, "InversionTime", "InversionTimes"),
        echo_ms=_milliseconds(dataset, groups, "EchoTime", "EffectiveEchoTime"),
        repetition_ms=_milliseconds(dataset, groups, "RepetitionTime"),
        inversion_recovery=recovery or "IR" in [str(w) for w in _words(dataset.get("ScanningSequence"))],
        contrast=str(dataset.get("ContrastBolusAgent") or "").strip().upper() not in ("", "NO", "NONE"),
    )


def sequence_of_timing(
    label: str | None,
    *,
    inversion_ms: float | None,
    echo_ms: float | None,
    repetition_ms: float | None,
    inversion_recovery: bool,
    contrast: bool = False,
) -> tuple[str | None, bool]:
    """The sequence by its timing; its name decides only where the timing leaves it open.

    Parameters
    ----------
    label : what the name says: one of `SEQUENCES`, OTHER, or None
    inversion_ms, echo_ms, repetition_ms : times in ms, None where the header has none
    inversion_recovery : whether the header says that the sequence inverts
    contrast : whether a contrast agent was given

    Returns
    -------
    One of `SEQUENCES`, OTHER or None; and whether a FLAIR is one by its name alone

    Examples
    --------
    >>> times = {"echo_ms": 120.0, "repetition_ms": 9000.0, "inversion_recovery": True}
    >>> sequence_of_timing("t2", inversion_ms=2500.0, **times)
    ('flair', False)
    >>> sequence_of_timing("flair", inversion_ms=180.0, **times)
    ('other', False)
    """
    t1 = label if label in ("t1", "t1ce") else "t1ce" if contrast else "t1"
    if label == OTHER:
        return OTHER, False
    if inversion_ms is not None:
        low, high = FLAIR_INVERSION_MS
        if low <= inversion_ms <= high and echo_ms is not None and echo_ms >= FLAIR_ECHO_MS:
            return "flair", False
        if inversion_ms < STIR_INVERSION_MS or echo_ms is None or echo_ms >= FLAIR_ECHO_MS:
            return (label if label in ("t1", "t1ce") else OTHER), False
        return t1, False
    long_echo = echo_ms is not None and echo_ms >= 80.0
    long_repetition = repetition_ms is not None and repetition_ms >= 6000.0
    if inversion_recovery and long_echo and long_repetition:
        return "flair", False
    if label == "flair":
        if echo_ms is not None and echo_ms < FLAIR_ECHO_MS:
            return t1, False
        short = repetition_ms is not None and repetition_ms < 3000.0
        return (OTHER, False) if short else ("flair", True)
    if label is not None:
        return label, False
    if echo_ms is None or repetition_ms is None or inversion_recovery:
        return None, False
    if echo_ms >= 70.0 and repetition_ms >= 2000.0:
        return "t2", False
    return (t1, False) if echo_ms < 30.0 and repetition_ms < 1500.0 else (None, False)


def _identifiers(dataset: Any) -> frozenset[str]:
    """Words of the header that name the patient, in lower case."""
    keywords = ("PatientName", "PatientID", "OtherPatientIDs", "PatientBirthDate", "AccessionNumber")
    text = [str(word) for keyword in keywords for word in _words(dataset.get(keyword))]
    text += [str(dataset.get("PatientName") or "")]
    words = {word for one in text for word in (*re.split(r"[\s^=\\,]+", one), one.strip())}
    born = re.fullmatch(r"(\d{4})(\d\d)(\d\d)", str(dataset.get("PatientBirthDate") or ""))
    if born:
        words |= {sign.join(parts) for sign in "-._" for parts in (born.groups(), born.groups()[::-1])}
    words |= {_without_accents(word) for word in words}
    return frozenset(unicodedata.normalize("NFC", word).lower() for word in words if len(word) >= 2)


def _without_accents(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))


def without_patient(text: str, identifiers: Iterable[str], instead: str = "patient") -> str:
    """The text with other words for each of those that name the patient.

    Short ones are replaced as whole words alone.

    >>> without_patient("DOE_JOHN_brain", ("doe", "john"))
    'patient_brain'
    """
    text = unicodedata.normalize("NFC", text)
    for word in sorted(identifiers, key=lambda w: (-len(w), w)):
        pattern = re.escape(word)
        if len(word) < 4:
            pattern = rf"(?<![^\W_]){pattern}(?![^\W_])"
        text = re.sub(pattern, "\0", text, flags=re.IGNORECASE)
    return re.sub(r"\0(?:[\W_]*\0)*", instead, text)
