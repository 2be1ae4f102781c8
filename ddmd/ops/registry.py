"""The registry of ops: schema, shape rule and gradient of each, and which backend serves which device.

`torch.ops.ddmd.<name>` is the registered op; the function of the same name in `ddmd.ops` documents it
and calls it. Every call is checked here, by `ddmd.ops.checks`, before it reaches a backend. Backends,
best first:

* C++ (`ddmd.ops.native`) on CPU, and its CUDA half for the ensemble ops;
* Triton (`ddmd.kernels`) on CUDA;
* `ddmd.ops.reference`, plain torch, everywhere else, for float64, and for everything when the
  environment variable DDMD_BACKEND is "reference" (or inside `with backend("reference")`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function as functorch_autograd

from ddmd.ops import checks, reference

SCHEMAS = {
    "noise": "(Tensor x0, Tensor t, Tensor table, Tensor step, Tensor seed, Tensor sample, "
    "Tensor slice_index) -> Tensor",
    "denoise_step": "(Tensor(a!) x, Tensor output, Tensor table, Tensor step, Tensor seed, "
    "Tensor sample, Tensor slice_index, Tensor(b!)? x0=None) -> ()",
    "discrepancy_maps": "(Tensor recon_a, Tensor recon_b) -> (Tensor, Tensor)",
    "gaussian_kl": "(Tensor mu_q, Tensor logvar_q, Tensor mu_p, Tensor logvar_p, "
    'str reduction="sum") -> Tensor',
    "gaussian_kl_backward": "(Tensor grad, Tensor mu_q, Tensor logvar_q, Tensor mu_p, "
    "Tensor logvar_p, str reduction) -> (Tensor, Tensor, Tensor, Tensor)",
    "pairwise_sqdist": "(Tensor z, Tensor group, int num_groups) -> Tensor",
    "pairwise_sqdist_backward": "(Tensor grad, Tensor z, Tensor group, int num_groups) -> Tensor",
    "ensemble_variance": "(Tensor samples, *, int correction=1) -> (Tensor, Tensor)",
    "ensemble_update": "(Tensor(a!) mean, Tensor(b!) m2, int count, Tensor samples) -> ()",
    "ensemble_merge": "(Tensor(a!) mean, Tensor(b!) m2, int count, Tensor other_mean, "
    "Tensor other_m2, int other_count) -> ()",
    "group_norm_silu": "(Tensor x, int num_groups, Tensor weight, Tensor bias, Tensor? scale, "
    "Tensor? shift, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    "group_norm_silu_backward": "(Tensor grad, Tensor x, int num_groups, Tensor weight, "
    "Tensor bias, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
OPS = tuple(name for name in SCHEMAS if not name.endswith("_backward"))

# Which module has the fast version of an op, by device; everything not named is the reference's.
_NATIVE_CPU = {
    "noise", "denoise_step", "discrepancy_maps", "ensemble_variance", "ensemble_update",
    "ensemble_merge", "gaussian_kl", "gaussian_kl_backward", "group_norm_silu", "group_norm_silu_backward",
    "pairwise_sqdist", "pairwise_sqdist_backward",
}  # fmt: skip
_NATIVE_CUDA = {"ensemble_variance", "ensemble_update", "ensemble_merge"}
_TRITON = set(SCHEMAS) - _NATIVE_CUDA

BACKENDS = ("auto", "reference")
_DEFAULT = os.environ.get("DDMD_BACKEND", "auto")
if _DEFAULT not in BACKENDS:
    raise ValueError(f"DDMD_BACKEND is {_DEFAULT!r}; allowed are 'auto' and 'reference'")

# The blocks of `backend` that this thread or task is in, innermost last: (mark of the block, name).
_blocks: contextvars.ContextVar[tuple[tuple[object, str], ...]] = contextvars.ContextVar(
    "ddmd_backend", default=((None, _DEFAULT),)
)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use "auto" or "reference" backends inside the block, in this thread (or asyncio task) alone.

    Raises
    ------
    ValueError
        If the name is neither.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; allowed are 'auto' and 'reference'")
    mark = object()
    _blocks.set((*_blocks.get(), (mark, name)))
    try:
        yield
    finally:  # blocks may end in another order than they began
        _blocks.set(tuple(block for block in _blocks.get() if block[0] is not mark))


def _chosen() -> str:
    return _blocks.get()[-1][1]


def serving(op: str, device: str) -> tuple[str, str | None]:
    """The backend that serves an op on "cpu" or "cuda", and why it is not a faster one (or None)."""
    _, name, reason = _route(op, device)
    if _chosen() == "reference":
        return "reference", "DDMD_BACKEND=reference"
    return name, reason


OLDEST_GPU = (7, 5)  # compute capability: what the CUDA code is built for, and bfloat16 in Triton


class FallbackWarning(RuntimeWarning):
    """Plain torch serves ops that faster code would serve on this machine, were something else installed."""


@functools.cache
def unsupported_gpu() -> str | None:
    """Why neither the CUDA code nor the Triton kernels can run on the GPUs of this machine, or None.

    Asked before the first launch; the reference then serves every op, with one warning.
    """
    reason = None
    if torch.version.hip:
        reason = "torch is built for ROCm, and the kernels of ddmd are for CUDA"
    elif torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if capability < OLDEST_GPU:
                reason = (
                    f"{torch.cuda.get_device_name(index)} is sm_{capability[0]}{capability[1]}, and the kernels of "
                    f"ddmd need sm_{OLDEST_GPU[0]}{OLDEST_GPU[1]} or newer"
                )
    if reason is not None:
        warnings.warn(f"{reason}: plain torch serves every op", FallbackWarning, stacklevel=2)
    return reason


@functools.cache
def no_triton() -> str | None:
    """Why the Triton kernels cannot run on the GPUs of this machine, or None.

    Asked before the first launch; the reference then serves their ops, with one warning where there is a GPU.
    """
    try:
        from ddmd import kernels
    except ImportError as error:
        reason: str | None = f"Triton is missing ({error})"
    else:
        reason = kernels.why_not()
    if reason is not None and torch.cuda.is_available():
        warnings.warn(
            f"{reason}: plain torch serves the ops that have Triton kernels", FallbackWarning, stacklevel=2
        )
    return reason


@functools.cache
def _route(op: str, device: str) -> tuple[Callable[..., Any], str, str | None]:
    plain = getattr(reference, op)
    if device == "cuda" and (reason := unsupported_gpu()):
        return plain, "reference", reason
    if op in {"cpu": _NATIVE_CPU, "cuda": _NATIVE_CUDA}.get(device, ()):
        from ddmd.ops import native

        reason = native.why_not(device, op)
        return (plain, "reference", reason) if reason else (getattr(native, op), "C++", None)
    if device == "cuda" and op in _TRITON:
        if reason := no_triton():
            return plain, "reference", reason
        from ddmd import kernels

        return getattr(kernels, op), "Triton", None
    return plain, "reference", None


# --------------------------------------------------------------------------- registration

_library: Any = torch.library.Library("ddmd", "DEF")


def _implementation(op: str, device: str) -> Callable[..., Any]:
    """Check the arguments, then call the backend that serves the op on "cpu", "cuda" or "other"."""
    plain = getattr(reference, op)
    check = getattr(checks, op)
    check_values = checks.VALUES.get(op) if device == "cpu" else None
    names = tuple(a.name for a in getattr(torch.ops.ddmd, op).default._schema.arguments)
    written = checks.WRITTEN.get(op, ())
    running = op in ("ensemble_update", "ensemble_merge")

    def call(*args: Any, **kwargs: Any) -> Any:
        use_reference = check(*args, **kwargs)
        if written:
            checks.memory(op, names, args)
        if check_values is not None:
            check_values(*args)
        if written:
            _count_writes(names, written, args)
        if running and args[2] == 0:  # what a state of no samples holds is of no meaning
            if op == "ensemble_merge" and args[5]:  # the other state may be the same memory
                args[0].copy_(args[3])
                args[1].copy_(args[4])
                return None
            args[0].zero_()
            args[1].zero_()
        if use_reference or _chosen() == "reference":
            return plain(*args, **kwargs)
        return _route(op, device)[0](*args, **kwargs)

    return call


def _count_writes(names: tuple[str, ...], written: tuple[str, ...], args: tuple[Any, ...]) -> None:
    """Tell autograd what is about to be written: a backward that needs the old values raises then."""
    for name, value in zip(names, args, strict=False):
        if name in written and isinstance(value, Tensor) and not value.is_inference():
            torch.autograd.graph.increment_version(value)


def _resolved(op: str) -> Callable[..., Any]:
    """The op on views with a negative or conjugate bit: kernels read memory, where the bit is not."""
    overload = getattr(torch.ops.ddmd, op).default
    names = tuple(a.name for a in overload._schema.arguments)
    written = checks.WRITTEN.get(op, ())

    def plain(value: Any) -> Any:
        return value.resolve_conj().resolve_neg() if isinstance(value, Tensor) else value

    def call(*args: Any, **kwargs: Any) -> Any:
        values = [plain(a) for a in args]
        result = overload(*values, **{k: plain(v) for k, v in kwargs.items()})
        for name, old, new in zip(names, args, values, strict=False):
            if name in written and new is not old and isinstance(old, Tensor):
                old.copy_(new)
        return result

    return call


def _fake(op: str) -> Callable[..., Any]:
    """Shapes, dtypes and strides of the result, by the same checks as a call's."""
    check, rule = getattr(checks, op), _FAKES[op]

    def fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return rule(*args, **kwargs)

    return fake


