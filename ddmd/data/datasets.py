"""Cases of a data set: which files, which image-level labels, which masks; and splits by patient."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddmd import nifti
from ddmd.volume import Volume, sequence_of

HEAD_MM = 140.0  # top to bottom, to guess the thickness of slices that do not tell
MASK_NAME = re.compile(r"(^|[-_.])(seg|dseg|mask|lesion\w*|roi|label|gt|consensus\w*)$", re.IGNORECASE)
NOT_AN_IMAGE = re.compile(r"(^|[-_.])(brain|brainmask|probseg|desc-\w+)($|[-_.])", re.IGNORECASE)


class DatasetError(ValueError):
    """A data set that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Case:
    """One examination. `masks` is opened by `lesion` and by nothing else.

    files : sequence -> one NIfTI, or the ordered PNG slices of a stack.
    slice_labels : 1 has a lesion, 0 has none, for every slice from the feet up, where known.
    """

    patient: str
    name: str
    source: str
    files: Mapping[str, tuple[Path, ...]]
    masks: tuple[Path, ...] | None = None
    slice_labels: tuple[int, ...] | None = None
    has_lesion: bool | None = None

    @property
    def stack(self) -> bool:
        """Whether this is a stack of PNG slices."""
        return next(iter(self.files.values()))[0].suffix.lower() == ".png"

    def volume(self, sequences: tuple[str, ...]) -> Volume:
        """Read the case. A stack gets 1 mm pixels and a guessed thickness (`HEAD_MM` over slices)."""
        if not self.stack:
            return Volume.read({s: self.files[s][0] for s in sequences}, require=sequences)
        images = {s: _read_stack(self.files[s]) for s in sequences}
        thickness = float(np.clip(HEAD_MM / len(self.files[sequences[0]]), 1.0, 7.0))
        return Volume.from_array(images, np.diag([1.0, 1.0, thickness, 1.0]), self.name)

    def lesion(self) -> np.ndarray:
        """The annotator's mask, bool (X, Y, Z) on the canonical grid of `volume`.

        Raises
        ------
        DatasetError
            If the case has no mask.
        """
        if self.masks is None:
            raise DatasetError(f"{self.name}: has no lesion mask; only cases with one can be compared with")
        if self.stack:
            return _read_stack(self.masks) > 0
        import nibabel as nib

        image = nib.as_closest_canonical(nifti.open_image(self.masks[0]))
        return nifti.voxels(image, str(self.masks[0])) > 0

    def labels(self) -> np.ndarray:
        """Image-level labels int8 (Z,): 1 lesion, 0 none, -1 not known. Opens no mask."""
        count = self._slices()
        if self.slice_labels is not None:
            if len(self.slice_labels) != count:
                raise DatasetError(
                    f"{self.name}: {len(self.slice_labels)} slice labels for {count} slices; correct the table"
                )
            return np.array(self.slice_labels, np.int8)
        return np.full(count, 0 if self.has_lesion is False else -1, np.int8)

    def _slices(self) -> int:
        files = next(iter(self.files.values()))
        if self.stack:
            return len(files)
        import nibabel as nib

        image = nifti.open_image(files[0])
        axes = nib.io_orientation(image.affine)[:, 0]
        return int(image.shape[int(np.flatnonzero(axes == 2)[0])])


def _read_stack(paths: Iterable[Path]) -> np.ndarray:
    """PNG slices -> (X, Y, Z): rows run to the back and columns to the patient's left."""
    from matplotlib import image as png

    planes = []
    for path in paths:
        try:
            plane = png.imread(path)
        except (OSError, ValueError, SyntaxError) as error:
            raise DatasetError(f"{path}: not a readable PNG ({error}); copy it again") from None
        planes.append((plane if plane.ndim == 2 else plane[..., 0]).astype(np.float32) * 255)
    return np.ascontiguousarray(np.stack(planes, -1)[::-1, ::-1].transpose(1, 0, 2))


