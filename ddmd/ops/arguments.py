"""What one argument of an op must be: a dense tensor of a type, shape and device, or an integer.

The checks are part of the cost of every call, so the usual answer takes few steps. Messages are built only where a
check fails.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_STRIDED, _FLOAT64, _INT64 = torch.strided, torch.float64, torch.int64


def require_tensors(op: str, names: Sequence[str], values: Sequence[Any], required: int) -> None:
    """Raise TypeError unless every value is a tensor; after the first `required`, one may be None."""
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        if not isinstance(value, Tensor) and (value is not None or i < required):
            raise TypeError(f"{op}: {name} is {type(value).__name__}; allowed is a torch.Tensor")


def require_int(op: str, name: str, value: Any) -> int:
    """The value as a Python int; raise TypeError where it is not an integer."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}; allowed is an integer") from None


def require_float(op: str, name: str, value: Any) -> float:
    """The value as a Python float; raise TypeError where it is not a number."""
    if isinstance(value, (float, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} is {value!r}; allowed is a number")
    return float(value)


def require_floats(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> bool:
    """Require dense floating tensors on one device; say whether one of them is float64. The first is not None."""
    first = tensors[0]
    assert first is not None
    device = first.device
    double = False
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = tensor.dtype
        if (
            dtype not in FLOATS
            or tensor.layout is not _STRIDED
            or tensor.is_nested
            or tensor.device != device
        ):
            _refuse_floats(op, names, tensors)
        if dtype is _FLOAT64:
            double = True
    return double


def _refuse_floats(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> NoReturn:
    device = None
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}; allowed are float32, bfloat16 and float16 "
                "(and float64, served by the reference)"
            )
        _require_dense(op, name, tensor)
        if device is None:
            device = tensor.device
        _require_device(op, name, tensor, device)
    raise AssertionError(f"{op}: refused floating tensors that are allowed")


def _require_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not _STRIDED or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{op}: {name} has layout {layout}; allowed is a dense tensor (torch.strided)")


def _require_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}; allowed is {device}, where the first tensor is"
        )


def require_index(op: str, name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Require a dense int64 tensor of a shape on a device."""
    if tensor.dtype is not _INT64:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; allowed is int64")
    if tensor.layout is not _STRIDED or tensor.is_nested:
        _require_dense(op, name, tensor)
    if tensor.device != device:
        _require_device(op, name, tensor, device)
    if tensor.shape != shape:
        require_shape(op, name, tensor, shape)


def require_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Require a shape."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; allowed is {tuple(shape)}")


def require_no_grad(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Refuse tensors that require grad, where gradients are recorded: the op has none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, and {op} has no gradient; detach it, or call under torch.no_grad()"
            )
