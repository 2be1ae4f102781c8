"""Every op through the registry, on the CPU and on a CUDA device, against the reference in float32 on the CPU."""

import pytest
import torch

from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.diffusion.schedule import Schedule
from ddmd.ops import reference
from tests.shapes import TYPES, assert_close, rows
from tests.test_ops import _arguments as arguments
from tests.volumes import tiny_system

MEMORY = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
gpu = [pytest.mark.gpu, pytest.mark.skipif(MEMORY == 0, reason="no CUDA device")]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


def moved(args: tuple, device: str) -> list:
    """Copies on a device, with their strides."""
    return [a.clone().to(device) if isinstance(a, torch.Tensor) else a for a in args]


def tensors(result: object) -> list[torch.Tensor]:
    return [
        r for r in (result if isinstance(result, tuple | list) else (result,)) if isinstance(r, torch.Tensor)
    ]


@on_each
@each_type
@pytest.mark.parametrize("op", ops.OPS)
def test_op_is_the_reference(op, dtype, device):
    args = arguments(op, dtype)
    ours, plain = moved(args, device), moved(args, "cpu")
    got = tensors(getattr(torch.ops.ddmd, op)(*ours))
    wanted = tensors(getattr(reference, op)(*plain))
    for a, r in zip(got + tensors(ours), wanted + tensors(plain), strict=True):
        assert_close(a.cpu(), r, dtype)


@on_each
@each_type
def test_gradients_are_the_references(dtype, device):
    for op in ("gaussian_kl", "pairwise_sqdist", "group_norm_silu"):
        grads = []
        for where, forced in ((device, "auto"), ("cpu", "reference")):
            torch.manual_seed(3)
            args = moved(arguments(op, dtype), where)
            leaves = [a.requires_grad_() for a in tensors(args) if a.is_floating_point()]
            with ops.backend(forced):
                out = tensors(getattr(torch.ops.ddmd, op)(*args))[0]
                grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
        for a, r in zip(*grads, strict=True):
            assert_close(a.cpu() / 16, r / 16, dtype)


@on_gpu
@pytest.mark.parametrize("op", ops.OPS)
def test_op_passes_opcheck_and_is_served_by_a_kernel(op, device, monkeypatch):
    monkeypatch.undo()
    name, why = ops.serving(op, device)
    assert name in ("C++", "Triton"), why
    result = torch.library.opcheck(getattr(torch.ops.ddmd, op).default, tuple(moved(arguments(op), device)))
    assert set(result.values()) == {"SUCCESS"}


@on_gpu
def test_no_op_of_inference_waits_for_the_device(device):
    calls = [(getattr(torch.ops.ddmd, op), moved(arguments(op), device)) for op in ops.OPS]
    for call, args in calls:
        call(*args)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call, args in calls:
            call(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each
@each_type
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (1, 0, 3, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (2, 1, 1, 1), (6, 4, 16, 64), (3, 0, 2, 2), (4, 2, 33, 130)])
def test_ensemble_moments_of_any_strides(order, shape, dtype, device):
    samples = (torch.randn(shape) + 5).to(dtype).to(device).permute(order)[..., ::2]
    if len(samples) < 2:
        samples = torch.randn(3, *samples.shape[1:]).to(samples)
    for a, r in zip(ops.ensemble_variance(samples), reference.ensemble_variance(samples.cpu()), strict=True):
        assert_close(a.cpu(), r)


@on_gpu
def test_more_elements_than_32_bits_count(device):
    if MEMORY < 20 * 2**30:
        pytest.skip(reason=f"needs 20 GiB on the device, which has {MEMORY / 2**30:.0f}")
    x = torch.zeros(2, 2**30 + 8, dtype=torch.bfloat16, device=device)
    tail = torch.randn(2, 64).to(x.dtype)
    x[:, -64:] = tail.to(device)
    mean, variance = ops.ensemble_variance(x)
    assert_close(mean[-64:].cpu(), tail.float().mean(0))
    assert_close(variance[-64:].cpu(), tail.float().var(0))
    assert not mean[:-64].any()
    del mean, variance
    state, at = x.view(2, -1), rows(2, device)
    table = Schedule().sampler(4, "ddpm").to(device)
    step = at[0]
    wanted = tail.float()
    table[:, 6] = 0  # without noise the end of a row is easily said
    ops.denoise_step(state, state.clone(), table, step, *at[1:])
    reference.denoise_step(wanted, tail.float(), table.cpu(), step.cpu(), *(a.cpu() for a in at[1:]))
    assert_close(state[:, -64:].cpu(), wanted, torch.bfloat16)


@on_gpu
def test_work_goes_to_the_current_stream(device):
    stream, x = torch.cuda.Stream(), torch.randn(5, 2**22, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x += 1
        mean, variance = ops.ensemble_variance(x)
    stream.synchronize()
    assert_close(mean.cpu(), x.cpu().mean(0))
    assert_close(variance.cpu(), x.cpu().var(0))


@on_gpu
def test_noise_and_a_whole_detection_are_those_of_the_cpu(device, rng):
    from dataclasses import replace

    from ddmd.inference.detector import Detector
    from ddmd.io.volume import Volume
    from tests.volumes import head

    at = rows(3)
    for dtype in TYPES:
        noise = [
            pure_noise((3, 1, 40, 37), Coordinates(*(a.to(d) for a in at[1:])), dtype)
            for d in ("cpu", device)
        ]
        assert_close(noise[1].cpu(), noise[0], dtype)
    system = tiny_system()
    values, affine = head(rng)
    volume = Volume.from_array({"flair": values}, affine)
    on_cpu = Detector(system).detect(volume)
    there = {name: part.to(device) for name, part in tiny_system().parts().items()}
    on_device = Detector(replace(system, **there)).detect(volume)
    difference = abs(on_cpu.probability.get_fdata() - on_device.probability.get_fdata())
    assert difference.mean() < 5e-3, f"mean {difference.mean():.1e}, largest {difference.max():.1e}"
