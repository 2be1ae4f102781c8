"""How the network's own masks on slices known to hold a lesion become what it is trained on next."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from ddmd.training.device_slices import DeviceSlices
from ddmd.training.stages import DenoiserLosses

MIN_PEAK = 0.2  # a positive slice on which nothing is this probable gets no pseudo-mask
SMOOTHING = 0.7  # slices over which the teacher's probability is smoothed: lesions go on from one to the next
SHARE = 0.1  # of the largest component's summed probability; smaller components are ignored
CERTAIN = (
    0.9  # share of a body's peak in a slice from which it is lesion, where the examination is not doubtful
)
FAINT = 0.1  # what is less probable is not lesion
SURE = (0.7, 0.85)  # mean probability of what is found in an examination: doubtful up to, sure from
LOWERED = 0.4  # by how much a doubtful examination's threshold is lower
NEAR_MARGIN_PX = 8  # pixels from its body within which a doubtful examination shows what is not lesion
ELSEWHERE = 0.05  # trust in "no lesion here" farther from it


def thresholds(probability: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(Z,) the smaller of 0.5 and half a slice's peak; infinite where there is no lesion or no peak.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    positive : (Z,) bool
    """
    peak = probability.max(axis=(1, 2))
    return np.where(positive & (peak >= MIN_PEAK), np.minimum(0.5, 0.5 * peak), np.inf)


def candidate_components(probability: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """What the teacher holds to be lesion in one examination: what reaches the slice's threshold, opened.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    threshold : (Z,)

    Returns
    -------
    (Z, H, W) bool, those of at least `SHARE` of the largest one's summed probability.
    """
    found = probability >= threshold[:, None, None]
    found = ndimage.binary_opening(found, ndimage.generate_binary_structure(2, 1)[None])
    parts, count = ndimage.label(found, np.ones((3, 3, 3)))
    mass = ndimage.sum(probability, parts, np.arange(1, count + 1))
    kept: np.ndarray = np.concatenate(([False], mass >= SHARE * mass.max(initial=0.0)))[parts]
    return kept


def teacher_uncertainty(probability: np.ndarray, found: np.ndarray) -> float:
    """How doubtful an examination is, in [0, 1]: 1 where what was found is hardly probable, or nothing was.

    The teacher is sure of lesions that look like the painted ones, and finds all of them. Where it is less sure
    it finds a part: what it says of the rest would update_pseudo_masks the next round to leave that out, too.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    found : (Z, H, W) bool, the bodies.
    """
    mean = float(probability[found].mean()) if found.any() else 0.0
    return float(np.clip((SURE[1] - mean) / (SURE[1] - SURE[0]), 0.0, 1.0))


def make_pseudo_mask(
    body: np.ndarray, probability: np.ndarray, deviation: np.ndarray, threshold: float, doubtful: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """One slice's pseudo-mask (H, W) bool, and how far to trust each of its pixels, float32 in [0, 1].

    Of an examination that is not doubtful, what is almost certain is lesion, and what is faint is not. What lies
    between teaches nothing: where a lesion ends is learnt from painted ones alone, or the masks would grow from
    round to round. Of a doubtful one the whole body is lesion, and little is said of what is far from it. Pixels
    on which the draws disagree count less.

    Parameters
    ----------
    body : (H, W) bool, what the teacher holds to be lesion.
    probability, deviation : (H, W) the teacher's mean, smoothed, and the deviation of its draws.
    threshold : of the body.
    doubtful : as `doubt` gives it.
    """
    certain = CERTAIN * float(probability[body].max(initial=0.0))
    mask = body & (probability >= threshold + (1 - doubtful) * max(0.0, certain - threshold))
    weight = np.clip(1.25 - 2.5 * deviation, 0.25, 1.0)
    far = ndimage.distance_transform_cdt(~body, "taxicab") > NEAR_MARGIN_PX
    weight = np.where(far, weight * (1 + doubtful * (ELSEWHERE - 1)), weight)
    return mask, np.where((body | (probability >= FAINT)) & ~mask, 0.0, weight)


def update_pseudo_masks(
    losses: DenoiserLosses, slices: DeviceSlices, seed: int, batch: int = 16
) -> dict[str, float]:
    """Give every positive slice (image-level label 1) a pseudo-mask by what was learnt so far.

    The teacher's draws are made on the device; components are found on the host, patient by patient.
    """
    losses.eval()
    made, skipped, area, uncertainties = 0, 0, 0.0, []
    for number, item in enumerate(slices.cases):
        item.mask, item.weight = None, None
        positive = np.flatnonzero(item.label == 1)
        if not len(positive):
            continue
        mean = np.zeros(item.head.shape, np.float32)
        deviation = np.zeros(item.head.shape, np.float32)
        for first in range(0, len(positive), batch):
            zs = positive[first : first + batch]
            drawn = _teacher_draws(losses, slices, number, zs, seed)
            mean[zs], deviation[zs] = drawn.mean(0) * item.head[zs], drawn.std(0)
        smooth = ndimage.gaussian_filter(mean, (SMOOTHING, 0, 0))
        threshold = thresholds(smooth, item.label == 1)
        components = candidate_components(smooth, threshold)
        uncertainty = teacher_uncertainty(smooth, components) * losses.stage.teacher_uncertainty
        uncertainties.append(uncertainty)
        if uncertainty:
            threshold *= 1 - LOWERED * uncertainty
            components = candidate_components(smooth, threshold)
        masks = np.zeros(item.head.shape, np.float16)
        weights = np.ones(item.head.shape, np.float16)
        for z in positive:
            if not components[z].any():
                skipped += 1
                continue
            masks[z], weights[z] = make_pseudo_mask(
                components[z], smooth[z], deviation[z], threshold[z], uncertainty
            )
            made += 1
            area += float(masks[z].sum(dtype=np.float32))
        if masks.any():
            item.mask, item.weight = masks, weights
    losses.train()
    slices.update_masks()
    return {
        "made": made,
        "skipped": skipped,
        "mean_pixels": area / max(made, 1),
        "mean_uncertainty": float(np.mean(uncertainties or 0)),
    }


def _teacher_draws(
    losses: DenoiserLosses, slices: DeviceSlices, case: int, zs: np.ndarray, seed: int
) -> np.ndarray:
    """One-step draws (draws, Z, H, W) of slices zs, and of the slices flipped, flipped back.

    A network that sees the mirror image gets the slice itself in its place in the second half, as it does in
    training, so that lesions that are the same on both sides are found, too.
    """
    config, symmetric = losses.condition.config, losses.stage.share_symmetric > 0
    image = slices.planes(case, zs, config.context, config.mirrored)
    flipped = image.flip(-1)
    if config.mirrored and symmetric:
        channels = config.sequences
        middle = flipped[:, config.context * channels : (config.context + 1) * channels]
        flipped = torch.cat((flipped[:, :-channels], middle), 1)
    draws = torch.cat((losses.draw(image, seed), losses.draw(flipped, seed).flip(-1)))
    return draws[:, :, 0].cpu().numpy()
