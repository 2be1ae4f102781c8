"""From files and folders to the examinations in them: one search for detection, training and evaluation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from ddmd.cohort.case_names import case_name, patient_of, unique_names, unique_stems
from ddmd.cohort.cases import UNKNOWN, Case
from ddmd.cohort.dicom_cases import dicom_cases
from ddmd.cohort.errors import DatasetError
from ddmd.cohort.file_names import (
    IMAGE,
    MASK,
    OTHER,
    RESULT,
    UNKNOWN_KIND,
    NamedFile,
    is_lesion_mask,
    name_file,
)
from ddmd.cohort.folders import Folders
from ddmd.cohort.grouping import Group, MaskIndex, group_images
from ddmd.cohort.tables import cases_of_slices, cases_of_table, read_participants
from ddmd.io.dicom import dicom_files
from ddmd.io.dicom_headers import is_dicom
from ddmd.io.errors import VolumeError
from ddmd.io.nifti import open_image
from ddmd.io.text import printable

LAYOUTS = ("slices", "volumes", "brats", "bids", "table")
NAMED_IN_A_NOTE = 3  # files that a note names; the others are counted


@dataclass(frozen=True)
class Discovery(Sequence[Case]):
    """The cases that were found, in the order of their paths, and notes on what was left aside."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Case, ...]: ...
    def __getitem__(self, index: int | slice) -> Case | tuple[Case, ...]:
        return self.cases[index]

    def __len__(self) -> int:
        return len(self.cases)


class _LeftAside:
    """Counts files that are not used, by reason."""

    def __init__(self) -> None:
        self.files: dict[str, list[Path]] = {}

    def add(self, reason: str, paths: Iterable[Path]) -> None:
        self.files.setdefault(reason, []).extend(paths)

    def notes(self) -> list[str]:
        notes = []
        for reason, paths in self.files.items():
            names = sorted({printable(path.name) for path in paths})
            if not names:
                continue
            shown = ", ".join(names[:NAMED_IN_A_NOTE]) + (", ..." if len(names) > NAMED_IN_A_NOTE else "")
            count = len(set(paths))
            notes.append(f"left aside: {count} {'file' if count == 1 else 'files'} {reason} ({shown})")
        return notes


def find_cases(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    layout: str = "auto",
    name: str | None = None,
    *,
    require: Sequence[str] = (),
    optional: Sequence[str] = (),
    sequence: str | None = None,
    annotations: bool = True,
) -> Discovery:
    """Find the examinations among files and folders.

    A folder is searched to the bottom: BIDS (sessions, runs, acquisitions), BraTS 2012 to 2024, folders of
    patients and visits, and many patients in one folder, distinguished by the names of their files. Hidden folders,
    derivatives and earlier results are not searched for images, and links are followed once. A folder without any
    such image is searched for DICOM files, unless annotations are looked for. Files named one by
    one belong together where they lie in one folder and their names agree, or where no sequence is there twice.

    Parameters
    ----------
    paths : one or several files, folders or tables (.csv)
    layout : "auto", "slices", "volumes", "brats", "bids" or "table"
    name : str, optional
        What to call the source; the folder's name by default.
    require : sequences without which an examination is left aside
    optional : sequences of which an examination needs one, where none is required
    sequence : str, optional
        What images are whose names do not say it.
    annotations : bool
        Whether lesion masks and participants.tsv are looked for. Detection needs neither.

    Returns
    -------
    Discovery
        The cases, with unique names, and notes on what was left aside.

    Raises
    ------
    DatasetError
        If a path or layout does not exist, a table is wrong, or no case is found.
    """
    roots = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(p) for p in paths]
    if layout != "auto" and layout not in LAYOUTS:
        raise DatasetError(
            f"{', '.join(map(str, roots))}: layout {layout!r} not known; allowed are auto, {', '.join(LAYOUTS)}"
        )
    search = _Search(require, sequence, annotations, optional)
    files: list[Path] = []
    for root in roots:
        if not os.path.lexists(root):
            raise DatasetError(f"{root}: no such file or folder; check the path")
        kind = _layout_of(root) if layout == "auto" else layout
        if kind == "table":
            search.add_cases(cases_of_table(root, name or _base_name(root)))
        elif kind == "slices":
            search.add_cases(cases_of_slices(root, name or _base_name(root)))
        elif root.is_dir():
            search.add_folder(root, name or _base_name(root), bids=kind == "bids")
        else:
            files.append(root)
    slices = [path for path in files if not annotations and is_dicom(path)]
    for folder in dict.fromkeys(path.parent for path in slices):
        search.add_dicom(folder, name or _base_name(folder), [p for p in slices if p.parent == folder])
    files = [path for path in files if path not in slices]
    if files:
        search.add_files(files, name)
    found = search.result()
    if not found.cases:
        if search.lacking_dicom:
            raise DatasetError("; ".join(found.notes))
        where = f"{', '.join(map(str, roots[:3]))}{', ...' if len(roots) > 3 else ''}"
        needs = f" with {', '.join(require)}" if require else ""
        reasons = f" ({'; '.join(found.notes)})" if found.notes else ""
        as_layout = f" as layout {layout!r}" if layout != "auto" else ""
        raise DatasetError(
            f"{where}: no case{needs} found{as_layout}: no .nii or .nii.gz image that can be used{reasons}; name a "
            "folder that holds some, or the sequence of a file (--sequence)"
        )
    return found