def _rows(path: Path, needed: set[str]) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        lacking = needed - set(reader.fieldnames or ())
        if lacking:
            raise DatasetError(f"{path}: lacks the columns {', '.join(sorted(lacking))}; add them")
        return list(reader)


def _from_slices(root: Path, source: str) -> list[Case]:
    """labels.csv (file, patient, slice, has_lesion) beside images/ and, optionally, masks/."""
    by_patient: dict[str, list[dict[str, str]]] = {}
    for row in _rows(root / "labels.csv", {"file", "patient", "slice", "has_lesion"}):
        by_patient.setdefault(row["patient"], []).append(row)
    cases = []
    for patient, rows in sorted(by_patient.items()):
        rows.sort(key=lambda row: int(row["slice"]))
        masks = tuple(root / "masks" / row["file"] for row in rows)
        labels = tuple(int(row["has_lesion"]) for row in rows)
        cases.append(
            Case(
                patient, patient, source, {"flair": tuple(root / "images" / row["file"] for row in rows)},
                masks if (root / "masks").is_dir() else None, labels, any(labels),
            )
        )  # fmt: skip
    return cases


def _case_of(folder: Path, patient: str, source: str, search: Iterable[Path]) -> Case | None:
    files: dict[str, tuple[Path, ...]] = {}
    masks: list[Path] = []
    for path in sorted(search):
        stem = nifti.stem(path)
        if MASK_NAME.search(stem) or "lesion_on" in stem:
            masks.append(path)
        elif not NOT_AN_IMAGE.search(stem) and (sequence := sequence_of(path)):
            if sequence in files:
                raise DatasetError(f"{files[sequence][0]} and {path} both claim to be {sequence}; keep one")
            files[sequence] = (path,)
    if not files:
        return None
    return Case(patient, folder.name, source, files, tuple(masks[:1]) or None)


def _from_folders(root: Path, source: str) -> list[Case]:
    """One sub-folder a case (BraTS 2020 to 2024, or plain names); participants.tsv where there is one."""
    table = root / "participants.tsv"
    known: dict[str, bool] = {}
    if table.exists():
        for row in _rows(table, {"participant_id", "has_lesion"}):
            known[row["participant_id"]] = row["has_lesion"].strip().lower() in ("1", "true", "yes")
    cases = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        case = _case_of(folder, folder.name, source, folder.glob("*.nii*"))
        if case is not None:
            cases.append(_with_label(case, known.get(folder.name)))
    return cases


def _with_label(case: Case, has_lesion: bool | None) -> Case:
    return Case(case.patient, case.name, case.source, case.files, case.masks, case.slice_labels, has_lesion)


def _from_bids(root: Path, source: str) -> list[Case]:
    """sub-*/[ses-*/]anat, masks there or under derivatives."""
    table = root / "participants.tsv"
    known: dict[str, bool] = {}
    if table.exists():
        for row in _rows(table, {"participant_id"}):
            if row.get("has_lesion", "") != "":
                known[row["participant_id"]] = row["has_lesion"].strip().lower() in ("1", "true", "yes")
    cases = []
    for anat in sorted((*root.glob("sub-*/anat"), *root.glob("sub-*/ses-*/anat"))):
        parts = anat.relative_to(root).parts[:-1]
        extra = [p for d in root.glob("derivatives/*") for p in d.joinpath(*parts, "anat").glob("*.nii*")]
        masks = [p for p in extra if MASK_NAME.search(nifti.stem(p))]
        case = _case_of(anat, parts[0], source, (*anat.glob("*.nii*"), *masks))
        if case is not None:
            case = Case(parts[0], "_".join(parts), source, case.files, case.masks)
            cases.append(_with_label(case, known.get(parts[0])))
    return cases


