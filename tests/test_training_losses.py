"""What training minimises: each loss by its formula, gradients, and the learning rate."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from ddmd.diffusion.schedule import Schedule
from ddmd.models.autoencoder import AutoencoderConfig, AutoencoderEnsemble
from ddmd.models.denoiser import Condition, ConditionNet, Denoiser, DenoiserConfig
from ddmd.models.discrepancy import heterogeneous_loss, homogeneous_loss
from ddmd.training.config import AutoencoderStage, DenoiserStage
from ddmd.training.loop import Plan, learning_rate
from ddmd.training.stages import BAG, AutoencoderLosses, DenoiserLosses, soft_dice


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
    """The reconstruction of one member moves its own weights alone: a third of each parameter."""
    ensemble = AutoencoderEnsemble(AutoencoderConfig(members=3, width=4, code=2))
    ensemble(torch.randn(2, 1, 32, 32))[1].square().sum().backward()
    for name, parameter in ensemble.named_parameters():
        moved = [bool(part.any()) for part in parameter.grad.chunk(3)]
        assert moved == [False, True, False], name


@pytest.mark.parametrize("channels", [1, 2])
def test_all_members_encode_the_same_slices_as_each_would(channels):
    """Codes and gradients are those of a grouped first convolution on a copy of the slices for each member."""
    ensemble = AutoencoderEnsemble(AutoencoderConfig(channels, members=3, width=4, code=2)).double()
    b = torch.randn(2, channels, 32, 32, dtype=torch.float64)
    h = functional.pixel_unshuffle(b.repeat(1, 3, 1, 1), 4)
    for conv, norm in zip(ensemble.encoder, ensemble.encoder_norms, strict=True):
        h = norm(conv(h))
    parameters = [*ensemble.encoder.parameters(), *ensemble.to_code.parameters()]
    results = []
    for codes in (ensemble.to_code(h).unflatten(1, (3, 2)), ensemble.encode_shared(b)):
        results.append((codes, *torch.autograd.grad(codes.sin().sum(), parameters)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def autoencoder_losses(sequences: int) -> AutoencoderLosses:
    torch.manual_seed(1)
    ensemble = AutoencoderEnsemble(AutoencoderConfig(members=3, width=4, code=2))
    return AutoencoderLosses(ensemble, AutoencoderStage(), mixed=True, sequences=sequences).requires_grad_(
        False
    )


def test_sequences_without_pairs_do_not_weaken_the_losses_of_the_others():
    planes, label = torch.randn(8, 1, 32, 32), torch.tensor([0, 0, 0, 1, 1, 1, -1, 0])
    one, four = autoencoder_losses(1), autoencoder_losses(4)
    batch = {"planes": planes, "label": label}
    alone = one(batch)
    codes = one.ensemble.encode_shared(planes).mean((3, 4))
    weight = AutoencoderStage().homogeneous
    each = torch.stack([homogeneous_loss(codes[:, member], label) for member in range(3)])
    assert torch.equal(alone["homogeneous"], each.mean() * weight), "one sequence: the mean over the members"
    for number in (0, 3):  # one sequence alone is in the batch
        named = four(batch | {"sequence": torch.full_like(label, number)})
        assert {k: float(v) for k, v in named.items()} == pytest.approx(
            {k: float(v) for k, v in alone.items()}, rel=1e-5
        )
    # pairs of label 0 in sequences 0 and 2, both labels in sequence 0 alone, one slice in sequence 1
    sequence = torch.tensor([0, 0, 2, 0, 0, 1, 2, 2])
    named = four(batch | {"sequence": sequence})
    first, third = ([m] for m in (sequence == 0, sequence == 2))
    homogeneous = [
        homogeneous_loss(codes[:, m][rows], label[rows]) for m in range(3) for rows in first + third
    ]
    heterogeneous = [heterogeneous_loss(codes[:, m][rows], label[rows], AutoencoderStage().bound) for m in range(3) for rows in first]  # fmt: skip
    assert float(named["homogeneous"]) == pytest.approx(float(sum(homogeneous)) / 6 * weight, rel=1e-5)
    assert float(named["heterogeneous"]) == pytest.approx(
        float(sum(heterogeneous)) / 3 * AutoencoderStage().heterogeneous, rel=1e-5
    )
    none = four({"planes": planes[:4], "label": label[[0, 0, 0, 3]], "sequence": torch.arange(4)})
    assert float(none["homogeneous"]) == float(none["heterogeneous"]) == 0


def test_learning_rate_rises_then_falls():
    plan = Plan("x", 1000, 1, 1.0)
    confusion_metrics = [learning_rate(step, plan) for step in range(1000)]
    assert confusion_metrics[0] < confusion_metrics[99] > confusion_metrics[500] > confusion_metrics[999] > 0
