"""What each stage of training minimises, and how the network's own masks become pseudo-masks."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from ddmd import diffusion, ops
from ddmd.autoencoder import AutoencoderEnsemble
from ddmd.denoiser import Condition, ConditionNet, Denoiser, predicted_sample
from ddmd.discrepancy import discrepancy_maps, heterogeneous_loss, homogeneous_loss
from ddmd.training.config import AutoencoderStage, DenoiserStage
from ddmd.training.samples import Packed

DISCREPANCY_SCALE = 4.0  # X and Y times this are of the size of the image's own planes
TEACHER_DRAWS = 2  # draws of x_T, each with and without left-right flip, that vote on a pseudo-mask
MIN_PEAK = 0.2  # a positive slice on which nothing is this probable gets no pseudo-mask


class AutoencoderLosses(nn.Module):
    """Reconstruction in the brain, L_homo and L_hetero of every member's codes."""

    def __init__(self, ensemble: AutoencoderEnsemble, stage: AutoencoderStage, mixed: bool) -> None:
        super().__init__()
        self.ensemble, self.stage, self.mixed = ensemble, stage, mixed

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        # member k sees the batch in its own order: K different runs over the same slices
        b, k = batch["planes"], self.ensemble.config.members
        order = torch.randperm(len(b))
        rolled = torch.stack([order.roll(i * max(1, len(b) // k)) for i in range(k)], 1)
        mine = b[rolled].flatten(1, 2)
        codes = self.ensemble.encode(mine.contiguous(memory_format=torch.channels_last))
        recon = self.ensemble.decode(codes).transpose(0, 1).flatten(1, 2)
        losses = {"reconstruction": functional.smooth_l1_loss(recon, mine, beta=0.2)}
        label = batch["label"][rolled]
        for member in range(k):
            known = label[:, member] >= 0
            z, y = codes[known, member].mean((2, 3)), label[known, member]
            if self.stage.homogeneous and len(z):
                loss = self.stage.homogeneous * homogeneous_loss(z, y) / k
                losses["homogeneous"] = losses.get("homogeneous", 0.0) + loss
            if self.mixed and self.stage.heterogeneous and len(z):
                loss = self.stage.heterogeneous * heterogeneous_loss(z, y, self.stage.bound) / k
                losses["heterogeneous"] = losses.get("heterogeneous", 0.0) + loss
        return losses


class DenoiserLosses(nn.Module):
    """Both ensembles frozen; L_simple on x_0 as cross-entropy, and dense supervision of the evidence.

    Without `diffusion` the evidence alone: the supervised system.

    The denoiser predicts x_0 in {-1, 1}; the cross-entropy's minimiser is the posterior mean, as that
    of L_simple is, and does not blow up near t = 0.
    """

    def __init__(
        self,
        ensemble_a: AutoencoderEnsemble,
        ensemble_b: AutoencoderEnsemble,
        condition: ConditionNet,
        denoiser: Denoiser,
        schedule: diffusion.Schedule,
        stage: DenoiserStage,
        diffusion: bool = True,
    ) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.frozen = (ensemble_a.eval(), ensemble_b.eval())  # a tuple: not parameters of this module
        self.condition, self.denoiser, self.stage = condition, denoiser, stage
        self.schedule, self.table = schedule, schedule.noising_table()

    def planes(self, image: Tensor) -> Tensor:
        """Image planes (N, P C, H, W) followed by X and Y of the middle slice."""
        channels = self.condition.config.sequences
        middle = self.condition.config.context * channels
        if self.stage.use_inter or self.stage.use_intra:
            with torch.no_grad():
                b = image[:, middle : middle + channels].contiguous(memory_format=torch.channels_last)
                inter, intra = discrepancy_maps(*(ensemble(b).contiguous() for ensemble in self.frozen))
            inter = inter * (DISCREPANCY_SCALE * self.stage.use_inter)
            intra = intra * (DISCREPANCY_SCALE * self.stage.use_intra)
        else:
            inter = intra = torch.zeros_like(image[:, :1])
        return torch.cat((image, inter, intra), 1).contiguous(memory_format=torch.channels_last)

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        mask, weight = batch["mask"], batch["weight"]
        condition = self.condition(self.planes(batch["planes"]))
        evidence = condition.evidence
        losses = {
            "evidence": (functional.binary_cross_entropy_with_logits(evidence, mask, reduction="none") * weight).mean() * 4,
            "dice": 0.3 * soft_dice(evidence, mask, weight),
        }  # fmt: skip
        if self.diffusion:
            rows = len(mask)
            t = torch.randint(self.schedule.steps, (rows,), device=mask.device)
            index = torch.arange(rows, device=mask.device)
            seed = torch.randint(2**31, (), device=mask.device)
            noisy = ops.noise(
                2 * mask - 1,
                t,
                self.table.to(mask.device),
                torch.tensor(step, device=mask.device),
                seed,
                index,
                index,
            )
            logits = self.denoiser(noisy, condition, t)
            loss = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
            losses["simple"] = (loss * weight).mean() * 4
        return losses

    @torch.no_grad()
    def draw(self, image: Tensor, seed: int) -> Tensor:
        """One-step draws of x_0 from pure noise, as a probability (TEACHER_DRAWS, N, 1, H, W)."""
        condition: Condition = self.condition(self.planes(image))
        if not self.diffusion:
            return condition.evidence.sigmoid()[None]
        n, device = len(image), image.device
        index = torch.arange(n, device=device)
        t = torch.full((n,), self.schedule.steps - 1, device=device)
        drawn = []
        for sample in range(TEACHER_DRAWS):
            at = diffusion.Coordinates(
                torch.tensor(seed, device=device), torch.full_like(index, sample), index
            )
            noise = diffusion.pure_noise(torch.zeros_like(condition.evidence), at)
            drawn.append(0.5 + 0.5 * predicted_sample(self.denoiser(noise, condition, t)))
        return torch.stack(drawn)


def soft_dice(logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """1 - soft Dice, a slice at a time, over the slices that have a mask."""
    p = logits.sigmoid() * weight
    target = mask * weight
    overlap = 2 * (p * target).sum((1, 2, 3)) + 1.0
    dice = overlap / (p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1.0)
    return ((1 - dice) * (target.sum((1, 2, 3)) > 0)).mean()


def pseudo_mask(probability: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A positive slice's pseudo-mask and how far to trust each pixel of it.

    The threshold is the smaller of 0.5 and half the slice's peak; the mask is opened; pixels near the
    threshold, or on which the draws disagree, count less. None where nothing is probable.

    Parameters
    ----------
    probability, deviation : (H, W) mean and standard deviation over the teacher's draws.

    Returns
    -------
    mask : (H, W) bool; weight : (H, W) float16 in [0, 1]
    """
    peak = float(probability.max())
    if peak < MIN_PEAK:
        return None
    threshold = min(0.5, 0.5 * peak)
    mask = ndimage.binary_opening(probability >= threshold, iterations=1)
    if not mask.any():
        return None
    margin = np.abs(probability - threshold) / threshold
    trusted = np.clip(0.25 + 1.5 * margin, 0.0, 1.0) * np.clip(1.25 - 2.5 * deviation, 0.25, 1.0)
    return mask, trusted.astype(np.float16)


def teach(losses: DenoiserLosses, packed: list[Packed], seed: int, batch: int = 16) -> dict[str, float]:
    """Give every positive slice (image-level label 1) a pseudo-mask by what was learnt so far."""
    losses.eval()
    context = losses.condition.config.context
    made, skipped, area = 0, 0, 0.0
    for item in packed:
        positive = np.flatnonzero(item.label == 1)
        item.mask, item.weight = None, None
        if not len(positive):
            continue
        masks = np.zeros(item.brain.shape, np.float16)
        weights = np.ones(item.brain.shape, np.float16)
        for first in range(0, len(positive), batch):
            zs = positive[first : first + batch]
            image = torch.from_numpy(np.stack([item.planes(z, context) for z in zs])).flatten(1, 2)
            draws = torch.cat((losses.draw(image, seed), losses.draw(image.flip(-1), seed).flip(-1)))[:, :, 0]
            mean, deviation = draws.mean(0).numpy(), draws.std(0).numpy()
            for row, z in enumerate(zs):
                result = pseudo_mask(mean[row] * item.brain[z], deviation[row])
                if result is None:
                    skipped += 1
                    continue
                masks[z], weights[z] = result
                made += 1
                area += float(result[0].sum())
        if masks.any():
            item.mask, item.weight = masks, weights
    losses.train()
    return {"made": made, "skipped": skipped, "mean_pixels": area / max(made, 1)}
