"""Searching folders for images: links followed once, hidden, derived and earlier results left out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ddmd.io.dicom_headers import DICOM_EXTENSIONS
from ddmd.io.text import printable

_IMAGE = re.compile(r"\.nii(\.(gz|bz2|zst))?$|\.hdr(\.(gz|bz2|zst))?$|\.mg[hz]$", re.IGNORECASE)
_OTHER_FORMAT = re.compile(r"\.(nrrd|nhdr|mha|mhd|mnc)$", re.IGNORECASE)
_DICOM = re.compile(rf"({'|'.join(map(re.escape, DICOM_EXTENSIONS))})$", re.IGNORECASE)
_HIDDEN = re.compile(r"\.[^.]")  # a file of two dots is somebody's typing error, and no hidden one
_NOT_SEARCHED = frozenset(("__MACOSX", "@eaDir", "lost+found"))
_DERIVED = frozenset(("derivatives", "code"))


class Folders:
    """Finds images below folders. Remembers what it saw, so that nothing is found twice.

    notes : what could not be read.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        self._other_formats: list[Path] = []
        self._dicom: list[Path] = []

    def take_dicom(self) -> list[Path]:
        """Files with the name of a DICOM file, seen since the last call."""
        found, self._dicom = self._dicom, []
        return found

    def take_other_formats(self) -> list[Path]:
        """Images in formats that are not searched for, seen since the last call."""
        found, self._other_formats = self._other_formats, []
        return found

    def images(self, root: Path, below_derivatives: bool = False) -> Iterator[Path]:
        """Files with the name of an image below a folder, in the order of their paths.

        Links to folders come after the folders themselves, and each folder is searched once, whatever the
        number of links to it.
        """
        links: list[Path] = []
        found: list[Path] = []
        self._search(root, found, links, below_derivatives)
        while links:
            more: list[Path] = []
            for link in links:
                self._search(link, found, more, below_derivatives)
            links = more
        yield from sorted(found, key=os.fspath)

    def _search(self, root: Path, found: list[Path], links: list[Path], below_derivatives: bool) -> None:
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in self._seen:
                    continue
                self._seen.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
                if folder != root and is_output_folder(folder, entries):
                    self.notes.append(f"left aside: {printable(str(folder))}, a folder of earlier results")
                    continue
            except OSError as error:
                self.notes.append(f"{printable(str(folder))}: cannot be searched ({error.strerror})")
                continue
            names = {entry.name for entry in entries}
            for entry in entries:
                path = folder / entry.name
                if _HIDDEN.match(entry.name) or entry.name in _NOT_SEARCHED:
                    continue
                if _is_folder(entry):
                    if self._is_searched(entry.name, names, below_derivatives):
                        (links if entry.is_symlink() else waiting).append(path)
                elif _IMAGE.search(entry.name):
                    found.append(path)
                elif _OTHER_FORMAT.search(entry.name):
                    self._other_formats.append(path)
                elif _DICOM.search(entry.name):
                    self._dicom.append(path)

    @staticmethod
    def _is_searched(name: str, beside: set[str], below_derivatives: bool) -> bool:
        if below_derivatives:
            return True
        if name.lower() in _DERIVED:
            return False
        return name.lower() != "sourcedata" or not any(other.startswith("sub-") for other in beside)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link in a circle


def is_output_folder(folder: Path, entries: list[os.DirEntry[str]]) -> bool:
    """Whether a folder holds results of this program (phantoms are none), by its dataset_description.json."""
    if not any(entry.name == "dataset_description.json" for entry in entries):
        return False
    try:
        text = (folder / "dataset_description.json").read_text(errors="replace")
        description = json.loads(text)
        made_by = description.get("GeneratedBy", [])
        ours = any(str(one.get("Name", "")).lower() == "ddmd" for one in made_by)
        return ours and "phantom" not in str(description.get("Name", "")).lower()
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False
