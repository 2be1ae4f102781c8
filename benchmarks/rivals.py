"""The rivals of a whole detection: MONAI's inferer and diffusers' scheduler driving the same networks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.inference import ensemble
from ddmd.inference.session import CPU_ROWS, CUDA_ROWS, SamplingConfig, Session, default_batch_size
from ddmd.inference.slices import Slices
from ddmd.models.autoencoder import NormSiLU
from ddmd.models.checkpoint import System
from ddmd.models.denoiser import Condition, from_patches, predicted_sample, to_patches
from ddmd.models.fused_convolution import FusedConv2d

Noise = Callable[[Tensor, int, int], Tensor]  # (planes, number of the first, sample) -> x_T
Drive = Callable[[nn.Module, Tensor], Tensor]  # (network, x_T) -> x_0


class TorchNormSiLU(nn.Module):
    """`NormSiLU` by torch's own ops, as MONAI and diffusers write it."""

    def __init__(self, ours: NormSiLU) -> None:
        super().__init__()
        self.groups, self.weight, self.bias = ours.groups, ours.weight, ours.bias

    def forward(self, x, scale=None, shift=None, residual=None):
        y = functional.group_norm(x, self.groups, self.weight, self.bias)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None])
        if shift is not None:
            y = y + shift[:, :, None, None]
        y = functional.silu(y)
        return y if residual is None else y + residual


def by_torch(part: nn.Module, fused: bool = False) -> nn.Module:
    """A network whose modules of ours are replaced by torch's ops; `fused` keeps our fused convolutions."""
    for module in list(part.modules()):
        for name, child in module.named_children():
            if isinstance(child, NormSiLU):
                setattr(module, name, TorchNormSiLU(child))
            elif isinstance(child, FusedConv2d) and not fused:
                child.fused_on = ()
    return part.to(memory_format=torch.channels_last)


def with_torchs_ops(system: System, dtype: torch.dtype, fused: bool = False) -> System:
    """The same weights in networks that call no op of ours."""
    parts = {name: by_torch(copy.deepcopy(part).to(dtype), fused) for name, part in system.parts().items()}
    return dataclasses.replace(system, **parts)


def compiled(system: System) -> System:
    """Our system with the denoiser, which runs S x N times, compiled by torch.compile."""
    denoiser = copy.deepcopy(system.denoiser)
    denoiser.patches = torch.compile(denoiser.patches, dynamic=False)  # type: ignore[method-assign]
    return dataclasses.replace(system, denoiser=denoiser)


def condition(system: System, planes: Tensor) -> tuple[Condition, Tensor, Tensor]:
    """The condition of slices with neighbours (Z, P C, H, W), and X and Y (Z, 1, H, W), in eager torch."""
    b = ensemble.middle_slice(system, planes).contiguous(memory_format=torch.channels_last)
    a, mixed = system.autoencoders_a(b), system.autoencoders_b(b)
    mu = a.mean(0)
    inter = (mixed.mean(0) - mu).abs().mean(1, keepdim=True)
    intra = (a - mu).square().mean(0).mean(1, keepdim=True).sqrt()
    scale = system.description.discrepancy_scale
    joined = torch.cat((planes, inter * scale, intra * scale), 1)
    return system.condition(joined.contiguous(memory_format=torch.channels_last)), inter, intra


class _Network(nn.Module):
    """The network as the inferers call it; the condition kept, or computed again at every step.

    Rows are samples of the slices, sample after sample.
    """

    def __init__(self, system: System, planes: Tensor, keep: bool, denoiser=None) -> None:
        super().__init__()
        self.system, self.planes, self.keep = (
            [system],
            planes,
            keep,
        )  # in a list: no submodules are registered
        self.denoiser = [system.denoiser if denoiser is None else denoiser]
        self.condition, self.inter, self.intra = condition(system, planes)
        self._of_rows: dict[int, Condition] = {}

    def forward(self, x, timesteps, context=None):
        kept = self._rows(len(x)) if self.keep else condition(self.system[0], self.planes)[0]
        return predicted_sample(self.denoiser[0](x, kept, timesteps.reshape(1).to(x.device)))

    def _rows(self, rows: int) -> Condition:
        """The condition of some samples of each slice, made once."""
        if rows not in self._of_rows:
            samples = rows // len(self.planes)
            evidence = self.condition.evidence.repeat(samples, 1, 1, 1)
            self._of_rows[rows] = Condition(self.condition.features, evidence)
        return self._of_rows[rows]


