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

from ddmd.ops import checks, memory, reference
from ddmd.ops.arguments import require_tensors
from ddmd.ops.direct import is_unobserved
from ddmd.ops.gradients import GRADIENTS, register_gradient
from ddmd.ops.result_shapes import RESULTS

SCHEMAS = {
    "noise": "(Tensor x0, Tensor t, Tensor table, Tensor step, Tensor seed, Tensor sample, "
    "Tensor slice_index) -> Tensor",
    "pure_noise": "(SymInt[] shape, Tensor step, Tensor seed, Tensor sample, Tensor slice_index, "
    "ScalarType? dtype=None) -> Tensor",
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
    "noise", "pure_noise", "denoise_step", "discrepancy_maps", "ensemble_variance", "ensemble_update",
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
    """What serves an op on a device, its name, and why it is not something faster (or None)."""
    plain = getattr(reference, op)
    if device == "cuda" and (reason := unsupported_gpu()):
        return plain, "reference", reason
    if op in {"cpu": _NATIVE_CPU, "cuda": _NATIVE_CUDA}.get(device, ()):
        from ddmd.ops import native

        _WITHOUT_GRADIENT[native.group_norm_silu] = native.group_norm_silu_result
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


# What serves a call of which nobody takes a gradient, where that leaves out what only the gradient needs.
_WITHOUT_GRADIENT: dict[Callable[..., Any], Callable[..., Any]] = {}


def _dispatched_route(op: str, device: str) -> Callable[..., Any]:
    return _route(op, device)[0]


def _direct_route(op: str, device: str) -> Callable[..., Any]:
    function = _route(op, device)[0]
    return _WITHOUT_GRADIENT.get(function, function)


def _implementation(
    op: str, device: str, route: Callable[[str, str], Callable[..., Any]]
) -> Callable[..., Any]:
    """Check the arguments, then call the backend that serves the op on "cpu", "cuda" or "other"."""
    plain = getattr(reference, op)
    check = getattr(checks, op)
    check_values = checks.VALUES.get(op) if device == "cpu" else None
    names = tuple(a.name for a in getattr(torch.ops.ddmd, op).default._schema.arguments)
    written = memory.WRITTEN.get(op, ())
    running = op in ("ensemble_update", "ensemble_merge")

    def call(*args: Any, **kwargs: Any) -> Any:
        use_reference = check(*args, **kwargs)
        if written:
            memory.require_disjoint(op, names, args)
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
        return route(op, device)(*args, **kwargs)

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
    written = memory.WRITTEN.get(op, ())

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
    check, rule = getattr(checks, op), RESULTS[op]

    def fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return rule(*args, **kwargs)

    return fake


_OVERLOADS: dict[str, Any] = {}
_REQUIRED: dict[str, int] = {}  # tensors of an op that may not be None
_DIRECT: dict[tuple[str, str], Callable[..., Any]] = {}  # an op on "cpu" or "cuda", past the dispatcher

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _OVERLOADS[_name] = getattr(torch.ops.ddmd, _name).default
    _REQUIRED[_name] = sum(str(a.type) == "Tensor" for a in _OVERLOADS[_name]._schema.arguments)
    # "other": every other device, and layouts such as sparse, which the checks refuse in plain words
    for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA"), ("other", "CompositeExplicitAutograd")):
        _library.impl(_name, _implementation(_name, _device, _dispatched_route), _key)
        _DIRECT[_name, _device] = _implementation(_name, _device, _direct_route)
    for _key in ("Negative", "Conjugate"):
        _library.impl(_name, _resolved(_name), _key)
    torch.library.register_fake(f"ddmd::{_name}", _fake(_name), lib=_library)
for _name in GRADIENTS:
    register_gradient(_library, _name, _chosen, backend)

# --------------------------------------------------------------------------- calls by the functions of ddmd.ops


def call(
    op: str, names: tuple[str, ...], tensors: tuple[Tensor | None, ...], *args: Any, **kwargs: Any
) -> Any:
    """Call an op: directly where nothing beside it takes part, or else through PyTorch's dispatcher.

    Parameters
    ----------
    op : str
    names, tensors
        The tensors among its arguments, and their names; those that may be None last.
    args, kwargs
        All its arguments, in the order of its schema.

    Raises
    ------
    TypeError
        If one of the tensors is not a tensor.
    """
    if not torch.compiler.is_compiling() and is_unobserved(tensors, _REQUIRED[op]):
        first = tensors[0]
        if first.is_cpu:  # type: ignore[union-attr]
            return _DIRECT[op, "cpu"](*args, **kwargs)
        if first.is_cuda:  # type: ignore[union-attr]
            return _DIRECT[op, "cuda"](*args, **kwargs)
    require_tensors(op, names, tensors, _REQUIRED[op])
    return _OVERLOADS[op](*args, **kwargs)
