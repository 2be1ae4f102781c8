"""Which MRI sequence the name of a file says it is."""

from __future__ import annotations

import os
import re
from pathlib import Path

SEQUENCES = ("t1", "t1ce", "t2", "flair")
OTHER = "other"

# Words are lower case, joined by single underscores. The first line that matches a word takes it, so that
# "t2_flair" is not T2 as well. Lines name a sequence, or an image of another kind.
WORDS: tuple[tuple[str, str], ...] = (
    # quantitative maps, and T2* in its spellings
    (OTHER, r"(t1|t2|t2star|r1|r2|r2star|pd|s0|m0|b0|b1|tb1|rb1|mwf|mtv|mtr|chi|t1rho)_?map"),
    (OTHER, r"t2_?(star|\*|s|hemo|heme|ffe|gre|fl2d|fl3d|medic|merge|swi)w?|t1_?rho|unit1|mp2rage|(t1_)?inv_?[12]"),
    (OTHER, r"star|hemo|hemoflash|r2_?star|qsm|swi|swan|venobold|mip|minip|gre|flash|medic"),
    (OTHER, r"(ax|sag|cor|tra|[23]d)?(pd|pdw|pdt2|proton(_?density)?)|pd_?(w|t2w?|tse|fs)|dual_?echo|mese|megre"),
    (OTHER, r"dwi|dti|dki|dmri|diff|diffusion|adc|eadc|fa|md|trace|tracew|b0|b\d{3,4}|hardi|noddi"),
    (OTHER, r"bold|fmri|func|functional|epi|ep2d|sbref|rest|asl|pcasl|pasl|m0scan|cbf|cbv|mtt|ttp|tmax|rcbv"),
    (OTHER, r"perf|perfusion|dsc|dce|pwi|magnitude[12]?|mag|phase[12]?|phasediff|field_?map"),
    (OTHER, r"fmap|b0map|tof|mra|mrv|angio|angiography|pca|mrs|csi|svs|mt|mtr|mton|mtoff|mtw|mts|vfa|stir|dir|psir"),
    (OTHER, r"ciss|fiesta|ct|cta|ctp|cbct|pet|fdg|spect|xray|localizer|localiser|scout|survey|aascout"),
    # T1 FLAIR, an inversion recovery that is weighted by T1
    ("t1", r"t1w?_?(flair|tirm|dark_?fluid|ir)"),
    ("flair", r"(ax|sag|cor|tra|[23]d|space|cube|vista|t2w?)?_?flair(ax|sag|cor|tra|[23]d|w)?|t2f|t2_?f|fl"),
    ("flair", r"(t2w?_?)?((space|spc)_?)?((tirm_?)?(dark_?fluid|da_fl)|tirm)(_?fs)?"),
    ("t1ce", r"t1w?_?(ce|c|gd|gad|gado\w*|post(?!_?op)|postcontrast|postgad|contrast|km)w?|ce_?gad\w*|ce_t1w?"),
    ("t2", r"(ax|sag|cor|tra|[23]d)?(t2|t2_?w|t2_?tse|t2_?space)(ax|sag|cor|tra|[23]d)?|inplanet2"),
    ("t1", r"(ax|sag|cor|tra|[23]d)?(t1|t1_?[nw]|t1_?(mprage|mpr|space|tse|se|tfl|tfe|vibe|bravo|spgr))(ax|sag|cor|tra|[23]d)?"),
    ("t1", r"mprage|bravo|fspgr|inplanet1"),
)  # fmt: skip
_TABLE = tuple((label, re.compile(rf"(?<![^_])(?:{pattern})(?![^_])")) for label, pattern in WORDS)

_CONTRAST = re.compile(r"(?<![^_])(ce|gd|gad|gado\w*|post|postcontrast|postgad|contrast|km|enhanced)(?![^_])")
_NO_CONTRAST = re.compile(
    r"(?<![^_])((pre|no|non|without)_?(contrast|gd|gad|gado\w*|km|ce)|unenhanced|post_?op\w*)(?![^_])"
)
# "t1_to_flair" is a T1 on the grid of a FLAIR
_ONTO = re.compile(r"_(to|in|on|onto|2)_(?=.*(t1|t2|flair))")
_EXTENSIONS = re.compile(r"\.((nii|hdr|img)(\.(gz|bz2|zst))?|mgz|mgh|nrrd|nhdr)$", re.IGNORECASE)


