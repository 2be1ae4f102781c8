"""How the network's own masks on slices known to hold a lesion become what it is trained on next."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from ddmd.training.config import PSEUDO_MASK_LIMITS
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.edges import follow_edges
from ddmd.training.stages import DenoiserLosses

MIN_PEAK = 0.2  # a positive slice on which nothing is this probable gets no pseudo-mask
SMOOTHING = 0.7  # standard deviation in slices: lesions continue from one slice to the next
MIN_MASS = 0.1  # share of the largest component's summed probability; smaller components are ignored
TEACHER_CERTAINTY = (
    0.7,
    0.85,
)  # mean probability of the components: uncertain up to the first, certain from the second
LOWERED = 0.4  # share by which the threshold of an uncertain examination is lower
NEAR_MARGIN_PX = 8  # pixels around a component in which an uncertain teacher's "no lesion" counts in full
FAR_WEIGHT = 0.05  # weight of an uncertain teacher's "no lesion" farther away


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
    """The components that the teacher takes for lesion in one examination.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    threshold : (Z,)

    Returns
    -------
    (Z, H, W) bool
        Pixels that reach the slice's threshold, opened; components of at least `MIN_MASS` of the largest one's
        summed probability.
    """
    above = probability >= threshold[:, None, None]
    above = ndimage.binary_opening(above, ndimage.generate_binary_structure(2, 1)[None])
    parts, count = ndimage.label(above, np.ones((3, 3, 3)))
    mass = ndimage.sum(probability, parts, np.arange(1, count + 1))
    kept: np.ndarray = np.concatenate(([False], mass >= MIN_MASS * mass.max(initial=0.0)))[parts]
    return kept


def teacher_uncertainty(probability: np.ndarray, components: np.ndarray) -> float:
    """How uncertain the teacher is about an examination, in [0, 1]; 1 where it has no component.

    The teacher is certain of lesions that look like the painted ones, and finds all of them. Where it is less
    certain it finds a part. Its pseudo-masks would then teach the next round to leave the rest out.

    Parameters
    ----------
    probability : (Z, H, W) the teacher's mean, smoothed.
    components : (Z, H, W) bool
    """
    mean = float(probability[components].mean()) if components.any() else 0.0
    low, high = TEACHER_CERTAINTY
    return float(np.clip((high - mean) / (high - low), 0.0, 1.0))


def make_pseudo_mask(
    component: np.ndarray,
    probability: np.ndarray,
    deviation: np.ndarray,
    threshold: float,
    uncertainty: float = 0.0,
    limits: tuple[float, float] = PSEUDO_MASK_LIMITS,
) -> tuple[np.ndarray, np.ndarray]:
    """One slice's pseudo-mask (H, W) bool, and the loss weight of each of its pixels, float in [0, 1].

    A certain teacher: almost certain pixels are lesion, faint ones are not, and intermediate probabilities get
    zero loss weight. Where a lesion ends is then learnt from painted lesions alone; otherwise masks would grow
    from round to round. An uncertain teacher: the whole component is lesion, and pixels far from it get little
    weight. Pixels on which the draws disagree get less weight.

    Parameters
    ----------
    component : (H, W) bool, what the teacher takes for lesion.
    probability, deviation : (H, W) the teacher's mean, smoothed, and the standard deviation of its draws.
    threshold : of the component.
    uncertainty : as `teacher_uncertainty` gives it.
    limits : (faint, certain)
        Pixels less probable than the first are not lesion. Where the teacher is certain, those that reach the
        second times the component's peak in the slice are.
    """
    certain = limits[1] * float(probability[component].max(initial=0.0))
    mask = component & (probability >= threshold + (1 - uncertainty) * max(0.0, certain - threshold))
    weight = np.clip(1.25 - 2.5 * deviation, 0.25, 1.0)
    far = ndimage.distance_transform_cdt(~component, "taxicab") > NEAR_MARGIN_PX
    weight = np.where(far, weight * (1 + uncertainty * (FAR_WEIGHT - 1)), weight)
    return mask, np.where((component | (probability >= limits[0])) & ~mask, 0.0, weight)


def update_pseudo_masks(
    losses: DenoiserLosses, slices: DeviceSlices, seed: int, batch: int = 16
) -> dict[str, float]:
    """Give every positive slice (image-level label 1) a pseudo-mask by what was learnt so far.

    The teacher's draws are made on the device; components are found on the host, patient by patient.

    Parameters
    ----------
    losses : DenoiserLosses
    slices : DeviceSlices
    seed : of the draws.
    batch : slices at a time.
    """
    stage = losses.stage
    losses.eval()
    made, skipped, area, uncertainties = 0, 0, 0.0, []
    for case, item in enumerate(slices.cases):
        item.mask, item.weight = None, None
        positive = np.flatnonzero(item.label == 1)
        if not len(positive):
            continue
        mean, deviation = _teacher_mean(losses, slices, case, positive, seed, batch)
        smooth = ndimage.gaussian_filter(mean, (SMOOTHING, 0, 0))
        threshold = thresholds(smooth, item.label == 1)
        components = candidate_components(smooth, threshold)
        uncertainty = teacher_uncertainty(smooth, components) * stage.teacher_uncertainty
        if stage.follow_edges and item.there[0]:
            smooth = follow_edges(smooth, components, item.image[:, 0], item.head)
            threshold = thresholds(smooth, item.label == 1)
            components = candidate_components(smooth, threshold)
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
                components[z],
                smooth[z],
                deviation[z],
                threshold[z],
                uncertainty,
                stage.pseudo_mask_limits,
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


def _teacher_mean(
    losses: DenoiserLosses, slices: DeviceSlices, case: int, zs: np.ndarray, seed: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean in the head, and standard deviation, of the teacher's draws, (Z, H, W) each; 0 on slices not in zs."""
    head = slices.cases[case].head
    mean, deviation = np.zeros(head.shape, np.float32), np.zeros(head.shape, np.float32)
    for first in range(0, len(zs), batch):
        some = zs[first : first + batch]
        drawn = _teacher_draws(losses, slices, case, some, seed)
        mean[some], deviation[some] = drawn.mean(0) * head[some], drawn.std(0)
    return mean, deviation


def _teacher_draws(
    losses: DenoiserLosses, slices: DeviceSlices, case: int, zs: np.ndarray, seed: int
) -> np.ndarray:
    """One-step draws (draws, Z, H, W) of slices zs, and of the slices flipped, flipped back.

    A network that sees the mirror image gets the slice itself in its place in the second half, as it does in
    training, so that lesions that are the same on both sides are found, too.
    """
    config, symmetric = losses.condition.config, losses.stage.share_symmetric > 0
    image = slices.planes(case, zs, config.context, config.mirrored, config.presence)
    flipped = image.flip(-1)
    if config.mirrored and symmetric:
        flipped[:, config.mirror_planes] = flipped[:, config.middle_planes]
    draws = torch.cat((losses.draw(image, seed), losses.draw(flipped, seed).flip(-1)))
    return draws[:, :, 0].cpu().numpy()
