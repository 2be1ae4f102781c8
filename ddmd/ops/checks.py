"""What each op requires of its arguments; checked at every call, before a kernel gets a pointer.

`ddmd.ops.registry` runs these checks for C++, CUDA, Triton and the reference alike, so that
`ddmd.ops.<name>` and `torch.ops.ddmd.<name>` refuse the same arguments with the same words.
Messages are built only when a check fails: the checks are part of the cost of every call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddmd.ops.reference import COLUMNS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATES = (torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
MAX_COUNT = 2**53  # samples of a running state: counted exactly in float64
MAX_GROUPS = 2**31 - 1  # programs on one axis of a launch
MAX_CODES = 2**30  # codes, and elements of a code, that 32-bit indices of a launch count
MAX_ROW_SIZE = 2**34  # elements that 2^32 Philox counters make

# Floating tensors that an op writes. Only `denoise_step` and the running states write to arguments.
WRITTEN = {
    "denoise_step": ("x", "x0"),
    "ensemble_update": ("mean", "m2"),
    "ensemble_merge": ("mean", "m2"),
}

# --------------------------------------------------------------------------- one argument


def require_tensors(op: str, names: Sequence[str], values: Sequence[Any]) -> None:
    """Raise TypeError unless every value is a tensor or None."""
    for name, value in zip(names, values, strict=True):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is {type(value).__name__}; allowed is a torch.Tensor")


def require_int(op: str, name: str, value: Any) -> int:
    """The value as a Python int; raise TypeError where it is not an integer."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}; allowed is an integer") from None


def _floats(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> bool:
    """Require dense floating tensors on one device; say whether one of them is float64."""
    device = None
    double = False
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        dtype = tensor.dtype
        if dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} has dtype {dtype}; allowed are float32, bfloat16 and float16 "
                "(and float64, served by the reference)"
            )
        if dtype == torch.float64:
            double = True
        _dense(op, name, tensor)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}; allowed is {device}, where the first tensor is"
            )
    return double


def _dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{op}: {name} has layout {layout}; allowed is a dense tensor (torch.strided)")


def _index(op: str, name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if tensor.dtype != torch.int64:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; allowed is int64")
    _dense(op, name, tensor)
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}; allowed is {device}, where the first tensor is"
        )
    _shape(op, name, tensor, shape)


def _shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; allowed is {tuple(shape)}")


def _no_grad(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, and {op} has no gradient; detach it, or call under torch.no_grad()"
            )


def _count(op: str, name: str, count: int, more: int) -> None:
    if not 0 <= count <= MAX_COUNT - more:
        raise ValueError(
            f"{op}: {name} is {count}; allowed is 0 or more, and at most 2^53 with what is added"
        )


def _coordinates(op: str, x: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor) -> None:
    if x.ndim < 2:
        raise ValueError(f"{op}: x has {x.ndim} dimensions; allowed are (R, ...) with at least 2")
    device, rows = x.device, x.shape[:1]
    if math.prod(x.shape[1:]) > MAX_ROW_SIZE:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}; allowed are at most 2^34 elements in a row, "
            "for which there is noise"
        )
    _index(op, "step", step, (), device)
    _index(op, "seed", seed, (), device)
    _index(op, "sample", sample, rows, device)
    _index(op, "slice_index", slice_index, rows, device)


def _state(op: str, prefix: str, mean: Tensor, m2: Tensor) -> None:
    for name, tensor in ((f"{prefix}mean", mean), (f"{prefix}m2", m2)):
        if tensor.dtype not in STATES or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} with strides {tensor.stride()}; allowed is contiguous float32"
            )
    _shape(op, f"{prefix}m2", m2, mean.shape)


# --------------------------------------------------------------------------- one op each
# Each takes the op's own arguments, and returns whether a tensor is float64, which the reference serves.


def noise(
    x0: Tensor, t: Tensor, table: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor
) -> bool:
    double = _floats("noise", ("x0", "table"), (x0, table))
    _no_grad("noise", ("x0", "table"), (x0, table))
    _coordinates("noise", x0, step, seed, sample, slice_index)
    _index("noise", "t", t, x0.shape[:1], x0.device)
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(f"noise: table has shape {tuple(table.shape)}; allowed is (T, 2)")
    return double


