"""Mutants of the tables that name cases: labels.csv, participants.tsv, cases.csv and split.json."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.image import imsave

from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from tests.fuzz.mutants import BYTES, Mutant, changed_bytes
from tests.volumes import head

LABELS = b"file,patient,slice,has_lesion\n" + b"".join(
    b"p%d_%d.png,p%d,%d,%d\n" % (p, z, p, z, z % 2) for p in (1, 2) for z in (1, 2, 3)
)
PARTICIPANTS = b"participant_id\thas_lesion\nsub-1\t1\nsub-2\t0\n"
CASES = b"patient,flair,mask,has_lesion,slice_labels\np,x.nii.gz,m.nii.gz,1,\nq,x.nii.gz,,0,labels.txt\n"
SPLIT = json.dumps({"p1": "train", "p2": "test", "p3": "validation"}).encode()
WHOLE = ("", "null", "[]", "3", '"x"', '{"train": 3}', '{"a": null}', '{"a": "train", "a": "test"}', '{"a": ["x"]}',
         "[" * 5000, '{"a":' * 5000, "NaN", '{"a": "evil"}', '{"train": ["a", ["b"]]}', '{"train": [{}]}',
         "file,patient,slice,has_lesion\n", "file\n", "\n\n\n", "a" * 200_000, '"' + "a" * 200_000)  # fmt: skip


@cache
def _png() -> bytes:
    file = io.BytesIO()
    imsave(file, head(np.random.default_rng(5), (48, 48, 3))[0][:, :, 1], cmap="gray")
    return file.getvalue()


@cache
def _nifti(mask: bool = False) -> bytes:
    values, affine = head(np.random.default_rng(5), (20, 24, 8), (8.0, 8.0, 8.0))
    return bytes(nib.Nifti1Image((values > 150).astype(np.uint8) if mask else values, affine).to_bytes())


def _use_cases(folder: Path) -> None:
    for case in list(find_cases(folder))[:2]:
        labels = case.labels()
        assert set(np.unique(labels)) <= {-1, 0, 1}
        case.volume(("flair",))
        if case.masks:
            case.lesion()


def _use_split(folder: Path) -> None:
    split = read_split(folder / "split.json")
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in dict(split).items())


def _changed(rng: random.Random, content: bytes) -> bytes:
    choice = rng.random()
    if choice < 0.15:
        return rng.choice(WHOLE).encode()
    if choice < 0.2:
        return rng.choice((content.decode().encode("utf-16"), b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"),
                           content.replace(b",", b";"), content + content, b"\xff" * 100, rng.randbytes(300)))  # fmt: skip
    if choice < 0.5:  # a cell
        lines = content.split(b"\n")
        at = rng.randrange(len(lines))
        separator = b"\t" if b"\t" in content else b","
        cells = lines[at].split(separator)
        cells[rng.randrange(len(cells))] = rng.choice((*BYTES, b"/etc", b".", b"x.nii.gz", b"p1_1.png", b"2"))
        lines[at] = separator.join(cells)
        return b"\n".join(lines)
    return changed_bytes(rng, content)


def mutant(rng: random.Random) -> Mutant:
    """A folder of cases whose table is damaged."""
    kind = rng.choice(("labels.csv", "participants.tsv", "cases.csv", "split.json"))
    if kind == "split.json":
        return Mutant({kind: _changed(rng, SPLIT)}, kind, _use_split)
    if kind == "labels.csv":
        names = [f"p{p}_{z}.png" for p in (1, 2) for z in (1, 2, 3)]
        files = {f"{folder}/{name}": _png() for folder in ("images", "masks") for name in names}
        return Mutant({**files, kind: _changed(rng, LABELS)}, kind, _use_cases)
    if kind == "participants.tsv":
        files = {f"sub-{i}/anat/sub-{i}_FLAIR.nii": _nifti() for i in (1, 2)}
        return Mutant({**files, kind: _changed(rng, PARTICIPANTS)}, kind, _use_cases)
    files = {"x.nii.gz": _nifti(), "m.nii.gz": _nifti(True), "labels.txt": b"0 1 0 1 0 0 0 0\n"}
    if rng.random() < 0.2:
        files["labels.txt"] = _changed(rng, files["labels.txt"])
    return Mutant({**files, kind: _changed(rng, CASES)}, kind, _use_cases)
