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
        0 has no lesion, 1 has one, -1 is not known and takes no part.
    """
    known = label >= 0
    counts = torch.stack(((label == 0).sum(), (label == 1).sum())).to(torch.float32)
    pairs = (counts * (counts - 1.0) / 2.0).sum().clamp(min=1.0)
    group = torch.where(known, label, 2)  # codes in the third group are all 0, and nothing apart
    return ops.pairwise_sqdist(z * known[:, None], group, 3) / (pairs * z.shape[1])


def heterogeneous_loss(z: Tensor, label: Tensor, bound: float = 2.0, floor: float = 1e-2) -> Tensor:
    """L_hetero: drive KL(p_pos || p_neg) of the two labels' codes up to a bound, never beyond.

    p_pos and p_neg are the diagonal Gaussians with the moments of the codes of each label. The loss
    is bound - KL averaged over dimensions while that is positive, else 0: unbounded, it diverges.

    Parameters
    ----------
    z : (n, d)
        Codes.
    label : (n,) int64
        0 has no lesion, 1 has one, -1 is not known and takes no part.
    bound : float
        KL per dimension, in nats, beyond which the labels count as apart.
    floor : float
        Added to the variances, so that few slices cannot make them vanish.
    """
    mean, log_variance, enough = [], [], []
    for value in (1, 0):
        member = (label == value).to(z.dtype)[:, None]
        count = member.sum()
        mean.append((z * member).sum(0) / count.clamp(min=1.0))
        variance = ((z - mean[-1]).square() * member).sum(0) / count.clamp(min=1.0)
        log_variance.append((variance + floor).log())
        enough.append(count >= 2)
    kl = ops.gaussian_kl(mean[0], log_variance[0], mean[1], log_variance[1], "mean")
    return torch.where(enough[0] & enough[1], torch.relu(bound - kl), 0.0)
