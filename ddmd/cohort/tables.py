"""Tables of cases: labels.csv, participants.tsv, cases.csv, slice labels; reading them and writing labels."""

from __future__ import annotations

import csv
import io
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ddmd.cohort.cases import Case
from ddmd.cohort.errors import DatasetError
from ddmd.io.atomic import write_text
from ddmd.io.naming import file_stem
from ddmd.io.sequences import SEQUENCES

MAX_BYTES = 64 << 20  # of a table
COLUMNS = ("patient", "name", "source", *SEQUENCES, "has_lesion", "slice_labels")


def read_text(path: Path) -> str:
    """Read a text file of a data set: UTF-8, or UTF-16 with its mark.

    Raises
    ------
    DatasetError
        If it is no regular file, too large, or not such text.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{path}: not a file; name the table itself")
        if status.st_size > MAX_BYTES:
            raise DatasetError(f"{path}: {status.st_size} bytes are no table; name the right file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        raise DatasetError(f"{path}: cannot be read ({reason}); check the path") from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DatasetError(f"{path}: line {line} is not UTF-8; save the table as UTF-8") from None
    if "\0" in text:
        line = text[: text.index(chr(0))].count("\n") + 1
        raise DatasetError(f"{path}: line {line} holds a NUL character; save the table anew")
    return text


def read_rows(
    path: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> list[tuple[str, dict[str, str]]]:
    """Read the rows of a table with a header: commas or semicolons in .csv, tabs in .tsv.

    Parameters
    ----------
    path : the table
    needed : columns that the header has and every row fills
    optional : columns that are read as well, "" where there is none

    Returns
    -------
    For every row that is not blank, where it is ("labels.csv, line 3") and the cells by column.

    Raises
    ------
    DatasetError
        If the table cannot be read, or a row lacks a cell or has too many.
    """
    text = read_text(path)
    delimiter = _delimiter(text, path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[str, dict[str, str]]] = []
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}: line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(header, needed, path)
                continue
            if len(cells) != len(header):
                raise DatasetError(f"{where} has {len(cells)} cells for {len(header)} columns; correct it")
            row = dict.fromkeys(optional, "") | dict(zip(header, cells, strict=True))
            empty = [column for column in needed if not row[column].strip()]
            if empty:
                raise DatasetError(f"{where}: {empty[0]} is empty; fill it")
            rows.append((where, row))
    except csv.Error as error:
        raise DatasetError(f"{path}: line {reader.line_num}: not a table ({error}); correct it") from None
    if not header:
        _check_header(header, needed, path)
    return rows


def _delimiter(text: str, path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = text.lstrip().partition("\n")[0]
    return ";" if ";" in header and "," not in header else ","


def _check_header(header: Sequence[str], needed: Sequence[str], path: Path) -> None:
    lacking = sorted(set(needed) - set(header))
    if lacking:
        raise DatasetError(f"{path}: lacks the columns {', '.join(lacking)}; add them")
    twice = sorted(column for column, count in Counter(header).items() if column and count > 1)
    if twice:
        raise DatasetError(f"{path}: the column {twice[0]} is there twice; keep one")


def truth(text: str, where: str) -> bool | None:
    """What a has_lesion cell says; None where it says that nobody knows."""
    word = text.strip().lower()
    if word in ("", "n/a", "na", "nan", "-1", "unknown"):
        return None
    if word in ("1", "true", "yes", "0", "false", "no"):
        return word in ("1", "true", "yes")
    raise DatasetError(f"{where}: has_lesion is {text!r}; write 1, 0, or n/a where it is not known")


def read_participants(root: Path) -> dict[str, bool | None]:
    """participant_id -> has_lesion of participants.tsv; empty where there is no such table."""
    table = root / "participants.tsv"
    if not table.exists():
        return {}
    known: dict[str, bool | None] = {}
    for where, row in read_rows(table, ("participant_id",), ("has_lesion",)):
        who = row["participant_id"].strip()
        if who in known:
            raise DatasetError(f"{where}: {who} is there twice; keep one row")
        known[who] = truth(row["has_lesion"], f"{where}: {who}")
    return known


def _whole_number(text: str, column: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DatasetError(f"{where}: {column} is {text[:40]!r}; write a whole number") from None


def _inner_path(cell: str, where: str) -> str:
    """The cell of a file that lies in its folder, or below it."""
    parts = PurePosixPath(cell.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or parts == PurePosixPath("."):
        raise DatasetError(f"{where}: file is {cell[:80]!r}; write the name of a file in images/")
    return cell


def cases_of_slices(root: Path, source: str) -> list[Case]:
    """Cases of labels.csv (file, patient, slice, has_lesion) beside images/ and, optionally, masks/."""
    by_patient: dict[str, list[tuple[int, str, bool | None]]] = {}
    for where, row in read_rows(root / "labels.csv", ("file", "patient", "slice"), ("has_lesion",)):
        number = _whole_number(row["slice"], "slice", where)
        file = _inner_path(row["file"], where)
        slices = by_patient.setdefault(row["patient"].strip(), [])
        slices.append((number, file, truth(row["has_lesion"], f"{where}: {file}")))
    cases = []
    for patient, slices in sorted(by_patient.items()):
        slices.sort(key=lambda one: one[0])
        for one, other in itertools.pairwise(slices):
            if one[0] == other[0]:
                raise DatasetError(
                    f"{root / 'labels.csv'}: {one[1]} and {other[1]} are both slice {one[0]} of {patient}; "
                    "number the slices from the feet up"
                )
        labels = tuple(-1 if known is None else int(known) for _, _, known in slices)
        cases.append(
            Case(
                patient, patient, source,
                {"flair": tuple(root / "images" / file for _, file, _ in slices)},
                tuple(root / "masks" / file for _, file, _ in slices) if (root / "masks").is_dir() else None,
                labels, True if 1 in labels else (None if -1 in labels else False),
            )
        )  # fmt: skip
    return cases


def cases_of_table(root: Path, source: str) -> list[Case]:
    """Cases of cases.csv: patient, a column a sequence; optionally name, source, mask, has_lesion, slice_labels.

    Files are named relative to the table.
    """
    path = root if root.is_file() else root / "cases.csv"
    optional = ("name", "source", *SEQUENCES, "mask", "has_lesion", "slice_labels")
    cases: list[Case] = []
    names: dict[str, str] = {}
    for where, row in read_rows(path, ("patient",), optional):
        patient = row["patient"].strip()
        files = {s: (path.parent / row[s],) for s in SEQUENCES if row[s].strip()}
        if not files:
            raise DatasetError(f"{where}: {patient} names no image; fill a sequence's column")
        for column in (*files, "mask"):
            if row[column].strip() and _is_special(path.parent / row[column]):
                raise DatasetError(f"{where}: {column} is {row[column]!r}, which is no file; correct it")
        name = row["name"].strip() or patient
        if name in names:
            raise DatasetError(
                f"{where}: {name} is the name of {names[name]} as well; give each case its own"
            )
        names[name] = where.rpartition(": ")[2]
        labels = read_slice_labels(path.parent / row["slice_labels"]) if row["slice_labels"].strip() else None
        masks = (path.parent / row["mask"],) if row["mask"].strip() else None
        has_lesion = truth(row["has_lesion"], f"{where}: {patient}")
        cases.append(Case(patient, name, row["source"].strip() or source, files, masks, labels, has_lesion))
    return cases


def _is_special(path: Path) -> bool:
    """Whether something is there that is no regular file."""
    try:
        return path.exists() and not path.is_file()
    except (OSError, ValueError):
        return True


def read_slice_labels(path: Path) -> tuple[int, ...]:
    """Read 0, 1 or -1 (not known) for every canonical axial slice, from the feet up."""
    if not path.is_file():
        raise DatasetError(f"{path}: no such file of slice labels; write it, or empty the table's cell")
    words = read_text(path).split()
    if not set(words) <= {"0", "1", "-1"}:
        raise DatasetError(
            f"{path}: slice labels are 0, 1 or -1 (not known), with spaces between; correct it"
        )
    return tuple(int(word) for word in words)


def label_slices(cases: Iterable[Case], folder: str | Path, healthy: Iterable[str] = ()) -> Path:
    """Write image-level labels of every axial slice, once, as an annotator would give them.

    Cases with a mask get 1 for slices that it marks and 0 for the others, those named in `healthy` 0
    throughout. The result is a table (`layout="table"`) without masks: training in the image-label
    track from it can open none. Stacks of PNG slices have their labels.csv already.

    Parameters
    ----------
    cases : volumes
    folder : where cases.csv and a file of labels a case are written
    healthy : names of cases without a lesion

    Returns
    -------
    path of cases.csv

    Raises
    ------
    DatasetError
        If a case is a stack, or two cases have one name.
    """
    folder, well = Path(folder).resolve(), set(healthy)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Mapping[str, str]] = []
    for case in cases:
        if case.stack:
            raise DatasetError(f"{case.name}: PNG slices have their labels in labels.csv; leave them out")
        if not set(case.files) <= set(SEQUENCES):
            raise DatasetError(f"{case.reference}: its name does not say which sequence it is; rename it")
        if any(file_stem(case.name) == file_stem(row["name"]) for row in rows):
            raise DatasetError(f"{case.name}: two cases have this name; label them into two folders")
        row = {"patient": case.patient, "name": case.name, "source": case.source}
        row["has_lesion"] = {None: "", True: "1", False: "0"}[case.has_lesion]
        row |= {s: os.path.relpath(files[0].resolve(), folder) for s, files in case.files.items()}
        if case.name in well:
            row["has_lesion"] = "0"
        elif case.masks is not None:
            marked = case.lesion().any(axis=(0, 1)).astype(int)
            row["has_lesion"], row["slice_labels"] = (
                str(marked.max()),
                f"{file_stem(case.name)}.slices.txt",
            )
            write_text(folder / row["slice_labels"], " ".join(map(str, marked)))
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "cases.csv"
    write_text(path, text.getvalue())
    return path
