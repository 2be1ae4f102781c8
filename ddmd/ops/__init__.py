"""Every op of ddmd as a documented function that calls `torch.ops.ddmd.<name>`.

`ddmd.ops.checks` has what each op requires of its arguments, `ddmd.ops.registry` what is registered
under these names and which backend serves which device, `ddmd.ops.reference` the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddmd.ops.arguments import require_float, require_int
from ddmd.ops.reference import COLUMNS
from ddmd.ops.registry import OPS, SCHEMAS, backend, call, serving

__all__ = [
    "COLUMNS", "OPS", "SCHEMAS", "backend", "denoise_step", "discrepancy_maps", "ensemble_merge",
    "ensemble_update", "ensemble_variance", "gaussian_kl", "group_norm_silu", "noise", "pairwise_sqdist",
    "pure_noise", "serving",
]  # fmt: skip


def noise(
    x0: Tensor, t: Tensor, table: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor
) -> Tensor:
    """Noise x_0 to step t: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) z (DDPM, eq. 4).

    Parameters
    ----------
    x0 : (R, ...) float32, bfloat16 or float16
        Clean rows, one sample of one slice each.
    t : (R,) int64
        Row of the table for each row of x0.
    table : (T, 2) float32
        sqrt(alpha_bar) and sqrt(1 - alpha_bar).
    step, seed : () int64
        Third coordinate and key of the noise (see `reference.normal`), on the device of x0.
    sample, slice_index : (R,) int64
        The other coordinates of the noise.

    Returns
    -------
    (R, ...) tensor of x0's type.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    names = ("x0", "t", "table", "step", "seed", "sample", "slice_index")
    tensors = (x0, t, table, step, seed, sample, slice_index)
    result: Tensor = call("noise", names, tensors, *tensors)
    return result


