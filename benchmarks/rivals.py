"""The rivals of a whole detection: MONAI's inferer and diffusers' scheduler driving the same networks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Work, alternate
from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.inference import ensemble
from ddmd.inference.session import SamplingConfig, Session, default_batch_size
from ddmd.inference.slices import Slices
from ddmd.models.autoencoder import NormSiLU
from ddmd.models.checkpoint import System
from ddmd.models.denoiser import Condition, from_patches, predicted_sample, to_patches
from ddmd.models.fused_convolution import FusedConv2d

QUICK_ROUNDS, SLOW_ROUNDS = 9, 3
TOLERANCE = 0.1  # largest `_difference` at which two loops count as doing the same work


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
    """The network as the inferers call it; the condition kept, or computed again at every step."""

    def __init__(self, system: System, planes: Tensor, keep: bool, denoiser=None) -> None:
        super().__init__()
        self.system, self.planes, self.keep = (
            [system],
            planes,
            keep,
        )  # in a list: no submodules are registered
        self.denoiser = [system.denoiser if denoiser is None else denoiser]
        self.condition, self.inter, self.intra = condition(system, planes)

    def forward(self, x, timesteps, context=None):
        kept = self.condition if self.keep else condition(self.system[0], self.planes)[0]
        t = timesteps.expand(len(x)).to(x.device)
        return predicted_sample(self.denoiser[0](x, kept, t))


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


def _maps(drive, make_network, slices: Slices, system: System, config: SamplingConfig, noise, batch: int):
    """The four maps of `Session.run`, from the same slices on the CPU back to the CPU.

    As ours, a rival gathers the planes, copies them to the device batch by batch, and copies probability,
    uncertainty, X and Y back.
    """
    own = system.condition.config
    planes = slices.planes(own.context, own.mirrored)
    maps = ensemble.Maps(*(torch.zeros_like(slices.image[:, :1]) for _ in range(4)))
    for first in range(0, len(planes), batch):
        where = slice(first, min(first + batch, len(planes)))
        part = planes[where].to(system.device, system.dtype)
        network = make_network(part)
        draws = [(drive(network, noise(part, first, s)).float() + 1) / 2 for s in range(config.samples)]
        stacked = torch.stack(draws).clamp(0, 1)
        maps.probability[where] = stacked.mean(0)
        maps.uncertainty[where] = stacked.var(0, correction=min(1, config.samples - 1))
        maps.inter[where] = network.inter
        maps.intra[where] = network.intra
    return maps


def compared(config: SamplingConfig) -> SamplingConfig:
    """The configuration with steps that the rivals' schedulers can do, too."""
    return dataclasses.replace(config, sampler="ddim", eta=0.0, stop=0.0, mirror=False)


CONDITIONS = ("at every step", "kept", "kept, our fused convolutions", "kept, compiled")


def _variants(compiling: bool) -> list[tuple[str, torch.dtype, str]]:
    """(library, dtype, what becomes of the condition) of every rival."""
    return [
        (library, dtype, kept)
        for library in ("diffusers", "MONAI")
        for dtype in (torch.float32, torch.bfloat16)
        for kept in CONDITIONS
        if not ("compiled" in kept and (library == "MONAI" or not compiling))
        and not (kept == "at every step" and dtype == torch.bfloat16)
        and not ("fused" in kept and dtype == torch.float32)
    ]


def _ours(system: System, slices: Slices, config: SamplingConfig) -> Callable[[], ensemble.Maps]:
    """Our own side: a session that is kept, as a detector keeps it, and its maps on the CPU."""
    session = Session(system)
    return lambda: session.run(slices, config).cpu()


