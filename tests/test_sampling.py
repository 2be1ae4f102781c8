"""The sampling loop: what is computed once, what it may not do, and its CUDA graph."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.inference import ensemble, session
from ddmd.inference.session import GRAPHS, Sampling, SamplingConfig, sampling_of
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from ddmd.models.denoiser import Condition, from_patches, predicted_sample, to_patches
from tests.volumes import head, tiny_system

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SAMPLERS = [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0), ("dpm++2m", 0.0)]


@pytest.fixture
def slices(rng):
    values, affine = head(rng, (40, 48, 8))
    return extract(Volume.from_array({"flair": values}, affine), ("flair",), SliceGrid(4.0, 16))


def to_device(system, device, dtype):
    parts = {name: copy.deepcopy(part).to(device, dtype) for name, part in system.parts().items()}
    return replace(system, **parts)


@torch.inference_mode()
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_the_condition_once_is_the_plain_network(slices, sampler, eta):
    """Every row its own whole network at every step, nothing kept: the same draws."""
    system = tiny_system()
    config = SamplingConfig(samples=3, steps=4, sampler=sampler, eta=eta, seed=5)
    z = len(slices)
    planes = slices.planes(1, mirrored=True).repeat(config.samples, 1, 1, 1)
    index = slices.index.repeat(config.samples)
    sample = torch.arange(config.samples).repeat_interleave(z)
    seed = torch.tensor(config.seed)
    like = to_patches(torch.zeros(len(planes), 1, *planes.shape[2:]))
    x = pure_noise(like, Coordinates(seed, sample, index))
    x0 = torch.zeros_like(x) if sampler == "dpm++2m" else None
    table = system.schedule.sampler(config.steps, sampler, eta)
    for i, t in enumerate(system.schedule.timesteps(config.steps)):
        condition, _, _ = ensemble.condition_on(system, planes)
        output = predicted_sample(system.denoiser(from_patches(x), condition, t.expand(len(x))))
        ops.denoise_step(x, to_patches(output), table, torch.tensor(i), seed, sample, index, x0)
    drawn = ((from_patches(x) + 1) / 2).clamp(0, 1).unflatten(0, (config.samples, z))
    maps = ensemble.detect_slices(system, slices, config)
    assert torch.allclose(maps.probability, drawn.mean(0), atol=1e-4)
    assert torch.allclose(maps.uncertainty, drawn.var(0), atol=1e-4)
    assert maps.uncertainty.max() > 0


FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)


class Watch(TorchFunctionMode):
    """Notes tensors that the host makes, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        moved = first is not None and isinstance(result, torch.Tensor) and result.device != first.device
        if moved or func in FROM_HOST:
            self.seen.append(str(func))
        return result


def on_meta(dtype, **options):
    """A sampling and its arguments on a device whose tensors have no values: asking for one raises."""
    sampling = Sampling(to_device(tiny_system(), "meta", dtype), SamplingConfig(**options))
    features = torch.empty(6, 8, 12, 10, device="meta", dtype=dtype)
    condition = Condition(features, torch.empty(6, 1, 48, 40, device="meta", dtype=dtype))
    return sampling, condition, *(torch.empty(n, dtype=torch.int64, device="meta") for n in ((6,), ()))


@torch.inference_mode()
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_asks_nothing_of_the_device(sampler, eta, dtype):
    """Neither .item(), a branch on data, nor a copy from the host, each of which would wait."""
    sampling, *args = on_meta(dtype, steps=3, sampler=sampler, eta=eta)
    with Watch() as watch:
        drawn = sampling.draw(*args)
    assert drawn.shape == (6, 1, 48, 40)
    assert drawn.dtype == torch.float32
    assert watch.seen == []


@pytest.mark.parametrize("kind", ["supervised", "anomaly"])
def test_a_baseline_asks_nothing_of_networks_that_it_has_not(kind):
    """They are left where they were built; a sampling is made of every system."""
    system = tiny_system()
    named = replace(system, description=replace(system.description, system=kind))
    Sampling(to_device(named, "meta", torch.float32), SamplingConfig())


def test_the_check_above_notices_a_loop_that_waits(monkeypatch):
    sampling, *args = on_meta(torch.float32, steps=1)
    plain = pure_noise
    with monkeypatch.context() as patch:
        patch.setattr(session, "pure_noise", lambda like, at: plain(like, at) * float(at.sample[0]))
        with pytest.raises(RuntimeError, match="meta"):
            sampling.draw(*args)
    monkeypatch.setattr(
        session, "pure_noise", lambda like, at: plain(like, at) * torch.tensor(2.0, device=like.device)
    )
    with Watch() as watch:
        sampling.draw(*args)
    assert watch.seen