def pure_noise(
    shape: Sequence[int],
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise z alone, as `noise` adds it to x_0: x_T, from which sampling starts.

    Parameters
    ----------
    shape : (R, ...) of int
        One row for each sample of a slice.
    step, seed : () int64
        Third coordinate and key of the noise (see `reference.normal`), on the device of `sample`.
    sample, slice_index : (R,) int64
        The other coordinates of the noise. The result is on the device of `sample`.
    dtype : float32, bfloat16 or float16
        Of the result; float32 by default.

    Returns
    -------
    (R, ...) tensor

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    names, tensors = ("sample", "step", "seed", "slice_index"), (sample, step, seed, slice_index)
    shape = [require_int("pure_noise", "shape", size) for size in shape]
    result: Tensor = call("pure_noise", names, tensors, shape, step, seed, sample, slice_index, dtype)
    return result


def denoise_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    x0: Tensor | None = None,
) -> Tensor:
    """One update of the sampling loop, in place: DDPM, DDIM with any eta, or DPM-Solver++ (2M).

    The table says which sampler it is and what the network predicts: `Schedule.coefficients` makes it, and
    `reference.denoise_step` has the formula.

    Parameters
    ----------
    x : (R, ...) float32, bfloat16 or float16
        x_t; becomes x_{t-1}.
    output : (R, ...) float32, bfloat16 or float16
        The network's output at x.
    table : (N, 8) float32
        Coefficients, columns `COLUMNS`, one row a step.
    step : () int64
        Row of the table, and third coordinate of the noise; on the device, so that a captured
        CUDA graph can replay it.
    seed : () int64
    sample, slice_index : (R,) int64
        Coordinates of the noise.
    x0 : (R, ...) float32, bfloat16 or float16, optional
        Holds the previous step's predicted x_0, gets this one's (needed by 2M).

    Returns
    -------
    x itself.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    names = ("x", "output", "table", "step", "seed", "sample", "slice_index", "x0")
    tensors = (x, output, table, step, seed, sample, slice_index, x0)
    call("denoise_step", names, tensors, *tensors)
    return x


def discrepancy_maps(recon_a: Tensor, recon_b: Tensor) -> tuple[Tensor, Tensor]:
    """Inter-discrepancy X and intra-discrepancy Y of two ensembles of reconstructions.

    X = mean_C |mu_B - mu_A|, Y = sqrt(mean_{K,C} (recon_A - mu_A)^2) with 1/K (the paper's X, Y).

    Parameters
    ----------
    recon_a : (K, Z, C, H, W)
        Reconstructions by the auto-encoders trained on normal slices.
    recon_b : (K', Z, C, H, W)
        Reconstructions by those trained on mixed slices, of the same type.

    Returns
    -------
    X, Y : (Z, 1, H, W) float32

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    tensors = (recon_a, recon_b)
    result: tuple[Tensor, Tensor] = call("discrepancy_maps", ("recon_a", "recon_b"), tensors, *tensors)
    return result


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum"
) -> Tensor:
    """KL(q || p) of diagonal Gaussians, differentiable in all four tensors.

    0.5 (logvar_p - logvar_q + exp(logvar_q - logvar_p) + (mu_q - mu_p)^2 exp(-logvar_p) - 1)

    Parameters
    ----------
    mu_q, logvar_q, mu_p, logvar_p : tensors of one shape
    reduction : "none", "mean" or "sum"

    Returns
    -------
    float32 tensor of the inputs' shape ("none") or () ("mean" and "sum" over all elements).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    names, tensors = ("mu_q", "logvar_q", "mu_p", "logvar_p"), (mu_q, logvar_q, mu_p, logvar_p)
    result: Tensor = call("gaussian_kl", names, tensors, *tensors, reduction)
    return result


def pairwise_sqdist(z: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum of ||z_i - z_j||^2 over unordered pairs of the same group, in O(n d), differentiable in z.

    Equals sum_g n_g sum_{i in g} ||z_i - mean_g||^2.

    Parameters
    ----------
    z : (n, d)
        Codes.
    group : (n,) int64
        Group of each code, from 0 to num_groups - 1.
    num_groups : int

    Returns
    -------
    () float32

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    num_groups = require_int("pairwise_sqdist", "num_groups", num_groups)
    result: Tensor = call("pairwise_sqdist", ("z", "group"), (z, group), z, group, num_groups)
    return result


def ensemble_variance(samples: Tensor, *, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and variance over the sample axis, dimension 0, in one read of the samples.

    Parameters
    ----------
    samples : (S, ...) float32, bfloat16 or float16, any strides
    correction : 0 or 1
        The variance divides by S - correction.

    Returns
    -------
    mean, variance : (...) float32

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    op = "ensemble_variance"
    correction = require_int(op, "correction", correction)
    result: tuple[Tensor, Tensor] = call(op, ("samples",), (samples,), samples, correction=correction)
    return result


def ensemble_update(mean: Tensor, m2: Tensor, count: int, samples: Tensor) -> int:
    """Merge new samples into a running mean and sum of squared deviations (M2), in place.

    Parameters
    ----------
    mean, m2 : (...) float32, contiguous
        State of `count` samples so far; what it holds is ignored while count is 0.
    count : int
    samples : (S, ...) float32, bfloat16 or float16, any strides

    Returns
    -------
    The new count.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    op, names = "ensemble_update", ("mean", "m2", "samples")
    count = require_int(op, "count", count)
    call(op, names, (mean, m2, samples), mean, m2, count, samples)
    return count + samples.shape[0]


def ensemble_merge(
    mean: Tensor, m2: Tensor, count: int, other_mean: Tensor, other_m2: Tensor, other_count: int
) -> int:
    """Merge a second running state into the first, in place (Chan, Golub and LeVeque, 1979).

    Parameters
    ----------
    mean, m2, other_mean, other_m2 : (...) float32, contiguous
    count, other_count : int

    Returns
    -------
    The new count.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    op, names = "ensemble_merge", ("mean", "m2", "other_mean", "other_m2")
    tensors = (mean, m2, other_mean, other_m2)
    count, other_count = require_int(op, "count", count), require_int(op, "other_count", other_count)
    call(op, names, tensors, mean, m2, count, other_mean, other_m2, other_count)
    return count + other_count


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """silu(group_norm(x) (1 + scale) + shift) + residual in one pass, differentiable.

    Parameters
    ----------
    x : (N, C, H, W), channels-last or contiguous
    num_groups : int
        Divides C.
    weight, bias : (C,)
    scale, shift : (N, C), optional
        Of the time embedding.
    residual : x's shape and type, optional
    eps : float

    Returns
    -------
    (N, C, H, W) of x's type and memory format.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    names = ("x", "weight", "bias", "scale", "shift", "residual")
    tensors = (x, weight, bias, scale, shift, residual)
    num_groups = require_int("group_norm_silu", "num_groups", num_groups)
    eps = require_float("group_norm_silu", "eps", eps)
    y: Tensor = call(
        "group_norm_silu", names, tensors, x, num_groups, weight, bias, scale, shift, residual, eps
    )[0]
    return y
