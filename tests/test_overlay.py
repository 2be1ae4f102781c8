"""The picture: drawn without display or settings, from any volume, with the mask's outline where the mask is."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ddmd.io.overlay import CELL, OUTLINE, draw_overlay, heat_colour, outline, slices_to_show


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def draw(
    image, mask, spacing=(1.0, 1.0, 1.0), title="case", uncertainty=None, probability=None
) -> np.ndarray:
    uncertainty = np.zeros_like(image) if uncertainty is None else uncertainty
    probability = np.ones_like(image) if probability is None else probability
    return picture(draw_overlay(image, mask, probability, uncertainty, spacing, title))


def is_red(pixels: np.ndarray) -> np.ndarray:
    return (pixels == OUTLINE).all(axis=-1)


def test_the_outline_lies_on_the_lesion(rng):
    image = rng.random((40, 50, 12)).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[25:31, 30:40, 4] = 1
    pixels = draw(image, mask)
    red = np.argwhere(is_red(pixels))
    assert pixels.shape[1] < 2 * CELL, "one slice has lesion, and one is shown"
    height = CELL * 50 // 40
    top, left = red.min(0) - [48, 6]
    bottom, right = red.max(0) - [48, 6]
    scale = CELL / 40
    assert (left, right) == pytest.approx((25 * scale, 31 * scale), abs=3)
    assert (top, bottom) == pytest.approx((height - 40 * scale, height - 30 * scale), abs=3), "front is up"


def test_pixels_are_as_wide_as_millimetres(rng):
    image = rng.random((30, 30, 5)).astype(np.float32)
    tall, flat = (draw(image, image < 0, spacing=(1.0, y, 1.0)).shape[0] for y in (2.0, 1.0))
    assert tall - flat == 2 * CELL


def test_the_uncertainty_is_shown_where_it_is(rng):
    image = np.full((40, 40, 3), 0.5, np.float32)
    image[0, 0] = 0
    uncertainty = np.zeros_like(image)
    uncertainty[5:10, 5:10] = 0.25
    pixels = draw(image, uncertainty * 0, uncertainty=uncertainty).astype(int)
    lower = pixels[48 + CELL + 6 :, 6 : 6 + CELL]
    coloured = np.abs(lower[..., 0] - lower[..., 2]) > 20
    y, x = np.argwhere(coloured).mean(0)
    assert (x, y) == pytest.approx((7.5 * CELL / 40, CELL - 7.5 * CELL / 40), abs=4)
    assert not (
        np.abs(pixels[48 : 48 + CELL, 6 : 6 + CELL, 0] - pixels[48 : 48 + CELL, 6 : 6 + CELL, 2]) > 20
    ).any()


def test_the_edge_of_a_mask_is_its_difference_to_the_eroded_one(rng):
    mask = ndimage.binary_dilation(rng.random((30, 40)) > 0.97, iterations=3)
    wanted = mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)))
    assert np.array_equal(outline(mask), wanted)


def test_colours_are_those_of_inferno():
    colormaps = pytest.importorskip("matplotlib").colormaps
    level = np.linspace(0, 1, 101)
    assert np.abs(heat_colour(level) - 255 * colormaps["inferno"](level)[:, :3]).max() < 10


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 200, 1), (200, 3, 2), (17, 5, 40)])
def test_any_shape_is_drawn(rng, shape):
    image = rng.random(shape).astype(np.float32)
    for mask in (image < 0, image >= 0, image > 0.5):
        assert draw(image, mask, uncertainty=image).size


def test_constant_and_broken_values_are_drawn():
    image = np.full((10, 10, 4), 7.0, np.float32)
    assert draw(image, image > 0).size
    image[1, 1, 1], image[2, 2, 2] = np.nan, np.inf
    assert draw(image, image > 0, uncertainty=image).size


@pytest.mark.parametrize(
    "title",
    ["P$_{$1", os.fsdecode(b"M\xfcller"), "患者 \U0001f600", "\u202exyz", "a\nb\x1b[31m", "x" * 5000, ""],
)
def test_any_title_is_drawn(rng, title):
    image = rng.random((10, 10, 4)).astype(np.float32)
    assert draw(image, image > 0.5, title=title).size


def test_a_title_is_drawn_without_freetype(rng, monkeypatch):
    from PIL import ImageFont

    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr("ddmd.io.overlay.ImageFont.load_default", lambda size: bitmap)
    image = rng.random((10, 10, 4)).astype(np.float32)
    assert draw(image, image > 0.5, title="患者 p\u0142").size


def test_slices_show_the_lesions_or_the_whole_head(rng):
    image = rng.random((8, 8, 40)).astype(np.float32)
    image[:, :, :4] = image[0, 0, 0]
    mask = np.zeros(image.shape, bool)
    shown = slices_to_show(mask, image)
    assert len(shown) == 6
    assert min(shown) > 4
    mask[2:4, 2:4, 17] = True
    assert slices_to_show(mask, image) == [17]
    mask[:, :, 10:30] = True
    shown = slices_to_show(mask, image)
    assert len(shown) == 6
    assert all(10 <= z < 30 for z in shown)
    assert shown == sorted(shown)


def test_matplotlib_and_its_settings_are_not_touched():
    script = (
        "import sys, numpy as np; from ddmd.io.overlay import draw_overlay; a = np.random.rand(9, 9, 3);"
        "draw_overlay(a, a > 0.5, a, a, (1.0, 1.0, 1.0), 'P$_{$1'); print('matplotlib' in sys.modules)"
    )
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "DISPLAY": ":77"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
