"""Writes the report of a folder of results: the page, and a script file of volumes a case."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np

import ddmd
from ddmd.cohort.cases import UNKNOWN, Case
from ddmd.io.atomic import write_text
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import GRID_TOLERANCE_MM, grid_gap
from ddmd.io.naming import name_hash
from ddmd.io.text import json_line, printable, without_folders
from ddmd.report.reported_cases import Failure, ReportedCase, read_results, result_files
from ddmd.report.thumbnails import Thumbnail, thumbnail
from ddmd.report.volumes import display_image, display_map, read_info, thinned, write_volumes

PAGE = "report.html"
VOLUMES = "report_volumes"  # folder of the script files, beside the page
GENERATOR = "ddmd report"
_MARK = f'<meta name="generator" content="{GENERATOR}">'
_MARK_WITHIN = 4096  # bytes at the beginning of a page that `ddmd report` wrote


class ReportError(ValueError):
    """A report that cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Report:
    """What was written.

    page : the HTML file. cases, failures : how many are in its tables.
    notes : what the user should know, as of images that were not found.
    """

    page: Path
    cases: int
    failures: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    """A case as the page shows it."""

    id: str
    case: ReportedCase
    thumbnail: Thumbnail | None
    script: str | None  # URL relative to the page
    volumes: tuple[str, ...]
    overlay: str | None
    note: str | None


def write_report(
    folder: str | os.PathLike[str],
    images: Iterable[Case] = (),
    *,
    title: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write `report.html` and the folder `report_volumes` for the results in a folder.

    The page needs no network and no server: it opens from a disk. Volumes of a case that were written for the
    same result stay as they are, with the image, so that a report grows with its cohort.

    Parameters
    ----------
    folder : that `ddmd detect` wrote results to
    images : the cases whose results they are, so that the viewer shows their images below the maps
    title : of the page; by default the name of the folder
    workers : threads that read volumes; by default one a core, 4 at most
    progress : called with the cases done and the cases there are

    Returns
    -------
    Report

    Raises
    ------
    ReportError
        If the folder is not there, has no results, cannot be written to, or has a report.html that is none of
        this program.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder}: is no folder; name the one that ddmd detect wrote to")
    page = folder / PAGE
    _check_replaceable(page)
    if (folder / VOLUMES).is_symlink():
        raise ReportError(f"{folder / VOLUMES}: is a link, and is not written through; move it away first")
    results, failures = read_results(folder)
    if not results and not failures:
        raise ReportError(f"{folder}: has no results; name the folder that ddmd detect wrote to")
    by_name = {printable(case.name): case for case in images}
    notes = _notes_on_images(results, by_name)
    try:
        (folder / VOLUMES).mkdir(exist_ok=True)
        with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1), "ddmd-report") as pool:
            rows: list[_Row] = []
            for row in pool.map(lambda case: _row(case, folder, by_name.get(case.name)), results):
                rows.append(row)
                if progress is not None:
                    progress(len(rows), len(results))
        _remove_leftovers(folder)
        write_text(page, _html(rows, failures, title or printable(folder.resolve().name) or "cohort"))
    except OSError as error:
        raise ReportError(f"{folder}: cannot be written to ({error}); choose another folder") from None
    notes += [f"{row.case.name}: {row.note}" for row in rows if row.note and row.case.name in by_name]
    return Report(page, len(rows), len(failures), tuple(notes))


def _remove_leftovers(folder: Path) -> None:
    """Remove script files of cases that are no longer there."""
    written = [path for path in (folder / VOLUMES).glob("*.js") if read_info(path) is not None]
    # looked for after that, so that a case that another process has just finished is among them
    there = {case_id(folder, path.parent, stem) for path, stem in result_files(folder)}
    for path in written:
        if path.stem not in there:
            path.unlink(missing_ok=True)


def case_id(folder: Path, case_folder: Path, stem: str) -> str:
    """What the page calls a case: the stem of its files, after a hash of the folder they are in below the report's."""
    below = case_folder.relative_to(folder).as_posix()
    return stem if below == "." else f"{name_hash(below)}-{stem}"


