"""The Triton kernels against the reference: on a CUDA device, or interpreted on the CPU."""

import pytest
import torch

from ddmd.ops import reference
from tests.shapes import TYPES, assert_close, rows

kernels = pytest.importorskip("ddmd.kernels", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest has the interpreter on where there is none
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def test_philox_words_are_the_references():
    counters = torch.randint(-(2**31), 2**31, (4, 300), device=DEVICE).to(torch.int32)
    seed = torch.randint(-(2**62), 2**62, (), device=DEVICE)
    words = kernels.philox(counters, seed).long() & 0xFFFFFFFF
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    assert torch.equal(words, torch.stack(reference.philox((counters.long() & 0xFFFFFFFF).unbind(0), key)))


@each_type
@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 5, 7), (2, 1, 16, 16), (2, 1, 40, 37), (0, 1, 4, 4)])
@pytest.mark.parametrize("memory", [False, True])
def test_denoise_step(dtype, shape, memory):
    x, out, table = randn(*shape, dtype=dtype), randn(*shape), torch.rand(3, 8, device=DEVICE) + 0.1
    at = rows(shape[0], DEVICE)
    x0 = randn(*shape, dtype=dtype) if memory else None
    ours, ours_x0 = x.clone(), None if x0 is None else x0.clone()
    kernels.denoise_step(ours, out, table, *at, ours_x0)
    reference.denoise_step(x, out, table, *at, x0)
    assert_close(ours, x, dtype)
    if x0 is not None and ours_x0 is not None:
        assert_close(ours_x0, x0, dtype)


def test_denoise_step_without_noise_and_into_a_strided_state():
    base, out = randn(2, 1, 6, 8), randn(2, 1, 6, 4)
    view, at = base[..., ::2], rows(2, DEVICE)
    table = torch.rand(3, 8, device=DEVICE)
    table[:, 6] = 0.0
    wanted = view.clone()
    kernels.denoise_step(view, out, table, *at)
    reference.denoise_step(wanted, out, table, *at)
    assert_close(base[..., ::2], wanted)


def test_nan_and_infinity_are_the_references():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1e30, 1e30], device=DEVICE)
    x, out = special.repeat(3, 1), special.roll(2).repeat(3, 1)
    x0, table, at = special.roll(1).repeat(3, 1), torch.rand(3, 8, device=DEVICE) + 0.1, rows(3, DEVICE)
    wanted, wanted_x0 = x.clone(), x0.clone()
    kernels.denoise_step(x, out, table, *at, x0)
    reference.denoise_step(wanted, out, table, *at, wanted_x0)
    for ours, plain in ((x, wanted), (x0, wanted_x0)):
        torch.testing.assert_close(ours, plain, equal_nan=True)
    assert x0.isnan().any()


@pytest.mark.parametrize("outside", [-1, 3, 2**40])
def test_what_is_outside_a_table_gives_nan_and_touches_no_other_memory(outside):
    where = torch.tensor(outside, device=DEVICE)
    x, at = randn(3, 1, 4, 4), rows(3, DEVICE)
    kernels.denoise_step(x, randn(3, 1, 4, 4), torch.rand(3, 8, device=DEVICE), where, *at[1:])
    assert x.isnan().all()
    t = torch.stack([torch.zeros_like(where), where])
    at = rows(2, DEVICE)
    noisy = kernels.noise(randn(2, 9), t, torch.rand(3, 2, device=DEVICE), *at)
    assert noisy[0].isfinite().all()
    assert noisy[1].isnan().all()
    codes, group = randn(2, 5), t
    assert kernels.pairwise_sqdist(codes, group, 3).isnan()
    d_codes = kernels.pairwise_sqdist_backward(randn(1)[0], codes, group, 3)
    assert d_codes[0].isfinite().all()
    assert d_codes[1].isnan().all()


@each_type
def test_noise(dtype):
    x0, t = randn(3, 1, 21, 13, dtype=dtype), torch.randint(0, 10, (3,), device=DEVICE)
    table, at = torch.rand(10, 2, device=DEVICE), rows(3, DEVICE)
    assert_close(kernels.noise(x0, t, table, *at), reference.noise(x0, t, table, *at), dtype)


@each_type
@pytest.mark.parametrize("shape", [(3, 1, 21, 13), (1, 1), (2, 1500), (0, 4)])
def test_pure_noise_is_the_noise_of_zeros_to_the_bit(dtype, shape):
    at = rows(shape[0], DEVICE)
    ours = kernels.pure_noise(shape, *at, dtype)
    t = torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
    table = torch.tensor([[0.0, 1.0]], device=DEVICE)
    assert torch.equal(ours, kernels.noise(torch.zeros(shape, dtype=dtype, device=DEVICE), t, table, *at))
    assert_close(ours, reference.pure_noise(shape, *at, dtype), dtype)


def test_rows_cut_into_batches_give_the_same_bits():
    x, out, table = randn(5, 1, 9, 11), randn(5, 1, 9, 11), torch.rand(3, 8, device=DEVICE) + 0.1
    step, seed, sample, place = rows(5, DEVICE)
    whole = x.clone()
    kernels.denoise_step(whole, out, table, step, seed, sample, place)
    for i in range(0, 5, 2):
        part = x[i : i + 2].clone()
        kernels.denoise_step(part, out[i : i + 2], table, step, seed, sample[i : i + 2], place[i : i + 2])
        assert torch.equal(part, whole[i : i + 2])


