"""Cases of a data set: which files, which image-level labels, which masks; and splits by patient."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddmd.io import nifti
from ddmd.io.volume import Volume, sequence_of

HEAD_MM = 140.0  # top to bottom, to guess the thickness of slices that do not tell
MASK_NAME = re.compile(r"(^|[-_.])(seg|dseg|mask|lesion\w*|roi|label|gt|consensus\w*)$", re.IGNORECASE)
NOT_AN_IMAGE = re.compile(r"(^|[-_.])(brain|brainmask|probseg|desc-\w+)($|[-_.])", re.IGNORECASE)

NOT_A_LESION = re.compile(
    r"(^|[-_.])(brain|tissue|skull|head|csf|gm|wm)([-_.]?(mask|d?seg|label|roi))?$", re.IGNORECASE
)
SAYS_LESION = re.compile(r"lesion|tumou?r|wmh|roi|consensus|(^|[-_.])(seg|gt)$", re.IGNORECASE)
TIME_POINT = re.compile(r"^(BraTS-[A-Za-z]+-\d+)-\d+$", re.IGNORECASE)  # BraTS 2023: patient, then scan
FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


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
                    f"{self.name}: {len(self.slice_labels)} slice labels for {count} slices; "
                    "correct the table"
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


def _truth(text: str | None, where: str) -> bool | None:
    """What a has_lesion cell says; None where it says that nobody knows."""
    word = (text or "").strip().lower()
    if word in ("", "n/a", "na", "nan", "-1", "unknown"):
        return None
    if word in ("1", "true", "yes", "0", "false", "no"):
        return word in ("1", "true", "yes")
    raise DatasetError(f"{where}: has_lesion is {text!r}; write 1, 0, or n/a where it is not known")


def _participants(root: Path) -> dict[str, bool | None]:
    table = root / "participants.tsv"
    if not table.exists():
        return {}
    return {
        row["participant_id"]: _truth(row.get("has_lesion"), f"{table}: {row['participant_id']}")
        for row in _rows(table, {"participant_id"})
    }


def _number(row: Mapping[str, str], column: str, table: Path) -> int:
    try:
        return int(row[column])
    except (TypeError, ValueError):
        raise DatasetError(
            f"{table}: {row['file']}: {column} is {row[column]!r}; write a whole number"
        ) from None


def _from_slices(root: Path, source: str) -> list[Case]:
    """labels.csv (file, patient, slice, has_lesion) beside images/ and, optionally, masks/."""
    by_patient: dict[str, list[dict[str, str]]] = {}
    table = root / "labels.csv"
    for row in _rows(table, {"file", "patient", "slice", "has_lesion"}):
        by_patient.setdefault(row["patient"], []).append(row)
    cases = []
    for patient, rows in sorted(by_patient.items()):
        rows.sort(key=lambda row: _number(row, "slice", table))
        masks = tuple(root / "masks" / row["file"] for row in rows)
        known = [_truth(row["has_lesion"], f"{table}: {row['file']}") for row in rows]
        labels = tuple(-1 if one is None else int(one) for one in known)
        has_lesion = True if 1 in labels else (None if -1 in labels else False)
        cases.append(
            Case(
                patient, patient, source, {"flair": tuple(root / "images" / row["file"] for row in rows)},
                masks if (root / "masks").is_dir() else None, labels, has_lesion,
            )
        )  # fmt: skip
    return cases


def _case_of(folder: Path, patient: str, source: str, search: Iterable[Path]) -> Case | None:
    files: dict[str, tuple[Path, ...]] = {}
    masks: list[Path] = []
    for path in sorted(search):
        stem = nifti.stem(path)
        if MASK_NAME.search(stem) or "lesion_on" in stem:
            if not NOT_A_LESION.search(stem):
                masks.append(path)
        elif not NOT_AN_IMAGE.search(stem) and (sequence := sequence_of(path)):
            if sequence in files:
                raise DatasetError(f"{files[sequence][0]} and {path} both claim to be {sequence}; keep one")
            files[sequence] = (path,)
    if not files:
        return None
    return Case(patient, folder.name, source, files, _the_mask(masks))


def _the_mask(masks: list[Path]) -> tuple[Path] | None:
    """The one lesion mask: a consensus before single raters, a name that says lesion before others."""
    for better in ("consensus", "lesion", SAYS_LESION):
        masks = [p for p in masks if re.search(better, nifti.stem(p))] or masks
    masks = [p for p in masks if "space-" not in nifti.stem(p)] or masks
    if len(masks) > 1:
        raise DatasetError(
            f"{masks[0]} and {masks[1]} are both lesion masks; keep one, or list the cases in a cases.csv"
        )
    if masks and re.search("dseg$", nifti.stem(masks[0])) and not SAYS_LESION.search(nifti.stem(masks[0])):
        return None  # tissue classes, as fMRIPrep and FreeSurfer write them
    return (masks[0],) if masks else None


def _case_folders(root: Path) -> list[Path]:
    """Folders with NIfTI files, below wrappers (HGG/, MICCAI_BraTS2020_TrainingData/) as far as needed."""
    found = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found += [folder] if any(folder.glob("*.nii*")) else _case_folders(folder)
    return found


def _from_folders(root: Path, source: str) -> list[Case]:
    """One sub-folder a case (BraTS 2020 to 2024, or plain names); participants.tsv where there is one."""
    known, cases = _participants(root), []
    for folder in _case_folders(root):
        scan = TIME_POINT.match(folder.name)
        inner = folder.relative_to(root).parts
        patient = scan[1] if scan else folder.name if folder.name.lower().startswith("brats") else inner[0]
        case = _case_of(folder, patient, source, folder.glob("*.nii*"))
        if case is not None:
            name = folder.name if patient != inner[0] else "_".join(inner)
            has_lesion = known.get(folder.name, known.get(patient))
            cases.append(dataclasses.replace(case, name=name, has_lesion=has_lesion))
    if known and cases and not any(c.patient in known or c.name in known for c in cases):
        raise DatasetError(
            f"{root / 'participants.tsv'}: no participant_id is the name of a folder, "
            f"as {cases[0].name} is; rename them"
        )
    return cases


def _from_bids(root: Path, source: str) -> list[Case]:
    """sub-*/[ses-*/]anat, masks there or under derivatives."""
    known, cases = _participants(root), []
    for anat in sorted((*root.glob("sub-*/anat"), *root.glob("sub-*/ses-*/anat"))):
        parts = anat.relative_to(root).parts[:-1]
        pipelines = [root / "derivatives", *root.glob("derivatives/*")]
        extra = [p for d in pipelines for p in sorted(d.joinpath(*parts).rglob("*.nii*"))]
        masks = [p for p in extra if MASK_NAME.search(nifti.stem(p))]
        case = _case_of(anat, parts[0], source, (*anat.glob("*.nii*"), *masks))
        if case is not None:
            cases.append(dataclasses.replace(case, name="_".join(parts), has_lesion=known.get(parts[0])))
    return cases


def _from_table(root: Path, source: str) -> list[Case]:
    """cases.csv: patient, a column a sequence; optionally name, source, mask, has_lesion, slice_labels."""
    path = root if root.is_file() else root / "cases.csv"
    cases = []
    for row in _rows(path, {"patient"}):
        files = {s: (path.parent / row[s],) for s in nifti.SEQUENCES if row.get(s)}
        if not files:
            raise DatasetError(f"{path}: {row['patient']} names no image; fill a sequence's column")
        labels = _label_file(path.parent / row["slice_labels"]) if row.get("slice_labels") else None
        has = _truth(row.get("has_lesion"), f"{path}: {row['patient']}")
        masks = (path.parent / row["mask"],) if row.get("mask") else None
        name = row.get("name") or row["patient"]
        cases.append(Case(row["patient"], name, row.get("source") or source, files, masks, labels, has))
    return cases


def _label_file(path: Path) -> tuple[int, ...]:
    """0, 1 or -1 (not known) for every canonical axial slice, from the feet up."""
    if not path.is_file():
        raise DatasetError(f"{path}: no such file of slice labels; write it, or empty the table's cell")
    words = path.read_text().split()
    if not set(words) <= {"0", "1", "-1"}:
        raise DatasetError(
            f"{path}: slice labels are 0, 1 or -1 (not known), with spaces between; correct it"
        )
    return tuple(int(word) for word in words)


COLUMNS = ("patient", "name", "source", *nifti.SEQUENCES, "has_lesion", "slice_labels")
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
        raise DatasetError(f"{root}: no case found as layout {layout!r}; name the right layout")
    return cases


def label_slices(cases: Iterable[Case], folder: str | Path, healthy: Iterable[str] = ()) -> Path:
    """Write image-level labels of every axial slice, once, as an annotator would give them.

    Cases with a mask get 1 for slices that it marks and 0 for the others, those named in `healthy` 0
    throughout. What is written is a table (`layout="table"`) without masks: training in the
    image-label track from it can open none. Stacks of PNG slices have their labels.csv already.

    Raises
    ------
    DatasetError
        If a case is a stack, or two cases have one name.
    """
    folder, well = Path(folder).resolve(), set(healthy)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for case in cases:
        if case.stack:
            raise DatasetError(f"{case.name}: PNG slices have their labels in labels.csv; leave them out")
        if any(case.name == row["name"] for row in rows):
            raise DatasetError(f"{case.name}: two cases have this name; label them into two folders")
        row = {"patient": case.patient, "name": case.name, "source": case.source}
        row["has_lesion"] = {None: "", True: "1", False: "0"}[case.has_lesion]
        row |= {s: os.path.relpath(files[0].resolve(), folder) for s, files in case.files.items()}
        if case.name in well:
            row["has_lesion"] = "0"
        elif case.masks is not None:
            marked = case.lesion().any(axis=(0, 1)).astype(int)
            row["has_lesion"], row["slice_labels"] = str(marked.max()), f"{case.name}.slices.txt"
            (folder / row["slice_labels"]).write_text(" ".join(map(str, marked)))
        rows.append(row)
    path = folder / "cases.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def split_by_patient(
    cases: Iterable[Case], fractions: Mapping[str, float] = FRACTIONS, seed: int = 0
) -> dict[str, str]:
    """patient -> part, drawn source by source so that each part holds some of each.

    Every case of a patient is in one part. Shares are rounded to patients, and what is left over is
    the first part's.
    """
    if min(fractions.values()) < 0 or not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise DatasetError(f"split: fractions are {dict(fractions)}; give shares from 0 to 1 that add to 1")
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


def write_split(path: str | Path, split: Mapping[str, str]) -> None:
    """Write patient -> part as JSON, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".partial-{path.name}")
    temporary.write_text(json.dumps(dict(split), indent=1, sort_keys=True))
    os.replace(temporary, path)


def read_split(path: str | Path) -> dict[str, str]:
    """The split.json that a training run wrote: patient -> part."""
    try:
        split = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable split ({error}); give the split.json of a run") from None
    if not isinstance(split, dict) or not all(isinstance(part, str) for part in split.values()):
        raise DatasetError(f"{path}: a split is {{patient: part}}; give the split.json of a run")
    return split