def test_bfloat16_finds_what_float32_finds(slices):
    system = tiny_system()
    config = SamplingConfig(samples=3, steps=4)
    exact = ensemble.detect_slices(system, slices, config)
    close = ensemble.detect_slices(to_device(system, "cpu", torch.bfloat16), slices, config)
    assert close.probability.dtype == torch.float32
    assert (close.probability - exact.probability).abs().mean() < 0.02
    assert not torch.equal(close.probability, exact.probability)


def test_every_second_sample_is_drawn_on_the_mirror_image(slices):
    system = tiny_system()
    plain = SamplingConfig(samples=4, steps=2)
    flipped = replace(slices, image=slices.image.flip(-1))
    with torch.inference_mode():
        sampling, index, drawn = sampling_of(system, plain), slices.index, []
        for sample in range(4):
            own = (slices, flipped)[sample % 2]
            condition, _, _ = ensemble.condition_on(system, own.planes(1, mirrored=True))
            mask = sampling.draw(condition, index, torch.tensor(sample))
            drawn.append(mask.flip(-1) if sample % 2 else mask)
    maps = ensemble.detect_slices(system, slices, replace(plain, mirror=True))
    assert torch.allclose(maps.probability, torch.stack(drawn).mean(0), atol=1e-5)
    assert torch.allclose(maps.uncertainty, torch.stack(drawn).var(0), atol=1e-5)


def test_a_sampling_is_made_once_a_configuration_and_system():
    system, config = tiny_system(), SamplingConfig(steps=3)
    first = sampling_of(system, config)
    assert sampling_of(system, SamplingConfig(steps=3)) is first
    assert sampling_of(system, SamplingConfig(steps=4)) is not first
    assert len(system.samplings) == 1
    assert replace(system).samplings == {}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_draws_what_the_loop_draws(slices, sampler, eta, dtype, device):
    system = to_device(tiny_system(), device, dtype)
    sampling = sampling_of(system, SamplingConfig(steps=4, sampler=sampler, eta=eta))
    planes, index = slices.planes(1, mirrored=True).to(device), slices.index.to(device)
    with torch.inference_mode():
        for part in (slice(0, 4), slice(1, 5), slice(0, 2)):
            condition, _, _ = ensemble.condition_on(system, planes[part])
            draw = sampling.bind(condition, index[part])
            for sample in (0, 3):
                replayed = draw(sample).clone()
                plain = sampling.draw(condition, index[part], torch.tensor(sample, device=device))
                assert torch.allclose(replayed, plain, atol=1e-6)
        assert len(sampling.captured) == 2
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            draw(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for rows in range(1, GRAPHS + 3):
            condition, _, _ = ensemble.condition_on(system, planes[:1].repeat(rows, 1, 1, 1))
            sampling.bind(condition, index[:1].repeat(rows))
        assert len(sampling.captured) == GRAPHS


def test_the_networks_see_a_slice_between_its_neighbours_and_its_mirror_image(slices):
    system = tiny_system()
    planes = slices.planes(1, mirrored=True)
    assert planes.shape[1] == system.condition.config.inputs - 2
    assert torch.equal(planes[:, 1:2], slices.image)
    assert torch.equal(ensemble.middle_slice(system, planes), slices.image)
    assert torch.equal(planes[2, 0], slices.image[2 - slices.offset, 0])
    assert torch.equal(planes[:, 3:], slices.image.flip(-1))
    flipped = replace(slices, image=slices.image.flip(-1)).planes(1, mirrored=True)
    assert torch.equal(planes.flip(-1), flipped), "mirroring everything is seeing the mirrored head"


def test_training_and_detection_see_the_same_planes(slices):
    import numpy as np

    from ddmd.cohort.cases import Case
    from ddmd.training.dataset import PreparedCase, with_mirror

    system = tiny_system()
    brain = slices.brain[:, 0].numpy()
    item = PreparedCase(
        case=Case("p", "p", "s", {}), image=slices.image.numpy(), brain=brain, head=brain,
        label=np.zeros(len(slices), np.int8), offset=slices.offset, offset_mm=1.0,
    )  # fmt: skip
    seen = system.condition.config
    trained = np.stack([with_mirror(item.planes(z, seen.context), seen) for z in range(len(slices))])
    detected = slices.planes(seen.context, seen.mirrored)
    assert torch.equal(torch.from_numpy(trained).flatten(1, 2), detected)
