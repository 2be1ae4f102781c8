"""What the name and the folder of a file say: its kind, its sequence, its BIDS entities."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ddmd.cohort.name_words import (
    is_mask_name,
    is_sequence_word,
    name_words,
    without_mask_words,
    without_sequence,
)
from ddmd.io.sequences import is_other_modality, sequence_of, stem

# Kinds of files beside images
MASK, RESULT, OTHER, UNKNOWN_KIND, IMAGE = "mask", "result", "other", "unknown", "image"

_BIDS_NAME = re.compile(r"^sub-[a-z0-9+]+(_[a-z]+-[a-z0-9+]+)*_[a-z0-9]+$", re.IGNORECASE)
_RESULT = re.compile(
    r"desc-lesion_(mask|probseg)$|(^|[-_.])(probseg|uncertainty|discrepancy|variance|dseg_probs?)$"
    r"|desc-(inter|intra)(_|$)|desc-variance",
    re.IGNORECASE,
)
_FILLED = re.compile(r"lesions?[-_.\s]?(filled|fill|inpainted|removed)", re.IGNORECASE)
_NOT_A_LESION = re.compile(
    r"(^|[-_.\s])(brain|bet|tissue|skull|head|csf|gm|wm|cortex|aseg|aparc|ribbon|ventricles?|vessels?|defac\w*|face)"
    r"([-_.\s]?(mask|d?seg\w*|label\w*|roi)\d*)?$|brain_?mask",
    re.IGNORECASE,
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
        return tuple(w.lower() for w in name_words(self.prefix))


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
        next((w for w in name_words(name) if w.lower() == parent.name.lower()), None)
        if is_sequence_word(parent.name.lower())
        else None
    )
    reduced = name
    if same is not None and not entities:
        rest = re.sub(rf"(?<![^-_.\s]){re.escape(same)}(?![^-_.\s])[-_.\s]?", "", name, count=1)
        if sequence_of(f"{rest}.nii") is not None:
            reduced = rest
    sequence = sequence_of(f"{reduced}.nii")
    from_folder = False
    kind = _kind(name, reduced, sequence, entities, parent, inner)
    if kind == UNKNOWN_KIND and is_sequence_word(parent.name.lower()):
        sequence, kind, from_folder = sequence_of(f"{parent.name}.nii"), IMAGE, True
    if from_folder:
        prefix = ""  # p1/FLAIR/3.nii.gz is named after p1
    elif kind in (MASK, RESULT):
        prefix = without_mask_words(name)
    elif kind == IMAGE:
        prefix = without_sequence(name) if reduced == name else f"{without_sequence(reduced)}_{same}"
    else:
        prefix = name
    folder = parent
    while folder != folder.parent:
        says = kind == IMAGE and reduced == name and is_sequence_word(folder.name.lower())
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
    name: str, reduced: str, sequence: str | None, entities: dict[str, str], parent: Path, inner: bool
) -> str:
    if _RESULT.search(name):
        return RESULT
    if _FILLED.search(name):
        return OTHER
    if is_mask_name(reduced, sequence) or (inner and _MASK_FOLDER.fullmatch(parent.name)):
        return MASK
    if "desc" in entities or "mod" in entities or "label" in entities:
        return RESULT
    if sequence is not None:
        return IMAGE
    if is_other_modality(f"{reduced}.nii") or entities:
        return OTHER
    return UNKNOWN_KIND