def denoise_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    x0: Tensor | None = None,
) -> bool:
    names, tensors = ("x", "output", "table", "x0"), (x, output, table, x0)
    double = _floats("denoise_step", names, tensors)
    _no_grad("denoise_step", names, tensors)
    _coordinates("denoise_step", x, step, seed, sample, slice_index)
    _shape("denoise_step", "output", output, x.shape)
    if x0 is not None:
        _shape("denoise_step", "x0", x0, x.shape)
    if table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(
            f"denoise_step: table has shape {tuple(table.shape)}; allowed is (N, {len(COLUMNS)})"
        )
    return double


def discrepancy_maps(recon_a: Tensor, recon_b: Tensor) -> bool:
    names, tensors = ("recon_a", "recon_b"), (recon_a, recon_b)
    double = _floats("discrepancy_maps", names, tensors)
    _no_grad("discrepancy_maps", names, tensors)
    for name, recon in zip(names, tensors, strict=True):
        if recon.ndim != 5 or recon.shape[0] == 0 or recon.shape[2] == 0:
            raise ValueError(
                f"discrepancy_maps: {name} has shape {tuple(recon.shape)}; allowed is (K, Z, C, H, W) "
                "with K and C at least 1"
            )
    _shape("discrepancy_maps", "recon_b", recon_b, (*recon_b.shape[:1], *recon_a.shape[1:]))
    if recon_b.dtype != recon_a.dtype:
        raise ValueError(
            f"discrepancy_maps: recon_b has dtype {recon_b.dtype}; allowed is recon_a's {recon_a.dtype}"
        )
    return double


_GAUSSIANS = ("mu_q", "logvar_q", "mu_p", "logvar_p")


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum"
) -> bool:
    tensors = (mu_q, logvar_q, mu_p, logvar_p)
    double = _floats("gaussian_kl", _GAUSSIANS, tensors)
    _gaussians("gaussian_kl", tensors, reduction)
    return double


def _gaussians(op: str, tensors: tuple[Tensor, ...], reduction: str) -> None:
    shape = tensors[0].shape
    for name, tensor in zip(_GAUSSIANS, tensors, strict=True):
        _shape(op, name, tensor, shape)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; allowed are 'none', 'mean' and 'sum'")


def gaussian_kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> bool:
    op, tensors = "gaussian_kl_backward", (mu_q, logvar_q, mu_p, logvar_p)
    double = _floats(op, ("grad", *_GAUSSIANS), (grad, *tensors))
    _no_grad(op, ("grad", *_GAUSSIANS), (grad, *tensors))
    _gaussians(op, tensors, reduction)
    _shape(op, "grad", grad, mu_q.shape if reduction == "none" else ())
    return double


def pairwise_sqdist(z: Tensor, group: Tensor, num_groups: int) -> bool:
    double = _floats("pairwise_sqdist", ("z",), (z,))
    _codes("pairwise_sqdist", z, group, num_groups)
    return double


def _codes(op: str, z: Tensor, group: Tensor, num_groups: int) -> None:
    if z.ndim != 2 or z.shape[0] > MAX_CODES or z.shape[1] > MAX_CODES:
        raise ValueError(f"{op}: z has shape {tuple(z.shape)}; allowed is (n, d), each at most 2^30")
    _index(op, "group", group, z.shape[:1], z.device)
    if not 1 <= num_groups <= MAX_GROUPS:
        raise ValueError(f"{op}: num_groups is {num_groups}; allowed is at least 1 (and below 2^31)")


def pairwise_sqdist_backward(grad: Tensor, z: Tensor, group: Tensor, num_groups: int) -> bool:
    op = "pairwise_sqdist_backward"
    double = _floats(op, ("grad", "z"), (grad, z))
    _no_grad(op, ("grad", "z"), (grad, z))
    _codes(op, z, group, num_groups)
    _shape(op, "grad", grad, ())
    return double


def ensemble_variance(samples: Tensor, *, correction: int = 1) -> bool:
    double = _floats("ensemble_variance", ("samples",), (samples,))
    _no_grad("ensemble_variance", ("samples",), (samples,))
    if correction not in (0, 1):
        raise ValueError(f"ensemble_variance: correction is {correction}; allowed are 0 and 1")
    if samples.ndim < 1 or samples.shape[0] <= correction:
        raise ValueError(
            f"ensemble_variance: samples has shape {tuple(samples.shape)}; allowed is (S, ...) with S at "
            f"least {correction + 1} for correction={correction}"
        )
    return double


