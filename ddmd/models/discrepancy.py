"""What two ensembles of auto-encoders disagree about, and the losses that shape their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ddmd import ops
from ddmd.ops import discrepancy_maps

__all__ = ["discrepancy_maps", "heterogeneous_loss", "homogeneous_loss"]


def homogeneous_loss(z: Tensor, label: Tensor) -> Tensor:
    """L_homo = ||z_i - z_j||^2 averaged over pairs of slices with the same image-level label.

    Parameters
    ----------
    z : (n, d)
        Codes.
    label : (n,) int64
        0 has no lesion, 1 has one.
    """
    counts = torch.bincount(label, minlength=2).to(torch.float32)
    pairs = (counts * (counts - 1.0) / 2.0).sum().clamp(min=1.0)
    return ops.pairwise_sqdist(z, label, 2) / (pairs * z.shape[1])


def heterogeneous_loss(z: Tensor, label: Tensor, bound: float = 2.0, floor: float = 1e-2) -> Tensor:
    """L_hetero: drive KL(p_pos || p_neg) of the two labels' codes up to a bound, never beyond.

    p_pos and p_neg are the diagonal Gaussians with the moments of the codes of each label. The loss
    is bound - KL averaged over dimensions while that is positive, else 0: unbounded, it diverges.

    Parameters
    ----------
    z : (n, d)
        Codes.
    label : (n,) int64
        0 has no lesion, 1 has one.
    bound : float
        KL per dimension, in nats, beyond which the labels count as apart.
    floor : float
        Added to the variances, so that few slices cannot make them vanish.
    """
    if bool((label == 0).sum() < 2) or bool((label == 1).sum() < 2):
        return z.sum() * 0.0
    positive, negative = z[label == 1], z[label == 0]
    kl = ops.gaussian_kl(
        positive.mean(0),
        (positive.var(0, correction=0) + floor).log(),
        negative.mean(0),
        (negative.var(0, correction=0) + floor).log(),
        "mean",
    )
    return torch.relu(bound - kl)
