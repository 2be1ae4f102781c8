"""The words in names of files: which say a sequence, a mask, a rater or a processing step, and names without them."""

from __future__ import annotations

import re
from functools import lru_cache

from ddmd.io.sequences import SEQUENCES, WORDS

_MASK_TOKEN = re.compile(
    r"\w*ma?sks?\d*|\w*segmentations?\d*|d?segs?\d*|aseg|aparc|labelmap|manual\w*|probseg|"
    r"ground[-_]?truth", re.IGNORECASE
)  # fmt: skip
_LAST_MASK_TOKEN = re.compile(
    r"lesions?\w*|rois?\d*|labels?\d*|gt\d*|consensus\w*|annotations?\d*|wmh\d*|tumou?rs?|edema|oedema|"
    r"brain|tissue|skull|ribbon|pve", re.IGNORECASE
)  # fmt: skip
_RATER_TOKEN = re.compile(r"(rater|reader|observer|annotator|expert)s?(\d+|[a-h])?", re.IGNORECASE)
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


def name_words(text: str) -> list[str]:
    """The words of a name, between signs and blanks."""
    return [w for w in re.split(r"[-_.,\s+()\[\]]+", text) if w]


@lru_cache(maxsize=1)
def _sequence_patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((label, re.compile(pattern)) for label, pattern in WORDS if label in SEQUENCES)


@lru_cache(maxsize=4096)
def is_sequence_word(text: str) -> bool:
    """Whether a word, in lower case, is a known sequence and nothing else."""
    return any(pattern.fullmatch(text) for _, pattern in _sequence_patterns())


def without_sequence(name: str) -> str:
    """The stem of an image's file without the words that say its sequence.

    >>> [without_sequence(n) for n in ("P1_T2_FLAIR", "s1_T1_bet", "BraTS-GLI-00001-000-t2f", "flair")]
    ['P1', 's1_bet', 'BraTS-GLI-00001-000', '']
    >>> [without_sequence(n) for n in ("p1 [final]_FLAIR", "p1 (FLAIR)", "(FLAIR) p1", "[p1] FLAIR")]
    ['p1 [final]', 'p1', 'p1', '[p1]']
    """
    spans = [m.span() for m in re.finditer(r"[^-_.,\s+()\[\]]+", name)]
    best: tuple[int, int] | None = None
    for i in range(len(spans)):
        for j in range(len(spans), i, -1):
            text = "_".join(name[a:b].lower() for a, b in spans[i:j])
            if is_sequence_word(text):
                if best is None or j - i >= best[1] - best[0]:
                    best = (i, j)
                break
    if best is None:
        return name
    before, after = name[: spans[best[0]][0]], name[spans[best[1] - 1][1] :]
    # a bracket goes with what it enclosed, and stays around what is kept
    before, after = before.rstrip("-_.,+ (["), after.lstrip("-_.,+ )]").rstrip("-_.,+ ([")
    return f"{before}_{after}".strip("_") if before and after else before or after


def without_mask_words(name: str) -> str:
    """The stem of a mask's file without the words that say mask, rater or sequence."""
    kept = [
        w for w in name_words(name)
        if not (_MASK_TOKEN.fullmatch(w) or _LAST_MASK_TOKEN.fullmatch(w) or _RATER_TOKEN.fullmatch(w))
    ]  # fmt: skip
    return without_sequence("_".join(kept))


def is_mask_name(name: str, sequence: str | None) -> bool:
    """Whether the stem of a file, and the sequence it says, are those of a mask."""
    words = name_words(name)
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