def _layout_of(root: Path) -> str:
    if root.is_file():
        return "table" if root.suffix.lower() in (".csv", ".tsv") else "volumes"
    if (root / "cases.csv").exists():
        return "table"
    if (root / "labels.csv").exists() and ((root / "images").is_dir() or not any(root.glob("*/*.nii*"))):
        return "slices"
    return "volumes"


def _base_name(root: Path) -> str:
    path = Path(os.path.abspath(root))
    return printable(path.name if path.is_dir() else path.parent.name)


class _Search:
    """Collects cases from folders and files."""

    def __init__(
        self,
        require: Sequence[str],
        sequence: str | None,
        annotations: bool,
        optional: Sequence[str] = (),
    ) -> None:
        self.require, self.sequence, self.annotations = tuple(require), sequence, annotations
        self.optional = tuple(optional)
        self.aside = _LeftAside()
        self.notes: list[str] = []
        self.cases: list[tuple[Case, Path]] = []  # with the absolute path of the first image
        self.folders = Folders()
        self.lacking_dicom: list[str] = []  # why DICOM folders have no case

    def add_cases(self, cases: Iterable[Case]) -> None:
        """Take cases that a table names."""
        for case in cases:
            if self._is_enough(case.files):
                first = Path(os.path.abspath(next(iter(case.files.values()))[0]))
                self.cases.append((case, first))
            else:
                self._lacking(path for paths in case.files.values() for path in paths)

    def add_folder(self, root: Path, source: str, bids: bool) -> None:
        """Take the cases of a folder."""
        absolute = Path(os.path.abspath(root))
        named = [name_file(path, absolute) for path in self.folders.images(absolute)]
        dicom = self.folders.take_dicom()
        usable = any(f.kind in (IMAGE, UNKNOWN_KIND) for f in named)  # results of an earlier run are none
        if not usable and not self.annotations and dicom_files(absolute):
            self.folders.take_other_formats()
            self.add_dicom(root, source)
            return
        self.aside.add("of DICOM, which only `ddmd detect` takes, in a folder without NIfTI files", dicom)
        self.aside.add(
            "of NRRD, MetaImage or MINC, which are not read; convert them to .nii.gz, with 3D Slicer, SimpleITK or "
            "mnc2nii",
            self.folders.take_other_formats(),
        )
        images = [f for f in named if f.kind == IMAGE]
        if bids:
            self.aside.add("without a BIDS name", (f.path for f in images if not f.entities))
            images = [f for f in images if f.entities]
        unknown = [f for f in named if f.kind == UNKNOWN_KIND]
        if self.sequence is not None:
            images += [dataclasses.replace(f, kind=IMAGE, sequence=self.sequence) for f in unknown]
        elif not images and not bids:
            self._add_unknown(unknown, absolute, source)
        else:
            self.aside.add("whose name does not say the sequence", (f.path for f in unknown))
        self.aside.add("of other modalities", (f.path for f in named if f.kind == OTHER))
        masks = [f for f in named if f.kind == MASK]
        self.aside.add("that are results or derivatives", (f.path for f in named if f.kind == RESULT))
        if not self.annotations:
            self.aside.add("that are masks", (f.path for f in masks))
            masks = []
        else:
            masks += self._derived_masks(images)
        known = read_participants(absolute) if self.annotations else {}
        self._add_groups(group_images(images, self.require), masks, absolute, source, known)

    def add_dicom(self, root: Path, source: str, files: Sequence[Path] | None = None) -> None:
        """Take the cases of a folder of DICOM files."""
        found = dicom_cases(root, source, self.require, self.sequence, files, self.optional)
        self.cases += found.cases
        self.notes += found.notes
        if found.lacking is not None:
            self.lacking_dicom.append(found.lacking)

    def add_files(self, paths: Sequence[Path], source: str | None) -> None:
        """Take the cases of files that were named one by one."""
        named = [name_file(Path(os.path.abspath(path))) for path in paths]
        if len(named) == 1 and self.sequence is not None:
            named = [dataclasses.replace(named[0], kind=IMAGE, sequence=self.sequence)]
        images = [f for f in named if f.kind == IMAGE]
        unknown = [f for f in named if f.kind == UNKNOWN_KIND]
        if self.sequence is not None:
            images += [dataclasses.replace(f, kind=IMAGE, sequence=self.sequence) for f in unknown]
        else:
            for f in unknown:
                self._add_unknown([f], f.path.parent, source or _base_name(f.path))
        self.aside.add("of other modalities", (f.path for f in named if f.kind == OTHER))
        self.aside.add("that are masks or results", (f.path for f in named if f.kind in (MASK, RESULT)))
        sequences = [f.sequence for f in images]
        examinations = {(f.entities.get("sub"), f.entities.get("ses")) for f in images if f.entities}
        if len(set(sequences)) == len(sequences) and len(examinations) <= 1 and images:
            groups = [Group(_anchor(images, self.require), {f.sequence or UNKNOWN: f for f in images})]
        else:
            groups = group_images(images, self.require)
        for group in groups:
            folder = group.first.folder
            self._add_groups([group], [], folder, source or printable(folder.name), {})

    def _add_unknown(self, files: Sequence[NamedFile], root: Path, source: str) -> None:
        """Take images whose names do not say the sequence, where no other is there; not 4-D series."""
        series = [f.path for f in files if _is_series(f.path)]
        self.aside.add("that are series of several volumes", series)
        for f in files:
            if f.path not in series:
                name = case_name(f)
                case = Case(patient_of(f, root, name), name, source, {UNKNOWN: (f.path,)})
                self.cases.append((case, f.path))

    def _add_groups(
        self, groups: Sequence[Group], masks: Sequence[NamedFile], root: Path, source: str,
        known: Mapping[str, bool | None],
    ) -> None:  # fmt: skip
        index = MaskIndex((m for m in masks if is_lesion_mask(m.path)), groups)
        matched: set[str] = set()
        taken: set[Path] = set()
        lacking: list[Path] = []
        added = 0
        for group in groups:
            files = {s: (f.path,) for s, f in group.files.items()}
            if not self._is_enough(files):
                lacking += [f.path for f in group.files.values()]
                continue
            taken |= {f.path for f in group.files.values()}
            first = group.first
            name = case_name(first)
            patient = patient_of(first, root, name)
            ids = [i for i in (name, first.folder.name, patient, first.prefix) if i in known]
            matched.update(ids)
            lesion, raters = index.masks_of(group)
            case = Case(
                patient,
                name,
                source,
                files,
                lesion,
                None,
                known[ids[0]] if ids else None,
                raters,
                first.entities,
            )
            self.cases.append((case, first.path))
            self.notes += group.notes
            added += 1
        self._lacking(path for path in lacking if path not in taken)
        if known and added and not matched:
            raise DatasetError(
                f"{root / 'participants.tsv'}: no participant_id is the name of a folder, "
                f"as {self.cases[-1][0].name} is; rename them"
            )

    def _derived_masks(self, images: Sequence[NamedFile]) -> Iterator[NamedFile]:
        """Masks below derivatives/ of the BIDS data sets that the images are of."""
        for root in sorted({f.dataset for f in images if f.dataset is not None}):
            if not (root / "derivatives").is_dir():
                continue
            for path in self.folders.images(root / "derivatives", below_derivatives=True):
                file = name_file(path, root)
                if file.kind == MASK:
                    yield _located(file, root)

    def _is_enough(self, files: Mapping[str, object]) -> bool:
        """Whether an examination has what is required, and one of what is optional."""
        one = not self.optional or any(s in files for s in (*self.require, *self.optional))
        return one and all(s in files for s in self.require)

    def _lacking(self, paths: Iterable[Path]) -> None:
        needs = " and ".join(self.require) or " or ".join(self.optional)
        self.aside.add(f"of examinations without {needs}", paths)

    def result(self) -> Discovery:
        """The cases, each once and with a unique name, and the notes."""
        once = {
            tuple(sorted((s, *map(os.fspath, p)) for s, p in c.files.items())): (c, f) for c, f in self.cases
        }
        cases = sorted(once.values(), key=lambda item: os.fspath(item[1]))
        names = unique_stems(unique_names([(case.name, first) for case, first in cases]))
        return Discovery(
            tuple(
                case if case.name == name else dataclasses.replace(case, name=name)
                for (case, _), name in zip(cases, names, strict=True)
            ),
            tuple(
                dict.fromkeys((*self.lacking_dicom, *self.folders.notes, *self.notes, *self.aside.notes()))
            ),
        )


def _anchor(images: Sequence[NamedFile], require: Sequence[str]) -> NamedFile:
    order = (*require, "flair", "t2", "t1ce", "t1")
    return min(images, key=lambda f: order.index(f.sequence or "t1"))


def _located(file: NamedFile, root: Path) -> NamedFile:
    """A mask below derivatives, as one of the subject and session that its name or its folders say."""
    entities = dict(file.entities)
    for part in file.path.relative_to(root).parts[1:-1]:
        key, _, value = part.partition("-")
        if key in ("sub", "ses") and value:
            entities.setdefault(key, value)
    for word in file.path.name.split("_"):
        key, _, value = word.partition("-")
        if key in ("sub", "ses") and value.isalnum():
            entities.setdefault(key, value)
    return dataclasses.replace(file, entities=entities, dataset=root)


def _is_series(path: Path) -> bool:
    """Whether the header of a file says that it holds several volumes; False where it cannot be read."""
    try:
        shape = open_image(path).shape
    except VolumeError:
        return False  # reading the image reports it
    return any(int(n) > 1 for n in shape[3:])
