"""What batches of training samples promise: shares, masks and their weights, and that no step waits for the device."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddmd.cohort.cases import Case
from ddmd.diffusion.schedule import Schedule
from ddmd.models.autoencoder import AutoencoderEnsemble
from ddmd.models.denoiser import ConditionNet, Denoiser
from ddmd.training.augmentation import Augmentation
from ddmd.training.batch_maker import NEGATIVE_WEIGHT
from ddmd.training.config import DataEntry, DenoiserStage, TrainConfig
from ddmd.training.loop import Plan, Stage, train_step
from ddmd.training.prepared_case import PreparedCase
from ddmd.training.sample_random import SampleRandom
from ddmd.training.stages import AutoencoderLosses, DenoiserLosses
from tests.training_setup import batch_maker, tiny_config


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    return tiny_config(tmp_path, rng)


def test_shares_that_no_slice_can_fill_are_refused(config, rng):
    only = dataclasses.replace(
        config.denoiser_stage,
        share_normal=0.0,
        share_painted=0.0,
        share_painted_beside=0.0,
        share_masked=0.7,
        share_transplanted=0.3,
    )
    case = Case("a", "a", "set", {})
    image = rng.normal(size=(1, 1, 16, 16)).astype(np.float16)
    brain = np.ones((1, 16, 16), bool)
    prepared = [PreparedCase(case, image, brain, brain, np.array([0]), 1, 1.0)]
    with pytest.raises(ValueError, match="no slice is there for any share"):
        batch_maker(prepared, dataclasses.replace(config, denoiser_stage=only, size=16)).samples(0, 1)


def test_transplanted_lesions_come_with_their_mask_and_its_weight(rng):
    """Two heads of other sizes: the donor's lesion lands at the same place from the middle of the brain."""
    prepared = []
    for name, at, level in (("donor", 30, 1.0), ("host", 40, 0.0)):
        brain = np.zeros((3, 80, 80), bool)
        brain[:, at - 20 : at + 20, at - 20 : at + 20] = True
        image = np.where(brain, level, -2.0)[:, None].astype(np.float16)
        case = Case(name, name, "set", {})
        label = np.full(3, int(level), np.int8)
        prepared.append(PreparedCase(case, image, brain, brain, label, offset=1, offset_mm=1.0))
    mask = np.zeros((3, 80, 80), np.float16)
    mask[:, 25:35, 25:35] = 1
    prepared[0].mask, prepared[0].weight = mask, np.where(mask, 0.5, 1.0).astype(np.float16)
    stage = DenoiserStage(
        share_normal=0.0,
        share_painted=0.0,
        share_painted_beside=0.0,
        share_masked=0.0,
        share_transplanted=1.0,
    )
    config = TrainConfig(data=(DataEntry("set"),), size=80, denoiser_stage=stage)
    batch = batch_maker(prepared, config).samples(0, 10)
    for planes, marked, weight in zip(batch["planes"], batch["mask"], batch["weight"], strict=True):
        inside = marked[0].numpy() > 0
        assert np.array_equal(inside, np.roll(mask[1] > 0, (10, 10), (0, 1)))
        assert planes[1].numpy()[inside] == pytest.approx(1.0, abs=1e-5)
        assert weight[0].numpy()[inside] == pytest.approx(0.5)


def test_a_positive_slice_is_a_bag_once_there_are_pseudo_masks(config, rng):
    """Also one without a mask of its own, of which nothing but that is known."""
    image = rng.normal(size=(2, 1, 16, 16)).astype(np.float16)
    brain = np.ones((2, 16, 16), bool)
    only = dataclasses.replace(
        config.denoiser_stage, share_normal=0.1, share_painted=0.0, share_painted_beside=0.0, share_masked=0.9
    )
    config = dataclasses.replace(config, denoiser_stage=only, size=16)
    prepared = [
        PreparedCase(Case(name, name, "set", {}), image, brain, brain, np.array([0, 1]), 1, 1.0)
        for name in "ab"
    ]
    assert not batch_maker(prepared, config).samples(0, 40)["bag"].any(), "before the first round"
    prepared[0].mask = np.zeros((2, 16, 16), np.float16)
    prepared[0].mask[1, 4:8, 4:8] = 1
    prepared[0].weight = np.ones((2, 16, 16), np.float16)
    batch = batch_maker(prepared, config).samples(0, 40)
    bags = batch["bag"] > 0
    assert 20 < bags.sum() < 40
    assert (batch["label"][bags] == 1).all()
    assert {round(float(w.min()), 6) for w in batch["weight"][bags]} == {1.0, NEGATIVE_WEIGHT}


