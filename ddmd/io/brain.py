"""Where the brain is in a volume, whether the skull is still on, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ddmd.io.brain_extraction import extract_brain, filled_slices, head_outline, largest_body

SKULL_CHOICES = ("auto", "on", "off")
SCALP_MM = 13.0  # scalp, skull and cerebrospinal fluid outside the brain
NEAR_BACKGROUND = 0.01  # of the intensity range: as close as this to the background is background
PARTIAL_VOLUME = (
    0.03,
    0.5,
)  # of the contrast of tissue: darker than this beside a blurred background is background
PAD_SHARE = 0.04  # of the border's voxels with one value: a constant pad next to the air
BAND_MM = 2.0  # thickness of the shells below the surface in which the intensity profile is measured
SKULL_DIP, DIP_WIDTH = 0.58, 0.06  # ratio of skull to scalp intensity: skull on below, stripped above
SURE_EVIDENCE = 2.5  # log odds: from here on the first cues decide, and no brain is extracted
STRIPPED_SHARE, SHARE_WIDTH = 0.65, 0.05  # of the head that extraction leaves: skull on below
LARGE_HEAD_ML, LARGE_WIDTH_ML = 2500.0, 250.0  # stripped brains are smaller, heads are bigger
PROFILE_SLICES = 5


@dataclass(frozen=True)
class BrainEstimate:
    """Where the brain is, and whether the skull is on.

    mask : bool (X, Y, Z), the brain.
    skull_on : whether scalp and skull are in the image.
    confidence : float in [0.5, 1], how sure `skull_on` is; 1 where the user said it.
    source : "background" (all that is not background), "extracted" (from the head), "head outline" (what lies
        a scalp's width inside the head, where no brain could be extracted), "given", or "stripped"
        (by deepbet).
    reference : bool (X, Y, Z) or None, where the skull is on, what lies a scalp's width inside the head. The
        shipped weights were trained on z-scores over it. None: the mask.
    """

    mask: np.ndarray
    skull_on: bool
    confidence: float
    source: str
    reference: np.ndarray | None = None

    def describe(self) -> str:
        """One plain sentence: which it is, how sure, and where the brain mask comes from."""
        skull = "on" if self.skull_on else "off"
        sure = f"skull {skull} ({self.confidence:.0%} sure)" if self.confidence < 1.0 else f"skull {skull}"
        origin = {
            "background": "the brain is what is not background",
            "extracted": "the brain is estimated by opening and by the overlap from slice to slice",
            "head outline": f"the brain is estimated as what lies {SCALP_MM:.0f} mm inside the head",
            "given": "the brain mask was given",
            "stripped": "the brain is what deepbet stripped",
        }
        return f"{sure}; {origin[self.source]}"


def _faces(values: np.ndarray) -> list[np.ndarray]:
    """The six faces of a volume (X, Y, Z)."""
    return [np.take(values, end, axis) for axis in range(3) for end in (0, -1)]


def border_values(values: np.ndarray) -> np.ndarray:
    """All voxels on the six faces of a volume (X, Y, Z), as one flat array; edges appear more than once."""
    return np.concatenate([face.ravel() for face in _faces(values)])


def background_value(values: np.ndarray, finite: np.ndarray) -> float:
    """The commonest finite value on the faces of the volume."""
    border = border_values(values)[border_values(finite)]
    if not len(border):
        return float(values[finite].min())
    distinct, counts = np.unique(border, return_counts=True)
    return float(distinct[counts.argmax()])


def estimate_brain(
    values: np.ndarray,
    spacing: np.ndarray | tuple[float, ...],
    background: float | None = None,
    *,
    skull: str = "auto",
    mask: np.ndarray | None = None,
) -> BrainEstimate:
    """Estimate the brain of a finite canonical volume, and whether the skull is on.

    Background has the values of the volume's border, within a tolerance from the data's own intensity range.
    There may be several such values (a constant pad next to the air). A skull shows as a dark shell between a
    brighter scalp and the brain, or as a head too big for a brain. The sign of the contrast does not matter.

    Parameters
    ----------
    values : (X, Y, Z) float, finite
    spacing : (3,) mm
    background : float, optional
        The commonest value of the border; found where it is not given.
    skull : "auto", "on" or "off"
        What is known of the skull.
    mask : (X, Y, Z), optional
        A brain mask; what is not 0 is brain, and all else is taken away, a skull included.

    Returns
    -------
    BrainEstimate

    Raises
    ------
    ValueError
        If `skull` is none of the three, or the mask has another shape or is empty.
    """
    if skull not in SKULL_CHOICES:
        raise ValueError(f"skull is {skull!r}; allowed are {', '.join(SKULL_CHOICES)}")
    size = np.asarray(spacing, dtype=np.float64)
    if mask is not None:
        given = np.asarray(mask) != 0
        if given.shape != values.shape:
            raise ValueError(f"the brain mask has shape {given.shape}; the image has {values.shape}")
        if not given.any():
            raise ValueError("the brain mask is empty")
        return BrainEstimate(given, False, 1.0, "given")
    if background is None:
        background = background_value(values, np.isfinite(values))
    box = _without_constant_planes(values)
    estimate = _estimate(values[box], size, background, skull)
    if estimate.mask.shape == values.shape:
        return estimate
    reference = estimate.reference
    return replace(
        estimate,
        mask=_placed(estimate.mask, box, values.shape),
        reference=None if reference is None else _placed(reference, box, values.shape),
    )


def _placed(mask: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The mask of a box in the whole volume."""
    whole = np.zeros(shape, bool)
    whole[box] = mask
    return whole


def _without_constant_planes(values: np.ndarray) -> tuple[slice, ...]:
    """The box that is left when planes of one value are cut off each face: background, or a pad."""
    box = []
    for axis in range(3):
        planes = np.moveaxis(values, axis, 0)
        ends = []
        for order in (range(len(planes)), range(len(planes) - 1, -1, -1)):
            varied = (k for k in order if planes[k].flat[0] != planes[k].flat[-1] or np.ptp(planes[k]) > 0)
            ends.append(next(varied, 0))
        box.append(slice(ends[0], max(ends[1], ends[0]) + 1))
    return tuple(box)


def _estimate(values: np.ndarray, size: np.ndarray, background: float, skull: str) -> BrainEstimate:
    """The estimate of `estimate_brain` within the box that is not constant."""
    levels, beside = _background(values, background)
    head, exact = _not_background(values, levels, beside)
    if not head.any():
        brain, source = _head_brain(values, size)
        on = skull != "off"
        return BrainEstimate(
            brain, on, 1.0 if skull != "auto" else 0.5, source, _inside_head(values, size) if on else None
        )
    if skull == "off":
        return BrainEstimate(head, False, 1.0, "background")
    air_side, two_sided = _air_side(values, head, levels[0], exact)
    side, dip = _profile(values, head, size, air_side, levels[0].value if two_sided else None)
    evidence = _skull_evidence(head, size, dip, exact, two_sided)
    if skull == "auto" and evidence < -SURE_EVIDENCE:
        return BrainEstimate(head, False, _probability(-evidence), "background")
    dark = _dark_air(values, head, levels, side)
    brain, source = _head_brain(dark, size)
    if skull == "auto":
        share = float((brain & head).sum() / head.sum()) if source == "extracted" else 1.0
        evidence += float(np.clip((STRIPPED_SHARE - share) / SHARE_WIDTH, -3.0, 6.0))
        if evidence < 0:
            return BrainEstimate(head, False, _probability(-evidence), "background")
    confidence = _probability(evidence) if skull == "auto" else 1.0
    return BrainEstimate(brain, True, confidence, source, _inside_head(dark, size))


def _probability(evidence: float) -> float:
    return float(1.0 / (1.0 + np.exp(-evidence)))


def intensity_range(values: np.ndarray, constants: np.ndarray) -> float:
    """From the 0.5th to the 99.5th percentile of what is none of the constants, or all where these are equal."""
    sample = values[::2, ::2, ::2]
    sample = sample[~np.isin(sample, constants)] if len(constants) else sample.ravel()
    if not len(sample):
        return float(np.ptp(values))
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(high - low) or float(np.ptp(values))


@dataclass(frozen=True)
class _Level:
    """One value of the background, and how near to it is background."""

    value: float
    tolerance: float

    def near(self, values: np.ndarray) -> np.ndarray:
        close: np.ndarray = np.abs(values - np.float32(self.value)) <= self.tolerance
        return close


def _background(values: np.ndarray, background: float) -> tuple[list[_Level], np.ndarray]:
    """The values that the border consists of, air and constant pads; and bool (X, Y, Z), near to none of them."""
    border = border_values(values)
    distinct, counts = np.unique(border, return_counts=True)
    constants = distinct[counts >= PAD_SHARE * len(border)]
    tolerance = NEAR_BACKGROUND * intensity_range(values, constants)
    if not np.any(constants == background):  # no exact value stands out: where the border is densest
        background = _densest(border, tolerance)
    empty = [
        face.ravel() for face in _faces(values) if np.mean(np.abs(face - background) <= 3 * tolerance) > 0.6
    ]
    air = np.concatenate(empty) if empty else border  # without faces that cut through tissue
    levels = [_level(background, air, tolerance)]
    levels += [_level(float(v), air, tolerance) for v in constants if abs(v - background) > tolerance]
    beside = np.ones(values.shape, bool)
    for level in levels:
        beside &= ~level.near(values)
    for _ in range(2):  # what lies within a pad all round
        box = bounding_box(beside)
        if box is None or beside[box].size == values.size:
            break
        touching = border_values(beside[box])
        shell = border_values(values[box])[touching]
        if len(shell) < 0.5 * len(touching):
            break
        inner = _densest(shell, tolerance)
        if np.mean(np.abs(shell - inner) <= tolerance) < 0.5:
            break
        levels.insert(0, _level(inner, shell, tolerance))
        beside &= ~levels[0].near(values)
    return levels, beside


def _level(value: float, border: np.ndarray, tolerance: float) -> _Level:
    """A level whose tolerance covers the noise of the border round it."""
    around = border[np.abs(border - value) <= 10 * tolerance]
    spread = float(np.percentile(np.abs(around - value), 90)) if len(around) else 0.0
    return _Level(float(value), float(np.clip(2.5 * spread, tolerance, 10 * tolerance)))


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


def _not_background(values: np.ndarray, levels: list[_Level], beside: np.ndarray) -> tuple[np.ndarray, bool]:
    """The largest body that is not background, holes of its slices filled; and whether the background is exact."""
    head = np.zeros(values.shape, bool)
    box = bounding_box(beside, margin=3)
    if box is None:
        return head, False
    all_near = beside.size - int(beside.sum())
    inside, beside = values[box], beside[box].copy()
    exact = np.ones(inside.shape, bool)
    for level in levels:
        exact &= inside != np.float32(level.value)
    outside = values.size - inside.size  # exact or near: not looked at
    if 2 * (outside + exact.size - int(exact.sum())) > all_near:
        main = largest_body(exact)
        surface = main & ~ndimage.binary_erosion(main, border_value=1)  # a face of the volume is none
        if surface.any() and beside[surface].mean() > 0.5:
            head[box] = filled_slices(main)
            return head, True
    air = levels[0].value
    tissue = inside[beside]
    contrast = float(np.median(tissue)) - air
    side = np.float32(1.0 if contrast >= 0 else -1.0)
    if np.mean(side * (tissue - np.float32(air)) < 0) < 0.02:
        # Partial volume and ringing beside a blurred edge are no tissue
        signal = side * (inside - np.float32(air))
        deep = ndimage.binary_erosion(beside, iterations=2, border_value=1)
        surface = float(np.percentile(signal[deep], 5)) if deep.any() else 0.0
        beside &= signal > np.clip(0.25 * surface / abs(contrast), *PARTIAL_VOLUME) * abs(contrast)
    else:
        beside = ndimage.binary_opening(ndimage.binary_closing(beside))
    head[box] = largest_body(
        filled_slices(beside)
    )  # filled first: a dark skull parts the scalp from the brain
    return head, False


def _skull_evidence(
    head: np.ndarray, spacing: np.ndarray, dip: float | None, exact: bool, two_sided: bool
) -> float:
    """Log odds of a skull: by the volume, the dark shell below the surface, and how the background is."""
    ml = float(head.sum()) * float(np.prod(spacing)) / 1000
    evidence = float(np.clip((ml - LARGE_HEAD_ML) / LARGE_WIDTH_ML, -1.0, 4.0))
    cropped = not exact and float(np.mean([face.mean() for face in _faces(head)[:4]])) > 0.15
    if dip is not None:  # which a cropped surface need not show
        evidence += float(np.clip((SKULL_DIP - dip) / DIP_WIDTH, 0.0 if cropped else -3.0, 6.0))
    if exact or two_sided:  # what a mask leaves
        evidence -= 1.0
    elif cropped:  # a stripped brain touches a face of the volume in few places
        evidence += 2.0 + 2.0 * float(float(border_values(head).mean()) > 0.4)
    return evidence


def _air_side(values: np.ndarray, head: np.ndarray, air: _Level, exact: bool) -> tuple[float | None, bool]:
    """Side of tissue, and whether it lies on both sides of air, as only z-scoring leaves it.

    The side is 1 where air is darker than tissue, -1 where it is brighter, None where its value may be arbitrary.
    """
    tissue = values[head][::7]
    brighter = float(np.mean(tissue > air.value + air.tolerance))
    darker = float(np.mean(tissue < air.value - air.tolerance))
    two_sided = min(brighter, darker) > 0.1
    if darker < 0.05:
        return 1.0, two_sided
    return (None if exact or brighter >= 0.05 else -1.0), two_sided


def _profile(
    values: np.ndarray, head: np.ndarray, spacing: np.ndarray, side: float | None, air: float | None
) -> tuple[float, float | None]:
    """Sign of the contrast, and the dip of the intensity below the surface.

    The sign is `side`, or where that is None 1 if the surface is darker than the inside. The dip is the lowest intensity 6 to 16 mm below
    the surface as a share of the highest 2 to 6 mm below it, where intensities count from the darkest of each
    slice; medians over shells and over slices. None where no slice is wide enough.
    """
    area = head.sum(axis=(0, 1))
    slices = np.flatnonzero(area > 0.5 * area.max())
    chosen = np.unique(slices[np.linspace(0, len(slices) - 1, PROFILE_SLICES + 2).round().astype(int)[1:-1]])
    found = []
    for z in chosen:
        inside = head[:, :, z]
        if inside.all():
            continue
        # A face of the volume is no surface
        depth = ndimage.distance_transform_edt(np.pad(inside, 1, mode="edge"), sampling=spacing[:2])
        depth = depth[1:-1, 1:-1][inside] - 0.5 * float(min(spacing[:2]))
        plane = values[:, :, z][inside].astype(np.float64)
        shells = np.floor(depth / BAND_MM).astype(int)
        if (shells >= 10).sum() < 20:
            continue
        present = [k for k in range(8) if (shells == k).any()]  # thick voxels leave some shells empty
        levels = np.interp(range(8), present, [np.median(plane[shells == k]) for k in present])
        found.append((levels, np.median(plane[shells >= 10]), *np.percentile(plane, (1, 99))))
    if not found:
        return side or 1.0, None
    if side is None:
        side = 1.0 if np.median([inside - levels[0] for levels, inside, _, _ in found]) >= 0 else -1.0
    if air is not None and side * (np.median([levels[1:3].max() for levels, *_ in found]) - air) <= 0:
        return side, None  # no brighter than the background: partial volume, no scalp
    profiles = []
    for levels, _, low, high in found:
        profile = levels[1:] - low if side > 0 else high - levels[1:]
        profiles.append(profile / max(float(profile.max()), 1e-12))
    middle = np.median(profiles, axis=0)
    rim, gap = middle[:2].max(), middle[2:].min()
    return side, float(gap / rim) if rim > 0 else None


def _dark_air(values: np.ndarray, head: np.ndarray, levels: list[_Level], side: float) -> np.ndarray:
    """The volume with a contrast in which air is dark, and pads and air of another value set to the darkest."""
    darkest = np.float32(side * np.percentile(side * values[head], 1))
    for k, level in enumerate(levels):
        if k > 0 or side * (level.value - float(darkest)) > level.tolerance:
            values = np.where(level.near(values) & ~head, darkest, values)
    return values if side > 0 else -values


def _head_brain(values: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, str]:
    """The brain of a head whose air is dark, and how it was found; see `BrainEstimate.source`."""
    extracted = extract_brain(values, spacing)
    if extracted is not None:
        return extracted, "extracted"
    return _inside_head(values, spacing), "head outline"


def _inside_head(values: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """What lies SCALP_MM inside a head whose air is dark."""
    head = head_outline(values)
    inside = np.zeros_like(head)
    for z in np.flatnonzero(head.any(axis=(0, 1))):
        depth = ndimage.distance_transform_edt(np.pad(head[:, :, z], 1), sampling=spacing[:2])[1:-1, 1:-1]
        inside[:, :, z] = depth > SCALP_MM
    return inside if inside.any() else head
