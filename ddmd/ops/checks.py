"""What each op requires of its arguments; checked at every call, before a kernel gets a pointer.

`ddmd.ops.registry` runs these checks for C++, CUDA, Triton and the reference alike, so that
`ddmd.ops.<name>` and `torch.ops.ddmd.<name>` refuse the same arguments with the same words. What one argument must be
is in `ddmd.ops.arguments`; which memory may be shared in `ddmd.ops.memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddmd.ops.arguments import FLOATS, require_floats, require_index, require_no_grad, require_shape
from ddmd.ops.reference import COLUMNS

STATES = (torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
MAX_COUNT = 2**53  # samples of a running state: counted exactly in float64
MAX_GROUPS = 2**31 - 1  # programs on one axis of a launch
MAX_CODES = 2**30  # codes, and elements of a code, that 32-bit indices of a launch count
MAX_ROW_SIZE = 2**34  # elements that 2^32 Philox counters make

# --------------------------------------------------------------------------- arguments that several ops have


def _count(op: str, name: str, count: int, more: int) -> None:
    if not 0 <= count <= MAX_COUNT - more:
        raise ValueError(
            f"{op}: {name} is {count}; allowed is 0 or more, and at most 2^53 with what is added"
        )


def _coordinates(
    op: str,
    name: str,
    shape: Sequence[int],
    device: torch.device,
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
) -> None:
    """Coordinates of the noise of a tensor (R, ...) on a device."""
    if len(shape) < 2:
        raise ValueError(f"{op}: {name} has {len(shape)} dimensions; allowed are (R, ...) with at least 2")
    rows = tuple(shape[:1])
    if math.prod(shape[1:]) > MAX_ROW_SIZE:
        raise ValueError(
            f"{op}: {name} has shape {tuple(shape)}; allowed are at most 2^34 elements in a row, "
            "for which there is noise"
        )
    require_index(op, "step", step, (), device)
    require_index(op, "seed", seed, (), device)
    require_index(op, "sample", sample, rows, device)
    require_index(op, "slice_index", slice_index, rows, device)


def _state(op: str, prefix: str, mean: Tensor, m2: Tensor) -> None:
    for name, tensor in ((f"{prefix}mean", mean), (f"{prefix}m2", m2)):
        if tensor.dtype not in STATES or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} with strides {tensor.stride()}; allowed is contiguous float32"
            )
    require_shape(op, f"{prefix}m2", m2, mean.shape)


# --------------------------------------------------------------------------- one op each
# Each takes the op's own arguments, and returns whether a tensor is float64, which the reference serves.


def noise(
    x0: Tensor, t: Tensor, table: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor
) -> bool:
    double = require_floats("noise", ("x0", "table"), (x0, table))
    require_no_grad("noise", ("x0", "table"), (x0, table))
    _coordinates("noise", "x0", x0.shape, x0.device, step, seed, sample, slice_index)
    require_index("noise", "t", t, x0.shape[:1], x0.device)
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(f"noise: table has shape {tuple(table.shape)}; allowed is (T, 2)")
    return double


def pure_noise(
    shape: Sequence[int],
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    dtype: torch.dtype | None = None,
) -> bool:
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(
            f"pure_noise: dtype is {dtype}; allowed are float32, bfloat16 and float16 "
            "(and float64, served by the reference)"
        )
    if any(size < 0 for size in shape):
        raise ValueError(f"pure_noise: shape is {tuple(shape)}; allowed are sizes of at least 0")
    _coordinates("pure_noise", "shape", shape, sample.device, step, seed, sample, slice_index)
    return dtype is torch.float64


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
    double = require_floats("denoise_step", names, tensors)
    require_no_grad("denoise_step", names, tensors)
    _coordinates("denoise_step", "x", x.shape, x.device, step, seed, sample, slice_index)
    require_shape("denoise_step", "output", output, x.shape)
    if x0 is not None:
        require_shape("denoise_step", "x0", x0, x.shape)
    if table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(
            f"denoise_step: table has shape {tuple(table.shape)}; allowed is (N, {len(COLUMNS)})"
        )
    return double


def discrepancy_maps(recon_a: Tensor, recon_b: Tensor) -> bool:
    names, tensors = ("recon_a", "recon_b"), (recon_a, recon_b)
    double = require_floats("discrepancy_maps", names, tensors)
    require_no_grad("discrepancy_maps", names, tensors)
    for name, recon in zip(names, tensors, strict=True):
        if recon.ndim != 5 or recon.shape[0] == 0 or recon.shape[2] == 0:
            raise ValueError(
                f"discrepancy_maps: {name} has shape {tuple(recon.shape)}; allowed is (K, Z, C, H, W) "
                "with K and C at least 1"
            )
    require_shape("discrepancy_maps", "recon_b", recon_b, (*recon_b.shape[:1], *recon_a.shape[1:]))
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
    double = require_floats("gaussian_kl", _GAUSSIANS, tensors)
    _gaussians("gaussian_kl", tensors, reduction)
    return double


def _gaussians(op: str, tensors: tuple[Tensor, ...], reduction: str) -> None:
    shape = tensors[0].shape
    for name, tensor in zip(_GAUSSIANS, tensors, strict=True):
        require_shape(op, name, tensor, shape)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; allowed are 'none', 'mean' and 'sum'")


def gaussian_kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> bool:
    op, tensors = "gaussian_kl_backward", (mu_q, logvar_q, mu_p, logvar_p)
    double = require_floats(op, ("grad", *_GAUSSIANS), (grad, *tensors))
    require_no_grad(op, ("grad", *_GAUSSIANS), (grad, *tensors))
    _gaussians(op, tensors, reduction)
    require_shape(op, "grad", grad, mu_q.shape if reduction == "none" else ())
    return double


def pairwise_sqdist(z: Tensor, group: Tensor, num_groups: int) -> bool:
    double = require_floats("pairwise_sqdist", ("z",), (z,))
    _codes("pairwise_sqdist", z, group, num_groups)
    return double


def _codes(op: str, z: Tensor, group: Tensor, num_groups: int) -> None:
    if z.ndim != 2 or z.shape[0] > MAX_CODES or z.shape[1] > MAX_CODES:
        raise ValueError(f"{op}: z has shape {tuple(z.shape)}; allowed is (n, d), each at most 2^30")
    require_index(op, "group", group, z.shape[:1], z.device)
    if not 1 <= num_groups <= MAX_GROUPS:
        raise ValueError(f"{op}: num_groups is {num_groups}; allowed is at least 1 (and below 2^31)")


def pairwise_sqdist_backward(grad: Tensor, z: Tensor, group: Tensor, num_groups: int) -> bool:
    op = "pairwise_sqdist_backward"
    double = require_floats(op, ("grad", "z"), (grad, z))
    require_no_grad(op, ("grad", "z"), (grad, z))
    _codes(op, z, group, num_groups)
    require_shape(op, "grad", grad, ())
    return double


def ensemble_variance(samples: Tensor, *, correction: int = 1) -> bool:
    double = require_floats("ensemble_variance", ("samples",), (samples,))
    require_no_grad("ensemble_variance", ("samples",), (samples,))
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
    double = require_floats("ensemble_update", names, tensors)
    require_no_grad("ensemble_update", names, tensors)
    _state("ensemble_update", "", mean, m2)
    require_shape("ensemble_update", "samples", samples, (*samples.shape[:1], *mean.shape))
    if samples.ndim == 0:
        raise ValueError("ensemble_update: samples has shape (); allowed is (S, ...)")
    _count("ensemble_update", "count", count, samples.shape[0])
    return double


def ensemble_merge(
    mean: Tensor, m2: Tensor, count: int, other_mean: Tensor, other_m2: Tensor, other_count: int
) -> bool:
    names, tensors = ("mean", "m2", "other_mean", "other_m2"), (mean, m2, other_mean, other_m2)
    double = require_floats("ensemble_merge", names, tensors)
    require_no_grad("ensemble_merge", names, tensors)
    _state("ensemble_merge", "", mean, m2)
    _state("ensemble_merge", "other_", other_mean, other_m2)
    require_shape("ensemble_merge", "other_mean", other_mean, mean.shape)
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
    double = require_floats("group_norm_silu", (*_NORM, "residual"), tensors)
    _norm("group_norm_silu", x, num_groups, weight, bias, scale, shift)
    if residual is not None:
        require_shape("group_norm_silu", "residual", residual, x.shape)
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
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"{op}: x has shape {tuple(shape)}; allowed is (N, C, ...)")
    channels = shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}; allowed is a divisor of the {channels} channels")
    of_channels = (channels,)
    if weight.shape != of_channels or bias.shape != of_channels:
        require_shape(op, "weight", weight, of_channels)
        require_shape(op, "bias", bias, of_channels)
    if scale is not None:
        require_shape(op, "scale", scale, shape[:2])
    if shift is not None:
        require_shape(op, "shift", shift, shape[:2])


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
    double = require_floats(op, names, tensors)
    require_no_grad(op, names, tensors)
    _norm(op, x, num_groups, weight, bias, scale, shift)
    require_shape(op, "grad", grad, x.shape)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        require_shape(op, name, statistic, (*x.shape[:1], num_groups))
    return double


# --------------------------------------------------------------------------- values, on the CPU alone
# On a GPU, looking would wait for the device: there the kernels write NaN for what is outside the table.


def _step_value(*args: Any) -> None:
    table, step = args[2], int(args[3])
    if not 0 <= step < len(table):
        raise IndexError(f"denoise_step: step is {step}; allowed are 0 to {len(table) - 1}")


def _least_and_greatest(numbers: Tensor) -> tuple[int, int]:
    """Of a vector that is not empty; a few numbers take less time as a list."""
    if numbers.numel() <= 64:
        few = numbers.tolist()
        return min(few), max(few)
    low, high = numbers.aminmax()
    return int(low), int(high)


def _t_values(*args: Any) -> None:
    t, table = args[1], args[2]
    if t.numel():
        low, high = _least_and_greatest(t)
        if low < 0 or high >= len(table):
            raise IndexError(
                f"noise: t holds {low if low < 0 else high}, which is outside the table; "
                f"allowed are 0 to {len(table) - 1}"
            )


def _group_values(op: str, group: Tensor, num_groups: int) -> None:
    if group.numel():
        low, high = _least_and_greatest(group)
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
