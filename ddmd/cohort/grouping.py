"""Which images and masks belong to one examination, by their folders and names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddmd.cohort.file_names import NamedFile
from ddmd.cohort.masks import choose_masks
from ddmd.cohort.name_words import PROCESSING
from ddmd.io.sequences import stem

ANCHORS = ("flair", "t2", "t1ce", "t1")  # an examination is what goes with one image of the first there is
OF_PATIENT = ("sub", "ses")


@dataclass(frozen=True)
class Group:
    """Images of one examination by sequence, beside the one that it is named after."""

    first: NamedFile
    files: dict[str, NamedFile]
    notes: tuple[str, ...] = ()


def group_images(images: Iterable[NamedFile], require: Sequence[str] = ()) -> list[Group]:
    """Group images into examinations.

    Each image of the anchor's sequence (the first that is required, else FLAIR) is an examination, and images of
    other sequences join the one whose name agrees best. Those that join none are grouped among themselves.
    """
    units: dict[tuple[object, ...], list[NamedFile]] = {}
    for image in images:
        units.setdefault(unit_of(image), []).append(image)
    groups: list[Group] = []
    for unit in units.values():
        left = _without_twins(unit)
        while left:
            made = _group_unit(left, require)
            used = {f.path for group in made for f in group.files.values()}
            left = [f for f in left if f.path not in used]
            groups += made
    return groups


def unit_of(file: NamedFile) -> tuple[object, ...]:
    """What files that can belong together share: subject and session of one data set, or the folder."""
    if file.entities:
        return (file.dataset, file.entities.get("sub"), file.entities.get("ses"))
    return (file.folder,)


def _without_twins(files: Sequence[NamedFile]) -> list[NamedFile]:
    """Of the same name with several extensions (x.nii and x.nii.gz), the compressed one."""
    best: dict[tuple[Path, str], NamedFile] = {}
    for file in files:
        key = (file.path.parent, stem(file.path))
        if key not in best or file.path.name.lower().endswith(".nii.gz"):
            best[key] = file
    return list(best.values())


def _group_unit(files: Sequence[NamedFile], require: Sequence[str]) -> list[Group]:
    order = dict.fromkeys((*require, *ANCHORS))
    first = next(s for s in order if any(f.sequence == s for f in files))
    anchors = [f for f in files if f.sequence == first]
    groups = []
    for anchor in anchors:
        chosen = {first: anchor}
        notes = []
        for sequence in ANCHORS:
            if sequence == first:
                continue
            scored = sorted(
                (score, stem(f.path), f)
                for f in files
                if f.sequence == sequence and (score := _companion_score(f, anchor, anchors)) is not None
            )
            if scored:
                chosen[sequence] = scored[0][2]
            if sequence in require and len(scored) > 1 and scored[0][0] == scored[1][0]:
                notes.append(
                    f"{anchor.path.name}: {scored[0][2].path.name} and {scored[1][2].path.name} are both {sequence}; "
                    "the first is used"
                )
        groups.append(Group(anchor, chosen, tuple(notes)))
    return groups


def _companion_score(file: NamedFile, anchor: NamedFile, anchors: Sequence[NamedFile]) -> int | None:
    """How badly an image goes with an anchor, 0 for names that agree; None where it does not."""
    score = match_score(file, anchor)
    if score is None or score == 0:
        return score
    return None if any(match_score(file, other) == 0 for other in anchors) else score


def match_score(file: NamedFile, anchor: NamedFile) -> int | None:
    """How badly two names of one unit agree: 0 where they say the same, None where they contradict."""
    if file.entities and anchor.entities:
        score = 0
        for key in set(file.entities) | set(anchor.entities):
            one, other = file.entities.get(key), anchor.entities.get(key)
            if one == other or (key in ("ce", "label", "desc", "acq") and None in (one, other)):
                continue
            if key in OF_PATIENT and None not in (one, other):
                return None
            score += 1 if None in (one, other) else 10
        return score
    words, others = file.words, anchor.words
    if words == others:
        return 0
    if others[: len(words)] == words:
        return 1 + len(others) - len(words)
    if words[: len(others)] == others:
        return 10 + len(words) - len(others)
    if set(words) ^ set(others) <= PROCESSING:
        return 30
    return None


class MaskIndex:
    """Finds the masks of an examination among those of a data set."""

    def __init__(self, masks: Iterable[NamedFile], groups: Iterable[Group]) -> None:
        self._masks: dict[tuple[object, ...], list[NamedFile]] = {}
        for mask in masks:
            self._masks.setdefault(unit_of(mask), []).append(mask)
        self._groups: dict[tuple[object, ...], list[Group]] = {}
        for group in groups:
            self._groups.setdefault(unit_of(group.first), []).append(group)

    def masks_of(self, group: Group) -> tuple[tuple[Path, ...] | None, tuple[Path, ...]]:
        """The lesion mask of an examination, and masks of single raters; as `choose_masks`."""
        anchor = group.first
        unit = unit_of(anchor)
        keys = dict.fromkeys((unit, (anchor.folder,)))
        candidates = [mask for key in keys for mask in self._masks.get(key, ())]
        if not candidates and not anchor.entities:  # p1/lesion.nii.gz beside p1/pre/flair.nii.gz
            above = (anchor.folder.parent,)
            candidates = (
                [] if above in self._groups else [m for m in self._masks.get(above, ()) if not m.words]
            )
        siblings = [g.first for g in self._groups[unit]]
        if len(siblings) > 1:
            scored = [
                (score, m)
                for m in candidates
                if (score := match_score(m, anchor)) is not None
                and (score == 0 or not m.words or not any(match_score(m, other) == 0 for other in siblings))
            ]
            best = min((score for score, _ in scored), default=0)
            candidates = [m for score, m in scored if score == best]
        return choose_masks([m.path for m in candidates])
