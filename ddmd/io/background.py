"""What of a volume is background: the values of its border, and the largest body that has none of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ddmd.io.brain_extraction import filled_slices, largest_body

NEAR_BACKGROUND = 0.01  # of the intensity range: as close as this to the background is background
PARTIAL_VOLUME = (0.03, 0.5)  # shares of the contrast: darker beside a blurred background is background
PAD_SHARE = 0.04  # of the border's voxels with one value: a constant pad next to the air


def faces(values: np.ndarray) -> list[np.ndarray]:
    """The six faces of a volume (X, Y, Z)."""
    return [np.take(values, end, axis) for axis in range(3) for end in (0, -1)]


def border_values(values: np.ndarray) -> np.ndarray:
    """All voxels on the six faces of a volume (X, Y, Z), as one flat array; edges appear more than once."""
    return np.concatenate([face.ravel() for face in faces(values)])


def background_value(values: np.ndarray, finite: np.ndarray) -> float:
    """The commonest finite value on the faces of the volume."""
    border = border_values(values)[border_values(finite)]
    if not len(border):
        return float(values[finite].min())
    distinct, counts = np.unique(border, return_counts=True)
    return float(distinct[counts.argmax()])


def intensity_range(values: np.ndarray, constants: np.ndarray) -> float:
    """From the 0.5th to the 99.5th percentile of what is none of the constants, or all where these are equal."""
    sample = values[::2, ::2, ::2]
    sample = sample[~np.isin(sample, constants)] if len(constants) else sample.ravel()
    if not len(sample):
        return float(np.ptp(values))
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(high - low) or float(np.ptp(values))


@dataclass(frozen=True)
class Background:
    """One value of the background, and how near to it is background."""

    value: float
    tolerance: float

    def near(self, values: np.ndarray) -> np.ndarray:
        """Where values lie within the tolerance; bool, of the shape of `values`."""
        close: np.ndarray = np.abs(values - np.float32(self.value)) <= self.tolerance
        return close


def find_backgrounds(values: np.ndarray, commonest: float) -> tuple[list[Background], np.ndarray]:
    """The values that the border consists of, air and constant pads, and where the volume is near to none of them.

    Parameters
    ----------
    values : (X, Y, Z) float, finite
    commonest : the commonest value of the border; see `background_value`

    Returns
    -------
    The backgrounds, the one next to the body first, and a bool array (X, Y, Z), the foreground
    """
    border = border_values(values)
    distinct, counts = np.unique(border, return_counts=True)
    constants = distinct[counts >= PAD_SHARE * len(border)]
    tolerance = NEAR_BACKGROUND * intensity_range(values, constants)
    if not np.any(constants == commonest):  # no exact value stands out: where the border is densest
        commonest = _densest(border, tolerance)
    empty = [
        face.ravel() for face in faces(values) if np.mean(np.abs(face - commonest) <= 3 * tolerance) > 0.6
    ]
    air = np.concatenate(empty) if empty else border  # without faces that cut through tissue
    backgrounds = [_background_near(commonest, air, tolerance)]
    backgrounds += [
        _background_near(float(v), air, tolerance) for v in constants if abs(v - commonest) > tolerance
    ]
    foreground = np.ones(values.shape, bool)
    for background in backgrounds:
        foreground &= ~background.near(values)
    for _ in range(2):  # what lies within a pad all round
        box = bounding_box(foreground)
        if box is None or foreground[box].size == values.size:
            break
        touching = border_values(foreground[box])
        shell = border_values(values[box])[touching]
        if len(shell) < 0.5 * len(touching):
            break
        inner = _densest(shell, tolerance)
        if np.mean(np.abs(shell - inner) <= tolerance) < 0.5:
            break
        backgrounds.insert(0, _background_near(inner, shell, tolerance))
        foreground &= ~backgrounds[0].near(values)
    return backgrounds, foreground


def _background_near(value: float, border: np.ndarray, tolerance: float) -> Background:
    """A background whose tolerance covers the noise of the border round it."""
    around = border[np.abs(border - value) <= 10 * tolerance]
    spread = float(np.percentile(np.abs(around - value), 90)) if len(around) else 0.0
    return Background(float(value), float(np.clip(2.5 * spread, tolerance, 10 * tolerance)))


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...] | None:
    """The smallest box that holds the mask, and a margin of voxels within the grid; None where it is empty."""
    box = []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        if not len(inside):
            return None
        box.append(slice(max(int(inside[0]) - margin, 0), int(inside[-1]) + 1 + margin))
    return tuple(box)


def _densest(values: np.ndarray, width: float) -> float:
    """The median of the values in the fullest window of this width."""
    low = float(values.min())
    bins = np.minimum((values.astype(np.float64) - low) / width, 1e6).astype(np.int64)
    distinct, counts = np.unique(bins, return_counts=True)
    return float(np.median(values[bins == distinct[counts.argmax()]]))


def find_body(
    values: np.ndarray, backgrounds: list[Background], foreground: np.ndarray
) -> tuple[np.ndarray, bool]:
    """The largest body that is not background, holes of its slices filled; and whether the background is exact."""
    head = np.zeros(values.shape, bool)
    box = bounding_box(foreground, margin=3)
    if box is None:
        return head, False
    all_near = foreground.size - int(foreground.sum())
    inside, foreground = values[box], foreground[box].copy()
    exact = np.ones(inside.shape, bool)
    for background in backgrounds:
        exact &= inside != np.float32(background.value)
    outside = values.size - inside.size  # exact or near: not looked at
    if 2 * (outside + exact.size - int(exact.sum())) > all_near:
        main = largest_body(exact)
        surface = main & ~ndimage.binary_erosion(main, border_value=1)  # a face of the volume is none
        if surface.any() and foreground[surface].mean() > 0.5:
            head[box] = filled_slices(main)
            return head, True
    air = backgrounds[0].value
    tissue = inside[foreground]
    contrast = float(np.median(tissue)) - air
    side = np.float32(1.0 if contrast >= 0 else -1.0)
    if np.mean(side * (tissue - np.float32(air)) < 0) < 0.02:
        # Partial volume and ringing beside a blurred edge are no tissue
        signal = side * (inside - np.float32(air))
        deep = ndimage.binary_erosion(foreground, iterations=2, border_value=1)
        surface = float(np.percentile(signal[deep], 5)) if deep.any() else 0.0
        foreground &= signal > np.clip(0.25 * surface / abs(contrast), *PARTIAL_VOLUME) * abs(contrast)
    else:
        foreground = ndimage.binary_opening(ndimage.binary_closing(foreground))
    # Filled first: a dark skull parts the scalp from the brain
    head[box] = largest_body(filled_slices(foreground))
    return head, False
