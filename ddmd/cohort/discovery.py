"""From the files and folders named on a command line to the examinations in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ddmd.cohort.cases import MASK_NAME, NOT_AN_IMAGE
from ddmd.io import nifti
from ddmd.io.nifti import VolumeError, sequence_of


@dataclass(frozen=True)
class Examination:
    """Files of one examination: by sequence, or one file whose name does not say which it is."""

    name: str
    files: dict[str | None, Path]


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    stem = nifti.stem(path)
    return (
        name.endswith((".nii", ".nii.gz"))
        and not name.startswith(".")
        and not MASK_NAME.search(stem)
        and not NOT_AN_IMAGE.search(stem)
        and "lesion_on" not in stem
    )


def _of_folder(folder: Path) -> list[Examination]:
    """Files of one folder are one examination; each sub-folder is one of its own."""
    found = []
    files = sorted(p for p in folder.iterdir() if p.is_file() and _is_image(p))
    if files:
        name = folder.name if folder.name != "anat" else "_".join(folder.parts[-2:-1])
        found += _grouped(files, name)
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found += _of_folder(inner)
    return found


def _prefix(path: Path) -> str:
    """What a file's name says besides the sequence: the examination, where many share a folder."""
    parts = nifti.stem(path).replace(".", "_").replace("-", "_").split("_")
    return "_".join(parts[:-1]).lower()


def _grouped(files: list[Path], name: str) -> list[Examination]:
    known = [(sequence_of(p), p) for p in files]
    named = [(s, p) for s, p in known if s is not None]
    found: list[Examination] = []
    sequences = [s for s, _ in named]
    if named and len(set(sequences)) == len(sequences):
        found.append(Examination(name, dict(named)))
    else:  # one sequence several times: several patients in one folder, told apart by their names
        groups: dict[str, dict[str | None, Path]] = {}
        for s, p in named:
            group = groups.setdefault(_prefix(p), {})
            if s in group:
                raise VolumeError(
                    f"{group[s]} and {p} both claim to be {s}; keep one, or name the files to use"
                )
            group[s] = p
        found += [Examination(nifti.stem(next(iter(g.values()))), g) for g in groups.values()]
    return found + [Examination(nifti.stem(p), {None: p}) for s, p in known if s is None]


def examinations(paths: Iterable[str | Path]) -> list[Examination]:
    """The examinations among files and folders.

    Files named one by one are one examination when no sequence is there twice, or when there is one
    file; a folder is searched to the bottom, masks and earlier results left aside.

    Raises
    ------
    VolumeError
        If a path does not exist, holds no image, or two files claim to be the same sequence.
    """
    found: list[Examination] = []
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = _of_folder(path)
            if not inside:
                raise VolumeError(f"{path}: no .nii or .nii.gz image in it; name a folder that holds some")
            found += inside
        elif path.exists():
            files.append(path)
        else:
            raise VolumeError(f"{path}: no such file or folder; check the path")
    if len(files) == 1:
        found.append(Examination(nifti.stem(files[0]), {sequence_of(files[0]): files[0]}))
    elif files:
        found += _grouped(files, nifti.stem(files[0]))
    return found
