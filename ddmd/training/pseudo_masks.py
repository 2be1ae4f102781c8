"""How the network's own masks on slices known to hold a lesion become what it is trained on next."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from ddmd.training.samples import Packed, with_mirror
from ddmd.training.stages import DenoiserLosses

MIN_PEAK = 0.2  # a positive slice on which nothing is this probable gets no pseudo-mask
SMOOTHING = 0.7  # slices over which the teacher's probability is smoothed: lesions go on from one to the next
SHARE = 0.1  # of the largest body's mass; smaller bodies are neither lesion nor its absence
GROWTH = 16  # pixels within which a mask may grow to its edge
MIN_CONTRAST = 0.15  # half robust z-scores; fainter lesions keep the teacher's own edge
DOUBTED = 0.5  # trust in pixels that are lesion by their intensity and not by the teacher, and the reverse
SURE = (0.7, 0.85)  # mean probability of what is found in an examination: doubtful up to, sure from
LOWERED = 0.4  # by how much a doubtful examination's threshold is lower
BESIDE = 8  # pixels from the mask within which a doubtful examination shows where the lesion ends
ELSEWHERE = 0.05  # trust in "no lesion here" farther from the mask of a doubtful examination


def thresholds(probability: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(Z,) the smaller of 0.5 and half a slice's peak; infinite where there is no lesion or no peak.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    positive : (Z,) bool
    """
    peak = probability.max(axis=(1, 2))
    return np.where(positive & (peak >= MIN_PEAK), np.minimum(0.5, 0.5 * peak), np.inf)


def bodies(probability: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the teacher holds to be lesion in one examination: what reaches the slice's threshold, opened.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    threshold : (Z,)

    Returns
    -------
    large, small : (Z, H, W) bool
        Bodies of at least `SHARE` of the largest one's summed probability, and the others.
    """
    found = probability >= threshold[:, None, None]
    found = ndimage.binary_opening(found, ndimage.generate_binary_structure(2, 1)[None])
    parts, count = ndimage.label(found, np.ones((3, 3, 3)))
    mass = ndimage.sum(probability, parts, np.arange(1, count + 1))
    large = np.concatenate(([False], mass >= SHARE * mass.max(initial=0.0)))[parts]
    return large, found & ~large


def doubt(probability: np.ndarray, found: np.ndarray) -> float:
    """How doubtful an examination is, in [0, 1]: 1 where what was found is hardly probable, or nothing was.

    The teacher is sure of lesions that look like the painted ones, and finds all of them. Where it is less sure
    it finds a part: what it says of the rest would teach the next round to leave that out, too.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    found : (Z, H, W) bool, the large bodies.
    """
    mean = float(probability[found].mean()) if found.any() else 0.0
    return float(np.clip((SURE[1] - mean) / (SURE[1] - SURE[0]), 0.0, 1.0))


def grown(mask: np.ndarray, image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The mask moved to the lesion's edge: where intensity is halfway from the tissue around it.

    Twice, what is brighter than the mean of two medians, that of the mask and that of the ring around
    it, and joined to the mask within `GROWTH` pixels of it, becomes the mask.

    Parameters
    ----------
    mask, brain : (H, W) bool
    image : (H, W) float32, half robust z-scores
    """
    smooth = ndimage.gaussian_filter(image, 1.0)
    for _ in range(2):
        core = ndimage.binary_erosion(mask)
        core = core if core.sum() > 10 else mask
        away = ndimage.distance_transform_cdt(~mask, "taxicab")
        ring = (away > 2) & (away <= GROWTH + 4) & brain
        if ring.sum() < 20:
            break
        inside, outside = np.median(smooth[core]), np.median(smooth[ring])
        if inside - outside < MIN_CONTRAST:
            break
        bright = (away <= GROWTH) & brain & (smooth > 0.5 * (inside + outside))
        parts, count = ndimage.label(ndimage.binary_opening(bright))
        touched = np.bincount(parts[core], minlength=count + 1) > 0
        touched[0] = False
        new = ndimage.binary_fill_holes(touched[parts])
        if new.sum() <= 5:
            break
        mask = new
    return mask


def trust(
    mask: np.ndarray, probability: np.ndarray, deviation: np.ndarray, threshold: float, doubtful: float = 0.0
) -> np.ndarray:
    """How far to trust each pixel of a slice's pseudo-mask, (H, W) float32 in [0, 1].

    Pixels near the teacher's threshold, or on which its draws disagree, count less, and so do those
    where its mask and the grown one differ, and, in an examination that is `doubtful`, those far from the mask.
    """
    margin = np.abs(probability - threshold) / threshold
    weight = np.clip(0.25 + 1.5 * margin, 0.0, 1.0) * np.clip(1.25 - 2.5 * deviation, 0.25, 1.0)
    weight = np.where(mask != (probability >= threshold), np.minimum(weight, DOUBTED), weight)
    far = ndimage.distance_transform_cdt(~mask, "taxicab") > BESIDE
    return np.where(far, weight * (1 + doubtful * (ELSEWHERE - 1)), weight)


def teach(losses: DenoiserLosses, packed: list[Packed], seed: int, batch: int = 16) -> dict[str, float]:
    """Give every positive slice (image-level label 1) a pseudo-mask by what was learnt so far."""
    losses.eval()
    made, skipped, area, doubts = 0, 0, 0.0, []
    for item in packed:
        item.mask, item.weight = None, None
        positive = np.flatnonzero(item.label == 1)
        if not len(positive):
            continue
        mean = np.zeros(item.head.shape, np.float32)
        deviation = np.zeros(item.head.shape, np.float32)
        for first in range(0, len(positive), batch):
            zs = positive[first : first + batch]
            drawn = _draws(losses, item, zs, seed)
            mean[zs], deviation[zs] = drawn.mean(0) * item.head[zs], drawn.std(0)
        smooth = ndimage.gaussian_filter(mean, (SMOOTHING, 0, 0))
        threshold = thresholds(smooth, item.label == 1)
        large, small = bodies(smooth, threshold)
        doubtful = doubt(smooth, large) * losses.stage.doubt
        doubts.append(doubtful)
        if doubtful:
            threshold *= 1 - LOWERED * doubtful
            large, small = bodies(smooth, threshold)
        masks = np.zeros(item.head.shape, np.float16)
        weights = np.ones(item.head.shape, np.float16)
        for z in positive:
            if not large[z].any():
                skipped += 1
                continue
            mask = large[z]
            if doubtful < 0.5:  # the edge of one that is found in part is not the lesion's
                mask = grown(mask, item.image[z, 0].astype(np.float32), item.head[z])
            trusted = trust(mask, smooth[z], deviation[z], threshold[z], doubtful)
            masks[z], weights[z] = mask, np.where(small[z] & ~mask, 0.0, trusted)
            made += 1
            area += float(mask.sum())
        if masks.any():
            item.mask, item.weight = masks, weights
    losses.train()
    return {
        "made": made, "skipped": skipped, "mean_pixels": area / max(made, 1), "mean_doubt": float(np.mean(doubts or 0)),
    }  # fmt: skip


def _draws(losses: DenoiserLosses, item: Packed, zs: np.ndarray, seed: int) -> np.ndarray:
    """One-step draws of slices zs and of their mirror images, mirrored back: (draws, Z, H, W)."""
    seen = losses.condition.config
    planes = np.stack([with_mirror(item.planes(z, seen.context), seen) for z in zs])
    image = torch.from_numpy(planes).flatten(1, 2)
    draws = torch.cat((losses.draw(image, seed), losses.draw(image.flip(-1), seed).flip(-1)))
    return draws[:, :, 0].numpy()
