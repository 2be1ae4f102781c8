"""One batch of slices, from planes to statistics: X and Y, the condition, S samples of N steps, mean and variance.

Nothing here synchronises, reads a value on the host or copies from it, so that a CUDA graph can hold a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.diffusion.samplers import SamplingConfig, rater_shifts
from ddmd.models.checkpoint import System
from ddmd.models.denoiser import Condition, Modulation, from_patches, predicted_sample, to_patches
from ddmd.models.discrepancy import discrepancies, reconstruct

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Maps:
    """What is known of Z slices, each (Z, 1, H, W) float32 on the device they were computed on.

    probability, uncertainty : mean and variance over the S samples (1/(S-1); 0 where S is 1).
    inter, intra : X and Y.
    draws : (S, Z, 1, H, W) uint8 on the CPU, the samples as `quantised` gives them; None where they were not kept.
    """

    probability: Tensor
    uncertainty: Tensor
    inter: Tensor
    intra: Tensor
    draws: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The four maps by the names of their fields, without the draws."""
        return {name: getattr(self, name) for name in ("probability", "uncertainty", "inter", "intra")}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four maps, in the order of the fields."""
        return self.probability, self.uncertainty, self.inter, self.intra

    def cpu(self) -> Maps:
        """The maps on the CPU."""
        probability, uncertainty, inter, intra = (values.cpu() for values in self.tensors())
        return Maps(probability, uncertainty, inter, intra, self.draws)


def quantised(probability: Tensor) -> Tensor:
    """Probabilities in [0, 1] as uint8, 255 for 1: half a step of 1/255 is lost at most."""
    return (probability * 255.0 + 0.5).to(torch.uint8)


@dataclass(frozen=True)
class SamplingTable:
    """The constants of a sampling configuration on a device. None depends on the weights or the seed.

    coefficients : (N, 8) float32, for `ops.denoise_step`.
    times, steps : (N,) int64, timestep of the schedule and number of each step.
    samples : (S,) int64, the numbers of the samples.
    shifts : (S,) float32, what is added to the logits of each sample.
    """

    coefficients: Tensor
    times: Tensor
    steps: Tensor
    samples: Tensor
    shifts: Tensor

    @classmethod
    def of(cls, system: System, config: SamplingConfig) -> SamplingTable:
        """The constants of a configuration, on the system's device."""
        schedule, device = system.schedule, system.device
        table = schedule.coefficients(config.steps, config.sampler, config.eta, stop=config.stop)
        return cls(
            coefficients=table.to(device),
            times=schedule.timesteps(config.steps, config.stop).to(device),
            steps=torch.arange(config.steps, dtype=torch.int64, device=device),
            samples=torch.arange(config.samples, dtype=torch.int64, device=device),
            shifts=rater_shifts(config.samples, config.rater_sd, config.rater_mean).to(device),
        )


def middle_slice(system: System, planes: Tensor) -> Tensor:
    """Of slices with neighbours (Z, P C, H, W), the slices b themselves (Z, C, H, W)."""
    return planes[:, system.condition.config.middle_planes]


def present_sequences(system: System, planes: Tensor) -> Tensor | None:
    """Of slices with neighbours (Z, P C, H, W), 1 for each sequence that is there, else 0: (Z, C).

    None where the system needs all of its sequences.
    """
    config = system.condition.config
    return planes[:, config.presence_planes, 0, 0] if config.presence else None


def reconstruction_error(system: System, b: Tensor, present: Tensor | None = None) -> Tensor:
    """1 - exp(-|b - recon|), |.| averaged over the K of A and over C: (Z, 1, H, W) in [0, 1).

    Unsupervised anomaly detection in its plainest form; the exponential brings it to [0, 1) and keeps
    its order. Of the sequences, those that are there count.
    """
    b = b.to(system.dtype)
    difference = (reconstruct(system.autoencoders_a, b).float() - b.float()).abs()
    if present is None:
        error = difference.mean((0, 2))[:, None]
    else:
        each = difference.mean(0) * present[:, :, None, None]
        error = each.sum(1, keepdim=True) / present.sum(1).clamp(min=1.0)[:, None, None, None]
    return -torch.expm1(-error)


def condition_on(system: System, planes: Tensor) -> tuple[Condition, Tensor, Tensor]:
    """Everything that depends on b, X and Y alone, once for slices with neighbours (Z, P C, H, W)."""
    description = system.description
    if description.use_inter or description.use_intra:
        b, present = middle_slice(system, planes).to(system.dtype), present_sequences(system, planes)
        inter, intra = discrepancies(system.autoencoders_a, system.autoencoders_b, b, present)
    else:
        inter, intra = (torch.zeros_like(planes[:, :1], dtype=torch.float32) for _ in range(2))
    scale = description.discrepancy_scale
    scaled = inter * (scale * description.use_inter), intra * (scale * description.use_intra)
    channels = [channel for part in (planes, *scaled) for channel in part.to(system.dtype).unbind(1)]
    inputs = torch.stack(channels, -1).permute(0, 3, 1, 2)  # channels last in memory
    return system.condition(inputs), inter, intra


