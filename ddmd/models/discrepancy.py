"""What two ensembles of auto-encoders disagree about, and the losses that shape their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ddmd import ops
from ddmd.models.autoencoder import PATCH, AutoencoderEnsemble
from ddmd.models.denoiser import from_patches
from ddmd.ops import discrepancy_maps

__all__ = ["discrepancies", "discrepancy_maps", "heterogeneous_loss", "homogeneous_loss", "reconstruct"]


def reconstruct(ensemble: AutoencoderEnsemble, b: Tensor) -> Tensor:
    """Reconstructions (K, Z, C, H, W) of slices b (Z, C, H, W), by members of all sequences or of one at a time.

    Auto-encoders of one sequence that are given several reconstruct each by itself.
    """
    slices, sequences = b.shape[:2]
    if ensemble.config.sequences == sequences:
        whole: Tensor = ensemble(b.contiguous(memory_format=torch.channels_last))
        return whole
    single = b.flatten(0, 1)[:, None].contiguous(memory_format=torch.channels_last)
    each: Tensor = ensemble(single)
    separate: Tensor = each.squeeze(2).unflatten(1, (slices, sequences))
    return separate


def discrepancies(
    normal: AutoencoderEnsemble, mixed: AutoencoderEnsemble, b: Tensor, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """X and Y of slices: the means over C are over the sequences that are there.

    Parameters
    ----------
    normal, mixed : the ensembles of A and of B
    b : (Z, C, H, W)
    present : (Z, C), optional
        1 for the sequences that are there, else 0; without it all are.

    Returns
    -------
    X, Y : (Z, 1, H, W) float32
    """
    if present is not None and b.device.type == "cpu":  # a GPU would have to be waited for
        used = present.any(0)
        b, present = b[:, used], present[:, used]
    reconstructions = _reconstructed_patches(normal, b), _reconstructed_patches(mixed, b)
    if present is None:
        return _as_pixels(*discrepancy_maps(*reconstructions))
    mask = present.to(b.dtype)[None, :, :, None, None]
    inter, intra = _as_pixels(*discrepancy_maps(*((r * mask).contiguous() for r in reconstructions)))
    share = present.float().mean(1).clamp(min=1.0 / b.shape[1])[:, None, None, None]
    return inter / share, intra / share.sqrt()


def _reconstructed_patches(ensemble: AutoencoderEnsemble, b: Tensor) -> Tensor:
    """As `reconstruct`, contiguous, in the order of `AutoencoderEnsemble.reconstructed_patches`."""
    slices, sequences = b.shape[:2]
    if ensemble.config.sequences == sequences:
        return ensemble.reconstructed_patches(b)
    each = ensemble.reconstructed_patches(b.flatten(0, 1)[:, None])
    separate: Tensor = each.squeeze(2).unflatten(1, (slices, sequences)).contiguous()
    return separate


def _as_pixels(*maps: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (Z, 1, H / 4, 4 W) in that order as (Z, 1, H, W)."""
    inter, intra = (from_patches(m.unflatten(3, (-1, PATCH**2)).squeeze(1)) for m in maps)
    return inter, intra


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
