"""Preparing and restoring on a device: one copy each way, no waiting in between, and the results of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddmd.inference.ensemble import Maps
from ddmd.inference.slices import SliceGrid, extract
from ddmd.inference.volume_maps import DetectionError, Prepared, draws_in_part, maps_in_part, maps_on_volume
from ddmd.io.volume import Volume
from tests.stand_in_device import DEVICE, OnDevice, StandInDevice
from tests.volumes import head, tiny_system

GRIDS = (SliceGrid(4.0, 16), SliceGrid(1.7, 16))


@pytest.fixture(params=["auto", "on"])
def volume(rng, request):
    values, affine = head(rng)
    flair, t1 = values, values.max() - values + rng.normal(size=values.shape)
    return Volume.from_array({"flair": flair, "t1": t1}, affine, skull=request.param)


def random_maps(rng, slices, on):
    def values():
        made = torch.from_numpy(rng.random((len(slices), 1, *slices.image.shape[2:])).astype(np.float32))
        return OnDevice(made) if on == DEVICE else made

    return Maps(values(), values(), values(), values())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_volume_is_uploaded_once_and_prepared_without_waiting(volume, grid):
    expected = extract(volume, ("flair", "t2", "t1"), grid)
    with StandInDevice() as device:
        slices = extract(volume, ("flair", "t2", "t1"), grid, DEVICE)
    assert len(device.counts.uploads) == 1
    assert device.counts.downloads == device.counts.waits == device.counts.allocations == []
    for name in ("image", "brain", "region"):
        made, wanted = getattr(slices, name), getattr(expected, name)
        assert isinstance(made, OnDevice)
        assert torch.allclose(made.held.float(), wanted.float(), rtol=0, atol=1e-6), name
    assert torch.equal(slices.index, expected.index)
    assert slices.image.held[:, 1].eq(-2.0).all(), "t2 is not there: air"


@pytest.mark.parametrize("grid", GRIDS)
def test_maps_come_back_in_one_copy_without_waiting(rng, volume, grid):
    state = rng.bit_generator.state
    cpu = extract(volume, ("flair",), grid)
    expected, ends = maps_in_part(cpu, random_maps(rng, cpu, "cpu"), 1.3)
    rng.bit_generator.state = state
    with StandInDevice() as device:
        slices = extract(volume, ("flair",), grid, DEVICE)
        device.counts.uploads.clear()
        parts, extremes = maps_in_part(slices, random_maps(rng, cpu, DEVICE), 1.3)
        assert device.counts.uploads == device.counts.downloads == device.counts.waits == []
        rng.bit_generator.state = state
        system = tiny_system()
        device.counts.allocations.clear()
        with torch.inference_mode():  # as `Detector.to_volume` does
            maps = maps_on_volume(Prepared(volume, slices), random_maps(rng, cpu, DEVICE), system)
    assert torch.allclose(parts.held, expected, rtol=0, atol=1e-6)
    assert torch.allclose(extremes.held, ends)
    assert device.counts.downloads == [tuple(expected.shape), (4, 2)], (
        "the maps, and what says whether they are finite"
    )
    assert device.counts.uploads == device.counts.waits == device.counts.allocations == []
    rng.bit_generator.state = state
    on_cpu = maps_on_volume(Prepared(volume, cpu), random_maps(rng, cpu, "cpu"), system)
    for name in ("probability", "uncertainty", "inter", "intra"):
        assert np.allclose(getattr(maps, name), getattr(on_cpu, name), rtol=0, atol=1e-6)
        assert not getattr(maps, name)[~volume.search_region].any()
        assert getattr(maps, name)[volume.search_region].any()


def test_each_draw_goes_up_and_comes_back_once(rng, volume):
    cpu = extract(volume, ("flair",), GRIDS[0])
    shape = (3, len(cpu), 1, *cpu.image.shape[2:])
    draws = torch.from_numpy(rng.integers(0, 256, shape).astype(np.uint8))
    expected = draws_in_part(Prepared(volume, cpu), draws, 1.3)
    with StandInDevice() as device:
        slices = extract(volume, ("flair",), GRIDS[0], DEVICE)
        device.counts.uploads.clear()
        made = draws_in_part(Prepared(volume, slices), draws, 1.3, DEVICE)
    assert np.array_equal(made, expected)
    assert device.counts.uploads == [shape[1:]] * 3
    assert len(device.counts.downloads) == 3
    assert device.counts.waits == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["probability", "intra"])
def test_a_map_that_is_not_finite_is_named(rng, volume, name, value):
    slices = extract(volume, ("flair",), GRIDS[0])
    maps = random_maps(rng, slices, "cpu")
    getattr(maps, name)[0, 0, 0, 0] = value  # in the padding, even
    with pytest.raises(DetectionError, match=f"maps of {name} are not finite: the weights .* float32; use"):
        maps_on_volume(Prepared(volume, slices), maps, tiny_system())


def test_the_stand_in_notices_what_waits_and_what_mixes():
    with StandInDevice() as device:
        there = torch.arange(6, dtype=torch.float32, device="cpu").to(DEVICE)
        bool((there > 2).any())
        there[there > 3]
        there.cpu()
        with pytest.raises(AssertionError, match="mixes"):
            there + torch.ones(6, dtype=torch.float32, device="cpu")
    assert device.counts.uploads == device.counts.downloads == [(6,)]
    assert len(device.counts.waits) == 2