def _check_replaceable(page: Path) -> None:
    if not os.path.lexists(page):
        return
    try:
        with open(page, "rb") as file:
            ours = _MARK.encode() in file.read(_MARK_WITHIN)
    except OSError:
        ours = False
    if page.is_symlink() or not ours:
        raise ReportError(f"{page}: is no page of ddmd report, and is not replaced; move it away first")


def _notes_on_images(results: list[ReportedCase], by_name: Mapping[str, Case]) -> list[str]:
    lacking = [case.name for case in results if case.name not in by_name]
    if not by_name or not lacking:
        return []
    shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
    return [f"no image was given for {len(lacking)} of {len(results)} cases ({shown})"]


def _row(case: ReportedCase, folder: Path, source: Case | None) -> _Row:
    """Write the volumes of a case, where they are not there yet, and say what the page shows of it."""
    row_id = case_id(folder, case.folder, case.stem)
    path = folder / VOLUMES / f"{row_id}.js"
    note: str | None = None
    volumes: tuple[str, ...] = ()
    info = read_info(path)
    complete = info is not None and info.checksum == case.checksum and set(case.maps) <= set(info.volumes)
    if info is not None and complete and ("image" in info.volumes or source is None):
        volumes = info.volumes
        note = None if "image" in volumes else _NO_IMAGE
    elif case.maps:
        try:
            made, note = _volumes(case, source)
            write_volumes(path, row_id, case.checksum, made)
            volumes = tuple(made)
        except (nib.filebasedimages.ImageFileError, ValueError, EOFError) as error:
            note = f"its maps cannot be read ({printable(error)})"
    else:
        note = "no maps were written (--maps); there is nothing to open"
    return _Row(
        id=row_id,
        case=case,
        thumbnail=None if case.overlay is None else thumbnail(case.overlay),
        script=quote(f"{VOLUMES}/{path.name}") if volumes else None,
        volumes=volumes,
        overlay=None if case.overlay is None else quote(case.overlay.relative_to(folder).as_posix()),
        note=note,
    )


_NO_IMAGE = "the image is not shown: name its file or folder (ddmd report OUT --images IN)"


def _volumes(case: ReportedCase, source: Case | None) -> tuple[dict[str, nib.Nifti1Image], str | None]:
    """The volumes of a case, all on one grid, image first; and a note where the image is not among them."""
    maps: dict[str, Any] = {key: nib.load(path) for key, path in case.maps.items()}
    first = next(iter(maps.values()))
    shape, affine = first.shape, np.asarray(first.affine, np.float64)
    if len(shape) != 3 or any(image.shape != shape for image in maps.values()):
        raise ValueError("they are not on one grid")
    shown: dict[str, nib.Nifti1Image] = {}
    note: str | None = _NO_IMAGE
    if source is not None:
        try:
            values = _source_values(case, source, shape, affine)
            shown["image"] = display_image(*thinned(values, affine))
            note = None
        except (VolumeError, ValueError, OSError) as error:
            note = f"the image is not shown: {_without_folders(str(error), source)}"
    for key, image in maps.items():
        values = np.asanyarray(image.dataobj)
        shown[key] = display_map(key, *thinned(values, affine))
    return shown, note


