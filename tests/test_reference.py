"""The reference against float64, against torch's own ops, and against what was published."""

import math

import pytest
import torch
from torch.nn import functional

from ddmd.ops import reference
from tests.shapes import assert_close, rows

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    got = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, got)) == words


def test_normal_draws_are_standard_normal_and_uncorrelated():
    step, seed, _, _ = rows(1)
    z = reference.normal(4096, step, seed, torch.arange(64), torch.arange(64)).double()
    n = z.numel()
    assert abs(z.mean()) < 6 / math.sqrt(n)
    assert abs(z.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 6 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4, 8):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 6 / math.sqrt(n)
    assert abs((z[1:] * z[:-1]).mean()) < 6 / math.sqrt(n)


def test_every_coordinate_changes_the_noise():
    step, seed, sample, place = torch.tensor(3), torch.tensor(9), torch.tensor([1]), torch.tensor([2])
    draws = [
        reference.normal(32, *at)
        for at in (
            (step, seed, sample, place), (step + 1, seed, sample, place), (step, seed + 1, sample, place),
            (step, seed + 2**32, sample, place), (step, seed, sample + 1, place), (step, seed, sample, place + 1),
        )
    ]  # fmt: skip
    assert len({tuple(d[0].tolist()) for d in draws}) == len(draws)


def test_noise_of_a_row_does_not_depend_on_its_length():
    at = rows(3)
    assert torch.equal(reference.normal(101, *at)[:, :37], reference.normal(37, *at))


@pytest.mark.parametrize("shape", [(2, 3, 1, 5, 7), (1, 1, 2, 1, 1), (4, 2, 3, 8, 8)])
def test_discrepancy_maps_follow_their_formula(shape):
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(3, *shape[1:], dtype=torch.float64)
    inter, intra = reference.discrepancy_maps(a.float(), b.float())
    mu = sum(a) / len(a)
    assert_close(inter, (sum(b) / 3 - mu).abs().mean(1, keepdim=True))
    assert_close(intra, (sum((m - mu) ** 2 for m in a) / len(a)).mean(1, keepdim=True).sqrt())


def test_gaussian_kl_is_that_of_torch_distributions():
    mu_q, lq, mu_p, lp = (torch.randn(5, 7, dtype=torch.float64) for _ in range(4))
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mu_q, (lq / 2).exp()), normal(mu_p, (lp / 2).exp()))
    for reduction, reduce in (("none", lambda x: x), ("sum", torch.sum), ("mean", torch.mean)):
        got = reference.gaussian_kl(*(t.float() for t in (mu_q, lq, mu_p, lp)), reduction)
        assert_close(got, reduce(wanted))


def test_pairwise_sqdist_is_the_sum_over_pairs():
    z, group = torch.randn(13, 4, dtype=torch.float64), torch.randint(0, 3, (13,))
    wanted = sum(((z[i] - z[j]) ** 2).sum() for i in range(13) for j in range(i) if group[i] == group[j])
    assert_close(reference.pairwise_sqdist(z.float(), group, 3), torch.as_tensor(wanted))


@pytest.mark.parametrize("correction", [0, 1])
def test_variance_survives_a_large_mean(correction):
    x = torch.randn(6, 50, dtype=torch.float64) + 1e4
    x = x.float()
    mean, variance = reference.ensemble_variance(x, correction)
    assert_close(mean, x.double().mean(0))
    assert_close(variance, x.double().var(0, correction=correction))


def test_merged_moments_are_those_of_the_whole():
    x = torch.randn(9, 31)
    mean, m2 = torch.zeros(31), torch.zeros(31)
    reference.ensemble_update(mean, m2, 0, x[:2])
    reference.ensemble_update(mean, m2, 2, x[2:3])
    other, other_m2 = torch.zeros(31), torch.zeros(31)
    reference.ensemble_update(other, other_m2, 0, x[3:])
    reference.ensemble_merge(mean, m2, 3, other, other_m2, 6)
    assert_close(mean, x.mean(0))
    assert_close(m2 / 8, x.var(0))


def test_group_norm_silu_is_torchs_own():
    x, w, b = torch.randn(3, 8, 5, 6), torch.randn(8), torch.randn(8)
    scale, shift, residual = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8, 5, 6)
    y, _, _ = reference.group_norm_silu(x, 4, w, b, scale, shift, residual, 1e-5)
    plain = functional.group_norm(x, 4, w, b, 1e-5) * (1 + scale[..., None, None]) + shift[..., None, None]
    assert_close(y, functional.silu(plain) + residual)
