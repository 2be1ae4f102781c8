"""The rivals of a whole detection: MONAI's inferer and diffusers' scheduler driving the same networks."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Work, alternate
from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.inference import ensemble
from ddmd.inference.session import SamplingConfig
from ddmd.inference.slices import Slices
from ddmd.models.autoencoder import NormSiLU
from ddmd.models.checkpoint import System
from ddmd.models.denoiser import Condition, from_patches, predicted_sample, to_patches
from ddmd.models.fused_convolution import FusedConv2d

QUICK_ROUNDS, SLOW_ROUNDS = 9, 3
TOLERANCE = 0.1  # sum of differences in probability over its sum, at which two loops still do the same work


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


def by_torch(part: nn.Module, folded: bool = False) -> nn.Module:
    """A network whose modules of ours are replaced by torch's ops; `folded` leaves it our convolutions."""
    for module in list(part.modules()):
        for name, child in module.named_children():
            if isinstance(child, NormSiLU):
                setattr(module, name, TorchNormSiLU(child))
            elif isinstance(child, FusedConv2d) and not folded:
                child.folded_on = ()
    return part.to(memory_format=torch.channels_last)


def with_torchs_ops(system: System, dtype: torch.dtype, folded: bool = False) -> System:
    """The same weights in networks that call no op of ours."""
    parts = {name: by_torch(copy.deepcopy(part).to(dtype), folded) for name, part in system.parts().items()}
    return dataclasses.replace(system, **parts)


def compiled(system: System) -> System:
    """Ours with the part that runs S x N times given to torch.compile: would it be faster still?"""
    denoiser = copy.deepcopy(system.denoiser)
    denoiser.patches = torch.compile(denoiser.patches, dynamic=False)  # type: ignore[method-assign]
    return dataclasses.replace(system, denoiser=denoiser)


def condition(system: System, planes: Tensor) -> Condition:
    """X, Y and what follows from them, in eager torch."""
    b = ensemble.middle_slice(system, planes).contiguous(memory_format=torch.channels_last)
    a, mixed = system.autoencoders_a(b), system.autoencoders_b(b)
    mu = a.mean(0)
    inter = (mixed.mean(0) - mu).abs().mean(1, keepdim=True)
    intra = (a - mu).square().mean(0).mean(1, keepdim=True).sqrt()
    scale = system.description.discrepancy_scale
    joined = torch.cat((planes, inter * scale, intra * scale), 1)
    return system.condition(joined.contiguous(memory_format=torch.channels_last))


class _Network(nn.Module):
    """The network as the inferers want it; the condition kept, or computed anew at every step."""

    def __init__(self, system: System, planes: Tensor, cached: bool, denoiser=None) -> None:
        super().__init__()
        self.system, self.planes = [system], planes  # in a list: no submodules are registered
        self.denoiser = [system.denoiser if denoiser is None else denoiser]
        self.known = condition(system, planes) if cached else None

    def forward(self, x, timesteps, context=None):
        known = self.known or condition(self.system[0], self.planes)
        t = timesteps.expand(len(x)).to(x.device)
        return predicted_sample(self.denoiser[0](x, known, t))


def _scheduler(kind, system: System, steps: int, **options):
    made = kind(
        num_train_timesteps=system.schedule.steps, clip_sample=True, prediction_type="sample", **options
    )
    made.set_timesteps(steps)
    made.timesteps = system.schedule.timesteps(steps)  # ours, so that all do the same steps
    made.alphas_cumprod = system.schedule.alpha_bar().float()
    return made


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


def _mean_and_variance(
    drive, make_network, planes: Tensor, config: SamplingConfig, noise, batch: int
) -> Tensor:
    means = []
    for first in range(0, len(planes), batch):
        part = planes[first : first + batch]
        network = make_network(part)
        drawn = torch.stack(
            [(drive(network, noise(part, first, s)).float() + 1) / 2 for s in range(config.samples)]
        )
        means.append(drawn.clamp(0, 1).mean(0))
        drawn.var(0, correction=min(1, config.samples - 1))
    return torch.cat(means)


def compared(config: SamplingConfig) -> SamplingConfig:
    """What all sides do: the steps of a configuration as the rivals' schedulers know them."""
    return dataclasses.replace(config, sampler="ddim", eta=0.0, stop=0.0, mirror=False)


