"""The sampling loop: N denoising steps from pure noise to a mask, on a GPU as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.diffusion.samplers import SAMPLERS, Sampler
from ddmd.models.checkpoint import System
from ddmd.models.denoiser import Condition, from_patches, predicted_sample, to_patches

GRAPHS = 4  # shapes whose captured loops are kept; each holds its activations
WARM_UP = 2  # runs before a capture: kernels are compiled, cuDNN and the allocator have settled


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
    stop : float
        Share of T at which the steps end and x_0 is predicted; see `Schedule.timesteps`.
    seed : int
        Key of every draw.
    batch : int, optional
        Slices at once; by default what suits the device, halved where memory does not suffice.
    mirror : bool
        Every second sample is drawn on the slice's mirror image and mirrored back, so that samples
        also differ in what the networks make of the image.
    """

    samples: int = 5
    steps: int = 5
    sampler: str = "ddim"
    eta: float = 0.0
    stop: float = 0.0
    seed: int = 0
    batch: int | None = None
    mirror: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (("samples", 1), ("steps", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} is {value}; allowed is at least {lowest}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; allowed are {', '.join(SAMPLERS)}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; allowed are 64-bit integers")


@dataclass(frozen=True)
class _Captured:
    """A loop of one shape: the graph, the tensors it reads, and the one it writes."""

    graph: torch.cuda.CUDAGraph
    condition: Condition
    index: Tensor
    sample: Tensor
    result: Tensor


class Sampling:
    """One configuration of one system: its table, what its time steps make of the blocks, its seed, and captured loops.

    The system's weights are not to change while it is in use.
    """

    def __init__(self, system: System, config: SamplingConfig) -> None:
        self.denoiser, self.dtype, self.config, device = system.denoiser, system.dtype, config, system.device
        schedule = system.schedule
        kind = cast(Sampler, config.sampler)
        self.table = schedule.sampler(config.steps, kind, config.eta, stop=config.stop).to(device)
        times = schedule.timesteps(config.steps, config.stop).to(device)
        drawing = "denoiser" in system.parts()  # a baseline has one map, and its denoiser may be anywhere
        self.modulations = [self.denoiser.modulations(t) for t in times.split(1)] if drawing else []
        self.steps = torch.arange(config.steps, device=device)
        self.seed = torch.tensor(config.seed, device=device)
        self.captured: dict[tuple[torch.Size, torch.Size], _Captured] = {}

    def bind(self, condition: Condition, index: Tensor) -> Callable[[int], Tensor]:
        """A function that draws sample number s of the slices `index`: (Z, 1, H, W) float32 in [0, 1].

        On a CUDA device the next draw overwrites what the last one returned.
        """
        if not index.is_cuda:
            return lambda sample: self.draw(condition, index, index.new_tensor(sample))
        held = self._captured(condition, index)
        held.condition.features.copy_(condition.features)
        held.condition.evidence.copy_(condition.evidence)
        held.index.copy_(index)

        def replay(sample: int) -> Tensor:
            held.sample.fill_(sample)
            with torch.cuda.device(index.device):
                held.graph.replay()
            return held.result

        return replay

    def draw(self, condition: Condition, index: Tensor, sample: Tensor) -> Tensor:
        """The loop itself, `sample` () int64. Never synchronises, so that a graph can hold it.

        x_t is held in the patches that the denoiser works on, and the position of its noise is that in a
        row of them: nothing is brought from pixels to patches and back at every step.
        """
        at = Coordinates(self.seed, sample.expand(len(index)).contiguous(), index)
        evidence = to_patches(condition.evidence)
        x = pure_noise(evidence.float(), at)
        x0 = torch.zeros_like(x) if self.config.sampler == "dpm++2m" else None
        for i in range(self.config.steps):
            logits = self.denoiser.patches(x.to(self.dtype), condition, self.modulations[i]) + evidence
            ops.denoise_step(
                x, predicted_sample(logits), self.table, self.steps[i], self.seed, at.sample, index, x0
            )
        return from_patches((x + 1.0) / 2.0).clamp_(0.0, 1.0)

    def _captured(self, condition: Condition, index: Tensor) -> _Captured:
        """The loop of this shape, captured the first time the shape is seen."""
        shape = (condition.features.shape, condition.evidence.shape)
        if shape in self.captured:
            return self.captured[shape]
        while len(self.captured) >= GRAPHS:
            del self.captured[next(iter(self.captured))]
        own = Condition(condition.features.clone(), condition.evidence.clone())
        own_index, sample = index.clone(), torch.zeros((), dtype=torch.int64, device=index.device)
        with torch.cuda.device(index.device):  # a capture is of the current device's work
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self.draw(own, own_index, sample)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                result = self.draw(own, own_index, sample)
        self.captured[shape] = _Captured(graph, own, own_index, sample, result)
        return self.captured[shape]


def sampling_of(system: System, config: SamplingConfig) -> Sampling:
    """The sampling of a configuration, made once a system; that of another configuration is given up."""
    if config not in system.samplings:
        system.samplings.clear()
        system.samplings[config] = Sampling(system, config)
    return system.samplings[config]
