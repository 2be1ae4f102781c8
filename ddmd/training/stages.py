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
from ddmd.models.discrepancy import discrepancies, heterogeneous_loss, homogeneous_loss
from ddmd.training.config import AutoencoderStage, DenoiserStage

DISCREPANCY_SCALE = 4.0  # X and Y times this are of the size of the image's own planes
BAG = 48  # pixels of a positive slice that are asked to be lesion; the smallest lesions are smaller
NOISE_STEP = 1 << 20  # step coordinate of the noise of training; no sampler goes so far
TEACHER_DRAWS = 2  # draws of x_T, each with and without left-right flip, that vote on a pseudo-mask


class AutoencoderLosses(nn.Module):
    """Reconstruction of the whole crop, L_homo and L_hetero of every member's codes.

    With several sequences, L_homo and L_hetero are means over those that have enough slices for them.
    """

    def __init__(
        self, ensemble: AutoencoderEnsemble, stage: AutoencoderStage, mixed: bool, sequences: int = 1
    ) -> None:
        super().__init__()
        self.ensemble, self.stage, self.mixed, self.sequences = ensemble, stage, mixed, sequences

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        b, k = batch["planes"], self.ensemble.config.members
        codes = self.ensemble.encode_shared(b)
        recon = self.ensemble.decode(codes).float()
        losses = {"reconstruction": functional.smooth_l1_loss(recon, b.expand_as(recon), beta=0.2)}
        label, z = gather_processes(batch["label"]), gather_processes(codes.float().mean((3, 4)))
        labels = [label]
        if "sequence" in batch:  # only slices of one sequence are compared
            sequence = gather_processes(batch["sequence"])
            labels = [torch.where(sequence == number, label, -1) for number in range(self.sequences)]
        # (C, 2): whether two slices or more of a sequence have label 0, and label 1
        enough = torch.stack(
            [torch.stack([(known == value).sum() >= 2 for value in (0, 1)]) for known in labels]
        )
        if self.stage.homogeneous:
            terms = [homogeneous_loss(z[:, member], known) for member in range(k) for known in labels]
            losses["homogeneous"] = _mean_of_used(terms, enough.any(1)) * self.stage.homogeneous
        if self.mixed and self.stage.heterogeneous:
            terms = [
                heterogeneous_loss(z[:, member], known, self.stage.bound)
                for member in range(k)
                for known in labels
            ]
            losses["heterogeneous"] = _mean_of_used(terms, enough.all(1)) * self.stage.heterogeneous
        return losses


def _mean_of_used(terms: list[Tensor], used: Tensor) -> Tensor:
    """Mean of losses of every member and sequence (K C) over the used sequences (C,); those of the others are 0."""
    return torch.stack(terms).mean() * (len(used) / used.sum().clamp(min=1))


def gather_processes(local: Tensor) -> Tensor:
    """Rows of all processes, in their order, for losses over pairs of the global batch.

    Gradients reach the rows of this process alone, times the number of processes: their mean over processes,
    which distributed training takes, is the gradient of one process with the whole batch.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return local
    count, rank = distributed.get_world_size(), distributed.get_rank()
    rows = [torch.zeros_like(local) for _ in range(count)]
    distributed.all_gather(rows, local.detach().contiguous())
    if local.requires_grad:
        rows[rank] = local * count - local.detach() * (count - 1)
    return torch.cat(rows)


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
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.frozen = (ensemble_a.eval(), ensemble_b.eval())  # a tuple: not parameters of this module
        self.condition, self.denoiser, self.stage = condition, denoiser, stage
        if not diffusion:  # what gets no gradient is not waited for by other processes
            denoiser.requires_grad_(False)
            condition.to_features.requires_grad_(False)
        self.schedule = schedule
        self.register_buffer("table", schedule.noising_table(), persistent=False)
        self.register_buffer("seed", torch.full((), seed, dtype=torch.int64, device="cpu"), persistent=False)
        self.table: Tensor
        self.seed: Tensor

    def planes(self, image: Tensor) -> Tensor:
        """Image planes (N, P C, H, W) followed by X and Y of the middle slice."""
        config = self.condition.config
        if self.stage.use_inter or self.stage.use_intra:
            with torch.no_grad():
                present = image[:, config.presence_planes, 0, 0] if config.presence else None
                inter, intra = discrepancies(*self.frozen, image[:, config.middle_planes], present)
            inter = inter * (DISCREPANCY_SCALE * self.stage.use_inter)
            intra = intra * (DISCREPANCY_SCALE * self.stage.use_intra)
        else:
            inter = intra = torch.zeros_like(image[:, :1])
        return torch.cat((image, inter, intra), 1).contiguous(memory_format=torch.channels_last)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask, weight = batch["mask"], batch["weight"]
        condition = self.condition(self.planes(batch["planes"]))
        evidence = condition.evidence.float()
        losses = {
            "evidence": (functional.binary_cross_entropy_with_logits(evidence, mask, reduction="none") * weight).mean() * 4,
            "dice": 0.3 * soft_dice(evidence, mask, weight),
        }  # fmt: skip
        if "bag" in batch and self.stage.bag_weight:
            most = evidence.flatten(1).topk(BAG, 1).values.mean(1)
            losses["bag"] = self.stage.bag_weight * (functional.softplus(-most) * batch["bag"]).mean()
        if self.diffusion:
            t, index = batch["t"], batch["index"]
            noisy = ops.noise(
                2 * mask - 1,
                t,
                self.table,
                torch.full_like(t[0], NOISE_STEP),
                self.seed,
                index,
                torch.zeros_like(index),
            )
            logits = self.denoiser(noisy, condition, t).float()
            loss = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
            losses["simple"] = (loss * weight).mean() * 4
        return losses

    @torch.no_grad()
    def draw(self, image: Tensor, seed: int) -> Tensor:
        """One-step draws of x_0 from pure noise, as a probability (TEACHER_DRAWS, N, 1, H, W)."""
        condition: Condition = self.condition(self.planes(image))
        if not self.diffusion:
            return condition.evidence.float().sigmoid()[None]
        n, device = len(image), image.device
        index = torch.arange(n, device=device)
        t = torch.full((n,), self.schedule.steps - 1, dtype=torch.int64, device=device)
        key = torch.full((), seed, dtype=torch.int64, device=device)
        drawn = []
        for sample in range(TEACHER_DRAWS):
            at = Coordinates(key, torch.full_like(index, sample), index)
            noise = pure_noise(condition.evidence.shape, at)
            drawn.append(0.5 + 0.5 * predicted_sample(self.denoiser(noise, condition, t).float()))
        return torch.stack(drawn)


def soft_dice(logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """1 - soft Dice, a slice at a time, summed over the slices that have a mask and divided by all there are."""
    p = logits.sigmoid() * weight
    target = mask * weight
    overlap = 2 * (p * target).sum((1, 2, 3)) + 1.0
    dice = overlap / (p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1.0)
    return ((1 - dice) * (target.sum((1, 2, 3)) > 0)).mean()