def stem(path: str | os.PathLike[str]) -> str:
    """File name without its extensions of an image.

    >>> [stem(name) for name in ("a/x.y_flair.nii.gz", "x.NII", "x.hdr.gz", "x.mgz", "x.png")]
    ['x.y_flair', 'x', 'x', 'x', 'x.png']
    """
    return _EXTENSIONS.sub("", Path(path).name)


def sequence_of(path: str | os.PathLike[str]) -> str | None:
    """The sequence that the name of a file says it is.

    Names as BraTS (2012 to 2024), BIDS, scanners and people write them. The folder is not looked at.

    Parameters
    ----------
    path : path or name of a file

    Returns
    -------
    One of `SEQUENCES`; None where the name says nothing, several sequences, or an image of another kind.

    Examples
    --------
    >>> [sequence_of(n) for n in ("BraTS-GLI-00001-000-t2f.nii.gz", "sub-1_ce-GAD_T1w.nii", "x.nii")]
    ['flair', 't1ce', None]
    >>> [sequence_of(n) for n in ("t2_space_dark-fluid.nii", "sub-1_T2starw.nii.gz")]
    ['flair', None]
    """
    label = _label(stem(path))
    return None if label == OTHER else label


def is_other_modality(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file says that it is an image of a kind that is no sequence of `SEQUENCES`.

    T2*, SWI, proton density, diffusion, functional, perfusion, field maps, quantitative maps, CT, PET.

    Examples
    --------
    >>> [is_other_modality(n) for n in ("sub-1_T2starw.nii.gz", "sub-1_dwi.nii", "sub-1_FLAIR.nii", "x.nii")]
    [True, True, False, False]
    """
    return _label(stem(path)) == OTHER


def label_of_description(text: str) -> str | None:
    """What free text, as a scanner's description of a series, says the image is.

    Returns
    -------
    One of `SEQUENCES`, OTHER for an image of another kind, None where the text does not tell.

    Examples
    --------
    >>> [label_of_description(t) for t in ("sT2W/FLAIR", "ep2d_diff_3scan_trace", "brain 3 mm")]
    ['flair', 'other', None]
    """
    return _plain_label(re.sub(r"[^\w+.*-]+", " ", text.lower()))


def _label(name: str) -> str | None:
    """One of `SEQUENCES`, OTHER, or None where the name does not tell."""
    name = name.lower()
    if re.match(r"sub-[^_]+_", name):
        return _bids_label(name)
    return _plain_label(name)


def _bids_label(name: str) -> str | None:
    """By the suffix of a BIDS name; entities are looked at where they change what the suffix means."""
    pieces = name.split("_")
    entities = dict(piece.split("-", 1) for piece in pieces if "-" in piece)
    words = [piece for piece in pieces if "-" not in piece]
    label = _plain_label("_".join(words)) if words else None
    if entities.get("part") in ("phase", "real", "imag"):
        return OTHER
    acquisition = _plain_label(entities.get("acq", ""))
    if label == "t2" and (acquisition in ("flair", OTHER) or "star" in entities.get("acq", "")):
        return acquisition or OTHER
    if label == "t1" and "ce" in entities and entities["ce"] not in ("none", "no", "pre"):
        return "t1ce"
    return label


def _plain_label(name: str) -> str | None:
    words = re.sub(r"[-_.,\s+()\[\]]+", "_", name).strip("_")
    for onto in _ONTO.finditer(words):
        before = words[: onto.start()]
        # "t1_2_flair" is a T1 on the grid of a FLAIR, "patient_2_flair" the FLAIR of patient 2
        if onto[1] != "2" or any(pattern.search(before) for _, pattern in _TABLE):
            words = before
            break
    found: list[tuple[int, str]] = []  # where a match ends, and its label
    rest = words
    for label, pattern in _TABLE:
        for match in list(pattern.finditer(rest)):
            found.append((match.end(), label))
            rest = rest[: match.start()] + "#" * len(match.group()) + rest[match.end() :]
    if not found:
        return None
    end, label = max(found)
    labels = {label for _, label in found}
    if end != len(words):  # the name goes on after the last of them
        if OTHER in labels:
            return OTHER
        for general, special in (("t1", "t1ce"), ("t2", "flair")):
            if labels == {general, special}:
                label, labels = special, {special}
        if len(labels) > 1:
            return None
    if label == "t1" and _CONTRAST.search(_NO_CONTRAST.sub("", words)):
        return "t1ce"
    return label