def _scheduler(kind, system: System, steps: int, **options):
    scheduler = kind(
        num_train_timesteps=system.schedule.steps, clip_sample=True, prediction_type="sample", **options
    )
    scheduler.set_timesteps(steps)
    scheduler.timesteps = system.schedule.timesteps(steps)  # ours, so that all take the same steps
    scheduler.alphas_cumprod = system.schedule.alpha_bar().float()
    return scheduler


def _drive(library: str, system: System, steps: int):
    """A function (network, x_T) -> x_0 of a library's own loop."""
    if library == "MONAI":
        from monai.inferers import DiffusionInferer
        from monai.networks.schedulers import DDIMScheduler as MonaiScheduler

        monai = _scheduler(MonaiScheduler, system, steps)
        inferer = DiffusionInferer(monai)
        return lambda network, x: inferer.sample(x, network, monai, verbose=False)
    from diffusers import DDIMScheduler

    theirs = _scheduler(DDIMScheduler, system, steps, timestep_spacing="trailing")

    def loop(network, x):
        for t in theirs.timesteps:
            x = theirs.step(network(x, t), t, x, use_clipped_model_output=True).prev_sample
        return x

    return loop


def _maps(
    drive: Drive,
    make_network: Callable[[Tensor], _Network],
    slices: Slices,
    system: System,
    config: SamplingConfig,
    noise: Noise,
    batch: int,
    rows_at_once: int,
) -> ensemble.Maps:
    """The four maps of `Session.run`, from the same slices on the CPU back to the CPU.

    As ours, a rival gathers the planes, copies them to the device batch by batch, draws several samples of them as
    one batch, and copies probability, uncertainty, X and Y back.
    """
    own = system.condition.config
    planes = slices.planes(own.context, own.mirrored)
    maps = ensemble.Maps(*(torch.zeros_like(slices.image[:, :1]) for _ in range(4)))
    for first in range(0, len(planes), batch):
        where = slice(first, min(first + batch, len(planes)))
        part = planes[where].to(system.device, system.dtype)
        network = make_network(part)
        at_once = max(1, rows_at_once // len(part)) if network.keep else 1
        draws = []
        for samples in torch.arange(config.samples).split(at_once):
            x = torch.cat([noise(part, first, s) for s in samples.tolist()])
            drawn = (drive(network, x).float() + 1) / 2
            draws.append(drawn.unflatten(0, (len(samples), len(part))))
        stacked = torch.cat(draws).clamp(0, 1)
        maps.probability[where] = stacked.mean(0)
        maps.uncertainty[where] = stacked.var(0, correction=min(1, config.samples - 1))
        maps.inter[where] = network.inter
        maps.intra[where] = network.intra
    return maps


def compared(config: SamplingConfig) -> SamplingConfig:
    """The configuration with steps that the rivals' schedulers can do, too."""
    return dataclasses.replace(config, sampler="ddim", eta=0.0, stop=0.0, mirror=False)


@dataclass(frozen=True)
class Variant:
    """One way in which a library drives our networks.

    library : "diffusers" or "MONAI"
    dtype : of the networks, which then call torch's ops alone
    condition : whether it is kept or computed at every step, and what else is fused or compiled
    """

    library: str
    dtype: torch.dtype
    condition: str

    @property
    def name(self) -> str:
        """As it is called in the results."""
        return f"{self.library}, {str(self.dtype)[6:]}, condition {self.condition}"


VARIANTS = tuple(
    Variant(library, dtype, kept)
    for library in ("diffusers", "MONAI")
    for dtype in (torch.float32, torch.bfloat16)
    for kept in ("at every step", "kept", "kept, our fused convolutions", "kept, compiled")
    if not ("compiled" in kept and library == "MONAI")
    and not (kept == "at every step" and dtype == torch.bfloat16)
    and not ("fused" in kept and dtype == torch.float32)
)
OURS, REFERENCE, COMPILED = "ours", "ours, DDMD_BACKEND=reference", "ours, the denoiser compiled"
NAMES = (OURS, REFERENCE, COMPILED, *(variant.name for variant in VARIANTS))


def chosen_names(words: Sequence[str] = (), without: Sequence[str] = ()) -> list[str]:
    """Ours, and the rivals whose names contain one of the words (all where there are none) and none of `without`.

    Examples
    --------
    >>> chosen_names(["reference", "MONAI"], ["every step", "bfloat16"])
    ['ours', 'ours, DDMD_BACKEND=reference', 'MONAI, float32, condition kept']
    """
    rest = [
        name
        for name in NAMES[1:]
        if (not words or any(word in name for word in words)) and not any(word in name for word in without)
    ]
    return [OURS, *rest]


class Rivals:
    """Ours and its rivals on one system. Networks, sessions and compiled code are made once and kept.

    Parameters
    ----------
    system : System
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self._systems: dict[tuple[torch.dtype, bool], System] = {}
        self._compiled: dict[torch.dtype, Any] = {}
        self._sessions: dict[str, Session] = {}

    def work(
        self, name: str, slices: Slices, config: SamplingConfig
    ) -> tuple[Callable[[], ensemble.Maps], Callable[[], ensemble.Maps]]:
        """What one side does with the slices: once from our noise, for comparison, and as it is measured.

        Ours makes the same noise in both. `config` is one of `compared`.
        """
        if name in (OURS, REFERENCE, COMPILED):
            run = self._ours(name, slices, config)
            return run, run
        variant = next(variant for variant in VARIANTS if variant.name == name)
        drive = _drive(variant.library, self.system, config.steps)
        plain = self._with_torchs_ops(variant.dtype, "fused" in variant.condition)
        faster = self._compiled_denoiser(variant.dtype) if "compiled" in variant.condition else None
        batch = config.batch or default_batch_size(self.system, *slices.image.shape[2:])
        rows = CPU_ROWS if self.system.device.type == "cpu" else CUDA_ROWS

        def network(part: Tensor) -> _Network:
            return _Network(plain, part, variant.condition != "at every step", faster)

        def run_from(noise: Noise) -> ensemble.Maps:
            with torch.inference_mode():
                return _maps(drive, network, slices, plain, config, noise, batch, rows)

        return lambda: run_from(self._our_noise(slices, config)), lambda: run_from(_torch_noise)

    def _ours(self, name: str, slices: Slices, config: SamplingConfig) -> Callable[[], ensemble.Maps]:
        """A session that is kept, as a detector keeps it, and its maps on the CPU.

        The reference backend has a session of its own: a graph captured before would replay our kernels.
        """
        if name not in self._sessions:
            system = compiled(self.system) if name == COMPILED else dataclasses.replace(self.system)
            self._sessions[name] = Session(system)
        session = self._sessions[name]

        def run() -> ensemble.Maps:
            with ops.backend("reference" if name == REFERENCE else "auto"):
                return session.run(slices, config).cpu()

        return run

    def _with_torchs_ops(self, dtype: torch.dtype, fused: bool) -> System:
        if (dtype, fused) not in self._systems:
            self._systems[dtype, fused] = with_torchs_ops(self.system, dtype, fused)
        return self._systems[dtype, fused]

    def _compiled_denoiser(self, dtype: torch.dtype) -> Any:
        if dtype not in self._compiled:
            plain = self._with_torchs_ops(dtype, fused=False).denoiser
            mode = "max-autotune" if self.system.device.type == "cuda" else "default"
            self._compiled[dtype] = torch.compile(plain, dynamic=False, mode=mode)
        return self._compiled[dtype]

    def _our_noise(self, slices: Slices, config: SamplingConfig) -> Noise:
        device = self.system.device
        index, seed = slices.index.to(device), torch.tensor(config.seed, device=device)

        def noise(part: Tensor, first: int, sample: int) -> Tensor:
            where = index[first : first + len(part)]
            at = Coordinates(seed, torch.full_like(where, sample), where)
            return from_patches(pure_noise(to_patches(part[:, :1]).shape, at)).to(part.dtype)

        return noise


def _torch_noise(part: Tensor, first: int, sample: int) -> Tensor:
    return torch.randn_like(part[:, :1])


def difference(probability: Tensor, expected: Tensor) -> float:
    """Sum of absolute differences over the sum of the expected probabilities."""
    return float((probability - expected).abs().sum() / expected.sum())