@each_type
@pytest.mark.parametrize("shape", [(1, 2, 1, 3, 3), (3, 2, 2, 9, 70), (2, 0, 1, 4, 4)])
def test_discrepancy_maps(dtype, shape):
    a, b = randn(*shape, dtype=dtype), randn(4, *shape[1:], dtype=dtype)
    for ours, wanted in zip(kernels.discrepancy_maps(a, b), reference.discrepancy_maps(a, b), strict=True):
        assert_close(ours, wanted)


@each_type
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1100,), (0, 2)])
def test_gaussian_kl(dtype, reduction, shape):
    inputs = [randn(*shape, dtype=dtype) for _ in range(4)]
    if shape[0] == 0 and reduction == "mean":
        return assert_nan(kernels.gaussian_kl(*inputs, reduction))
    assert_close(kernels.gaussian_kl(*inputs, reduction), reference.gaussian_kl(*inputs, reduction))
    grad = randn(*shape) if reduction == "none" else randn(1)[0]
    for ours, wanted in zip(
        kernels.gaussian_kl_backward(grad, *inputs, reduction),
        reference.gaussian_kl_backward(grad, *inputs, reduction), strict=True,
    ):  # fmt: skip
        assert_close(ours, wanted, dtype)


def assert_nan(value):
    assert torch.isnan(value)


@each_type
@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 3), (33, 130), (0, 4)])
def test_pairwise_sqdist(dtype, n, d):
    z, group = randn(n, d, dtype=dtype), torch.randint(0, 3, (n,), device=DEVICE)
    assert_close(kernels.pairwise_sqdist(z, group, 4), reference.pairwise_sqdist(z, group, 4))
    grad = randn(1)[0]
    assert_close(
        kernels.pairwise_sqdist_backward(grad, z, group, 4),
        reference.pairwise_sqdist_backward(grad, z, group, 4), dtype,
    )  # fmt: skip


