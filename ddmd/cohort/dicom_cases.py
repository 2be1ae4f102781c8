"""The examinations in a folder of DICOM files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddmd.cohort.cases import Case
from ddmd.io.dicom import DicomSeries, describe, find_series, originals
from ddmd.io.dicom_headers import without_patient
from ddmd.io.naming import name_hash


@dataclasses.dataclass(frozen=True)
class DicomCases:
    """What was found in one folder.

    cases : each with a path that orders and tells it apart, and names no patient.
    notes : what was left aside.
    lacking : why there is no case, where there is none.
    """

    cases: tuple[tuple[Case, Path], ...]
    notes: tuple[str, ...]
    lacking: str | None


def dicom_cases(
    root: Path,
    source: str,
    require: Sequence[str],
    sequence: str | None,
    files: Sequence[Path] | None = None,
    optional: Sequence[str] = (),
) -> DicomCases:
    """One case for each series of the first sequence that is required, with others of the same study.

    Where none is required, the first optional sequence that a study has takes its place in that study.

    Series that were computed from others are left aside where their study has an original.

    Parameters
    ----------
    root : folder
    source : what the cases' source is called
    require : sequences without which a study is left aside; FLAIR where there is none, nor an optional one
    sequence : what series are whose tags do not say it, and the only series of a folder
    files : the DICOM files in it that are looked at, by default all
    optional : sequences that a study may have; where none is required, a study has one of them at least

    Raises
    ------
    VolumeError
        If a package is missing, or no file holds an image.
    """
    search = find_series(root, files)
    by_sequence: dict[str, list[DicomSeries]] = {}
    for one in search.series:
        said = sequence if sequence and (one.sequence is None or len(search.series) == 1) else one.sequence
        by_sequence.setdefault(said or "", []).append(one)
    usable = {name: originals(series) for name, series in by_sequence.items()}
    needed = tuple(require) or (() if optional else ("flair",))
    anchors = _anchors(usable, needed[:1] or tuple(optional))
    patients = {one.patient for one in search.series}
    cases: list[tuple[Case, Path]] = []
    used: set[DicomSeries] = set()
    for sequence_of_anchor, anchor in anchors:
        chosen = {sequence_of_anchor: anchor}
        for other in dict.fromkeys((*needed, *optional)):
            if other in chosen:
                continue
            beside = [one for one in usable.get(other, []) if one.study == anchor.study]
            if beside:
                chosen[other] = max(beside, key=lambda one: (one.shape == anchor.shape, len(one.positions)))
        if any(name not in chosen for name in needed):
            continue
        used |= set(chosen.values())
        files_of = {name: one.files for name, one in chosen.items()}
        words = anchor.headers[0].identifiers
        group = without_patient(source, words)
        patient = group if len(patients) == 1 else f"{group}_patient-{anchor.patient}"
        case = Case(patient, anchor.name, group, files_of, dicom=chosen)
        place = Path(without_patient(os.path.abspath(root), words), f"{len(cases):06d}")
        cases.append((case, place / name_hash(os.fspath(anchor.files[0])) / "series"))
    if not cases:
        wanted = (" and " if needed else " or ").join(name.upper() for name in needed or optional)
        return DicomCases(
            (), search.notes, f"{root}: no {wanted} series in it; found: {describe(search.series)}; give the folder "
            "of one series alone with --sequence if it is one",
        )  # fmt: skip
    others = [one for one in search.series if one not in used]
    notes = [*search.notes, *([f"{root}: left aside: {describe(others)}"] if others else [])]
    return DicomCases(tuple(cases), tuple(notes), None)


def _anchors(
    usable: Mapping[str, Sequence[DicomSeries]], names: Sequence[str]
) -> list[tuple[str, DicomSeries]]:
    """The series that each stand for a case: in every study, those of the first of the sequences that it has."""
    by_study: dict[int, tuple[str, list[DicomSeries]]] = {}
    for name in names:
        for series in usable.get(name, ()):
            sequence, chosen = by_study.setdefault(series.study, (name, []))
            if sequence == name:
                chosen.append(series)
    return [(sequence, series) for sequence, chosen in by_study.values() for series in chosen]
