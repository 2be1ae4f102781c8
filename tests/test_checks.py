"""What ops refuse, called either way; the caller's torch state; backends of threads; registration."""

import subprocess
import sys
import threading

import pytest
import torch

from ddmd import ops
from ddmd.ops import memory, reference
from tests.shapes import assert_close, rows

D = torch.ops.ddmd
EACH_BACKEND = pytest.mark.parametrize("backend", ["auto", "reference"])


def table():
    return torch.rand(4, 8) + 0.1


def step(x, output, x0=None, at=None, coefficients=None):
    D.denoise_step(x, output, table() if coefficients is None else coefficients, *(at or rows(len(x))), x0)


def update(mean, m2, count, samples):
    D.ensemble_update(mean, m2, count, samples)


def norm(x, groups=3, weight=None, **changed):
    c = x.shape[1]
    w = torch.ones(c) if weight is None else weight
    arguments = {"scale": None, "shift": None, "residual": None, "eps": 1e-5} | changed
    return D.group_norm_silu(x, groups, w, torch.zeros(c), *arguments.values())


def z(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def with_row(i, value):
    at = list(rows(3))
    at[i] = value
    return tuple(at)


REFUSED = {
    "output smaller": (lambda: step(z(3, 16), z(3, 4)), r"output has shape \(3, 4\)"),
    "output on meta": (lambda: step(z(3, 4), torch.empty(3, 4, device="meta")), "output is on meta"),
    "x on meta": (lambda: step(torch.empty(3, 4, device="meta"), z(3, 4)), "output is on cpu"),
    "x of one dimension": (lambda: step(z(3), z(3)), "x has 1 dimensions"),
    "x0 smaller": (lambda: step(z(3, 16), z(3, 16), z(3, 4)), r"x0 has shape \(3, 4\)"),
    "sample shorter": (lambda: step(z(3, 4), z(3, 4), at=rows(2)), r"sample has shape \(2,\)"),
    "sample of int32": (lambda: step(z(3, 4), z(3, 4), at=with_row(2, z(3, dtype=torch.int32))), "sample has dtype"),
    "seed of one row": (lambda: step(z(3, 4), z(3, 4), at=with_row(1, z(1, dtype=torch.int64))), "seed has shape"),
    "step negative": (lambda: step(z(3, 4), z(3, 4), at=with_row(0, torch.tensor(-1))), "step is -1; allowed are 0 to 3"),
    "empty table": (lambda: step(z(3, 4), z(3, 4), coefficients=z(0, 8)), "step is 1; allowed are 0 to -1"),
    "table of 4 columns": (lambda: step(z(3, 4), z(3, 4), coefficients=z(5, 4)), r"table has shape \(5, 4\)"),
    "x expanded": (lambda: step(z(1, 16).expand(3, 16), z(3, 16)), "elements may share memory"),
    "x as_strided": (lambda: step(z(20).as_strided((3, 16), (2, 1)), z(3, 16)), "elements may share memory"),
    "x0 is x": (lambda: (lambda x: step(x, z(3, 16), x))(z(3, 16)), "x, which is written, shares memory with x0"),
    "x beside output": (lambda: (lambda b: step(b[:-1].view(3, 16), b[1:].view(3, 16)))(z(49)),
                        "x, which is written, shares memory with output"),
    "x is sample": (lambda: (lambda b: step(b.view(torch.float32).view(3, 2), z(3, 2), at=with_row(2, b)))(
        z(3, dtype=torch.int64)), "x, which is written, shares memory with sample"),
    "x is a leaf": (lambda: step(z(3, 4).requires_grad_(), z(3, 4)), "x requires grad, and denoise_step has no gradient"),
    "t shorter": (lambda: D.noise(z(3, 4), z(1, dtype=torch.int64), z(5, 2), *rows(3)), r"t has shape \(1,\)"),
    "t outside": (lambda: D.noise(z(3, 4), torch.tensor([0, 5, 1]), z(5, 2), *rows(3)), "t holds 5"),
    "m2 smaller": (lambda: update(z(10), z(4), 0, z(3, 10)), r"m2 has shape \(4,\); allowed is \(10,\)"),
    "samples larger": (lambda: update(z(4), z(4), 0, z(3, 40)), r"samples has shape \(3, 40\)"),
    "samples of no dimension": (lambda: update(z(()), z(()), 0, z(())), "samples has shape"),
    "state of float16": (lambda: update(z(4, dtype=torch.float16), z(4, dtype=torch.float16), 0, z(3, 4)), "mean is torch.float16"),
    "state strided": (lambda: update(z(4, 8)[:, ::2], z(4, 8)[:, ::2], 0, z(3, 4, 4)), "strides"),
    "mean is m2": (lambda: (lambda m: update(m, m, 0, z(3, 16)))(z(16)), "mean, which is written, shares memory with m2"),
    "samples hold mean": (lambda: (lambda m: update(m, z(16), 3, m[None]))(z(16)), "shares memory with samples"),
    "count negative": (lambda: update(z(4), z(4), -5, z(3, 4)), "count is -5"),
    "count of 2^62": (lambda: update(z(4), z(4), 2**62, z(3, 4)), "count is 4611686018427387904"),
    "other state swapped": (lambda: (lambda m, v: D.ensemble_merge(m, v, 3, v, m, 3))(z(4), z(4)), "shares memory"),
    "weight shorter": (lambda: norm(z(2, 6, 5, 5), weight=z(2)), r"weight has shape \(2,\)"),
    "4 groups of 6": (lambda: norm(z(2, 6, 5, 5), 4), "num_groups is 4"),
    "0 groups": (lambda: norm(z(2, 6, 5, 5), 0), "num_groups is 0"),
    "residual of float16": (lambda: norm(z(2, 6, 5, 5), residual=z(2, 6, 5, 5, dtype=torch.float16)), "residual has dtype"),
    "eps NaN": (lambda: norm(z(2, 6, 5, 5), eps=float("nan")), "eps is nan"),
    "eps negative": (lambda: norm(z(2, 6, 5, 5), eps=-1.0), r"eps is -1\.0"),
    "scale of one image": (lambda: norm(z(2, 6, 5, 5), scale=z(1, 6)), r"scale has shape \(1, 6\)"),
    "maps of two shapes": (lambda: D.discrepancy_maps(z(2, 3, 1, 5, 7), z(2, 3, 1, 50, 70)), "recon_b has shape"),
    "maps of two types": (lambda: D.discrepancy_maps(z(2, 3, 1, 5, 7), z(2, 3, 1, 5, 7, dtype=torch.bfloat16)), "recon_b has dtype"),
    "no members": (lambda: D.discrepancy_maps(z(0, 3, 1, 5, 7), z(2, 3, 1, 5, 7)), "K and C at least 1"),
    "variance of int64": (lambda: D.ensemble_variance(z(3, 4, dtype=torch.int64)), "samples has dtype torch.int64"),
    "variance of complex": (lambda: D.ensemble_variance(z(3, 4, dtype=torch.complex64)), "samples has dtype torch.complex64"),
    "variance of nothing": (lambda: D.ensemble_variance(torch.tensor(3.0), correction=0), r"samples has shape \(\)"),
    "one sample": (lambda: D.ensemble_variance(z(1, 4)), "S at least 2"),
    "correction -3": (lambda: D.ensemble_variance(z(3, 4), correction=-3), "correction is -3"),
    "sparse": (lambda: D.ensemble_variance(z(3, 4).to_sparse()), "samples has layout torch.sparse_coo"),
    "with grad": (lambda: D.ensemble_variance(z(3, 4).requires_grad_()), "samples requires grad"),
    "group outside": (lambda: D.pairwise_sqdist(z(3, 2), torch.tensor([0, 1, 5]), 2), "group holds 5"),
    "group negative": (lambda: D.pairwise_sqdist(z(3, 2), torch.tensor([0, -1, 1]), 2), "group holds -1"),
    "no groups": (lambda: D.pairwise_sqdist(z(0, 2), z(0, dtype=torch.int64), 0), "num_groups is 0"),
    "kl of two shapes": (lambda: D.gaussian_kl(z(3), z(3), z(2), z(3)), r"mu_p has shape \(2,\)"),
    "kl gradient": (lambda: D.gaussian_kl_backward(z(2), z(3), z(3), z(3), z(3), "none"), r"grad has shape \(2,\)"),
    "norm statistics": (lambda: D.group_norm_silu_backward(
        z(2, 6, 5, 5), z(2, 6, 5, 5), 3, z(6), z(6), None, None, z(2, 2), z(2, 3)), r"mean has shape \(2, 2\)"),
    "a list": (lambda: ops.group_norm_silu([1], 2, z(2), z(2)), "x is list; allowed is a torch.Tensor"),
    "2.5 groups": (lambda: ops.group_norm_silu(z(2, 4, 2, 2), 2.5, z(4), z(4)), "num_groups is 2.5; allowed is an integer"),
}  # fmt: skip


@EACH_BACKEND
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_named_before_a_kernel_sees_it(case, backend):
    call, message = REFUSED[case]
    with ops.backend(backend), pytest.raises((ValueError, TypeError, IndexError), match=message):
        call()


@pytest.mark.parametrize("count", [1, 64, 65, 3000])
@pytest.mark.parametrize("outside", [-1, 5])
def test_one_index_outside_among_many_is_found(count, outside, rng):
    where = torch.randint(0, 5, (count,))
    x, at = z(count, 2), rows(count)
    D.noise(x, where, z(5, 2), *at)
    D.pairwise_sqdist(x, where, 5)
    where[int(rng.integers(count))] = outside
    with pytest.raises(IndexError, match=f"t holds {outside}"):
        D.noise(x, where, z(5, 2), *at)
    with pytest.raises(ValueError, match=f"group holds {outside}"):
        D.pairwise_sqdist(x, where, 5)


def test_views_that_interleave_do_not_overlap():
    buffer = torch.zeros(3, 4, 5, 6)
    for a, b in (
        (buffer[:, :2], buffer[:, 2:]),
        (buffer[..., ::2], buffer[..., 1::2]),
        (buffer[0], buffer[1:]),
    ):
        assert not memory.may_overlap(a, b)
        assert not memory.may_overlap(b, a)
    for a, b in (
        (buffer[:, :2], buffer[:, 1:]),
        (buffer[..., ::2], buffer[..., ::3]),
        (buffer, buffer[2, 3, 4, 5:]),
    ):
        assert memory.may_overlap(a, b)


def test_overlap_is_what_a_list_of_addresses_says(rng):
    base = torch.zeros(64, dtype=torch.int8)
    for _ in range(300):
        views = []
        for _ in range(2):
            shape = [int(n) for n in rng.integers(1, 4, 2)]
            strides = [int(n) for n in rng.integers(1, 12, 2)]
            offset = int(rng.integers(0, 20))
            views.append((base.as_strided(shape, strides, offset), {
                offset + i * strides[0] + j * strides[1] for i in range(shape[0]) for j in range(shape[1])}))  # fmt: skip
        (a, at_a), (b, at_b) = views
        if at_a & at_b:
            assert memory.may_overlap(a, b), (a.shape, a.stride(), b.shape, b.stride())


@EACH_BACKEND
def test_channels_of_one_buffer_are_updated_in_place(backend):
    buffer, output, coefficients, at = torch.randn(3, 2, 4, 5), torch.randn(3, 1, 4, 5), table(), rows(3)
    x, x0 = buffer[:, :1].clone(), buffer[:, 1:].clone()
    with ops.backend(backend):
        ops.denoise_step(buffer[:, :1], output, coefficients, *at, buffer[:, 1:])
    reference.denoise_step(x, output, coefficients, *at, x0)
    assert_close(buffer, torch.cat([x, x0], 1))


@pytest.mark.parametrize("types", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_x0_of_another_type_stays_within_its_memory(types):
    memory = torch.full((6, 1, 8, 8), 7.0, dtype=types[1])
    x, output, coefficients, at = (
        torch.randn(3, 1, 8, 8).to(types[0]),
        torch.randn(3, 1, 8, 8),
        table(),
        rows(3),
    )
    wanted, wanted_x0 = x.clone(), memory[:3].clone()
    ops.denoise_step(x, output, coefficients, *at, memory[:3])
    reference.denoise_step(wanted, output, coefficients, *at, wanted_x0)
    assert (memory[3:] == 7).all()
    assert_close(x, wanted, types[0])
    assert_close(memory[:3], wanted_x0, types[1])


@EACH_BACKEND
def test_views_with_a_negative_bit_are_read_and_written_by_value(backend):
    def view(*shape):
        return torch.view_as_complex(torch.randn(*shape, 2)).conj().imag

    x, output, mean, m2 = view(3, 4, 4), view(3, 4, 4), torch.zeros(4, 4), torch.zeros(4, 4)
    assert x.is_neg()
    coefficients, at, wanted = table(), rows(3), x.clone().resolve_neg()
    samples = output.clone()
    with ops.backend(backend):
        ops.denoise_step(x, output, coefficients, *at)
        ops.ensemble_update(mean, m2, 0, output)
    reference.denoise_step(wanted, output.resolve_neg(), coefficients, *at)
    assert_close(x.resolve_neg(), wanted)
    assert_close(mean, samples.resolve_neg().mean(0))


@EACH_BACKEND
def test_nothing_merged_into_nothing_stays_finite(backend):
    mean, m2 = torch.full((4,), float("nan")), torch.full((4,), float("nan"))
    with ops.backend(backend):
        D.ensemble_merge(mean, m2, 0, torch.randn(4), torch.rand(4), 0)
        assert mean.eq(0).all()
        D.ensemble_merge(mean.fill_(float("nan")), m2, 0, torch.ones(4), torch.ones(4), 3)
    assert torch.equal(mean, torch.ones(4))
    assert torch.equal(m2, torch.ones(4))


def calls():
    x = torch.randn(2, 6, 4, 5, dtype=torch.float32)
    coefficients, at = table(), rows(2)
    w, b = torch.randn(6), torch.randn(6)
    group, t, noising = torch.tensor([0, 1]), torch.tensor([0, 3]), torch.rand(4, 2)
    mean, m2 = torch.zeros(6, 4, 5), torch.zeros(6, 4, 5)

    def gradients():
        leaves = [v.clone().requires_grad_() for v in (x, w, b)]
        return torch.autograd.grad(ops.group_norm_silu(leaves[0], 3, *leaves[1:]).sum(), leaves)

    return {
        "denoise_step": lambda: (ops.denoise_step(x.clone(), x, coefficients, *at, x.clone()),),
        "noise": lambda: (ops.noise(x, t, noising, *at),),
        "discrepancy_maps": lambda: ops.discrepancy_maps(x[:, None], x[:, None] * 0.5),
        "gaussian_kl": lambda: (ops.gaussian_kl(x, x, x * 0.5, x), ops.gaussian_kl(x, x, x * 0.5, x, "none")),
        "pairwise_sqdist": lambda: (ops.pairwise_sqdist(x.flatten(1), group, 2),),
        "ensemble_variance": lambda: ops.ensemble_variance(x),
        "ensemble_update": lambda: (ops.ensemble_update(mean.zero_(), m2.zero_(), 0, x), mean.clone(), m2.clone())[1:],
        "group_norm_silu": lambda: (ops.group_norm_silu(x, 3, w, b, scale=x[:, :, 0, 0], residual=x),),
        "gradients": gradients,
    }  # fmt: skip


@EACH_BACKEND
def test_the_callers_default_dtype_and_device_change_nothing(backend, monkeypatch):
    monkeypatch.undo()  # conftest's torch.empty does not know the default device
    made = calls()
    with ops.backend(backend):
        wanted = {name: call() for name, call in made.items()}
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                got = {name: call() for name, call in made.items()}
            finally:
                torch.set_default_dtype(torch.float32)
            for name, results in wanted.items():
                assert all(
                    a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got[name], results, strict=True)
                ), name
        torch.set_default_device("meta")
        try:
            got = {name: call() for name, call in made.items()}
        finally:
            torch.set_default_device(None)
        for name, results in wanted.items():
            assert all(torch.equal(a, b) for a, b in zip(got[name], results, strict=True)), name


def test_a_backend_is_that_of_its_thread_and_blocks_may_end_in_any_order():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with ops.backend("reference"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    assert ops.serving("noise", "cpu")[1] != "DDMD_BACKEND=reference"
    leave.set()
    thread.join()
    first, second = ops.backend("reference"), ops.backend("auto")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ops.serving("noise", "cpu")[1] != "DDMD_BACKEND=reference"
    second.__exit__(None, None, None)
    assert ops.serving("noise", "cpu")[1] != "DDMD_BACKEND=reference"


def test_a_gradient_is_made_by_the_backend_of_its_forward_call(monkeypatch):
    used = []
    plain = reference.group_norm_silu_backward
    from ddmd.ops import registry

    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    with ops.backend("reference"):
        y = ops.group_norm_silu(x, 1, torch.ones(2), torch.zeros(2)).sum()
    monkeypatch.setattr(
        registry, "_route", lambda op, device: (lambda *a: used.append(op) or plain(*a), "", None)
    )
    y.backward()
    assert used == []
    assert x.grad is not None


def test_func_grad_vmap_and_compile():
    x, w, b = torch.randn(3, 4, 5, 6), torch.randn(4), torch.randn(4)

    def loss(x):
        return ops.group_norm_silu(x, 2, w, b).square().sum()

    leaf = x.clone().requires_grad_()
    assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    many = torch.func.vmap(lambda x: ops.group_norm_silu(x, 2, w, b))(x[None].expand(2, -1, -1, -1, -1))
    assert_close(many[1], ops.group_norm_silu(x, 2, w, b))
    codes, group = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    compiled = torch.compile(lambda z, g: ops.pairwise_sqdist(z, g, 3), fullgraph=True, backend="aot_eager")
    assert_close(compiled(codes, group), reference.pairwise_sqdist(codes, group, 3))
    with pytest.raises(ValueError, match="group holds 2; allowed are 0 to 1"):
        torch.compile(lambda z, g: ops.pairwise_sqdist(z, g, 2), fullgraph=True, backend="aot_eager")(
            codes, group
        )


@pytest.mark.parametrize("code", [
    "import ddmd, sys; assert 'torch' not in sys.modules; import importlib.util; importlib.util.find_spec('torch');"
    "import torch; torch.ops.ddmd.noise.default; import torch.nn; assert not any('ddmd._register_ops' in type(f).__module__ for f in sys.meta_path)",
    "import torch, ddmd; torch.ops.ddmd.noise.default",
    "import ddmd, torch._C; import torch; torch.ops.ddmd.noise.default; from ddmd import ops; ops.noise",
    "import ddmd, threading; t = [threading.Thread(target=__import__, args=('torch',)) for _ in range(3)];"
    "[x.start() for x in t]; [x.join() for x in t]; import torch; torch.ops.ddmd.noise.default",
])  # fmt: skip
def test_importing_ddmd_registers_the_ops_in_either_order(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_torch_is_imported_even_where_the_ops_cannot_be(monkeypatch):
    monkeypatch.setenv("DDMD_BACKEND", "fastest")
    done = subprocess.run(
        [sys.executable, "-c", "import ddmd, torch; print(torch.ones(2).sum())"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.ops.ddmd is not registered: ValueError: DDMD_BACKEND is 'fastest'" in done.stderr


@EACH_BACKEND
@pytest.mark.parametrize("op", sorted(memory.WRITTEN))
def test_a_backward_that_needs_what_an_op_has_overwritten_raises(op, backend):
    calls = {
        "denoise_step": lambda t: step(t, torch.randn(3, 8)),
        "ensemble_update": lambda t: update(t, z(3, 8), 2, torch.randn(4, 3, 8)),
        "ensemble_merge": lambda t: D.ensemble_merge(t, z(3, 8), 2, torch.randn(3, 8), z(3, 8), 3),
    }
    written = torch.randn(3, 8)
    weight = torch.randn(3, 8, requires_grad=True)
    product = (weight * written).sum()
    with ops.backend(backend):
        calls[op](written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode(), ops.backend(backend):
        calls[op](written)
        calls[op](torch.randn(3, 8))


@EACH_BACKEND
def test_an_empty_state_that_is_merged_with_itself_is_the_other_state(backend):
    mean, m2 = torch.randn(5), torch.rand(5)
    expected = mean.clone(), m2.clone()
    with ops.backend(backend):
        assert ops.ensemble_merge(mean, m2, 0, mean, m2, 4) == 4
    assert torch.equal(mean, expected[0])
    assert torch.equal(m2, expected[1])
    nothing, garbage = torch.full((5,), float("nan")), torch.full((5,), float("nan"))
    with ops.backend(backend):
        ops.ensemble_merge(nothing, garbage, 0, mean, m2, 4)
    assert torch.equal(nothing, expected[0])
    assert torch.equal(garbage, expected[1])