def ensemble_update(mean: Tensor, m2: Tensor, count: int, samples: Tensor) -> bool:
    names, tensors = ("mean", "m2", "samples"), (mean, m2, samples)
    double = _floats("ensemble_update", names, tensors)
    _no_grad("ensemble_update", names, tensors)
    _state("ensemble_update", "", mean, m2)
    _shape("ensemble_update", "samples", samples, (*samples.shape[:1], *mean.shape))
    if samples.ndim == 0:
        raise ValueError("ensemble_update: samples has shape (); allowed is (S, ...)")
    _count("ensemble_update", "count", count, samples.shape[0])
    return double


def ensemble_merge(
    mean: Tensor, m2: Tensor, count: int, other_mean: Tensor, other_m2: Tensor, other_count: int
) -> bool:
    names, tensors = ("mean", "m2", "other_mean", "other_m2"), (mean, m2, other_mean, other_m2)
    double = _floats("ensemble_merge", names, tensors)
    _no_grad("ensemble_merge", names, tensors)
    _state("ensemble_merge", "", mean, m2)
    _state("ensemble_merge", "other_", other_mean, other_m2)
    _shape("ensemble_merge", "other_mean", other_mean, mean.shape)
    _count("ensemble_merge", "count", count, 0)
    _count("ensemble_merge", "other_count", other_count, count)
    return double


_NORM = ("x", "weight", "bias", "scale", "shift")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> bool:
    tensors = (x, weight, bias, scale, shift, residual)
    double = _floats("group_norm_silu", (*_NORM, "residual"), tensors)
    _norm("group_norm_silu", x, num_groups, weight, bias, scale, shift)
    if residual is not None:
        _shape("group_norm_silu", "residual", residual, x.shape)
        if residual.dtype != x.dtype:
            raise ValueError(
                f"group_norm_silu: residual has dtype {residual.dtype}; allowed is x's {x.dtype}"
            )
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"group_norm_silu: eps is {eps}; allowed is a finite number, 0 or more")
    return double


def _norm(
    op: str, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> None:  # fmt: skip
    if x.ndim < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; allowed is (N, C, ...)")
    image_channels = x.shape[:2]
    channels = image_channels[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}; allowed is a divisor of the {channels} channels")
    _shape(op, "weight", weight, image_channels[1:])
    _shape(op, "bias", bias, image_channels[1:])
    if scale is not None:
        _shape(op, "scale", scale, image_channels)
    if shift is not None:
        _shape(op, "shift", shift, image_channels)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> bool:
    op, names = "group_norm_silu_backward", ("grad", *_NORM, "mean", "rstd")
    tensors = (grad, x, weight, bias, scale, shift, mean, rstd)
    double = _floats(op, names, tensors)
    _no_grad(op, names, tensors)
    _norm(op, x, num_groups, weight, bias, scale, shift)
    _shape(op, "grad", grad, x.shape)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        _shape(op, name, statistic, (*x.shape[:1], num_groups))
    return double


# --------------------------------------------------------------------------- values, on the CPU alone
# On a GPU, looking would wait for the device: there the kernels write NaN for what is outside the table.


def _step_value(*args: Any) -> None:
    table, step = args[2], int(args[3])
    if not 0 <= step < len(table):
        raise IndexError(f"denoise_step: step is {step}; allowed are 0 to {len(table) - 1}")


def _t_values(*args: Any) -> None:
    t, table = args[1], args[2]
    if t.numel():
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= len(table):
            raise IndexError(
                f"noise: t holds {low if low < 0 else high}, which is outside the table; "
                f"allowed are 0 to {len(table) - 1}"
            )


def _group_values(op: str, group: Tensor, num_groups: int) -> None:
    if group.numel():
        low, high = (int(v) for v in group.aminmax())
        if low < 0 or high >= num_groups:
            raise ValueError(
                f"{op}: group holds {low if low < 0 else high}; allowed are 0 to {num_groups - 1}"
            )


VALUES: dict[str, Callable[..., None]] = {
    "denoise_step": _step_value,
    "noise": _t_values,
    "pairwise_sqdist": lambda z, group, num_groups: _group_values("pairwise_sqdist", group, num_groups),
    "pairwise_sqdist_backward": lambda grad, z, group, num_groups: _group_values(
        "pairwise_sqdist_backward", group, num_groups
    ),
}

# --------------------------------------------------------------------------- memory of written arguments


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


def memory(op: str, names: Sequence[str], values: Sequence[Any]) -> None:
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
