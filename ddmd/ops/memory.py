"""Whether tensors that an op writes share memory with themselves or with another argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Floating tensors that an op writes. Only `denoise_step` and the running states write to arguments.
WRITTEN = {
    "denoise_step": ("x", "x0"),
    "ensemble_update": ("mean", "m2"),
    "ensemble_merge": ("mean", "m2"),
}


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last of a tensor with elements."""
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * size
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * size


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: expanded, or strides smaller than what lies inside them."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return True
            reach += (n - 1) * stride
    return False


def _runs(tensor: Tensor) -> tuple[int, int]:
    """Bytes of its contiguous inner runs, and the greatest common divisor of the distances between runs."""
    size = tensor.element_size()
    run, distance = size, 0
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if distance == 0 and stride * size == run:
                run *= n
            else:
                distance = math.gcd(distance, stride * size)
    return run, distance


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory. Interleaved views, such as channels of a buffer, do not."""
    first, second = _extent(a), _extent(b)
    if first[1] <= second[0] or second[1] <= first[0]:
        return False
    (run_a, gap_a), (run_b, gap_b) = _runs(a), _runs(b)
    period = math.gcd(gap_a, gap_b)
    if period == 0:
        return True
    apart = (second[0] - first[0]) % period
    return not (run_a <= apart and apart + run_b <= period)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


# Pairs (written, other) that may be one and the same memory: each element is read before it is written.
_MAY_BE_SAME = {
    ("denoise_step", "x", "output"),
    ("denoise_step", "x0", "output"),
    ("ensemble_merge", "mean", "other_mean"),
    ("ensemble_merge", "m2", "other_m2"),
}


def require_disjoint(op: str, names: Sequence[str], values: Sequence[Any]) -> None:
    """Raise ValueError where a written tensor shares memory with itself or with another argument."""
    written = WRITTEN[op]
    tensors = [
        (name, value)
        for name, value in zip(names, values, strict=False)
        if isinstance(value, Tensor) and value.numel()
    ]
    for i, (name, tensor) in enumerate(tensors):
        if name not in written:
            continue
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, so that elements "
                "may share memory, and it is written; pass .clone()"
            )
        start, end = _extent(tensor)
        for j, (other_name, other) in enumerate(tensors):
            if i == j or (j < i and other_name in written):
                continue
            first = other.data_ptr()
            if first >= end or _extent(other)[1] <= start:
                continue
            if (op, name, other_name) in _MAY_BE_SAME and _is_same(tensor, other):
                continue
            if may_overlap(tensor, other):
                raise ValueError(
                    f"{op}: {name}, which is written, shares memory with {other_name}; pass a copy of one"
                )