def test_thick_slices_are_at_least_as_thick_as_those_of_the_patient(config):
    """Of 1 mm slices some become 3 to 9 mm thick; slices of 7 mm never become thinner."""
    brain = np.ones((40, 16, 16), bool)
    image, label = np.zeros((40, 1, 16, 16), np.float16), np.zeros(40, np.int8)
    ranges = {}
    for slice_mm in (1.0, 7.0):
        case = PreparedCase(Case("a", "a", "set", {}), image, brain, brain, label, 1, slice_mm)
        choice = batch_maker([case], dataclasses.replace(config, size=32)).choice
        near = choice.neighbours(SampleRandom(0, 0, np.arange(2000)), np.full(2000, 20))
        thick = near.thickness_mm[near.thickness_mm != slice_mm]
        ranges[slice_mm] = (near.thickness_mm.min(), thick.min(initial=9.0), near.thickness_mm.max())
    assert ranges[1.0] == pytest.approx((1.0, 3.0, 9.0), abs=0.4)
    assert ranges[7.0] == (7.0, 9.0, 7.0), "none is thicker, either: the next gap would be 14 mm"


WAITS = {  # what a GPU's host would wait for: values and shapes that depend on data, copies to the host
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::bincount",
    "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::is_nonzero", "aten::equal",
    "aten::nonzero_numpy", "aten::histc", "aten::allclose",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the device, and indexing by bool tensors, whose result's shape depends on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in WAITS | {f"{n}.default" for n in WAITS}, name
        if name.startswith(("aten::index.Tensor", "aten::index_put")):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, f"{name} by a bool tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["normal", "mixed", "lesions"])
def test_a_step_never_waits_for_the_device(config, tmp_path, rng, name):
    """Batch, losses, backward, clipping, optimiser and average; every kind of sample is among them."""
    from accelerate import Accelerator

    stage = dataclasses.replace(
        config.denoiser_stage, batch=24, hard_from=0.0, share_normal=0.2, share_painted=0.2,
        share_transplanted=0.2, share_painted_beside=0.2, share_masked=0.2,
    )  # fmt: skip
    config = dataclasses.replace(config, denoiser_stage=stage)
    image = rng.normal(size=(6, 1, 64, 64)).astype(np.float16)
    brain = np.ones((6, 64, 64), bool)
    mask = np.zeros((6, 64, 64), np.float16)
    mask[3:, 20:40, 20:40] = 1
    case = PreparedCase(
        Case("a", "a", "set", {}), image, brain, brain, np.array([0, 0, 0, 1, 1, 1], np.int8), 1, 4.0,
        mask, np.ones_like(mask),
    )  # fmt: skip
    batches = batch_maker(
        [case], config, name, augmentation_config=Augmentation(blur=0.5, coarse=0.5, ringing=0.5)
    )
    ensembles = [AutoencoderEnsemble(config.autoencoder) for _ in range(2)]
    if name == "lesions":
        for ensemble in ensembles:
            ensemble.requires_grad_(False)
        networks = ConditionNet(config.denoiser), Denoiser(config.denoiser)
        losses = DenoiserLosses(*ensembles, *networks, Schedule(), stage)
    else:
        losses = AutoencoderLosses(ensembles[0], config.autoencoder_stage, mixed=name == "mixed")
    trained = Stage(losses, Plan("x", 5, 24, 1e-3, 0.9), tmp_path, Accelerator())
    model = trained.accelerator.prepare(trained.model)
    train_step(model, trained.optimizer, batches.make(0), trained)  # the optimiser makes its state
    with NoWaiting():
        train_step(model, trained.optimizer, batches.make(1), trained)


def test_the_check_for_waiting_finds_what_waits():
    x = torch.ones(3)
    for wait in (lambda: float(x.sum()), lambda: x[x > 0], lambda: bool((x > 0).all()), lambda: x.nonzero()):
        with NoWaiting(), pytest.raises(AssertionError):
            wait()
