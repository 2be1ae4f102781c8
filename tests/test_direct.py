"""Calls past PyTorch's dispatcher: made only where nothing else takes part, with the same result and refusals."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddmd import ops
from ddmd.ops import reference, registry
from ddmd.ops.direct import is_unobserved
from tests.shapes import assert_close, rows


def norm(x, **more):
    return ops.group_norm_silu(x, 2, torch.ones(4), torch.zeros(4), **more)


@pytest.fixture
def dispatched(monkeypatch):
    """Names of the ops that went through the dispatcher."""
    names: list[str] = []

    class Noting(dict):
        def __getitem__(self, op):
            names.append(op)
            return super().__getitem__(op)

    monkeypatch.setattr(registry, "_OVERLOADS", Noting(registry._OVERLOADS))
    return names


def test_a_call_without_gradient_is_direct_and_the_same_bits(dispatched):
    x = torch.randn(2, 4, 5, 6)
    direct = norm(x)
    assert dispatched == []
    assert torch.equal(
        direct, torch.ops.ddmd.group_norm_silu(x, 2, torch.ones(4), torch.zeros(4), None, None, None, 1e-5)[0]
    )
    weight = torch.nn.Parameter(torch.ones(4))
    with torch.no_grad():
        ops.group_norm_silu(x, 2, weight, torch.zeros(4))
    with torch.inference_mode():
        ops.group_norm_silu(x, 2, weight, torch.zeros(4))
    assert dispatched == []
    assert ops.group_norm_silu(x, 2, weight, torch.zeros(4)).requires_grad
    assert dispatched == ["group_norm_silu"]


class FunctionMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
def test_modes_see_every_call(mode):
    x, z = torch.randn(2, 4, 5, 6), torch.randn(3, 4)
    at = rows(2)
    with mode() as watch:
        norm(x)
        ops.ensemble_variance(x)
        ops.pure_noise((2, 5), *at)
        ops.gaussian_kl(z, z, z, z)
    for op in ("group_norm_silu", "ensemble_variance", "pure_noise", "gaussian_kl"):
        assert any(op in name for name in watch.seen), (op, watch.seen)


def test_the_profiler_sees_the_op():
    x = torch.randn(2, 4, 5, 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x)
    assert "ddmd::group_norm_silu" in {event.key for event in profile.key_averages()}


class Subclass(torch.Tensor):
    pass


def views_and_wrappers():
    x = torch.randn(2, 4, 5, 6)
    neg = torch.view_as_complex(torch.randn(2, 4, 5, 6, 2)).conj().imag
    return {
        "negative": (neg, neg.clone().resolve_neg()),
        "zero": (torch._efficientzerotensor((2, 4, 5, 6)), torch.zeros(2, 4, 5, 6)),
        "functional": (torch._to_functional_tensor(x), x),
        "subclass": (x.as_subclass(Subclass), x),
    }


@pytest.mark.parametrize("kind", ["negative", "zero", "functional", "subclass"])
def test_a_tensor_that_is_not_its_memory_goes_through_the_dispatcher(kind, dispatched):
    tensor, plain = views_and_wrappers()[kind]
    assert is_unobserved((plain, None), 1)
    assert not is_unobserved((plain, None, tensor), 1)
    y = norm(tensor)
    assert dispatched == ["group_norm_silu"]
    y = torch._from_functional_tensor(y) if kind == "functional" else y
    wanted = reference.group_norm_silu(plain, 2, torch.ones(4), torch.zeros(4), None, None, None, 1e-5)[0]
    assert_close(y.as_subclass(torch.Tensor), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to_sparse(), "x has layout torch.sparse_coo"),
        (lambda x: x.flatten(1).to_sparse_csr(), "x has layout torch.sparse_csr"),
        (lambda x: x.to_mkldnn(), "x has layout torch._mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x)), "x has layout nested"),
        (lambda x: x.to(torch.complex64), "x has dtype torch.complex64"),
        (lambda x: [x], "x is list"),
        (lambda x: None, "x is NoneType"),
    ],
)
def test_a_direct_call_refuses_what_the_dispatcher_does(make, message):
    with pytest.raises(TypeError, match=message):
        norm(make(torch.randn(2, 4, 5, 6)))


def test_a_missing_tensor_is_named():
    x = torch.randn(2, 4, 5, 6)
    with pytest.raises(TypeError, match="weight is NoneType; allowed is a torch.Tensor"):
        ops.group_norm_silu(x, 2, None, torch.zeros(4))
    with pytest.raises(TypeError, match="m2 is NoneType; allowed is a torch.Tensor"):
        ops.ensemble_update(torch.zeros(4), None, 0, x)


def test_wrong_scalars_are_named():
    x = torch.randn(2, 4, 5, 6)
    for eps in ("1e-5", None, [1.0]):
        with pytest.raises(TypeError, match="eps is .*; allowed is a number"):
            norm(x, eps=eps)
    with pytest.raises(TypeError, match=r"shape is 2\.5; allowed is an integer"):
        ops.pure_noise((2, 2.5), *rows(2))
    with pytest.raises(TypeError, match="dtype is torch.int64"):
        ops.pure_noise((2, 5), *rows(2), torch.int64)
    with pytest.raises(ValueError, match=r"sample has shape \(3,\); allowed is \(2,\)"):
        ops.pure_noise((2, 5), *rows(3))
    with pytest.raises(ValueError, match="shape has 1 dimensions"):
        ops.pure_noise((2,), *rows(2))
    for call in (ops.pure_noise, torch.ops.ddmd.pure_noise):
        with pytest.raises(ValueError, match=r"shape is \(2, -5\); allowed are sizes of at least 0"):
            call((2, -5), *rows(2))


def test_compiled_traced_and_transformed_calls_are_the_op():
    x, at = torch.randn(2, 4, 5, 6), rows(2)

    def both(x, step, seed, sample, place):
        return norm(x) + ops.pure_noise(x.shape, step, seed, sample, place)

    wanted = both(x, *at)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, *at), wanted)
    dynamic = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(dynamic(x, *at), wanted)
    traced = torch.jit.trace(norm, (x,), check_trace=False)
    assert "ddmd::group_norm_silu" in str(traced.graph)
    assert_close(torch.vmap(norm)(x[None])[0], norm(x))
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    training = torch.compile(lambda t: norm(t).square().sum(), fullgraph=True, backend="aot_eager")
    training(leaf).backward()
    norm(other).square().sum().backward()
    assert_close(leaf.grad, other.grad)


def test_a_meta_tensor_has_the_shape_and_no_values():
    step, seed, sample, place = (t.to("meta") for t in rows(2))
    x = ops.pure_noise((2, 3), step, seed, sample, place, torch.bfloat16)
    assert (x.device.type, x.dtype, x.shape) == ("meta", torch.bfloat16, (2, 3))