@each_type
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "groups"), [((1, 1, 1, 1), 1), ((2, 6, 3, 5), 2), ((2, 24, 17, 13), 4)])
def test_group_norm_silu_forward_and_backward(dtype, layout, shape, groups):
    n, c = shape[:2]
    x = (randn(*shape) * 2 + 3).to(dtype).contiguous(memory_format=layout)
    w, b, scale, shift = randn(c), randn(c), randn(n, c), randn(n, c)
    residual, grad = torch.randn_like(x), torch.randn_like(x)
    for extra in ((scale, shift, residual), (None, None, None)):
        wanted = reference.group_norm_silu(x, groups, w, b, *extra, 1e-2)
        ours = kernels.group_norm_silu(x, groups, w, b, *extra, 1e-2)
        assert ours[0].stride() == wanted[0].stride()
        for a, r in zip(ours, wanted, strict=True):
            assert_close(a, r, dtype)
        grads = kernels.group_norm_silu_backward(grad, x, groups, w, b, *extra[:2], *wanted[1:])
        for a, r in zip(
            grads,
            reference.group_norm_silu_backward(grad, x, groups, w, b, *extra[:2], *wanted[1:]),
            strict=True,
        ):
            assert_close(a / n, r / n, dtype)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often the interpreted kernels read each element of a tensor: reads(tensor, call)."""
    if DEVICE == "cuda":
        pytest.skip(reason="reads are counted where the kernels are interpreted")
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def count(tensor: torch.Tensor, call) -> torch.Tensor:
        times, first, size = (
            torch.zeros(tensor.numel(), dtype=torch.int64),
            tensor.data_ptr(),
            tensor.element_size(),
        )

        def counted(self, pointers, mask, *rest):
            at = pointers.data[mask.data.astype(bool)].astype("int64").ravel()
            at = at[(at >= first) & (at < first + tensor.numel() * size)] - first
            times.index_add_(0, torch.from_numpy(at // size), torch.ones(len(at), dtype=torch.int64))
            return load(self, pointers, mask, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
        call()
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
        return times

    return count


@each_type
@pytest.mark.parametrize(("n", "d", "groups"), [(70, 300, 2), (600, 5, 3), (1300, 3, 2), (9, 40, 9)])
def test_pairwise_sqdist_reads_every_code_once(dtype, n, d, groups, reads):
    z, group = randn(n, d, dtype=dtype), torch.arange(n) % groups
    assert (reads(z, lambda: kernels.pairwise_sqdist(z, group, groups)) == 1).all()


@pytest.mark.parametrize("position", ["near", "outlier first", "outlier last"])
def test_pairwise_sqdist_of_near_equal_codes_far_from_zero(position):
    n, d = 300, 5
    z = randn(n, d) + 3000
    if position != "near":
        z[0 if position == "outlier first" else -1] += 1e4
    group = torch.randint(0, 2, (n,), device=DEVICE)
    z[group == 1] -= 7000
    wanted = reference.pairwise_sqdist(z.double(), group, 2)
    assert abs(kernels.pairwise_sqdist(z, group, 2).double() / wanted - 1) < 1e-5
    same = (randn(1, d) * 1000 + 1 / 3).expand(n, d)
    assert kernels.pairwise_sqdist(same, group, 2) == 0


@pytest.mark.parametrize("n", [40, 2000])
def test_pairwise_sqdist_of_rows_in_chunks_and_of_nan(n):
    z, group = randn(n, 4), torch.randint(0, 3, (n,), device=DEVICE)
    assert_close(
        kernels.pairwise_sqdist(z, group, 9) / n, reference.pairwise_sqdist(z.double(), group, 9) / n
    )
    for value in (float("nan"), float("inf")):
        bad = z.clone()
        bad[n // 2, 1] = value
        assert kernels.pairwise_sqdist(bad, group, 3).isnan()
    group[n - 1] = 9
    assert kernels.pairwise_sqdist(z, group, 9).isnan()


@each_type
@pytest.mark.parametrize(("shape", "groups", "times"), [
    ((1, 64, 48, 48), 8, 1), ((2, 96, 15, 15), 8, 1), ((1, 24, 17, 13), 2, 1), ((1, 160, 19, 20), 2, 2),
])  # fmt: skip
def test_group_norm_silu_reads_once_what_fits_into_registers(dtype, shape, groups, times, reads):
    x = (randn(*shape) * 2 + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    residual, w, b = torch.randn_like(x), randn(shape[1]), randn(shape[1])
    results = []
    counted = reads(
        x,
        lambda: results.extend(kernels.group_norm_silu(x, groups, w, b, None, None, residual, 1e-5)),
    )
    assert (counted == times).all()
    for ours, wanted in zip(
        results, reference.group_norm_silu(x, groups, w, b, None, None, residual, 1e-5), strict=True
    ):
        assert_close(ours, wanted, dtype)


@each_type
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("shape", "groups", "times"), [
    ((1, 64, 32, 32), 8, 1), ((2, 96, 15, 15), 8, 1), ((1, 24, 17, 13), 2, 1), ((1, 160, 19, 20), 2, 2),
])  # fmt: skip
def test_group_norm_silu_gradients_read_once_what_fits_into_registers(
    dtype, shape, groups, times, modulated, reads
):
    n, c = shape[:2]
    x = (randn(*shape) * 2 + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    grad, w, b = torch.randn_like(x), randn(c), randn(c)
    extra = (randn(n, c), randn(n, c)) if modulated else (None, None)
    statistics = reference.group_norm_silu(x, groups, w, b, *extra, None, 1e-5)[1:]
    ours = []

    def gradients():
        ours[:] = kernels.group_norm_silu_backward(grad, x, groups, w, b, *extra, *statistics)

    for tensor in (x, grad):
        assert (reads(tensor, gradients) == times).all()
    wanted = reference.group_norm_silu_backward(
        grad.double(), x.double(), groups, w.double(), b.double(),
        *(None if e is None else e.double() for e in extra), *(s.double() for s in statistics),
    )  # fmt: skip
    size = n * x[0, 0].numel() ** 0.5
    for a, r in zip(ours, wanted, strict=True):
        assert_close(a / size, r / size, dtype)


@pytest.mark.parametrize("pixels", [(20, 20), (90, 50)])
def test_group_norm_silu_of_an_outlier_and_a_large_mean(pixels):
    """Variances that sums of squares would lose; the outlier is where a pivot would be taken."""
    x = randn(1, 160, *pixels) + 1000
    x[:, :, 0, 0] -= 5000
    x = x.contiguous(memory_format=torch.channels_last)
    w, b = randn(160), randn(160)
    y, mean, rstd = kernels.group_norm_silu(x, 2, w, b, None, None, None, 1e-5)
    exact = reference.group_norm_silu(x.double(), 2, w.double(), b.double(), None, None, None, 1e-5)
    assert_close(mean, exact[1])
    assert abs(rstd / exact[2] - 1).max() < 1e-5
    assert_close(y / 10, exact[0] / 10)


def test_sums_are_the_same_bits_every_time():
    inputs = [randn(5000) for _ in range(4)]
    z, group = randn(200, 9), torch.randint(0, 2, (200,), device=DEVICE)
    for call in (lambda: kernels.gaussian_kl(*inputs, "sum"), lambda: kernels.pairwise_sqdist(z, group, 2)):
        assert torch.equal(call(), call())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_captured_graph_replays_the_next_step():
    x, out, table = randn(2, 1, 32, 32), randn(2, 1, 32, 32), torch.rand(4, 8, device=DEVICE)
    _, seed, sample, place = rows(2, DEVICE)
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    wanted, state = x.clone(), x.clone()
    kernels.denoise_step(x.clone(), out, table, step, seed, sample, place)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.denoise_step(state, out, table, step, seed, sample, place)
        step += 1
    state.copy_(x)
    step.zero_()
    for i in range(4):
        graph.replay()
        reference.denoise_step(wanted, out, table, torch.tensor(i, device=DEVICE), seed, sample, place)
    assert_close(state, wanted)
