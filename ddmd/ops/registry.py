"""The registry of ops: schema, shape rule and gradient of each, and which backend serves which device.

`torch.ops.ddmd.<name>` is the registered op; the function of the same name in `ddmd.ops` checks its
arguments, and calls it. Backends, best first:

* C++ (`ddmd.native`) on CPU, and its CUDA half for the ensemble ops;
* Triton (`ddmd.kernels`) on CUDA;
* `ddmd.reference`, plain torch, everywhere else, and for everything when the environment
  variable DDMD_BACKEND is "reference" (or inside `with backend("reference")`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ddmd.ops import reference

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
    "ensemble_merge", "group_norm_silu", "group_norm_silu_backward",
}  # fmt: skip
_NATIVE_CUDA = {"ensemble_variance", "ensemble_update", "ensemble_merge"}
_TRITON = set(SCHEMAS) - _NATIVE_CUDA

_forced: list[str] = [os.environ.get("DDMD_BACKEND", "auto")]
if _forced[0] not in ("auto", "reference"):
    raise ValueError(f"DDMD_BACKEND is {_forced[0]!r}; allowed are 'auto' and 'reference'")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use "auto" or "reference" backends inside the block.

    Raises
    ------
    ValueError
        If the name is neither.
    """
    if name not in ("auto", "reference"):
        raise ValueError(f"backend is {name!r}; allowed are 'auto' and 'reference'")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def serving(op: str, device: str) -> tuple[str, str | None]:
    """The backend that serves an op on "cpu" or "cuda", and why it is not a faster one (or None)."""
    _, name, reason = _route(op, device)
    if _forced[-1] == "reference":
        return "reference", "DDMD_BACKEND=reference"
    return name, reason


@functools.cache
def _route(op: str, device: str) -> tuple[Callable[..., Any], str, str | None]:
    plain = getattr(reference, op)
    if op in (_NATIVE_CPU if device == "cpu" else _NATIVE_CUDA):
        from ddmd.ops import native

        reason = native.why_not(device)
        return (plain, "reference", reason) if reason else (getattr(native, op), "C++", None)
    if device == "cuda" and op in _TRITON:
        try:
            from ddmd import kernels
        except ImportError as error:
            return plain, "reference", f"Triton is missing ({error})"
        reason = kernels.why_not()
        return (plain, "reference", reason) if reason else (getattr(kernels, op), "Triton", None)
    return plain, "reference", None


# --------------------------------------------------------------------------- registration

_library = torch.library.Library("ddmd", "DEF")


def _implementation(op: str, device: str) -> Callable[..., Any]:
    plain = getattr(reference, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        if _forced[-1] == "reference" or any(
            isinstance(a, Tensor) and a.dtype == torch.float64 for a in args
        ):
            return plain(*args, **kwargs)
        return _route(op, device)[0](*args, **kwargs)

    return call


def _wide_empty(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _fake_maps(recon_a: Tensor, recon_b: Tensor) -> tuple[Tensor, Tensor]:
    _, z, _, h, w = recon_a.shape
    return _wide_empty(recon_a, (z, 1, h, w)), _wide_empty(recon_a, (z, 1, h, w))


def _fake_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum"
) -> Tensor:
    return _wide_empty(mu_q, mu_q.shape if reduction == "none" else ())


def _fake_kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (mu_q, logvar_q, mu_p, logvar_p))


def _fake_variance(samples: Tensor, *, correction: int = 1) -> tuple[Tensor, Tensor]:
    return _wide_empty(samples, samples.shape[1:]), _wide_empty(samples, samples.shape[1:])


def _fake_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = (x.shape[0], num_groups)
    return torch.empty_like(x), _wide_empty(x, statistics), _wide_empty(x, statistics)


def _fake_norm_backward(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, channels = x.shape[:2]
    shapes = ((channels,), (channels,), (n, channels), (n, channels))
    return torch.empty_like(x), *(_wide_empty(x, shape) for shape in shapes)


_FAKES: dict[str, Callable[..., Any]] = {
    "noise": lambda x0, *_: torch.empty_like(x0),
    "denoise_step": lambda *_, **__: None,
    "discrepancy_maps": _fake_maps,
    "gaussian_kl": _fake_kl,
    "gaussian_kl_backward": _fake_kl_backward,
    "pairwise_sqdist": lambda z, group, num_groups: _wide_empty(z, ()),
    "pairwise_sqdist_backward": lambda grad, z, group, num_groups: torch.empty_like(z),
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
    torch.library.register_fake(f"ddmd::{_name}", _FAKES[_name], lib=_library)


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


for _name, _backward, _setup in (
    ("gaussian_kl", _kl_backward, _kl_setup),
    ("pairwise_sqdist", _pairs_backward, _pairs_setup),
    ("group_norm_silu", _norm_backward, _norm_setup),
):
    torch.library.register_autograd(f"ddmd::{_name}", _backward, setup_context=_setup, lib=_library)
