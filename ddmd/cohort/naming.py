"""What the names of files and folders say: the sequence, the kind, the examination; and names of cases."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

from ddmd.io.naming import file_stem, name_hash
from ddmd.io.sequences import SEQUENCES, WORDS, is_other_modality, sequence_of, stem
from ddmd.io.text import printable

# Kinds of files beside images
MASK, RESULT, OTHER, UNKNOWN_KIND, IMAGE = "mask", "result", "other", "unknown", "image"

_BIDS_NAME = re.compile(r"^sub-[a-z0-9+]+(_[a-z]+-[a-z0-9+]+)*_[a-z0-9]+$", re.IGNORECASE)
_RESULT = re.compile(
    r"desc-lesion_(mask|probseg)$|(^|[-_.])(probseg|uncertainty|discrepancy|variance|dseg_probs?)$"
    r"|desc-(inter|intra)(_|$)|desc-variance",
    re.IGNORECASE,
)
_FILLED = re.compile(r"lesions?[-_.\s]?(filled|fill|inpainted|removed)", re.IGNORECASE)
_MASK_TOKEN = re.compile(
    r"\w*ma?sks?\d*|\w*segmentations?\d*|d?segs?\d*|aseg|aparc|labelmap|manual\w*|probseg|"
    r"ground[-_]?truth", re.IGNORECASE
)  # fmt: skip
_LAST_MASK_TOKEN = re.compile(
    r"lesions?\w*|rois?\d*|labels?\d*|gt\d*|consensus\w*|annotations?\d*|wmh\d*|tumou?rs?|edema|oedema|"
    r"brain|tissue|skull|ribbon|pve", re.IGNORECASE
)  # fmt: skip
_RATER_TOKEN = re.compile(r"(rater|reader|observer|annotator|expert)s?(\d+|[a-h])?", re.IGNORECASE)
_NOT_A_LESION = re.compile(
    r"(^|[-_.\s])(brain|bet|tissue|skull|head|csf|gm|wm|cortex|aseg|aparc|ribbon|ventricles?|vessels?|defac\w*|face)"
    r"([-_.\s]?(mask|d?seg\w*|label\w*|roi)\d*)?$|brain_?mask",
    re.IGNORECASE,
)
# Words that say how an image was processed, not whose it is
PROCESSING = frozenset(
    [
        "brain",
        "bet",
        "ss",
        "stripped",
        "skullstripped",
        "hdbet",
        "synthstrip",
        "pp",
        "preproc",
        "preprocessed",
        "proc",
        "n4",
        "bfc",
        "bc",
        "biascorrected",
        "corrected",
        "norm",
        "normalized",
        "normalised",
        "reg",
        "registered",
        "coreg",
        "rigid",
        "affine",
        "resampled",
        "std",
        "mni",
        "1mm",
        "iso",
        "native",
        "orig",
        "raw",
        "image",
        "img",
        "scan",
        "mri",
        "mr",
        "2d",
        "3d",
        "ax",
        "axial",
        "sag",
        "sagittal",
        "cor",
        "coronal",
        "tra",
        "fs",
        "final",
        "new",
        "in",
        "to",
        "on",
        "space",
        "t1space",
    ]
)
_GENERIC_FOLDER = re.compile(
    r"anat|nii|nifti|niftis|images?|imgs?|raw|scans?|mri?|data|preprocessed|preproc|output|unprocessed|resources"
    r"|(raw|pre[-_]?processed|processed|unprocessed|original)[-_]?(data|images?|files?)",
    re.IGNORECASE,
)
_MASK_FOLDER = re.compile(
    r"(manual|lesion|tumou?r|expert)?[-_]?(masks?|labels?|segs?|segmentations?|rois?|lesions?|annotations?|ground[-_]?truth|gt)",
    re.IGNORECASE,
)
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


@dataclass(frozen=True)
class NamedFile:
    """A file, and what its name and folder say.

    folder : of the examination, absolute; folders that say a sequence or nothing (anat, masks) are left out.
    kind : IMAGE, MASK, RESULT (of this program or another), OTHER or UNKNOWN_KIND.
    prefix : the name without sequence and mask words; "" where nothing is left.
    entities : of a BIDS name. dataset : folder above that of the BIDS subject.
    """

    path: Path
    folder: Path
    kind: str
    sequence: str | None
    prefix: str
    entities: dict[str, str] = field(default_factory=dict)
    dataset: Path | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the prefix, without case."""
        return tuple(w.lower() for w in _words(self.prefix))


def _words(text: str) -> list[str]:
    return [w for w in re.split(r"[-_.,\s+()\[\]]+", text) if w]


@lru_cache(maxsize=1)
def _sequence_patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((label, re.compile(pattern)) for label, pattern in WORDS if label in SEQUENCES)


@lru_cache(maxsize=4096)
def _is_sequence_word(text: str) -> bool:
    return any(pattern.fullmatch(text) for _, pattern in _sequence_patterns())


