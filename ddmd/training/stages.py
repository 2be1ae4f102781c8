"""What each stage of training minimises."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.diffusion.schedule import Schedule
from ddmd.models.autoencoder import AutoencoderEnsemble
from ddmd.models.denoiser import Condition, ConditionNet, Denoiser, predicted_sample
from ddmd.models.discrepancy import discrepancy_maps, heterogeneous_loss, homogeneous_loss
from ddmd.training.config import AutoencoderStage, DenoiserStage

DISCREPANCY_SCALE = 4.0  # X and Y times this are of the size of the image's own planes
BAG = 48  # pixels of a positive slice that are asked to be lesion; the smallest lesions are smaller
TEACHER_DRAWS = 2  # draws of x_T, each with and without left-right flip, that vote on a pseudo-mask


class AutoencoderLosses(nn.Module):
    """Reconstruction of the whole crop, L_homo and L_hetero of every member's codes."""

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
        losses = {"reconstruction": functional.smooth_l1_loss(recon.float(), mine, beta=0.2)}
        label = batch["label"][rolled]
        for member in range(k):
            known = label[:, member] >= 0
            z, y = codes[known, member].float().mean((2, 3)), label[known, member]
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
        schedule: Schedule,
        stage: DenoiserStage,
        diffusion: bool = True,
    ) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.frozen = (ensemble_a.eval(), ensemble_b.eval())  # a tuple: not parameters of this module
        self.condition, self.denoiser, self.stage = condition, denoiser, stage
        if not diffusion:  # what gets no gradient is not waited for by other processes
            denoiser.requires_grad_(False)
            condition.to_features.requires_grad_(False)
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
        evidence = condition.evidence.float()
        losses = {
            "evidence": (functional.binary_cross_entropy_with_logits(evidence, mask, reduction="none") * weight).mean() * 4,
            "dice": 0.3 * soft_dice(evidence, mask, weight),
        }  # fmt: skip
        if "bag" in batch and self.stage.bag:
            most = evidence.flatten(1).topk(BAG, 1).values.mean(1)
            losses["bag"] = self.stage.bag * (functional.softplus(-most) * batch["bag"]).mean()
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
            logits = self.denoiser(noisy, condition, t).float()
            loss = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
            losses["simple"] = (loss * weight).mean() * 4
        return losses

    @torch.no_grad()
    def draw(self, image: Tensor, seed: int) -> Tensor:
        """One-step draws of x_0 from pure noise, as a probability (TEACHER_DRAWS, N, 1, H, W), on the CPU."""
        image = image.to(next(self.condition.parameters()).device)
        condition: Condition = self.condition(self.planes(image))
        if not self.diffusion:
            return condition.evidence.float().sigmoid()[None].cpu()
        n, device = len(image), image.device
        index = torch.arange(n, device=device)
        t = torch.full((n,), self.schedule.steps - 1, device=device)
        drawn = []
        for sample in range(TEACHER_DRAWS):
            at = Coordinates(torch.tensor(seed, device=device), torch.full_like(index, sample), index)
            noise = pure_noise(torch.zeros_like(condition.evidence, dtype=torch.float32), at)
            drawn.append(0.5 + 0.5 * predicted_sample(self.denoiser(noise, condition, t).float()))
        return torch.stack(drawn).cpu()


def soft_dice(logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """1 - soft Dice, a slice at a time, summed over the slices that have a mask and divided by all there are."""
    p = logits.sigmoid() * weight
    target = mask * weight
    overlap = 2 * (p * target).sum((1, 2, 3)) + 1.0
    dice = overlap / (p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1.0)
    return ((1 - dice) * (target.sum((1, 2, 3)) > 0)).mean()
