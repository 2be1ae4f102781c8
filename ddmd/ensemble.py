"""Multi-sample inference: many masks drawn for every slice, their mean and variance kept as they finish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ddmd import diffusion, ops
from ddmd.denoiser import Condition, predicted_sample
from ddmd.diffusion import Coordinates, Sampler
from ddmd.slices import Slices
from ddmd.weights import System

SLICES_AT_ONCE = {"cpu": 8, "cuda": 512}  # measured on the CPU: larger batches leave the cache
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SamplingConfig:
    """How masks are drawn.

    Parameters
    ----------
    samples : int
        S, the implicit ensemble.
    steps : int
        N.
    sampler : "ddim", "ddpm" or "dpm++2m"
    eta : float
        Of DDIM: 0 is deterministic given x_T, 1 is DDPM.
    seed : int
        Key of every draw.
    batch : int, optional
        Slices at once; by default what suits the device, halved where memory does not suffice.
    """

    samples: int = 5
    steps: int = 5
    sampler: str = "ddim"
    eta: float = 0.0
    seed: int = 0
    batch: int | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("samples", 1), ("steps", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} is {value}; allowed is at least {lowest}")
        if self.sampler not in diffusion.SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; allowed are {', '.join(diffusion.SAMPLERS)}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; allowed are 64-bit integers")


@dataclass(frozen=True)
class Maps:
    """What is known of every slice, each (Z, 1, H, W) float32 on the CPU.

    probability, uncertainty : mean and variance over the S samples (1/(S-1); 0 where S is 1).
    inter, intra : X and Y.
    """

    probability: Tensor
    uncertainty: Tensor
    inter: Tensor
    intra: Tensor


def discrepancies(system: System, b: Tensor) -> tuple[Tensor, Tensor]:
    """X and Y (Z, 1, H, W) of slices b (Z, C, H, W): all members of an ensemble in one call."""
    b = b.contiguous(memory_format=torch.channels_last)
    return ops.discrepancy_maps(system.autoencoders_a(b).contiguous(), system.autoencoders_b(b).contiguous())


def middle_slice(system: System, planes: Tensor) -> Tensor:
    """Of slices with neighbours (Z, P C, H, W), the slices b themselves (Z, C, H, W)."""
    channels = len(system.description.sequences)
    first = planes.shape[1] // 2 - channels // 2
    return planes[:, first : first + channels]


def reconstruction_error(system: System, b: Tensor) -> Tensor:
    """1 - exp(-|b - recon|), |.| averaged over the K of A and over C: (Z, 1, H, W) in [0, 1).

    Unsupervised anomaly detection in its plainest form; the exponential brings it to [0, 1) and keeps
    its order.
    """
    b = b.contiguous(memory_format=torch.channels_last)
    error = (system.autoencoders_a(b) - b).abs().mean((0, 2))[:, None]
    return -torch.expm1(-error)


def condition_on(system: System, planes: Tensor) -> tuple[Condition, Tensor, Tensor]:
    """Everything that depends on b, X and Y alone, once for slices with neighbours (Z, P C, H, W)."""
    told = system.description
    if told.use_inter or told.use_intra:
        inter, intra = discrepancies(system, middle_slice(system, planes))
    else:
        inter, intra = torch.zeros_like(planes[:, :1]), torch.zeros_like(planes[:, :1])
    scale = told.discrepancy_scale
    joined = torch.cat((planes, inter * (scale * told.use_inter), intra * (scale * told.use_intra)), 1)
    return system.condition(joined.contiguous(memory_format=torch.channels_last)), inter, intra


class _Sampling:
    """One configuration on one device: its table, time steps and seed, made once."""

    def __init__(self, system: System, config: SamplingConfig) -> None:
        self.system, self.config, device = system, config, system.device
        schedule = system.schedule
        kind = cast(Sampler, config.sampler)
        self.table = schedule.sampler(config.steps, kind, config.eta).to(device)
        self.times = schedule.timesteps(config.steps).to(device)
        self.steps = torch.arange(config.steps, device=device)
        self.seed = torch.tensor(config.seed, device=device)

    def draw(self, condition: Condition, index: Tensor, sample: int) -> Tensor:
        """Sample number `sample` of the slices `index`: (Z, 1, H, W) in [0, 1]. Never synchronises."""
        at = Coordinates(self.seed, torch.full_like(index, sample), index)
        x = diffusion.pure_noise(condition.evidence.float(), at)
        x0 = torch.zeros_like(x) if self.config.sampler == "dpm++2m" else None
        for i in range(self.config.steps):
            logits = self.system.denoiser(x, condition, self.times[i].expand(len(index)))
            ops.denoise_step(
                x, predicted_sample(logits), self.table, self.steps[i], self.seed, at.sample, index, x0
            )
        return ((x + 1.0) / 2.0).clamp_(0.0, 1.0)


@torch.inference_mode()
def detect_slices(
    system: System, slices: Slices, config: SamplingConfig, progress: Progress | None = None
) -> Maps:
    """Draw S masks for every slice of a volume; of a baseline, its one map.

    Memory grows with the batch, not with S: each sample goes into the running mean and M2 as it is
    finished. What comes out does not depend on the batch, up to the rounding of the convolutions.

    Parameters
    ----------
    system : System
    slices : Slices
    config : SamplingConfig
    progress : called with (slices done, slices in all), optional
    """
    count, device = len(slices), system.device
    shape = (count, 1, *slices.image.shape[2:])
    maps = Maps(*(torch.zeros(shape) for _ in range(4)))
    planes = slices.planes(system.condition.config.context)
    sampling = _Sampling(system, config)
    batch = config.batch or SLICES_AT_ONCE[device.type]
    first = 0
    while first < count:
        part = slice(first, min(first + batch, count))
        try:
            _one_batch(sampling, planes[part].to(device), slices.index[part].to(device), maps, part)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            continue
        first = part.stop
        if progress is not None:
            progress(first, count)
    return maps


def _one_batch(sampling: _Sampling, planes: Tensor, index: Tensor, maps: Maps, part: slice) -> None:
    system = sampling.system
    if system.description.system == "anomaly":
        maps.probability[part] = reconstruction_error(system, middle_slice(system, planes))
        return
    condition, inter, intra = condition_on(system, planes)
    maps.inter[part] = inter
    maps.intra[part] = intra
    if system.description.system == "supervised":
        maps.probability[part] = condition.evidence.sigmoid()
        return
    mean = torch.empty_like(inter)
    m2 = torch.empty_like(inter)
    count = 0
    for sample in range(sampling.config.samples):
        drawn = sampling.draw(condition, index, sample)
        count = ops.ensemble_update(mean, m2, count, drawn[None])
    maps.probability[part] = mean
    maps.uncertainty[part] = m2 / max(count - 1, 1)
