"""The results in a folder, read and checked: what `ddmd detect` said of each case, and where its maps are."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddmd.io.results import BIDS_NAMES, PLAIN_NAMES, read_result
from ddmd.io.text import printable, without_folders

_RESULT = "_result.json"
SHOWN_MAPS = ("mask", "labels", "probability", "uncertainty")


@dataclass(frozen=True)
class LesionRow:
    """A lesion of a case: number as in the label map, centre in mm (RAS), volume, probabilities."""

    number: int
    centre_mm: tuple[float, float, float] | None
    volume_ml: float | None
    peak_probability: float | None
    mean_probability: float | None


@dataclass(frozen=True)
class ReportedCase:
    """One case with a complete result.

    name : as the user knows it, printable. stem : what the names of its files begin with.
    folder : where they are, absolute. checksum : SHA-256 of the checksums of all its files.
    maps : keys of `SHOWN_MAPS` -> file. overlay : PNG file, or None.
    sources : base names of the images it was made from.
    values : what its JSON says; of unchecked types.
    """

    name: str
    stem: str
    folder: Path
    checksum: str
    maps: Mapping[str, Path]
    overlay: Path | None
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    lesions: tuple[LesionRow, ...]
    values: Mapping[str, Any]

    def number(self, key: str) -> float | None:
        """A finite number of the JSON, or None."""
        return _number(self.values.get(key))


@dataclass(frozen=True)
class Failure:
    """A case without a result: its name, the base name of its file, and why."""

    name: str
    file: str
    reason: str


def result_files(folder: Path) -> list[tuple[Path, str]]:
    """The JSON files that results end with, in a folder and below it, each with the stem of its case."""
    found = [(path, path.name.removesuffix(_RESULT)) for path in sorted(folder.rglob(f"*{_RESULT}"))]
    return [(path, stem) for path, stem in found if stem and not stem.startswith(".") and path.is_file()]


def read_results(folder: Path) -> tuple[list[ReportedCase], list[Failure]]:
    """The complete results in a folder and below it, by name, and the cases that have none.

    Parameters
    ----------
    folder : that `ddmd detect` or `ddmd.cohort.pipeline.detect_cohort` wrote to

    Returns
    -------
    results, failures
        Failures are the rows of failures.tsv (of all parts) and results that are not complete or were changed.
    """
    results: list[ReportedCase] = []
    failures: dict[str, Failure] = {}
    for path, stem in result_files(folder):
        values = read_result(stem, path.parent)
        if values is None or not all(name.startswith(f"{stem}_") for name in values["Files"]):
            reason = "its files are not complete, or were changed after they were written; detect it again"
            failures[stem] = Failure(printable(stem), printable(path.name), reason)
        else:
            results.append(_case(stem, path.parent, values))
    results.sort(key=lambda case: (_natural(case.name), case.stem))
    named = {case.name for case in results}
    for failure in _failure_rows(folder):
        if failure.name not in named:
            failures[failure.name] = failure
    return results, [failures[name] for name in sorted(failures, key=_natural)]


def _case(stem: str, folder: Path, values: dict[str, Any]) -> ReportedCase:
    from ddmd.io.naming import name_hash

    files: dict[str, Any] = values["Files"]
    quality = values.get("Quality")
    sources = values.get("Sources")  # a list of URIs in BIDS derivatives
    sources = list(sources.values()) if isinstance(sources, dict) else sources
    lesions = values.get("LesionTable")
    names = [
        (key, f"{stem}_{naming.suffixes[key]}.nii.gz")
        for key in SHOWN_MAPS
        for naming in (PLAIN_NAMES, BIDS_NAMES)
    ]
    return ReportedCase(
        name=printable(values.get("Name") or stem),
        stem=stem,
        folder=folder,
        checksum=name_hash(repr(sorted(files.items())), 64),
        maps={key: folder / name for key, name in names if name in files},
        overlay=folder / f"{stem}_overlay.png" if f"{stem}_overlay.png" in files else None,
        sources=tuple(os.path.basename(source) for source in _texts(sources)),
        flags=_texts(quality.get("Flags") if isinstance(quality, dict) else None),
        notes=_texts(values.get("Notes")),
        lesions=tuple(
            _lesion(number, row)
            for number, row in enumerate(lesions if isinstance(lesions, list) else [], 1)
            if isinstance(row, dict)
        ),
        values=values,
    )


def _lesion(number: int, row: Mapping[str, Any]) -> LesionRow:
    centre = tuple(_number(row.get(f"{axis}_mm")) for axis in "xyz")
    x, y, z = centre
    return LesionRow(
        number,
        None if x is None or y is None or z is None else (x, y, z),
        _number(row.get("volume_ml")),
        _number(row.get("peak_probability")),
        _number(row.get("mean_probability")),
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(printable(text) for text in value) if isinstance(value, list) else ()


def _failure_rows(folder: Path) -> list[Failure]:
    rows: list[Failure] = []
    for path in sorted(folder.glob("failures*.tsv")):
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    name, source, reason = (
                        printable(row.get(key) or "") for key in ("case", "file", "reason")
                    )
                    source = os.path.basename(source)
                    if name:
                        rows.append(Failure(name, source, _without_folders(reason, source)))
        except (OSError, UnicodeError, csv.Error):
            rows.append(Failure(path.name, path.name, "cannot be read as a table"))
    return rows


def _without_folders(reason: str, source: str) -> str:
    """A reason that names no folder; most begin with the path of the case's file."""
    before, found, after = reason.partition(f"/{source}")
    if source and found and (not before or before.startswith("/")):
        reason = source + after
    return without_folders(reason)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts case-2 before case-10."""
    parts: list[tuple[int, int, str]] = []
    run = ""
    for character in [*name, ""]:
        if run and (not character or character.isdecimal() != run[0].isdecimal()):
            parts.append((0, int(run), "") if run.isdecimal() else (1, 0, run.casefold()))
            run = ""
        run += character
    return tuple(parts)
