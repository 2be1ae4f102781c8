"""User strings and values as text that is safe to print, to draw, to tabulate and to read back as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (right-to-left marks), surrogates, separators
# of absolute paths, all but the base name
_FOLDERS = re.compile(r"(?:[A-Za-z]:[\\/]|(?<![\w.<])/)(?:[^\s'\"<>:;,|]+[\\/])+")
_JOINERS = "\u200c\u200d"  # of category Cf, but parts of words and of emoji


def printable(text: object) -> str:
    r"""The text with control characters escaped: no newline, ANSI sequence, right-to-left mark or lone surrogate.

    Parameters
    ----------
    text : any object; `str` is called on it.

    Returns
    -------
    str
        Text that every UTF-8 terminal and file takes. A byte of a file name that is not UTF-8 becomes `\xNN`.

    Examples
    --------
    >>> printable("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    >>> printable("p\udce9ter")
    'p\\xe9ter'
    """
    return "".join(_escaped(c) if unicodedata.category(c) in _ESCAPED else c for c in str(text))


def _escaped(character: str) -> str:
    code = ord(character)
    if character in _JOINERS:
        return character
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def without_folders(text: str) -> str:
    """A message with base names for absolute paths; folders whose names hold blanks are not known as such.

    Examples
    --------
    >>> without_folders("/home/ada/data/p1/flair.nii.gz: not a NIfTI file")
    'flair.nii.gz: not a NIfTI file'
    """
    return _FOLDERS.sub("", text)


def table_cell(value: object) -> object:
    """The value as a cell of a table, where no spreadsheet takes it for a formula.

    Numbers, and strings that are numbers, stay as they are. Other strings become printable, and one that begins
    with = + - or @ (full-width forms included, blanks left aside) gets a leading apostrophe.

    Parameters
    ----------
    value : str, number, bool or None

    Returns
    -------
    str, or the number itself

    Examples
    --------
    >>> table_cell("=1+1"), table_cell("-3.5"), table_cell(-3.5), table_cell("p-1")
    ("'=1+1", '-3.5', -3.5, 'p-1')
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])
    if first and first in "=+-@" and not _is_number(text):
        return "'" + text
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def table_text(rows: Iterable[Mapping[str, object]], columns: Sequence[str], delimiter: str = "\t") -> str:
    r"""A table as text: a header, then one line a row, each cell by `table_cell`.

    Parameters
    ----------
    rows : mappings of column to value; a missing value is an empty cell.
    columns : names of the columns, in order.
    delimiter : "\t" for TSV, "," for CSV.

    Examples
    --------
    >>> table_text([{"name": "@a", "ml": 1.5}], ["name", "ml"], ",")
    "name,ml\n'@a,1.5\n"
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow([table_cell(column) for column in columns])
    for row in rows:
        writer.writerow([table_cell(row.get(column, "")) for column in columns])
    return text.getvalue()


def json_text(value: Any) -> str:
    """A value as JSON in ASCII, numpy scalars and arrays included; what is not finite is null.

    Examples
    --------
    >>> print(json_text({"samples": 5, "score": float("nan")}))
    {
     "samples": 5,
     "score": null
    }
    <BLANKLINE>
    """
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def json_line(value: Any) -> str:
    """A value as JSON on one line, by the rules of `json_text`."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if type(value).__module__.split(".")[0] == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_plain_text(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, os.PathLike):
        return _plain_text(os.path.basename(os.fspath(value)))
    return _plain_text(str(value))


def _plain_text(text: str) -> str:
    """Text without lone surrogates, which strict readers of JSON refuse."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return printable(text)
    return text
