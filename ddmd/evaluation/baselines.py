"""The obvious system to beat: one threshold on the smoothed image."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ddmd.io.intensities import LOWEST
from ddmd.io.volume import Volume

SMOOTHING_MM = 1.5


def smoothed_intensity(volume: Volume, sequence: str = "flair") -> np.ndarray:
    """Robust z-score smoothed by a Gaussian of SMOOTHING_MM inside the brain; (X, Y, Z) float32.

    One threshold on this is the obvious way to find what is bright on FLAIR. A volume without the sequence gives
    its first one.
    """
    sequence = sequence if sequence in volume.images else next(iter(volume.images))
    region = volume.search_region
    z = np.where(region, volume.normalised(sequence), 0.0).astype(np.float32)
    sigma = [SMOOTHING_MM / s for s in volume.spacing]
    inside = region.astype(np.float32)
    weight = ndimage.gaussian_filter(inside, sigma)
    smooth = ndimage.gaussian_filter(z, sigma) / np.maximum(weight, 1e-3)
    return np.where(region, smooth, LOWEST).astype(np.float32)