def draw_samples(
    system: System,
    config: SamplingConfig,
    table: SamplingTable,
    condition: Condition,
    modulations: tuple[Modulation, ...],
    index: Tensor,
    seed: Tensor,
    samples: Tensor,
) -> Tensor:
    """The sampling loop: N steps from pure noise to a mask, s samples of Z slices as one batch of s Z rows.

    x_t is held in the patches that the denoiser works on, and the position of its noise is that in a
    row of them: nothing is brought from pixels to patches and back at every step.

    Parameters
    ----------
    system, config, table
    condition : Condition of the Z slices
    modulations : of all N steps, as `Denoiser.modulations(table.times)` gives them
    index : (Z,) int64, coordinates of the slices' noise
    seed : () int64
    samples : (s,) int64, numbers of the samples

    Returns
    -------
    (s, Z, 1, H, W) float32 in [0, 1]
    """
    s, z = len(samples), len(index)
    rows = Coordinates(seed, samples[:, None].expand(s, z).reshape(-1), index.repeat(s))
    evidence = to_patches(condition.evidence)
    x = pure_noise((s * z, *evidence.shape[1:]), rows)
    if config.rater_sd or config.rater_mean:
        evidence = evidence + table.shifts[samples].view(s, 1, 1, 1, 1)
    x0 = torch.zeros_like(x) if config.sampler == "dpm++2m" else None
    for i in range(config.steps):
        now = tuple((scale[i : i + 1], shift[i : i + 1]) for scale, shift in modulations)
        logits = system.denoiser.patches(x.to(system.dtype), condition, now)
        logits = (logits.unflatten(0, (s, z)) + evidence).flatten(0, 1)
        ops.denoise_step(
            x, predicted_sample(logits), table.coefficients, table.steps[i], seed, rows.sample,
            rows.slice_index, x0,
        )  # fmt: skip
    drawn: Tensor = from_patches(x.add_(1.0).div_(2.0).clamp_(0.0, 1.0)).unflatten(0, (s, z))
    return drawn


def compute_batch(
    system: System,
    config: SamplingConfig,
    table: SamplingTable,
    planes: Tensor,
    index: Tensor,
    seed: Tensor,
    rows_at_once: int,
    draws: Tensor | None = None,
) -> Maps:
    """Everything that is computed for Z slices; of a baseline, its one map.

    Parameters
    ----------
    system : System
    config : SamplingConfig
        Its seed and batch are not read.
    table : SamplingTable of the configuration
    planes : (Z, P C, H, W) float32, slices with their neighbours
    index : (Z,) int64
    seed : () int64
    rows_at_once : int
        Most rows (a sample of a slice each) drawn as one batch; at least one sample is. Memory grows with it,
        not with S: samples go into the running mean and M2 as they are finished.
    draws : (S, Z, 1, H, W) uint8, optional
        Filled with the samples, `quantised`; with a baseline's one map S times.
    """
    kind = system.description.system
    if kind == "anomaly":
        present = present_sequences(system, planes)
        probability = reconstruction_error(system, middle_slice(system, planes), present)
        if draws is not None:
            draws.copy_(quantised(probability).expand_as(draws))
        return Maps(probability, *(torch.zeros_like(probability) for _ in range(3)))
    condition, inter, intra = condition_on(system, planes)
    if kind == "supervised":
        probability = condition.evidence.float().sigmoid()
        if draws is not None:
            draws.copy_(quantised(probability).expand_as(draws))
        return Maps(probability, torch.zeros_like(inter), inter, intra)
    if config.shared_noise:
        index = torch.zeros_like(index)
    modulations = system.denoiser.modulations(table.times)
    mean, m2, count = torch.empty_like(inter), torch.empty_like(inter), 0
    stride = 2 if config.mirror else 1
    for mirrored in range(min(stride, config.samples)):
        if mirrored:
            condition, _, _ = condition_on(system, planes.flip(-1))
        for samples in table.samples[mirrored::stride].split(max(1, rows_at_once // len(index))):
            drawn = draw_samples(system, config, table, condition, modulations, index, seed, samples)
            drawn = drawn.flip(-1) if mirrored else drawn
            count = ops.ensemble_update(mean, m2, count, drawn)
            if draws is not None:
                draws.index_copy_(0, samples, quantised(drawn))
    return Maps(mean, m2 / max(count - 1, 1), inter, intra)
