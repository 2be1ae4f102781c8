"""From the name of an examination to the stem of its files: plain characters, bounded length."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_REPLACED = " "  # stands for a character that no file name should have
MAX_STEM_BYTES = 180  # leaves room for the longest suffix within the 255 bytes of a file name


def name_hash(name: str, length: int = 8) -> str:
    """The first hexadecimal digits of the SHA-256 of a name."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def file_stem(name: str, *, unique: bool = False) -> str:
    """The stem of the files of an examination of this name.

    ASCII letters, digits, "-" and "_" stay, accents are dropped, and other characters become "-", or nothing
    beside "_". A hash of the name is added where letters or digits are lost, or where more than `MAX_STEM_BYTES` are cut.

    Parameters
    ----------
    name : name of the examination
    unique : bool
        Whether to add the hash in any case, where the stem of another name is the same.

    Returns
    -------
    At most `MAX_STEM_BYTES` ASCII characters, never empty, never beginning with "-" or ".".

    Examples
    --------
    >>> file_stem("sub-01_ses-1"), file_stem("p 1"), file_stem("Zoë"), file_stem("../../x")
    ('sub-01_ses-1', 'p-1', 'Zoe', 'x')
    >>> file_stem("scan [final]_2")
    'scan-final_2'
    >>> len(file_stem("x" * 1000))
    180
    """
    kept, lost = [], False
    for c in unicodedata.normalize("NFKD", name):
        if unicodedata.combining(c):
            continue
        if c.isascii() and (c.isalnum() or c in "-_"):
            kept.append(c)
        else:
            lost |= c.isalnum() or not c.isprintable()
            kept.append(_REPLACED)
    joined = re.sub(
        rf"[-_]*{_REPLACED}[-_{_REPLACED}]*", lambda match: "_" if "_" in match[0] else "-", "".join(kept)
    )
    stem = re.sub(r"-{2,}", "-", joined).strip("-_")
    if stem and not lost and not unique and len(stem) <= MAX_STEM_BYTES:
        return stem
    ending = f"-{name_hash(name)}"
    return f"{(stem or 'case')[: MAX_STEM_BYTES - len(ending)].rstrip('-_')}{ending}"