def _accumulator(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _fake_maps(recon_a: Tensor, recon_b: Tensor) -> tuple[Tensor, Tensor]:
    _, z, _, h, w = recon_a.shape
    return _accumulator(recon_a, (z, 1, h, w)), _accumulator(recon_a, (z, 1, h, w))


def _fake_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum"
) -> Tensor:
    return _accumulator(mu_q, mu_q.shape if reduction == "none" else ())


def _fake_kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> tuple[Tensor, ...]:
    return tuple(_contiguous(t) for t in (mu_q, logvar_q, mu_p, logvar_p))


def _fake_variance(samples: Tensor, *, correction: int = 1) -> tuple[Tensor, Tensor]:
    return _accumulator(samples, samples.shape[1:]), _accumulator(samples, samples.shape[1:])


def _fake_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = (x.shape[0], num_groups)
    y = torch.empty_like(x, memory_format=reference.norm_layout(x))
    return y, _accumulator(x, statistics), _accumulator(x, statistics)


def _fake_norm_backward(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, channels = x.shape[:2]
    shapes = ((channels,), (channels,), (n, channels), (n, channels))
    d_x = torch.empty_like(x, memory_format=reference.norm_layout(x))
    return d_x, *(_accumulator(x, shape) for shape in shapes)


_FAKES: dict[str, Callable[..., Any]] = {
    "noise": lambda x0, *_: _contiguous(x0),
    "denoise_step": lambda *_, **__: None,
    "discrepancy_maps": _fake_maps,
    "gaussian_kl": _fake_kl,
    "gaussian_kl_backward": _fake_kl_backward,
    "pairwise_sqdist": lambda z, group, num_groups: _accumulator(z, ()),
    "pairwise_sqdist_backward": lambda grad, z, group, num_groups: _contiguous(z),
    "ensemble_variance": _fake_variance,
    "ensemble_update": lambda *_: None,
    "ensemble_merge": lambda *_: None,
    "group_norm_silu": _fake_norm,
    "group_norm_silu_backward": _fake_norm_backward,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _implementation(_name, "cpu"), "CPU")
    _library.impl(_name, _implementation(_name, "cuda"), "CUDA")
    # every other device, and layouts such as sparse, which the checks refuse in plain words
    _library.impl(_name, _implementation(_name, "other"), "CompositeExplicitAutograd")
    for _key in ("Negative", "Conjugate"):
        _library.impl(_name, _resolved(_name), _key)
    torch.library.register_fake(f"ddmd::{_name}", _fake(_name), lib=_library)


def _register_gradient(
    op: str, setup: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    """Give an op its gradient: what `torch.library.register_autograd` does, and for torch.func.grad too.

    The gradient is run by the backend of its forward call, since autograd may run it in another thread.
    """
    overload = getattr(torch.ops.ddmd, op).default
    defaults = [a.default_value if a.has_default_value() else None for a in overload._schema.arguments]

    def below(keys: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    class Gradient(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keys: Any, *args: Any) -> Any:
            result = below(keys, args)
            ctx.backend = _chosen()
            setup(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if ctx.backend == _chosen():
                return None, *backward(ctx, *grads)
            with backend(ctx.backend):
                return None, *backward(ctx, *grads)

    Gradient.__name__ = Gradient.__qualname__ = f"{op}_gradient"
    apply = Gradient.apply  # type: ignore[attr-defined]

    def call(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what is the default
            if torch._C._are_functorch_transforms_active():
                with functorch_autograd.enable_single_level_autograd_function():  # type: ignore[attr-defined]
                    return apply(keys, *args)
            return apply(keys, *args)
        return below(keys, args)

    _library.impl(op, call, "Autograd", with_keyset=True)


def _kl_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.reduction = inputs[4]


def _kl_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.ddmd.gaussian_kl_backward(grad, *ctx.saved_tensors, ctx.reduction), None


def _pairs_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.num_groups = inputs[2]


def _pairs_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.ddmd.pairwise_sqdist_backward(grad, *ctx.saved_tensors, ctx.num_groups), None, None


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, scale, shift, residual, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1], output[2])
    ctx.residual_dtype = None if residual is None else residual.dtype


def _norm_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    d_x, d_weight, d_bias, d_scale, d_shift = torch.ops.ddmd.group_norm_silu_backward(
        grad, x, ctx.num_groups, weight, bias, scale, shift, mean, rstd
    )
    return (
        d_x,
        None,
        d_weight.to(weight.dtype),
        d_bias.to(bias.dtype),
        None if scale is None else d_scale.to(scale.dtype),
        None if shift is None else d_shift.to(shift.dtype),
        None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype),
        None,
    )


_register_gradient("gaussian_kl", _kl_setup, _kl_backward)
_register_gradient("pairwise_sqdist", _pairs_setup, _pairs_backward)
_register_gradient("group_norm_silu", _norm_setup, _norm_backward)
