"""Names of examinations and patients, and of the files of their results: each once, on any file system."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from ddmd.cohort.file_names import UNKNOWN_KIND, NamedFile
from ddmd.cohort.name_words import PROCESSING, name_words
from ddmd.io.naming import file_stem, name_hash
from ddmd.io.sequences import stem
from ddmd.io.text import printable

_WRAPPER = re.compile(
    r"(train|val|valid|test)(ing|idation)?([-_]?(data|set|cases))?|hgg|lgg|miccai.*|.*(training|validation|testing)[-_]?data"
    r"|volumes|cases|patients|subjects|sourcedata|rawdata|bids|data",
    re.IGNORECASE,
)
_SITE = re.compile(r"(cent(er|re)|site|cohort|group|hospital|scanner|hg|lg)[-_ ]?\w{0,12}", re.IGNORECASE)
_VISIT = re.compile(
    r"((ses|session|visit|timepoint|time|baseline|bl|follow[-_ ]?up|fu|month|week|year|day|pre|post|exam|tp)[-_ ]?\w{0,3}"
    r"|(pre|post)[-_ ]?op\w*|[vtmwyd]\d{1,3}|(19|20)\d{2}([-_]?\d{2}([-_]?\d{2})?)?)",
    re.IGNORECASE,
)
_VISIT_AT_END = re.compile(
    r"^(.+?)[-_](ses|session|visit|timepoint|tp|followup|fu|month|week|year|scan)[-_]?\d+$", re.IGNORECASE
)
_BRATS_TIME_POINT = re.compile(r"^(BraTS-[A-Za-z]+-\d+)-\d+$", re.IGNORECASE)  # patient, then examination


def case_name(file: NamedFile) -> str:
    """The name of the examination of an image, by its own name, or its folder's where that says nothing.

    The name does not depend on which other files there are, nor on which folder was searched.
    """
    if file.entities:
        return printable("_".join(f"{k}-{v}" for k, v in file.entities.items()))
    words = file.words
    if file.kind == UNKNOWN_KIND:
        return printable(file.prefix)
    if not words or set(words) <= PROCESSING:
        return printable("_".join(filter(None, (_folder_name(file.folder), file.prefix))))
    if _VISIT.fullmatch(file.prefix):
        return printable("_".join(filter(None, (_folder_name(file.folder), file.prefix))))
    if _VISIT.fullmatch(file.folder.name) and not set(name_words(file.folder.name.lower())) <= set(words):
        return printable(f"{file.prefix}_{file.folder.name}")
    return printable(file.prefix)


def _folder_name(folder: Path) -> str:
    name = folder.name
    says_whose = not (_VISIT.fullmatch(name) or name.lower() in PROCESSING)
    if not says_whose and folder.parent.name and not _WRAPPER.fullmatch(folder.parent.name):
        return f"{folder.parent.name}_{name}"
    return name


def patient_of(file: NamedFile, root: Path, name: str) -> str:
    """Who an image is of: a BIDS subject, a BraTS patient, else the first folder below the root, or the name."""
    if "sub" in file.entities:
        return f"sub-{file.entities['sub']}"
    for text in (file.folder.name, name):
        if match := _BRATS_TIME_POINT.match(text):
            return printable(match[1])
    if file.folder.name.lower().startswith("brats") and file.folder != root:
        return printable(file.folder.name)
    try:
        inner = [p for p in file.folder.relative_to(root).parts if not _WRAPPER.fullmatch(p)]
    except ValueError:
        inner = []
    depth = 1 + next((k for k, part in enumerate(inner[:-1]) if not _SITE.fullmatch(part)), len(inner) - 1)
    patient = printable("_".join(inner[:depth])) if inner else name
    visit = _VISIT_AT_END.match(patient)
    return visit[1] if visit else patient


def unique_names(items: Sequence[tuple[str, Path]]) -> list[str]:
    """Names of cases, each once: folders are put in front of names that several have, else a hash behind.

    Parameters
    ----------
    items : for each case its name and the absolute path of its first image
    """
    names = [name for name, _ in items]
    for _ in range(8):
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(name, []).append(i)
        again = [group for group in groups.values() if len(group) > 1]
        if not again:
            return names
        for group in again:
            for i, name in zip(
                group, _told_apart([items[i][1] for i in group], names[group[0]]), strict=True
            ):
                names[i] = name
    counts = Counter(names)
    return [
        f"{name}-{name_hash(os.fspath(path))}" if counts[name] > 1 else name
        for name, (_, path) in zip(names, items, strict=True)
    ]


def _told_apart(paths: Sequence[Path], name: str) -> list[str]:
    """A name for each path, with the first folder in which they differ; in one folder, the names of files."""
    if len({path.parent for path in paths}) == 1:
        stems = [printable(stem(path)) for path in paths]
        return [s if name.lower() in s.lower() else f"{name}_{s}" for s in stems]
    folders = [path.parent.parts[::-1] for path in paths]
    for level in zip_longest(*folders, fillvalue=""):
        if len(set(level)) > 1:
            return [printable(f"{folder}_{name}") if folder.strip(os.sep) else name for folder in level]
    return [name] * len(paths)


def unique_stems(names: Sequence[str]) -> list[str]:
    """Names with a hash behind those whose files would have the stem of another's, on any file system.

    Of names that differ in blanks, signs or case alone, the one that is its own stem stays as it is.

    Parameters
    ----------
    names : of the cases of one cohort, each once

    Examples
    --------
    >>> unique_stems(["p 1", "p-1", "p2"])
    ['p 1-85051de8', 'p-1', 'p2']
    >>> output_stems(["sub-01", "Zoë"])
    {'sub-01': 'sub-01', 'Zoë': 'Zoe'}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(file_stem(name).casefold(), []).append(name)
    result = {}
    for group in groups.values():
        own = [name for name in group if file_stem(name) == name]
        kept = group[0] if len(group) == 1 else own[0] if len(own) == 1 else None
        for name in group:
            result[name] = name if name == kept else f"{name}-{name_hash(name)}"
    if len({file_stem(name).casefold() for name in result.values()}) < len(result):
        result = {name: f"{name}-{name_hash(name, 16)}" for name in names}
    return [result[name] for name in names]


def output_stems(names: Iterable[str]) -> dict[str, str]:
    """The stem of the files of each case: name -> stem, no two the same on any file system.

    Names as `find_cases` gives them have the stem that `file_stem` says.

    Parameters
    ----------
    names : of the cases of one cohort
    """
    listed = list(dict.fromkeys(names))
    return {name: file_stem(own) for name, own in zip(listed, unique_stems(listed), strict=True)}
