"""The picture of a result as a strip small enough to stand in a row of a table."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ddmd.io.overlay import BAR_WIDTH, CELL, LABEL_HEIGHT, MARGIN, TITLE_HEIGHT

HEIGHT = 112  # pixels of the strip; the page shows half as many, for dense screens
MAX_WIDTH = 700
QUALITY = 78


@dataclass(frozen=True)
class Thumbnail:
    """A JPEG file as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


def thumbnail(overlay: Path) -> Thumbnail | None:
    """The slices of a picture that `draw_overlay` made, without title, labels and uncertainty; scaled down.

    Parameters
    ----------
    overlay : PNG file

    Returns
    -------
    Thumbnail, or None where the file is no picture. A picture of another layout is scaled down as a whole.
    """
    try:
        with Image.open(overlay, formats=["PNG"]) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    width, height = picture.size
    slices = width - MARGIN - BAR_WIDTH
    rows = height - TITLE_HEIGHT - LABEL_HEIGHT
    if slices > 0 and slices % (CELL + MARGIN) == 0 and rows > 0 and rows % 2 == 0:
        top = TITLE_HEIGHT + LABEL_HEIGHT
        picture = picture.crop((MARGIN, top, MARGIN + slices - MARGIN, top + rows // 2 - MARGIN))
    picture.thumbnail((MAX_WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(uri, *picture.size)
