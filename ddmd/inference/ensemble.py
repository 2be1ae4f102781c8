"""Multi-sample inference: many masks drawn for every slice, their mean and variance kept as they finish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddmd import ops
from ddmd.inference.session import Sampling, SamplingConfig, sampling_of
from ddmd.inference.slices import Slices
from ddmd.models.checkpoint import System
from ddmd.models.denoiser import Condition

CPU_SLICES = 8  # measured: larger batches leave the cache
CUDA_SLICES = 512
BYTES_A_PIXEL = 1024  # of a slice's activations at their peak, by a generous count of the live tensors
Progress = Callable[[int, int], None]


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
    b = b.to(system.dtype).contiguous(memory_format=torch.channels_last)
    return ops.discrepancy_maps(system.autoencoders_a(b).contiguous(), system.autoencoders_b(b).contiguous())


def middle_slice(system: System, planes: Tensor) -> Tensor:
    """Of slices with neighbours (Z, P C, H, W), the slices b themselves (Z, C, H, W)."""
    seen = system.condition.config
    first = seen.context * seen.sequences
    return planes[:, first : first + seen.sequences]


def reconstruction_error(system: System, b: Tensor) -> Tensor:
    """1 - exp(-|b - recon|), |.| averaged over the K of A and over C: (Z, 1, H, W) in [0, 1).

    Unsupervised anomaly detection in its plainest form; the exponential brings it to [0, 1) and keeps
    its order.
    """
    b = b.to(system.dtype).contiguous(memory_format=torch.channels_last)
    error = (system.autoencoders_a(b).float() - b.float()).abs().mean((0, 2))[:, None]
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
    joined = joined.to(system.dtype).contiguous(memory_format=torch.channels_last)
    return system.condition(joined), inter, intra


def default_batch_size(system: System, height: int, width: int) -> int:
    """Slices at once that suit the device: few enough for the cache of a CPU, or for a GPU's free memory."""
    if system.device.type == "cpu":
        return CPU_SLICES
    free, _ = torch.cuda.mem_get_info(system.device)
    # what torch holds and does not use is free, too: the batch, and with it the graph, is the same next time
    free += torch.cuda.memory_reserved(system.device) - torch.cuda.memory_allocated(system.device)
    return max(1, min(CUDA_SLICES, int(0.8 * free) // (BYTES_A_PIXEL * height * width)))


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
    seen = system.condition.config
    planes = slices.planes(seen.context, seen.mirrored)
    sampling = sampling_of(system, config)
    batch = config.batch or default_batch_size(system, *slices.image.shape[2:])
    first = 0
    while first < count:
        part = slice(first, min(first + batch, count))
        try:
            _one_batch(system, sampling, planes[part].to(device), slices.index[part].to(device), maps, part)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            sampling.captured.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        first = part.stop
        if progress is not None:
            progress(first, count)
    return maps


def _one_batch(
    system: System, sampling: Sampling, planes: Tensor, index: Tensor, maps: Maps, part: slice
) -> None:
    if system.description.system == "anomaly":
        maps.probability[part] = reconstruction_error(system, middle_slice(system, planes))
        return
    condition, inter, intra = condition_on(system, planes)
    maps.inter[part] = inter
    maps.intra[part] = intra
    if system.description.system == "supervised":
        maps.probability[part] = condition.evidence.float().sigmoid()
        return
    mean = torch.empty_like(inter)
    m2 = torch.empty_like(inter)
    config, count = sampling.config, 0
    draw = sampling.bind(condition, index)
    for sample in range(0, config.samples, 2 if config.mirror else 1):
        count = ops.ensemble_update(mean, m2, count, draw(sample)[None])
    if config.mirror and config.samples > 1:
        condition, _, _ = condition_on(system, planes.flip(-1))
        draw = sampling.bind(condition, index)
        for sample in range(1, config.samples, 2):
            count = ops.ensemble_update(mean, m2, count, draw(sample).flip(-1)[None])
    maps.probability[part] = mean
    maps.uncertainty[part] = m2 / max(count - 1, 1)
