"""How noisy an image is, by its second differences within slices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEASURED_SLICES = 24  # at most, evenly over the brain: more change the third digit
NORMAL_SHARE = 0.6745  # of a standard normal variable's absolute values, half lie below this
NORMAL_IQR = 1.349  # interquartile range of a standard normal variable


def noise_share(image: NDArray[np.floating], brain: NDArray[np.bool_]) -> float:
    """Standard deviation of the noise, as a share of that of the brain's intensities.

    Parameters
    ----------
    image : (X, Y, Z), of any unit
    brain : (X, Y, Z)

    Returns
    -------
    At least 0; 0 where it cannot be measured, as in a brain that is too small or of one intensity. What smooths an
    image, as resampling does, lowers it, and voxels of several mm raise it: anatomy itself differs between them.

    Notes
    -----
    The kernel (1, -2, 1) ⊗ (1, -2, 1) of Immerkær, "Fast noise variance estimation", CVIU 64 (1996), whose response
    to noise of standard deviation σ has 6 σ. The median, instead of the mean, of its absolute values leaves edges
    out of account; both spreads are robust.
    """
    levels = np.flatnonzero(brain.any(axis=(0, 1)))
    if not levels.size:
        return 0.0
    chosen = levels[np.unique(np.linspace(0, levels.size - 1, min(levels.size, MEASURED_SLICES)).astype(int))]
    values, inside = np.asarray(image[:, :, chosen], np.float32), brain[:, :, chosen]
    if min(values.shape[:2]) < 3:
        return 0.0
    response = np.diff(np.diff(values, n=2, axis=0), n=2, axis=1)
    rows = inside[2:] & inside[1:-1] & inside[:-2]
    whole = rows[:, 2:] & rows[:, 1:-1] & rows[:, :-2]
    if not whole.any():
        return 0.0
    noise = float(np.median(np.abs(response[whole]))) / NORMAL_SHARE / 6
    low, high = np.percentile(values[inside], (25, 75))
    spread = float(high - low) / NORMAL_IQR
    return noise / spread if spread > 0 else 0.0
