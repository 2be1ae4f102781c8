"""One batch of slices: what is computed once, and what it may not do so that a CUDA graph can hold it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ddmd import ops
from ddmd.diffusion.noise import Coordinates, pure_noise
from ddmd.diffusion.samplers import SamplingConfig
from ddmd.inference import ensemble
from ddmd.inference.ensemble import SamplingTable, compute_batch
from ddmd.inference.session import detect_slices
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from ddmd.models.denoiser import from_patches, predicted_sample, to_patches
from tests.volumes import head, tiny_system

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
    x = pure_noise(like.shape, Coordinates(seed, sample, index))
    x0 = torch.zeros_like(x) if sampler == "dpm++2m" else None
    table = system.schedule.coefficients(config.steps, sampler, eta)
    for i, t in enumerate(system.schedule.timesteps(config.steps)):
        condition, _, _ = ensemble.condition_on(system, planes)
        output = predicted_sample(system.denoiser(from_patches(x), condition, t.expand(len(x))))
        ops.denoise_step(x, to_patches(output), table, torch.tensor(i), seed, sample, index, x0)
    drawn = ((from_patches(x) + 1) / 2).clamp(0, 1).unflatten(0, (config.samples, z))
    maps = detect_slices(system, slices, config)
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


def on_meta(dtype, system=None, **options):
    """Arguments of `compute_batch` on a device whose tensors have no values: asking for one raises."""
    system = to_device(system or tiny_system(), "meta", dtype)
    config = SamplingConfig(**options)
    planes = torch.empty(6, system.condition.config.inputs - 2, 48, 32, device="meta")
    index, seed = (torch.empty(n, dtype=torch.int64, device="meta") for n in ((6,), ()))
    return system, config, SamplingTable.of(system, config), planes, index, seed


@torch.inference_mode()
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_batch_asks_nothing_of_the_device(sampler, eta, mirror, dtype):
    """Neither .item(), a branch on data, nor a copy from the host, each of which would wait."""
    arguments = on_meta(dtype, samples=5, steps=3, sampler=sampler, eta=eta, mirror=mirror)
    with Watch() as watch:
        maps = compute_batch(*arguments, rows_at_once=12)
    for values in maps.tensors():
        assert values.shape == (6, 1, 48, 32)
        assert values.dtype == torch.float32
    assert watch.seen == []


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["supervised", "anomaly"])
def test_a_baseline_asks_nothing_of_the_device_or_of_networks_that_it_has_not(kind):
    system = tiny_system()
    named = replace(system, description=replace(system.description, system=kind))
    arguments = on_meta(torch.float32, named)
    with Watch() as watch:
        maps = compute_batch(*arguments, rows_at_once=12)
    assert maps.probability.shape == (6, 1, 48, 32)
    assert watch.seen == []


@torch.inference_mode()
def test_the_check_above_notices_a_batch_that_waits(monkeypatch):
    arguments = on_meta(torch.float32, steps=1)
    plain = pure_noise
    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "pure_noise", lambda shape, at: plain(shape, at) * float(at.sample[0]))
        with pytest.raises(RuntimeError, match="meta"):
            compute_batch(*arguments, rows_at_once=12)
    monkeypatch.setattr(
        ensemble,
        "pure_noise",
        lambda shape, at: plain(shape, at) * torch.tensor(2.0, device=at.sample.device),
    )
    with Watch() as watch:
        compute_batch(*arguments, rows_at_once=12)
    assert watch.seen


def calls(config, rows_at_once):
    """How often the denoiser, the networks before it and the statistics are called for a batch."""
    system, _, table, planes, index, seed = on_meta(torch.float32, **config)
    counted = {"denoiser": 0, "condition": 0, "statistics": 0}

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            counted["statistics"] += "ensemble_update" in str(func)
            return func(*args, **(kwargs or {}))

    def count(name, module, attribute):
        plain = getattr(module, attribute)

        def counting(*args):
            counted[name] += 1
            return plain(*args)

        object.__setattr__(module, attribute, counting)

    count("denoiser", system.denoiser, "patches")
    count("condition", system.condition, "forward")
    with torch.inference_mode(), Count():
        compute_batch(system, SamplingConfig(**config), table, planes, index, seed, rows_at_once)
    return tuple(counted.values())


def test_samples_of_slices_are_rows_of_one_batch():
    """S x Z rows at once: N calls of the denoiser whatever S is; sample after sample: S N."""
    config = {"samples": 6, "steps": 3}
    assert calls(config, 36) == (3, 1, 1)
    assert calls(config, 12) == (9, 1, 3)
    assert calls(config, 1) == (18, 1, 6)
    assert calls(config | {"mirror": True}, 36) == (6, 2, 2)
    assert calls(config | {"samples": 1, "mirror": True}, 36) == (3, 1, 1)


@torch.inference_mode()
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_rows_at_once_do_not_change_the_result(slices, mirror, sampler, eta):
    system = tiny_system()
    config = SamplingConfig(samples=5, steps=2, sampler=sampler, eta=eta, mirror=mirror)
    table, planes = SamplingTable.of(system, config), slices.planes(1, mirrored=True)
    results = [
        compute_batch(system, config, table, planes, slices.index, torch.tensor(7), rows)
        for rows in (1, 2 * len(slices), 1000)
    ]
    for other in results[1:]:
        for a, b in zip(results[0].tensors(), other.tensors(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_bfloat16_finds_what_float32_finds(slices):
    system = tiny_system()
    config = SamplingConfig(samples=3, steps=4)
    exact = detect_slices(system, slices, config)
    close = detect_slices(to_device(system, "cpu", torch.bfloat16), slices, config)
    assert close.probability.dtype == torch.float32
    assert (close.probability - exact.probability).abs().mean() < 0.02
    assert not torch.equal(close.probability, exact.probability)


def test_every_second_sample_is_drawn_on_the_mirror_image(slices):
    system = tiny_system()
    plain = SamplingConfig(samples=4, steps=2)
    flipped = replace(slices, image=slices.image.flip(-1))
    with torch.inference_mode():
        table, drawn = SamplingTable.of(system, plain), []
        modulations = system.denoiser.modulations(table.times)
        for sample in range(4):
            own = (slices, flipped)[sample % 2]
            condition, _, _ = ensemble.condition_on(system, own.planes(1, mirrored=True))
            mask = ensemble.draw_samples(
                system, plain, table, condition, modulations, slices.index, torch.tensor(0),
                torch.tensor([sample]),
            )[0]  # fmt: skip
            drawn.append(mask.flip(-1) if sample % 2 else mask)
    maps = detect_slices(system, slices, replace(plain, mirror=True))
    assert torch.allclose(maps.probability, torch.stack(drawn).mean(0), atol=1e-5)
    assert torch.allclose(maps.uncertainty, torch.stack(drawn).var(0), atol=1e-5)


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
    from ddmd.training.device_slices import DeviceSlices
    from ddmd.training.prepared_case import PreparedCase

    config = tiny_system().condition.config
    brain = slices.brain[:, 0].numpy()
    case = PreparedCase(
        case=Case("p", "p", "s", {}), image=slices.image.numpy(), brain=brain, head=brain,
        label=np.zeros(len(slices), np.int8), offset=slices.offset, offset_mm=1.0,
    )  # fmt: skip
    trained = DeviceSlices([case], torch.device("cpu"), 1.0).planes(
        0, range(len(slices)), config.context, config.mirrored
    )
    detected = slices.planes(config.context, config.mirrored)
    # training keeps float16: half robust z-scores of -2 to 3 above that of air
    torch.testing.assert_close(trained, detected, atol=2e-3, rtol=0.0)
