"""What training minimises: each loss by its formula, gradients, and the learning rate."""

import numpy as np
import pytest
import torch

from ddmd.diffusion.schedule import Schedule
from ddmd.models.autoencoder import AutoencoderConfig, AutoencoderEnsemble
from ddmd.models.denoiser import Condition, ConditionNet, Denoiser, DenoiserConfig
from ddmd.models.discrepancy import heterogeneous_loss, homogeneous_loss
from ddmd.training.config import DenoiserStage
from ddmd.training.loop import Plan, learning_rate
from ddmd.training.stages import BAG, DenoiserLosses, soft_dice


def test_a_bag_wants_a_lesion_somewhere():
    """Of the slice's most probable pixels alone, and only where it is a bag."""
    sizes = DenoiserConfig(widths=(8, 8, 8, 8), noise_width=8)
    ensembles = [AutoencoderEnsemble(AutoencoderConfig(members=2, width=4, code=2)) for _ in range(2)]
    losses = DenoiserLosses(*ensembles, ConditionNet(sizes), Denoiser(sizes), Schedule(), DenoiserStage())
    evidence = torch.full((2, 1, 32, 32), -9.0)
    evidence[:, :, :6, : BAG // 6] = torch.linspace(0.0, 4.0, BAG).view(6, -1)  # 2 in the mean
    losses.condition.forward = lambda planes: Condition(torch.zeros(2, 8, 8, 8), evidence)
    zeros = torch.zeros(2, 1, 32, 32)
    batch = {
        "planes": torch.randn(2, 3, 32, 32),
        "mask": zeros,
        "weight": zeros,
        "bag": torch.tensor([1.0, 0.0]),
        "t": torch.tensor([3, 700]),
        "index": torch.tensor([0, 1]),
    }
    named = losses(batch)
    assert float(named["bag"]) == pytest.approx(
        DenoiserStage().bag_weight * np.log1p(np.exp(-2.0)) / 2, rel=1e-5
    )
    del batch["bag"]
    assert "bag" not in losses(batch)


@pytest.mark.parametrize("diffusion", [True, False])
def test_every_trained_parameter_gets_a_gradient(diffusion):
    """DistributedDataParallel waits for each that requires one."""
    sizes = DenoiserConfig(widths=(8, 8, 8, 8), noise_width=8)
    ensembles = [AutoencoderEnsemble(AutoencoderConfig(members=2, width=4, code=2)) for _ in range(2)]
    losses = DenoiserLosses(
        *ensembles, ConditionNet(sizes), Denoiser(sizes), Schedule(), DenoiserStage(), diffusion=diffusion
    )
    mask = (torch.rand(2, 1, 32, 32) > 0.5).float()
    batch = {"planes": torch.randn(2, 3, 32, 32), "mask": mask, "weight": torch.ones_like(mask)}
    batch |= {"t": torch.tensor([3, 700]), "index": torch.tensor([0, 1])}
    sum(losses(batch).values()).backward()
    assert [n for n, p in losses.named_parameters() if p.requires_grad and p.grad is None] == []


def test_losses_follow_their_formulas():
    z, label = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 1, 0])
    pairs = [(i, j) for i in range(6) for j in range(i) if label[i] == label[j]]
    wanted = sum(((z[i] - z[j]) ** 2).sum() for i, j in pairs) / len(pairs) / 3
    assert torch.isclose(homogeneous_loss(z, label), torch.as_tensor(wanted), rtol=1e-4)
    near, far = torch.randn(8, 3), torch.randn(8, 3) + 50
    labels = torch.tensor([0] * 8 + [1] * 8)
    assert heterogeneous_loss(torch.cat((near, far)), labels) == 0, "apart beyond the bound"
    assert heterogeneous_loss(torch.cat((near, near)), labels) == pytest.approx(2.0, abs=1e-4)
    assert heterogeneous_loss(near, torch.zeros(8, dtype=torch.int64)) == 0, "one label alone has no distance"
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2] = 1
    right = (mask * 2 - 1) * 20
    assert soft_dice(right, mask, torch.ones_like(mask)) == pytest.approx(0, abs=1e-3)
    assert soft_dice(-right, mask, torch.ones_like(mask)) == pytest.approx(0.5 * (1 - 1 / 17), abs=1e-3), (
        "half of the slices have a mask; all is wrong but for the 1 that keeps the quotient from 0 / 0"
    )


def test_members_never_mix():
    ensemble = AutoencoderEnsemble(AutoencoderConfig(members=3, width=4, code=2))
    b = torch.randn(2, 3, 32, 32)  # a slice for each of the three members
    whole = ensemble.decode(ensemble.encode(b))
    changed = b.clone()
    changed[:, 1] += 1
    other = ensemble.decode(ensemble.encode(changed))
    assert torch.equal(whole[[0, 2]], other[[0, 2]])
    assert not torch.equal(whole[1], other[1])


def test_learning_rate_rises_then_falls():
    plan = Plan("x", 1000, 1, 1.0)
    confusion_metrics = [learning_rate(step, plan) for step in range(1000)]
    assert confusion_metrics[0] < confusion_metrics[99] > confusion_metrics[500] > confusion_metrics[999] > 0