def compare(
    system: System, slices: Slices, config: SamplingConfig, compiling: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of `Session.run` ("ours") and of each rival, and why a rival is missing.

    All sides do the same work: slices on the CPU in, four maps on the CPU out. They run alternately, the slowest
    in rounds of their own with ours. A rival whose probabilities from the same x_T differ from ours is not reported.
    """
    config = compared(config)
    device = system.device
    batch = config.batch or default_batch_size(system, *slices.image.shape[2:])
    index, seed = slices.index.to(device), torch.tensor(config.seed, device=device)
    ours = _ours(system, slices, config)
    expected = ours()
    work: dict[str, Work] = {"ours": ours}
    missing: dict[str, str] = {}

    def our_noise(part, first, sample):
        where = index[first : first + len(part)]
        at = Coordinates(seed, torch.full_like(where, sample), where)
        return from_patches(pure_noise(to_patches(part[:, :1]).shape, at)).to(part.dtype)

    def torch_noise(part, first, sample):
        return torch.randn_like(part[:, :1])

    for library, dtype, kept in _variants(compiling):
        name = f"{library}, {str(dtype)[6:]}, condition {kept}"
        try:
            drive = _drive(library, system, config.steps)
            plain = with_torchs_ops(system, dtype, "fused" in kept)
            faster = torch.compile(plain.denoiser, dynamic=False) if "compiled" in kept else None

            def run(noise, plain=plain, drive=drive, kept=kept, faster=faster):
                def network(part):
                    return _Network(plain, part, kept != "at every step", faster)

                with torch.inference_mode():
                    return _maps(drive, network, slices, plain, config, noise, batch)

            difference = _difference(run(our_noise).probability, expected.probability)
        except Exception as error:  # a rival that does not run here is reported as missing
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        if difference <= TOLERANCE:
            work[name] = lambda run=run: run(torch_noise)
        else:
            missing[name] = f"its probabilities differ from ours by {difference:.3f} of their sum"
    if compiling:
        name = "ours, the denoiser compiled"
        try:
            fast = compiled(system)
            other = _ours(fast, slices, config)
            probability = other().probability
            if _difference(probability, expected.probability) <= TOLERANCE:
                work[name] = other
            else:
                missing[name] = "its probabilities are not ours"
        except Exception as error:
            missing[name] = type(error).__name__
    slow = {name: run for name, run in work.items() if "every step" in name}
    quick = {name: run for name, run in work.items() if name not in slow}
    seconds = alternate(quick, device.type, QUICK_ROUNDS, warm=1)
    with_slow = alternate({"ours": work["ours"], **slow}, device.type, SLOW_ROUNDS, warm=1)
    seconds |= {name: with_slow[name] / with_slow["ours"] * seconds["ours"] for name in slow}
    seconds["ours, DDMD_BACKEND=reference"] = _by_reference(system, slices, config)
    return seconds, missing


def _difference(probability: Tensor, expected: Tensor) -> float:
    """Sum of absolute differences over the sum of the expected probabilities."""
    return float((probability - expected).abs().sum() / expected.sum())


def _by_reference(system: System, slices: Slices, config: SamplingConfig) -> float:
    """Seconds of ours with every op in plain torch.

    The copy of the system has no captured graphs yet: a graph captured before would replay our kernels.
    """
    fresh = dataclasses.replace(system)
    with ops.backend("reference"):
        work = {"reference": _ours(fresh, slices, config)}
        return alternate(work, system.device.type, SLOW_ROUNDS, warm=1)["reference"]


def one_member(system: System, number: int) -> nn.Module:
    """Auto-encoder `number` of ensemble A on its own, by torch's ops."""
    whole = system.autoencoders_a
    members = whole.config.members
    alone = type(whole)(dataclasses.replace(whole.config, members=1))
    state = {key: value.chunk(members)[number] for key, value in whole.state_dict().items()}
    alone.load_state_dict(state)
    return by_torch(alone.to(system.device, system.dtype).eval())


def autoencoders_one_by_one(system: System, slices: Slices) -> float:
    """Time of the K auto-encoders of A, one slice and one member at a time, over their time all together."""
    b = slices.image.to(system.device, system.dtype, memory_format=torch.channels_last)
    members = [one_member(system, k) for k in range(system.autoencoders_a.config.members)]
    batch = default_batch_size(system, *b.shape[2:])
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
