"""How much work the networks do, how fast the device could do it, and what batching and fusing save."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals import by_torch
from benchmarks.timing import alternate
from ddmd.inference import ensemble
from ddmd.inference.detector import Detector
from ddmd.inference.session import SamplingConfig, default_batch_size, detect_slices
from ddmd.inference.slices import Slices
from ddmd.models.checkpoint import System
from ddmd.models.fused_convolution import FusedConv2d


def peaks(device: str) -> dict[str, float]:
    """FLOP/s of a convolution like the network's and of a matrix product, in float32 and bfloat16."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8, 64, 96, 96, device=device).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(64, 64, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        m = torch.randn(2048, 2048, device=device).to(dtype)
        with torch.inference_mode():
            seconds = alternate(
                {
                    "convolution": lambda x=x, w=w: functional.conv2d(x, w, padding=1),
                    "matrix product": lambda m=m: m @ m,
                },
                device,
                7,
            )
        work = {"convolution": 2 * x.numel() * 64 * 9, "matrix product": 2 * 2048**3}
        rates |= {f"{name}, {str(dtype)[6:]}": work[name] / seconds[name] for name in work}
    return rates


@contextmanager
def fused_on(*devices: str) -> Iterator[None]:
    """Convolutions are fused on these devices, and on no other."""
    kept, FusedConv2d.fused_on = FusedConv2d.fused_on, devices
    try:
        yield
    finally:
        FusedConv2d.fused_on = kept


def flops(detector: Detector, slices: Slices, config: SamplingConfig) -> int:
    """Multiplications and additions of the networks in one `detect_slices`; counted on the CPU, where no
    replayed graph hides them, with convolutions fused as on the detector's device."""
    system = detector.system
    parts = {name: copy.deepcopy(part).cpu() for name, part in system.parts().items()}
    fused = ("cpu",) if system.device.type in FusedConv2d.fused_on else ()
    with FlopCounterMode(display=False) as counter, fused_on(*fused):
        detect_slices(dataclasses.replace(system, **parts), slices, config)
    return int(counter.get_total_flops())


def fusion(detector: Detector, slices: Slices) -> float:
    """Time of auto-encoders and condition network without fused convolutions, over their time with them."""
    system, condition = detector.system, detector.system.condition.config
    planes = slices.planes(condition.context, condition.mirrored).to(system.device)

    def run(*devices: str) -> None:
        with fused_on(*devices):
            ensemble.condition_on(system, planes)

    kind = system.device.type
    with torch.inference_mode():
        seconds = alternate({"plain": run, "fused": lambda: run(kind)}, kind, 7)
    return seconds["plain"] / seconds["fused"]


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
