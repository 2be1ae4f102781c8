"""Robust z-scores of an image's intensities, on the CPU or on a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddmd.io.intensities import HIGHEST, LOWEST

NORMAL_IQR = 1.349  # interquartile range of a standard normal variable


def robust_z_scores_(values: Tensor, inside: Tensor, count: int) -> Tensor:
    """(x - median) / (interquartile range / 1.349) over the voxels inside, clipped, in place of the values.

    On a device nothing waits for it: the number of voxels inside is known beforehand.

    Parameters
    ----------
    values : float32, of any shape, finite
    inside : bool, of the same shape, on the same device
    count : number of voxels inside, at least 1

    Returns
    -------
    The values, now z-scores in [LOWEST, HIGHEST].
    """
    statistics = _statistics_on_host if values.device.type == "cpu" else statistics_on_device
    median, scale = statistics(values, inside, count)
    return values.sub_(median).div_(scale).clamp_(LOWEST, HIGHEST)


def _statistics_on_host(values: Tensor, inside: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`statistics_on_device` by numpy, whose selection is quicker on a CPU than a sort."""
    selected = values.numpy()[inside.numpy()]
    low, median, high = np.percentile(selected, (25, 50, 75))
    scale = (high - low) / NORMAL_IQR or float(selected.std(dtype=np.float64)) or 1.0
    both = torch.tensor([median, scale], dtype=torch.float64, device="cpu").float()
    return both[0], both[1]


def statistics_on_device(values: Tensor, inside: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Median and scale over the voxels inside, without a host synchronisation.

    The scale is the interquartile range over 1.349; where that is 0 the standard deviation, or else 1. Percentiles
    are interpolated linearly between order statistics.

    Parameters
    ----------
    values, inside, count
        As `robust_z_scores_` takes them.

    Returns
    -------
    () float32 each, on the device of the values
    """
    ordered = torch.where(inside, values, torch.inf).flatten().sort().values
    low, median, high = (_percentile(ordered, count, share) for share in (0.25, 0.5, 0.75))
    mean = torch.where(inside, values, 0.0).sum(dtype=torch.float64) / count
    deviation = torch.where(inside, values.double() - mean, 0.0).square_().sum().div_(count).sqrt_()
    scale = (high - low) / NORMAL_IQR
    scale = torch.where(scale > 0, scale, torch.where(deviation > 0, deviation, 1.0))
    return median.float(), scale.float()


def _percentile(ordered: Tensor, count: int, share: float) -> Tensor:
    """() float64: the value at `share` of the way through the first `count` ordered values."""
    position = share * (count - 1)
    below = int(position)
    weight = position - below
    one, other = ordered[below], ordered[min(below + 1, count - 1)]
    difference = (other - one).double()  # the difference is rounded to float32, as numpy rounds it
    if weight < 0.5:
        return one.double() + difference * weight
    return other.double() - difference * (1.0 - weight)
