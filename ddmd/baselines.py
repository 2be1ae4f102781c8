"""The systems to beat: one threshold on the smoothed image, and the error of auto-encoders."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from ddmd.slices import SliceGrid, extract
from ddmd.volume import LOWEST, Volume
from ddmd.weights import System

SMOOTHING_MM = 1.5


def smoothed_intensity(volume: Volume, sequence: str = "flair") -> np.ndarray:
    """Robust z-score smoothed by a Gaussian of SMOOTHING_MM inside the brain; (X, Y, Z) float32.

    One threshold on this is the obvious way to find what is bright on FLAIR.
    """
    z = np.where(volume.brain, volume.normalised(sequence), 0.0).astype(np.float32)
    sigma = [SMOOTHING_MM / s for s in volume.spacing]
    inside = volume.brain.astype(np.float32)
    weight = ndimage.gaussian_filter(inside, sigma)
    smooth = ndimage.gaussian_filter(z, sigma) / np.maximum(weight, 1e-3)
    return np.where(volume.brain, smooth, LOWEST).astype(np.float32)


@torch.inference_mode()
def reconstruction_error(system: System, volume: Volume, batch: int = 16) -> np.ndarray:
    """Anomaly map of the auto-encoders trained on normal slices: mean over K and C of |b - recon|.

    (X, Y, Z) float32, 0 outside the brain. Unsupervised anomaly detection in its plainest form.
    """
    slices = extract(volume, system.description.sequences, SliceGrid(**system.description.grid))
    errors = []
    for b in slices.image.split(batch):
        b = b.to(system.device).contiguous(memory_format=torch.channels_last)
        errors.append((system.autoencoders_a(b) - b).abs().mean((0, 2))[:, None].cpu())
    return slices.restore(torch.cat(errors)) * volume.brain
