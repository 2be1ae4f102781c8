"""The C++ ops against the reference: types, layouts, odd and empty shapes, threads, the random stream."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddmd.ops import native, reference
from tests.shapes import TYPES, assert_close, rows

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


def test_philox_words_are_the_references():
    counters = torch.randint(-(2**31), 2**31, (777, 4)).to(torch.int32)
    seed = int(torch.randint(-(2**62), 2**62, ()))
    words = native.philox(counters, seed).long() & 0xFFFFFFFF
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF))
    wanted = reference.philox((counters.long() & 0xFFFFFFFF).unbind(1), key)
    assert torch.equal(words, torch.stack(wanted, 1))


@each_type
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 1, 3, 3), (3, 1, 16, 16), (2, 1, 33, 31), (4, 1023), (0, 1, 4, 4)]
)
@pytest.mark.parametrize("memory", [False, True])
def test_denoise_step(dtype, shape, memory):
    x, out, table = torch.randn(shape).to(dtype), torch.randn(shape), torch.rand(3, 8) + 0.1
    at = rows(shape[0])
    x0 = torch.randn(shape).to(dtype) if memory else None
    ours, ours_x0 = x.clone(), None if x0 is None else x0.clone()
    native.denoise_step(ours, out, table, *at, ours_x0)
    reference.denoise_step(x, out, table, *at, x0)
    assert_close(ours, x, dtype)
    if x0 is not None and ours_x0 is not None:
        assert_close(ours_x0, x0, dtype)


@each_type
def test_noise(dtype):
    x0, t = torch.randn(6, 1, 21, 13).to(dtype), torch.randint(0, 10, (6,))
    table, at = torch.rand(10, 2), rows(6)
    assert_close(native.noise(x0, t, table, *at), reference.noise(x0, t, table, *at), dtype)


@each_type
@pytest.mark.parametrize("shape", [(1, 1), (5, 1, 3, 3), (2, 1, 33, 31), (4, 1023), (0, 1, 4, 4), (2, 0)])
def test_pure_noise_is_the_noise_of_zeros_to_the_bit(dtype, shape):
    at = rows(shape[0])
    ours = native.pure_noise(shape, *at, dtype)
    assert ours.dtype == dtype
    t, table = torch.zeros(shape[0], dtype=torch.int64), torch.tensor([[0.0, 1.0]])
    assert torch.equal(ours, native.noise(torch.zeros(shape, dtype=dtype), t, table, *at))
    assert_close(ours, reference.pure_noise(shape, *at, dtype), dtype)


def test_denoise_step_updates_a_strided_state_in_place():
    base = torch.randn(4, 1, 8, 16)
    view, out, table, at = base[..., ::2], torch.randn(4, 1, 8, 8), torch.rand(2, 8), rows(4)
    wanted, untouched = view.clone(), base[..., 1::2].clone()
    reference.denoise_step(wanted, out, table, *at)
    native.denoise_step(view, out, table, *at)
    assert_close(base[..., ::2], wanted)
    assert torch.equal(base[..., 1::2], untouched)


@each_type
@pytest.mark.parametrize("shape", [(1, 2, 1, 3, 3), (3, 5, 2, 9, 70), (2, 1, 4, 32, 32), (3, 0, 1, 4, 4)])
def test_discrepancy_maps(dtype, shape):
    a, b = torch.randn(shape).to(dtype), torch.randn(4, *shape[1:]).to(dtype)
    for ours, wanted in zip(native.discrepancy_maps(a, b), reference.discrepancy_maps(a, b), strict=True):
        assert_close(ours, wanted)


@each_type
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "groups"), [
    ((1, 1, 1, 1), 1), ((2, 6, 3, 5), 2), ((3, 24, 17, 13), 24), ((2, 64, 24, 24), 8), ((1, 5, 40, 41), 1),
])  # fmt: skip
def test_group_norm_silu_forward_and_backward(dtype, layout, shape, groups):
    n, c = shape[:2]
    x = (torch.randn(shape) * 2 + 3).to(dtype).contiguous(memory_format=layout)
    w, b, scale, shift = torch.randn(c), torch.randn(c), torch.randn(n, c), torch.randn(n, c)
    residual, grad = torch.randn_like(x), torch.randn_like(x)
    for extra in ((scale, shift, residual), (None, None, None), (scale, None, None)):
        ours = native.group_norm_silu(x, groups, w, b, *extra, 1e-2)
        wanted = reference.group_norm_silu(x, groups, w, b, *extra, 1e-2)
        assert ours[0].stride() == wanted[0].stride()
        for a, r in zip(ours, wanted, strict=True):
            assert_close(a, r, dtype)
        args = (grad, x, groups, w, b, *extra[:2], *wanted[1:])
        grads, wanted = native.group_norm_silu_backward(*args), reference.group_norm_silu_backward(*args)
        assert_close(grads[0], wanted[0], dtype)
        # sums over images and pixels err, in float32 on both sides, with their terms rather than with themselves
        size = n * x[0, 0].numel() ** 0.5
        for a, r in zip(grads[1:], wanted[1:], strict=True):
            assert_close(a / size, r / size, dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 8]),
    per_group=st.sampled_from([1, 2, 4, 5, 8, 16]),
    h=st.integers(1, 40),
    w=st.integers(1, 19),
    mean=st.sampled_from([0.0, 3.0, 300.0]),
    modulated=st.booleans(),
    layouts=st.lists(st.sampled_from(["contiguous", "last", "strided"]), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_gradients_of_group_norm_are_autograds_of_the_formula_in_float64(
    n, groups, per_group, h, w, mean, modulated, layouts, seed
):
    torch.manual_seed(seed)
    c = groups * per_group

    def laid_out(layout):
        if layout == "strided":
            return torch.randn(n, c, h, 2 * w)[..., ::2]
        last = torch.channels_last if layout == "last" else torch.contiguous_format
        return torch.randn(n, c, h, w).contiguous(memory_format=last)

    x, grad = laid_out(layouts[0]) * 2, laid_out(layouts[1])
    x += mean
    weight, bias = torch.randn(c), torch.randn(c)
    extra = (torch.randn(n, c), torch.randn(n, c)) if modulated else (None, None)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, *(e for e in extra if e is not None))]
    grouped = leaves[0].reshape(n, groups, -1)
    centre = grouped.mean(2, keepdim=True)
    r = (grouped.var(2, correction=0, keepdim=True) + 1e-2).rsqrt()
    value = ((grouped - centre) * r).reshape(x.shape) * leaves[1][:, None, None] + leaves[2][:, None, None]
    if modulated:
        value = value * (1 + leaves[3][..., None, None]) + leaves[4][..., None, None]
    wanted = torch.autograd.grad(torch.nn.functional.silu(value), leaves, grad.double())
    statistics = (centre.detach().flatten(1).float(), r.detach().flatten(1).float())
    ours = native.group_norm_silu_backward(grad, x, groups, weight, bias, *extra, *statistics)
    # float32 keeps values of a large mean, and the mean, to 2^-24 of them
    scale = 1 + mean * float(r.max())
    assert_close(ours[0] / scale, wanted[0] / scale)
    size = n * (h * w) ** 0.5 * scale
    for a, b in zip(ours[1:], wanted[1:], strict=False):
        assert_close(a / size, b / size)


def test_group_norm_keeps_its_precision_under_a_large_mean():
    x = torch.randn(2, 16, 30, 30) + 1000
    _, mean, rstd = native.group_norm_silu(x, 4, torch.ones(16), torch.zeros(16), None, None, None, 1e-5)
    exact = x.double().reshape(2, 4, -1)
    assert_close(mean, exact.mean(2))
    assert_close(rstd, exact.var(2, correction=0).rsqrt())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    dtype=st.sampled_from(TYPES),
    correction=st.integers(0, 1),
)
def test_ensemble_variance_takes_any_strides(shape, order, step, dtype, correction):
    axes = list(range(len(shape) + 1))
    order.shuffle(axes)
    full = torch.randn([5, *shape]).to(dtype) + 7
    samples = full.permute(axes)[::step]
    samples = samples if len(samples) > correction else full
    for ours, wanted in zip(
        native.ensemble_variance(samples, correction),
        reference.ensemble_variance(samples, correction),
        strict=True,
    ):
        assert_close(ours, wanted)


def test_ensemble_variance_survives_a_large_mean_and_empty_shapes():
    samples = torch.randn(64, 3000) + 1e4
    for ours, wanted in zip(
        native.ensemble_variance(samples), reference.ensemble_variance(samples.double()), strict=True
    ):
        assert_close(ours, wanted)
    assert native.ensemble_variance(torch.empty(3, 0, 4))[0].shape == (0, 4)


@each_type
def test_running_moments_are_those_of_the_whole(dtype):
    samples = torch.randn(9, 4, 50).to(dtype)
    mean, m2 = torch.zeros(4, 50), torch.zeros(4, 50)
    count = 0
    for part in samples.split([1, 3, 5]):
        native.ensemble_update(mean, m2, count, part)
        count += len(part)
    wanted = reference.ensemble_variance(samples)
    assert_close(mean, wanted[0])
    assert_close(m2 / 8, wanted[1])


@each_type
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("shape", [(1,), (3, 70), (5, 1000)])
def test_one_update_is_the_references(dtype, samples, shape):
    x = (torch.randn(samples, *shape) + 50).to(dtype)
    ours = [torch.randn(shape) + 50, torch.rand(shape) * 5]
    wanted = [t.double() for t in ours]
    native.ensemble_update(*ours, 6, x)
    reference.ensemble_update(*wanted, 6, x.double())
    for a, b in zip(ours, wanted, strict=True):
        assert_close(a, b)


@each_type
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 1000), (40000,), (0, 2)])
def test_gaussian_kl_forward_and_backward(dtype, reduction, shape):
    inputs = [torch.randn(shape).to(dtype) for _ in range(4)]
    ours = native.gaussian_kl(*inputs, reduction)
    wanted = reference.gaussian_kl(*(t.double() for t in inputs), reduction)
    if shape[0] == 0 and reduction == "mean":
        assert ours.isnan()
    else:
        assert_close(ours, wanted)
    grad = torch.randn(shape) if reduction == "none" else torch.randn(())
    for ours, wanted in zip(
        native.gaussian_kl_backward(grad, *inputs, reduction),
        reference.gaussian_kl_backward(grad.double(), *(t.double() for t in inputs), reduction),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert_close(ours, wanted, dtype)


def test_gaussian_kl_of_mixed_types_and_strides():
    inputs = [
        torch.randn(6, 9)[:, ::2], torch.randn(5, 6).half().t(), torch.randn(6, 1).expand(6, 5),
        torch.randn(6, 5).bfloat16(),
    ]  # fmt: skip
    assert_close(native.gaussian_kl(*inputs), reference.gaussian_kl(*(t.double() for t in inputs)))
    grads = native.gaussian_kl_backward(torch.tensor(0.5), *inputs, "mean")
    wanted = reference.gaussian_kl_backward(torch.tensor(0.5), *inputs, "mean")
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert_close(a, b, a.dtype)


def test_gaussian_kl_of_every_size_of_exponent():
    """What overflows, vanishes or is no number does so as in torch; between them it is as near as float32."""
    values = torch.cat([
        torch.linspace(-200, 200, 4001), torch.linspace(88.3, 88.8, 101),
        torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-30, -1e30, 1e30]),
    ])  # fmt: skip
    zero = torch.zeros_like(values)
    for inputs in (
        (zero, values, zero, zero), (zero, zero, zero, values), (zero + 3, values, zero, values), (values, zero, zero, zero),
    ):  # fmt: skip
        ours, wanted = native.gaussian_kl(*inputs, "none"), reference.gaussian_kl(*inputs, "none")
        torch.testing.assert_close(ours, wanted, rtol=3e-6, atol=1e-6, equal_nan=True)


@each_type
@pytest.mark.parametrize(
    ("n", "d", "groups"),
    [(1, 1, 1), (7, 3, 4), (33, 1300, 3), (1200, 70, 2), (0, 4, 2), (3, 0, 2), (5, 9, 10**9)],
)
def test_pairwise_sqdist_forward_and_backward(dtype, n, d, groups):
    z, group = torch.randn(n, d).to(dtype), torch.randint(0, groups, (n,))
    few = group.unique(return_inverse=True)[1] if n else group  # no reference of 10^9 centroids
    wanted = reference.pairwise_sqdist(z.double(), few, max(n, 1))
    assert abs(native.pairwise_sqdist(z, group, groups) - wanted) <= 1e-6 * wanted
    grad = torch.randn(())
    ours = native.pairwise_sqdist_backward(grad, z, group, groups)
    assert_close(
        ours / max(n, 1),
        reference.pairwise_sqdist_backward(grad, z.double(), few, max(n, 1)) / max(n, 1),
        dtype,
    )


@pytest.mark.parametrize("position", ["near", "outlier first", "outlier last"])
def test_pairwise_sqdist_of_near_equal_codes_far_from_zero(position):
    n, d = 2000, 30
    z = torch.randn(n, d) + 3000
    if position != "near":
        z[0 if position == "outlier first" else -1] += 1e4
    group = torch.randint(0, 2, (n,))
    z[group == 1] -= 7000
    wanted = reference.pairwise_sqdist(z.double(), group, 2)
    assert abs(native.pairwise_sqdist(z, group, 2).double() / wanted - 1) < 1e-5
    same = (torch.randn(1, d) * 1000 + 1 / 3).expand(n, d)
    assert native.pairwise_sqdist(same, group, 2) <= 1e-9 * n * n * same.double().square().sum()


def test_pairwise_sqdist_of_nan_and_infinity_is_nan():
    for value in (float("nan"), float("inf")):
        z = torch.randn(60, 40)
        z[17, 3] = value
        assert native.pairwise_sqdist(z, torch.arange(60) % 2, 2).isnan()


def test_merging_two_states():
    x = torch.randn(11, 40)
    state = [x[:4].mean(0), x[:4].var(0) * 3]
    native.ensemble_merge(*state, 4, x[4:].mean(0), x[4:].var(0) * 6, 7)
    assert_close(state[0], x.mean(0))
    assert_close(state[1], x.var(0) * 10)


def test_the_number_of_threads_changes_no_bit():
    x = torch.randn(5, 32, 64, 64)
    w, b = torch.randn(32), torch.randn(32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state = x[:, :1].clone()
            native.denoise_step(state, x[:, 1:2], torch.full((2, 8), 0.3), *(t for t in FIXED))
            norm = native.group_norm_silu(x, 8, w, b, None, None, None, 1e-5)
            codes, group = x.flatten(1), torch.tensor([0, 1, 1, 0, 1])
            losses = (
                native.gaussian_kl(x, x * 0.5, x + 1, x),
                native.pairwise_sqdist(codes, group, 2),
                native.pairwise_sqdist_backward(torch.ones(()), codes, group, 2),
            )
            results.append((state, *norm, *native.ensemble_variance(x), *losses))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other, strict=True))


FIXED = (torch.tensor(1), torch.tensor(5), torch.arange(5), torch.arange(5))


def test_a_forked_child_computes_after_its_parent_used_many_threads():
    """libgomp would wait for threads that did not come along; the child uses a pool of its own."""
    code = (
        "import os, signal, torch; from ddmd import ops\n"
        "torch.set_num_threads(2); x = torch.randn(64, 1, 128, 128); wanted = ops.ensemble_variance(x)[1]\n"
        "if (child := os.fork()) == 0:\n"
        "    signal.alarm(60); os._exit(not torch.equal(ops.ensemble_variance(x)[1], wanted))\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extreme", [False, True])
def test_float16_is_converted_as_torch_does(extreme):
    """Every float16 read, and float32 between, at and beyond its values rounded, subnormals among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    mean, _ = native.ensemble_variance(every[None], 0)
    torch.testing.assert_close(mean, every.float(), rtol=0, atol=0, equal_nan=True)
    x = torch.randn(1, 20000) * (10.0 ** torch.randint(-9, 6, (1, 20000)))
    if extreme:
        values = every[every.isfinite()].float().sort()[0]
        x = ((values[1:] + values[:-1]) / 2)[None]  # ties
        x = torch.cat(
            [x, torch.tensor([[65519.99, 65520.0, 1e30, float("inf"), float("nan"), 2.0**-25, 0.0]])], 1
        )
    table = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]])
    at = (torch.tensor(0), torch.tensor(0), torch.tensor([0]), torch.tensor([0]))
    state = torch.zeros(x.shape, dtype=torch.float16)
    pick_output = table.clone()
    pick_output[0, 3], pick_output[0, 4] = 0.0, 1.0  # x <- output
    native.denoise_step(state, x, pick_output, *at)
    finite = ~(x.isnan() | x.isinf())
    torch.testing.assert_close(state[finite], x.half()[finite], rtol=0, atol=0)