def compare(
    system: System, slices: Slices, config: SamplingConfig, compiling: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of `ensemble.detect_slices` ("ours") and of each rival, and why a rival is missing.

    Every round runs all of them, the slowest in rounds of their own with ours. A rival whose probabilities are not ours, from the same x_T, is not
    reported.
    """
    config = compared(config)
    device = system.device
    seen = system.condition.config
    planes = slices.planes(seen.context, seen.mirrored).to(device)
    batch = config.batch or ensemble.default_batch_size(system, *planes.shape[2:])
    index, seed = slices.index.to(device), torch.tensor(config.seed, device=device)
    wanted = ensemble.detect_slices(system, slices, config).probability
    work: dict[str, Work] = {"ours": lambda: ensemble.detect_slices(system, slices, config)}
    missing: dict[str, str] = {}

    def ours_noise(part, first, sample):
        where = index[first : first + len(part)]
        at = Coordinates(seed, torch.full_like(where, sample), where)
        return from_patches(pure_noise(to_patches(part[:, :1].float()), at)).to(part.dtype)

    def own_noise(part, first, sample):
        return torch.randn_like(part[:, :1])

    for library in ("diffusers", "MONAI"):
        for dtype in (torch.float32, torch.bfloat16):
            for how in (
                "condition at every step",
                "condition kept",
                "condition kept, our folded convolutions",
                "condition kept, compiled",
            ):
                name = f"{library}, {str(dtype)[6:]}, {how}"
                if "compiled" in how and (library == "MONAI" or not compiling):
                    continue
                if how == "condition at every step" and dtype == torch.bfloat16:
                    continue
                if "folded" in how and dtype == torch.float32:
                    continue
                try:
                    drive = _drive(library, system, config.steps)
                    plain = with_torchs_ops(system, dtype, "folded" in how)
                    faster = torch.compile(plain.denoiser, dynamic=False) if "compiled" in how else None

                    def run(noise, plain=plain, drive=drive, how=how, dtype=dtype, faster=faster):
                        def network(part):
                            return _Network(plain, part, how != "condition at every step", faster)

                        with torch.inference_mode():
                            return _mean_and_variance(drive, network, planes.to(dtype), config, noise, batch)

                    off = float((run(ours_noise).cpu() - wanted).abs().sum() / wanted.sum())
                except Exception as error:  # a rival that does not run here is said to be missing
                    missing[name] = (
                        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    )
                    continue
                if off > TOLERANCE:
                    missing[name] = f"its probabilities are off ours by {off:.3f} of their sum"
                else:
                    work[name] = lambda run=run: run(own_noise)
    if compiling:
        name = "ours, the denoiser compiled"
        try:
            fast = compiled(system)
            found = ensemble.detect_slices(fast, slices, config).probability
            if float((found - wanted).abs().sum() / wanted.sum()) <= TOLERANCE:
                work[name] = lambda: ensemble.detect_slices(fast, slices, config)
            else:
                missing[name] = "its probabilities are not ours"
        except Exception as error:
            missing[name] = type(error).__name__
    slow = {name: run for name, run in work.items() if "every step" in name}
    quick = {name: run for name, run in work.items() if name not in slow}
    seconds = alternate(quick, device.type, QUICK_ROUNDS, warm=1)
    with_slow = alternate({"ours": work["ours"], **slow}, device.type, SLOW_ROUNDS, warm=1)
    seconds |= {name: with_slow[name] / with_slow["ours"] * seconds["ours"] for name in slow}
    with ops.backend("reference"):
        seconds["ours, DDMD_BACKEND=reference"] = alternate({"": work["ours"]}, device.type, 1, warm=1)[""]
    return seconds, missing


def one_member(system: System, number: int) -> nn.Module:
    """Auto-encoder `number` of ensemble A on its own, by torch's ops."""
    whole = system.autoencoders_a
    members = whole.config.members
    alone = type(whole)(dataclasses.replace(whole.config, members=1))
    state = {key: value.chunk(members)[number] for key, value in whole.state_dict().items()}
    alone.load_state_dict(state)
    return by_torch(alone.to(system.device, system.dtype).eval())


def autoencoders_one_by_one(system: System, slices: Slices) -> float:
    """How many times longer the K auto-encoders of A take one slice and one member at a time."""
    b = slices.image.to(system.device, system.dtype, memory_format=torch.channels_last)
    members = [one_member(system, k) for k in range(system.autoencoders_a.config.members)]
    batch = ensemble.default_batch_size(system, *b.shape[2:])
    with torch.inference_mode():
        together = torch.cat([system.autoencoders_a(part) for part in b.split(batch)], 1)
        apart = torch.stack([torch.cat([m(s)[0] for s in b.split(1)]) for m in members])
        if float((together - apart).float().abs().mean()) > 1e-2:
            raise RuntimeError("the members alone do not give what the ensemble gives")
        seconds = alternate(
            {
                "together": lambda: [system.autoencoders_a(part) for part in b.split(batch)],
                "apart": lambda: [m(s) for m in members for s in b.split(1)],
            },
            system.device.type,
            3,
        )
    return seconds["apart"] / seconds["together"]
