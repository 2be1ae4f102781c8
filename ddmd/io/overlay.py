"""The picture of a result: axial slices with the mask's outline, and the uncertainty in colour below."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ddmd.io.text import printable

CELL = 240  # width of a slice in pixels
COLUMNS = 6
MARGIN, TITLE_HEIGHT, LABEL_HEIGHT, BAR_WIDTH = 6, 30, 18, 64
OUTLINE = (255, 40, 40)
HEAT_OPACITY = 0.85
INFERNO = np.array([  # the colour map of that name (van der Walt, Smith), at every tenth
    (0, 0, 4), (22, 11, 57), (66, 10, 104), (106, 23, 110), (147, 38, 103), (188, 55, 84), (221, 81, 58),
    (243, 120, 25), (252, 165, 10), (246, 215, 70), (252, 255, 164),
])  # fmt: skip

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_overlay(
    image: NDArray[np.floating],
    mask: NDArray[Any],
    probability: NDArray[np.floating],
    uncertainty: NDArray[np.floating],
    spacing: tuple[float, float, float],
    title: str,
) -> bytes:
    """Draw the slices with most lesion, from the feet up, or evenly spaced ones where no lesion was found.

    Parameters
    ----------
    image, mask, probability, uncertainty : (X, Y, Z), in closest-canonical (RAS+) order
    spacing : voxel size in mm
    title : text above; control characters are escaped

    Returns
    -------
    bytes
        A PNG file.
    """
    mask = np.asarray(mask) > 0
    image, probability, uncertainty = (_finite(a) for a in (image, probability, uncertainty))
    shown = slices_to_show(mask, image)
    height = int(
        np.clip(round(CELL * image.shape[1] * spacing[1] / (image.shape[0] * spacing[0])), 40, 4 * CELL)
    )
    size = (CELL, height)
    width = MARGIN + len(shown) * (CELL + MARGIN) + BAR_WIDTH
    canvas = Image.new("RGB", (width, TITLE_HEIGHT + LABEL_HEIGHT + 2 * (height + MARGIN)))
    draw = ImageDraw.Draw(canvas)
    fonts = {points: ImageFont.load_default(points) for points in (16, 11, 10)}
    _write(draw, (width // 2, TITLE_HEIGHT // 2), title, fonts[16], width - 2 * MARGIN)
    tissue = image[image != image.flat[0]]
    low, high = np.percentile(tissue if tissue.size else image, (1, 99.5))
    top = max(float(uncertainty.max()), 1e-3)
    upper = TITLE_HEIGHT + LABEL_HEIGHT
    lower = upper + height + MARGIN
    for column, z in enumerate(shown):
        left = MARGIN + column * (CELL + MARGIN)
        label = f"slice {z + 1}"
        _write(draw, (left + CELL // 2, TITLE_HEIGHT + LABEL_HEIGHT // 2), label, fonts[11], CELL)
        grey = (np.clip((image[:, :, z] - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
        slice_rgb = np.repeat(_resized(grey, size, Image.Resampling.BICUBIC)[..., None], 3, axis=2)
        outlined = slice_rgb.copy()
        outlined[outline(_resized(mask[:, :, z].astype(np.uint8) * 255, size) > 127)] = OUTLINE
        seen = uncertainty[:, :, z] * (probability[:, :, z] > 0.01) / top
        level = _resized(seen, size)[..., None]
        heat = HEAT_OPACITY * heat_colour(level[..., 0]) + (1 - HEAT_OPACITY) * slice_rgb
        canvas.paste(Image.fromarray(outlined), (left, upper))
        canvas.paste(Image.fromarray(np.where(level < 0.02, slice_rgb, heat).astype(np.uint8)), (left, lower))
    draw.text((MARGIN + 4, upper + 2), "L", "white", fonts[11])  # the patient's left: x grows to the right
    draw.text((MARGIN + CELL - 12, upper + 2), "R", "white", fonts[11])
    _colour_bar(canvas, (width - BAR_WIDTH + MARGIN, lower + 14), height - 24, top, fonts[10])
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def _finite(values: NDArray[Any]) -> NDArray[np.float32]:
    """The values as float32 with 0 for what is no finite number; not copied where all are."""
    values = np.asarray(values, np.float32)
    if np.isfinite((values.min(), values.max())).all():  # both are NaN where one value is
        return values
    cleaned: NDArray[np.float32] = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    return cleaned


def _resized(
    plane: NDArray[Any], size: tuple[int, int], how: Image.Resampling = Image.Resampling.BILINEAR
) -> NDArray[Any]:
    """A plane (X, Y) as rows of pixels, front at the top, in (height, width) of the size."""
    rows = np.ascontiguousarray(plane.T[::-1])
    return np.asarray(Image.fromarray(rows).resize(size, how))


def outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a mask (H, W) that have a neighbour outside it, of eight; the picture's edge is outside."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    inner = np.logical_and.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
    edge: NDArray[np.bool_] = mask & ~inner
    return edge


def heat_colour(level: NDArray[Any]) -> NDArray[np.float64]:
    """Levels (...) in [0, 1] as colours (..., 3) in [0, 255]."""
    at = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(level, at, INFERNO[:, c]) for c in range(3)], axis=-1)


def _colour_bar(canvas: Image.Image, corner: tuple[int, int], height: int, top: float, font: Font) -> None:
    colours = heat_colour(np.linspace(1, 0, max(height, 1))[:, None].repeat(10, axis=1))
    canvas.paste(Image.fromarray(colours.astype(np.uint8)), corner)
    draw, (x, y) = ImageDraw.Draw(canvas), corner
    draw.text((x, y - 13), "variance", "white", font)
    for share in (0.0, 0.5, 1.0):
        draw.text((x + 14, y + (1 - share) * (height - 11)), f"{share * top:.2g}", "white", font)


def _write(draw: ImageDraw.ImageDraw, centre: tuple[int, int], text: str, font: Font, room: int) -> None:
    """Write text about its centre, cut to the room it has in pixels."""
    text = printable(text)
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType: its font is Latin-1
        text = text.encode("latin-1", "replace").decode("latin-1")
    while len(text) > 1 and draw.textlength(text, font) > room:
        text = (
            text[: max(1, min(len(text) - 4, int(len(text) * room / draw.textlength(text, font)) - 3))]
            + "..."
        )
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    draw.text((centre[0] - (right + left) / 2, centre[1] - (bottom + top) / 2), text, "white", font)


def slices_to_show(mask: NDArray[np.bool_], image: NDArray[np.floating], count: int = COLUMNS) -> list[int]:
    """Up to `count` slices: spread over the lesions by their area, or over the tissue where there are none."""
    area = mask.sum(axis=(0, 1))
    depth = mask.shape[2]
    count = min(count, depth)
    if area.any():
        held = np.flatnonzero(area)
        if len(held) > count:
            shares = np.cumsum(area[held]) / area.sum()
            held = held[np.searchsorted(shares, (np.arange(count) + 0.5) / count)]
        return sorted({int(z) for z in held})
    filled = np.flatnonzero((image != image.flat[0]).any(axis=(0, 1)))
    filled = filled if len(filled) else np.arange(depth)
    return [int(z) for z in filled[np.linspace(0, len(filled) - 1, count + 2).round().astype(int)[1:-1]]]