def _from_table(root: Path, source: str) -> list[Case]:
    """cases.csv: patient, one column a sequence, optionally mask, has_lesion and slice_labels."""
    path = root if root.is_file() else root / "cases.csv"
    cases = []
    for row in _rows(path, {"patient"}):
        files = {s: (path.parent / row[s],) for s in nifti.SEQUENCES if row.get(s)}
        if not files:
            raise DatasetError(f"{path}: {row['patient']} names no image; fill a sequence's column")
        labels = None
        if row.get("slice_labels"):
            text = (path.parent / row["slice_labels"]).read_text().split()
            labels = tuple(int(word) for word in text)
        has = {"": None, "1": True, "0": False}.get((row.get("has_lesion") or "").strip())
        masks = (path.parent / row["mask"],) if row.get("mask") else None
        cases.append(Case(row["patient"], row["patient"], source, files, masks, labels, has))
    return cases


LAYOUTS: dict[str, Callable[[Path, str], list[Case]]] = {
    "slices": _from_slices,
    "volumes": _from_folders,
    "brats": _from_folders,
    "bids": _from_bids,
    "table": _from_table,
}


def find_cases(root: str | Path, layout: str = "auto", name: str | None = None) -> list[Case]:
    """The cases of a data set.

    Parameters
    ----------
    root : path of the data set's folder, or of a table
    layout : "auto", "slices", "volumes", "brats", "bids" or "table"
    name : str, optional
        What to call the source; the folder's name by default.

    Raises
    ------
    DatasetError
        If there is no such folder, layout or case.
    """
    root = Path(root)
    if not root.exists():
        raise DatasetError(f"{root}: no such data set; check the path")
    if layout == "auto":
        if root.is_file() or (root / "cases.csv").exists():
            layout = "table"
        elif (root / "labels.csv").exists():
            layout = "slices"
        else:
            layout = "bids" if any(root.glob("sub-*/**/anat")) else "volumes"
    if layout not in LAYOUTS:
        raise DatasetError(f"{root}: layout {layout!r} not known; allowed are auto, {', '.join(LAYOUTS)}")
    cases = LAYOUTS[layout](root, name or root.name)
    if not cases:
        raise DatasetError(f"{root}: no case found as layout {layout!r}; name the layout, or look at the folder")
    return cases


def label_slices(cases: Iterable[Case], folder: str | Path, healthy: Iterable[str] = ()) -> Path:
    """Write image-level labels of every axial slice, once, as an annotator would give them.

    Cases with a mask get 1 for slices that it marks and 0 for the others, those named in `healthy` 0
    throughout. What is written is a table (`layout="table"`) without masks: training in the
    image-label track from it can open none.
    """
    folder, well = Path(folder).resolve(), set(healthy)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        row = {"patient": case.patient, "has_lesion": "", "slice_labels": ""}
        row |= {s: str(files[0].resolve()) for s, files in case.files.items()}
        if case.name in well:
            row["has_lesion"] = "0"
        elif case.masks is not None and not case.stack:
            row["has_lesion"], row["slice_labels"] = "1", f"{case.name}.slices.txt"
            marked = case.lesion().any(axis=(0, 1)).astype(int)
            (folder / row["slice_labels"]).write_text(" ".join(map(str, marked)))
        rows.append(row)
    path = folder / "cases.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["patient", *nifti.SEQUENCES, "has_lesion", "slice_labels"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def split_by_patient(cases: Iterable[Case], fractions: Mapping[str, float], seed: int = 0) -> dict[str, str]:
    """patient -> part, drawn source by source so that each part holds some of each.

    Every case of a patient is in one part. Shares are rounded to patients, and what is left over is
    the first part's.
    """
    by_source: dict[str, set[str]] = {}
    for case in cases:
        by_source.setdefault(case.source, set()).add(case.patient)
    parts = list(fractions)
    split: dict[str, str] = {}
    for source, patients in sorted(by_source.items()):
        free = sorted(patients - set(split))
        order = np.random.default_rng((seed, len(source), sum(source.encode()))).permutation(len(free))
        start = 0
        for part in parts[1:]:
            count = round(fractions[part] * len(free))
            split |= {free[i]: part for i in order[start : start + count]}
            start += count
        split |= {free[i]: parts[0] for i in order[start:]}
    return split


def read_split(path: str | Path) -> dict[str, str]:
    """The split.json that a training run wrote."""
    split: dict[str, str] = json.loads(Path(path).read_text())
    return split