def _source_values(
    case: ReportedCase, source: Case, shape: tuple[int, ...], affine: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The image that the result was made from, on its own grid; ValueError for another one."""
    named = {name: paths[0].name for name, paths in source.files.items()}
    sequence = next((s for file in case.sources for s, name in named.items() if name == file), None)
    sequence = sequence or next(iter(named))
    sequence = "flair" if sequence == UNKNOWN else sequence  # any name will do
    volume = source.volume((sequence,))
    file = printable(os.path.basename(volume.sources[sequence]))
    if case.sources and file not in case.sources:
        raise ValueError(f"the result is of {', '.join(case.sources)}, not of {file}")
    image = volume.to_native(volume.images[sequence])
    gap = np.inf if image.shape != shape else grid_gap(shape, np.asarray(image.affine), affine)
    if gap > GRID_TOLERANCE_MM:
        raise ValueError(f"{file} has another grid than the result")
    return np.asanyarray(image.dataobj)


def _without_folders(text: str, source: Case) -> str:
    for path in (path for paths in source.files.values() for path in paths):
        text = text.replace(str(path), path.name)
    return printable(without_folders(text))


def _html(rows: list[_Row], failures: list[Failure], title: str) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ddmd.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    files = importlib.resources.files("ddmd.report")
    style = files.joinpath("templates", "report.css").read_text("utf-8")
    script = files.joinpath("templates", "report.js").read_text("utf-8")
    niivue = base64.b64encode(files.joinpath("assets", "niivue.umd.js.gz").read_bytes()).decode("ascii")
    return environment.get_template("report.html").render(
        generator=GENERATOR,
        version=ddmd.__version__,
        title=title,
        style=style,
        style_hash=_csp_hash(style),
        script=script,
        script_hash=_csp_hash(script),
        niivue=niivue,
        licences=files.joinpath("assets", "LICENSES.txt").read_text("utf-8"),
        rows=rows,
        failures=failures,
        totals=_totals(rows, failures),
        runs=_runs(rows),
        data=_script_json({row.id: _case_data(row) for row in rows}),
    )


def _csp_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def _script_json(value: Any) -> str:
    """JSON that ends no script element and begins no comment in it."""
    text = json_line(value)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _figure(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _totals(rows: list[_Row], failures: list[Failure]) -> list[tuple[str, str]]:
    found = [row for row in rows if row.case.lesions]
    return [
        ("cases", str(len(rows))),
        ("with lesions", str(len(found))),
        ("with flags", str(sum(bool(row.case.flags) for row in rows))),
        ("failed", str(len(failures))),
    ]


def _runs(rows: list[_Row]) -> list[tuple[str, int]]:
    """What made the results, in words, and of how many cases."""
    counts: dict[str, int] = {}
    for row in rows:
        values = row.case.values
        sampling = values.get("Sampling")
        sampling = sampling if isinstance(sampling, dict) else {}
        parts = [
            f"ddmd {values.get('Version', '?')}",
            f"weights {values.get('Weights', '?')} ({str(values.get('WeightsSha256'))[:12]})",
            f"S = {sampling.get('samples', '?')}",
            f"N = {sampling.get('steps', '?')}",
            f"threshold {values.get('Threshold', '?')}",
        ]
        words = printable(", ".join(parts))
        counts[words] = counts.get(words, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def _case_data(row: _Row) -> dict[str, Any]:
    case = row.case
    quality = case.values.get("Quality")
    quality = quality if isinstance(quality, dict) else {}
    facts = {
        "score": _figure(case.number("Score"), 2),
        "lesions": str(len(case.lesions)),
        "lesion volume": f"{_figure(case.number('LesionMl'), 2)} ml{_interval(case)}",
        "brain volume": f"{_figure(case.number('BrainMl'), 0)} ml",
        "uncertain share": _figure(_as_number(quality.get("UncertainShare")), 2),
        "image": ", ".join(case.sources),
    }
    return {
        "name": case.name,
        "script": row.script,
        "overlay": row.overlay,
        "facts": facts,
        "flags": list(case.flags),
        "notes": [*case.notes, *([row.note] if row.note else [])],
        "threshold": case.number("Threshold"),
        "lesions": [
            {
                "number": lesion.number,
                "centre": lesion.centre_mm,
                "ml": lesion.volume_ml,
                "peak": lesion.peak_probability,
            }
            for lesion in case.lesions
        ],
    }


def _interval(case: ReportedCase) -> str:
    """The volume that is surely and that is possibly lesion, in brackets; empty where it is not known."""
    ends = case.values.get("LesionMlInterval")
    low, high = map(_as_number, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"


def _as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
