"""Where the brain is in a volume, whether the skull is still on, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ddmd.io.background import Background, background_value, border_values, faces, find_backgrounds, find_body
from ddmd.io.brain_extraction import extract_brain, head_outline

SKULL_CHOICES = ("auto", "on", "off")
SCALP_MM = 13.0  # scalp, skull and cerebrospinal fluid outside the brain
BAND_MM = 2.0  # thickness of the shells below the surface in which the intensity profile is measured
SKULL_DIP, DIP_WIDTH = 0.58, 0.06  # ratio of skull to scalp intensity: skull on below, stripped above
SURE_EVIDENCE = 2.5  # log odds: from here on the first cues decide, and no brain is extracted
STRIPPED_SHARE, SHARE_WIDTH = 0.65, 0.05  # of the head that extraction leaves: skull on below
CROPPED_FACES = (
    0.08,
    0.15,
)  # share of the four faces round a head that it covers: whole below, cropped above
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
    backgrounds, foreground = find_backgrounds(values, background)
    head, exact = find_body(values, backgrounds, foreground)
    if not head.any():
        brain, source = _head_brain(values, size)
        on = skull != "off"
        return BrainEstimate(
            brain, on, 1.0 if skull != "auto" else 0.5, source, _inside_head(values, size) if on else None
        )
    if skull == "off":
        return BrainEstimate(head, False, 1.0, "background")
    air_side, two_sided = _air_side(values, head, backgrounds[0], exact)
    side, dip = _profile(values, head, size, air_side, backgrounds[0].value if two_sided else None)
    evidence = _skull_evidence(head, size, dip, exact, two_sided)
    if skull == "auto" and evidence < -SURE_EVIDENCE:
        return BrainEstimate(head, False, _probability(-evidence), "background")
    dark = _dark_air(values, head, backgrounds, side)
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


def _skull_evidence(
    head: np.ndarray, spacing: np.ndarray, dip: float | None, exact: bool, two_sided: bool
) -> float:
    """Log odds of a skull: by the volume, the dark shell below the surface, and how the background is."""
    ml = float(head.sum()) * float(np.prod(spacing)) / 1000
    evidence = float(np.clip((ml - LARGE_HEAD_ML) / LARGE_WIDTH_ML, -1.0, 4.0))
    touching = float(np.mean([face.mean() for face in faces(head)[:4]]))
    cropped = 0.0 if exact else float(np.interp(touching, CROPPED_FACES, (0.0, 1.0)))
    if dip is not None:  # which a cropped surface need not show
        evidence += float(np.clip((SKULL_DIP - dip) / DIP_WIDTH, -3.0 * (1.0 - cropped), 6.0))
    if exact or two_sided:  # what a mask leaves
        evidence -= 1.0
    else:  # a stripped brain touches a face of the volume in few places
        evidence += cropped * (2.0 + 2.0 * float(float(border_values(head).mean()) > 0.4))
    return evidence


def _air_side(
    values: np.ndarray, head: np.ndarray, air: Background, exact: bool
) -> tuple[float | None, bool]:
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

    The sign is `side`, or where that is None 1 if the surface is darker than the inside. The dip is the lowest
    intensity 6 to 16 mm below the surface as a share of the highest 2 to 6 mm below it, where intensities
    count from the darkest of each slice; medians over shells and over slices. None where no slice is wide
    enough.
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
        medians = np.interp(range(8), present, [np.median(plane[shells == k]) for k in present])
        found.append((medians, np.median(plane[shells >= 10]), *np.percentile(plane, (1, 99))))
    if not found:
        return side or 1.0, None
    if side is None:
        side = 1.0 if np.median([inside - medians[0] for medians, inside, _, _ in found]) >= 0 else -1.0
    if air is not None and side * (np.median([medians[1:3].max() for medians, *_ in found]) - air) <= 0:
        return side, None  # no brighter than the background: partial volume, no scalp
    profiles = []
    for medians, _, low, high in found:
        profile = medians[1:] - low if side > 0 else high - medians[1:]
        profiles.append(profile / max(float(profile.max()), 1e-12))
    middle = np.median(profiles, axis=0)
    rim, gap = middle[:2].max(), middle[2:].min()
    return side, float(gap / rim) if rim > 0 else None


def _dark_air(values: np.ndarray, head: np.ndarray, backgrounds: list[Background], side: float) -> np.ndarray:
    """The volume with a contrast in which air is dark, and pads and air of another value set to the darkest."""
    darkest = np.float32(side * np.percentile(side * values[head], 1))
    for k, background in enumerate(backgrounds):
        if k > 0 or side * (background.value - float(darkest)) > background.tolerance:
            values = np.where(background.near(values) & ~head, darkest, values)
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
