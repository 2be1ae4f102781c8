"""From stored voxels to float32: scaling of the header, without losing contrast to offset or magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLE = 1 << 16  # voxels looked at to see where the values lie
OFFSET_BITS = 12  # an offset over 2^12 times the spread takes too many of float32's 24 bits
EXPONENT = 100  # spreads from 2^-100 to 2^100 are computed with safely in float32
TARGET_EXPONENT = 8  # what other spreads are scaled to
LOWEST, HIGHEST = -4.0, 6.0  # robust z-scores are clipped to this; air is LOWEST


@dataclass(frozen=True)
class Stored:
    """Voxels as they are stored: value = slope * raw + intercept.

    raw : (X, Y, Z), real numbers or bool.
    notes : what a user should know of how they were read.
    """

    raw: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_scaled(self) -> bool:
        return self.slope != 1.0 or self.intercept != 0.0


def values_of(stored: Stored) -> np.ndarray:
    """The values as float32 (X, Y, Z), rounded once; what float32 cannot hold is Inf."""
    with np.errstate(over="ignore"):
        if not stored.is_scaled:
            return stored.raw.astype(np.float32, copy=False)
        return _converted(stored.raw, lambda raw: raw * stored.slope + stored.intercept)


def intensities_of(stored: Stored) -> tuple[np.ndarray, str | None]:
    """The values as float32 (X, Y, Z) up to an offset and a factor, and a note that says which.

    An image's intensities have no unit. Where the contrast is small beside the offset, or outside what
    float32 computes with, the median is subtracted and a power of two taken out before rounding.
    """
    raw = stored.raw
    if not stored.is_scaled and (raw.dtype.itemsize <= 2 or raw.dtype.kind == "b"):
        return values_of(stored), None
    raw, base = _relative(raw)
    middle, spread = _location(raw)
    fraction, exponent = np.frexp(stored.slope)
    level = abs(stored.slope * (middle + base) + stored.intercept)
    size = (spread or abs(middle)) or 1.0
    spread_exponent = int(np.frexp(size)[1]) + int(exponent)
    shifted = (
        (raw.dtype != np.float32 or stored.is_scaled)
        and spread > 0
        and (not np.isfinite(level) or (level > 0 and np.frexp(level)[1] - spread_exponent > OFFSET_BITS))
    )
    scaled = abs(spread_exponent) > EXPONENT
    if not shifted and not scaled:
        return values_of(stored), None
    power = spread_exponent - TARGET_EXPONENT if scaled else 0
    subtracted = middle if shifted else 0.0
    rest = 0.0 if shifted else float(np.ldexp(stored.slope * base + stored.intercept, -power))

    def convert(values: np.ndarray) -> np.ndarray:
        moved: np.ndarray = np.ldexp(values - subtracted, int(exponent) - power) * fraction + rest
        return moved

    notes = []
    if shifted:
        notes.append(f"{stored.slope * (middle + base) + stored.intercept:g} was subtracted from its values")
    if scaled:
        notes.append(f"its values were divided by 2^{power}")
    with np.errstate(over="ignore", invalid="ignore"):
        return _converted(raw, convert), " and ".join(notes) + ", to keep their contrast in float32"


def _converted(raw: np.ndarray, convert: object) -> np.ndarray:
    """float32 of a conversion in float64, plane by plane."""
    assert callable(convert)
    out = np.empty(raw.shape, np.float32, order="F")
    for z in range(raw.shape[2]):
        out[:, :, z] = convert(raw[:, :, z].astype(np.float64))
    return out


def _relative(raw: np.ndarray) -> tuple[np.ndarray, float]:
    """Integers of 64 bits relative to the least of them, so that float64 holds them, and that one."""
    if raw.dtype.kind not in "iu" or raw.dtype.itemsize < 8:
        return raw, 0.0
    low, high = int(raw.min()), int(raw.max())
    if max(abs(low), abs(high)) < 1 << 53 or high - low >= 1 << 63:
        return raw, 0.0
    return raw - raw.dtype.type(low), float(low)


def _location(raw: np.ndarray) -> tuple[float, float]:
    """Median and spread (interquartile range, or else standard deviation) of what is not background."""
    step = max(1, raw.size // SAMPLE) | 1  # odd: no multiple of a usual row
    sample = raw.ravel(order="K")[::step].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 0.0
    found, counts = np.unique(sample, return_counts=True)
    if len(found) > 1 and counts.max() > 0.05 * sample.size:
        sample = sample[sample != found[counts.argmax()]]
    low, middle, high = (float(v) for v in np.percentile(sample, (25, 50, 75)))
    spread = high - low
    if not spread:
        largest = float(np.abs(sample).max())
        spread = float((sample / largest).std()) * largest if largest else 0.0
    return middle, spread if np.isfinite(spread) else float(np.abs(sample).max())