def without_sequence(name: str) -> str:
    """The stem of an image's file without the words that say its sequence.

    >>> [without_sequence(n) for n in ("P1_T2_FLAIR", "s1_T1_bet", "BraTS-GLI-00001-000-t2f", "flair")]
    ['P1', 's1_bet', 'BraTS-GLI-00001-000', '']
    """
    spans = [m.span() for m in re.finditer(r"[^-_.,\s+()\[\]]+", name)]
    best: tuple[int, int] | None = None
    for i in range(len(spans)):
        for j in range(len(spans), i, -1):
            text = "_".join(name[a:b].lower() for a, b in spans[i:j])
            if _is_sequence_word(text):
                if best is None or j - i >= best[1] - best[0]:
                    best = (i, j)
                break
    if best is None:
        return name
    before, after = name[: spans[best[0]][0]], name[spans[best[1] - 1][1] :]
    separators = "-_.,+ ()[]"
    before, after = before.rstrip(separators), after.strip(separators)
    return f"{before}_{after}".strip("_") if before and after else before or after


def _without_mask_words(name: str) -> str:
    kept = [
        w for w in _words(name)
        if not (_MASK_TOKEN.fullmatch(w) or _LAST_MASK_TOKEN.fullmatch(w) or _RATER_TOKEN.fullmatch(w))
    ]  # fmt: skip
    return without_sequence("_".join(kept))


def _is_mask(name: str, sequence: str | None) -> bool:
    words = _words(name)
    if not words:
        return False
    if any(_MASK_TOKEN.fullmatch(w) for w in words):
        return True
    last = words[-1] if not (words[-1].isdigit() and len(words) > 1) else words[-2]
    if _RATER_TOKEN.fullmatch(last):
        return True
    if _LAST_MASK_TOKEN.fullmatch(last):
        return last.lower() not in ("brain", "skull") or sequence is None
    if words[0].lower() in ("lesion", "lesions", "tumor", "tumour", "brain") and sequence is not None:
        return len(words) > 1 and not words[1][0].isdigit()
    return sequence is None and any(w.lower() in ("lesion", "lesions", "brain", "tumor") for w in words)


def is_lesion_mask(path: Path) -> bool:
    """Whether the name of a mask leaves it possible that it marks lesions."""
    return not _NOT_A_LESION.search(stem(path)) and not _RESULT.search(stem(path))


def bids_entities(name: str) -> dict[str, str]:
    """Entities of a stem in BIDS form; empty where it has another form.

    >>> bids_entities("sub-01_ses-1_run-2_FLAIR")
    {'sub': '01', 'ses': '1', 'run': '2'}
    >>> bids_entities("p1_flair")
    {}
    """
    if not _BIDS_NAME.match(name):
        return {}
    return dict(piece.split("-", 1) for piece in name.split("_")[:-1])


def name_file(path: Path, root: Path | None = None) -> NamedFile:
    """Read the name of a file.

    Parameters
    ----------
    path : absolute path of the file
    root : folder that was searched; folders above it are not looked at for what the file is.
    """
    name, parent = stem(path), path.parent
    entities = bids_entities(name)
    inner = parent != root
    # A time point called T1 in a name as in the folder's is no sequence: T1/P1_T1_FLAIR
    same = (
        next((w for w in _words(name) if w.lower() == parent.name.lower()), None)
        if _is_sequence_word(parent.name.lower())
        else None
    )
    told = name
    if same is not None and not entities:
        rest = re.sub(rf"(?<![^-_.\s]){re.escape(same)}(?![^-_.\s])[-_.\s]?", "", name, count=1)
        if sequence_of(f"{rest}.nii") is not None:
            told = rest
    sequence = sequence_of(f"{told}.nii")
    from_folder = False
    kind = _kind(name, told, sequence, entities, parent, inner)
    if kind == UNKNOWN_KIND and _is_sequence_word(parent.name.lower()):
        sequence, kind, from_folder = sequence_of(f"{parent.name}.nii"), IMAGE, True
    if from_folder:
        prefix = ""  # p1/FLAIR/3.nii.gz is named after p1
    elif kind in (MASK, RESULT):
        prefix = _without_mask_words(name)
    elif kind == IMAGE:
        prefix = without_sequence(name) if told == name else f"{without_sequence(told)}_{same}"
    else:
        prefix = name
    folder = parent
    while folder != folder.parent:
        says = kind == IMAGE and told == name and _is_sequence_word(folder.name.lower())
        collapses = (
            (says and sequence_of(f"{folder.name}.nii") == sequence)
            or _GENERIC_FOLDER.fullmatch(folder.name)
            or (kind == MASK and folder != root and _MASK_FOLDER.fullmatch(folder.name))
        )
        if not collapses:
            break
        folder = folder.parent
    dataset = None
    if entities:
        subject = f"sub-{entities['sub']}"
        dataset = next((above.parent for above in path.parents if above.name == subject), folder)
    return NamedFile(path, folder, kind, sequence if kind == IMAGE else None, prefix, entities, dataset)


def _kind(
    name: str, told: str, sequence: str | None, entities: dict[str, str], parent: Path, inner: bool
) -> str:
    if _RESULT.search(name):
        return RESULT
    if _FILLED.search(name):
        return OTHER
    if _is_mask(told, sequence) or (inner and _MASK_FOLDER.fullmatch(parent.name)):
        return MASK
    if "desc" in entities or "mod" in entities or "label" in entities:
        return RESULT
    if sequence is not None:
        return IMAGE
    if is_other_modality(f"{told}.nii") or entities:
        return OTHER
    return UNKNOWN_KIND


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
    if _VISIT.fullmatch(file.folder.name) and not set(_words(file.folder.name.lower())) <= set(words):
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
