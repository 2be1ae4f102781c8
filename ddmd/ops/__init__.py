"""Every op of ddmd as a documented function: it checks its arguments and calls `torch.ops.ddmd.<name>`.

What is registered under these names, and which backend serves which device, is `ddmd.registry`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddmd.ops.reference import COLUMNS
from ddmd.ops.registry import OPS, SCHEMAS, backend, serving

__all__ = ["COLUMNS", "OPS", "SCHEMAS", "backend", "serving", *OPS]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SERVED = (*FLOATS, torch.float64)

# --------------------------------------------------------------------------- argument checks


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_float(op: str, **tensors: Tensor | None) -> None:
    """All floating, of an allowed type, on one device."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}; allowed is a torch.Tensor")
        if tensor.dtype not in SERVED:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}; allowed are float32, bfloat16 and float16 "
                "(and float64, served by the reference)"
            )
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}; allowed is {device}, where the first tensor is"
            )


def _check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:  # messages are not written before they are needed: checks are run at every call
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; allowed is {tuple(shape)}")


def _check_inference(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        _require(
            tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()),
            f"{op}: {name} requires grad, and {op} has no gradient; detach it, or call under torch.no_grad()",
        )


def _check_rows(op: str, x: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor) -> None:
    _require(x.ndim >= 2, f"{op}: x has {x.ndim} dimensions; allowed are (R, ...) with at least 2")
    for name, tensor in (("step", step), ("seed", seed), ("sample", sample), ("slice_index", slice_index)):
        _require(tensor.dtype == torch.int64, f"{op}: {name} has dtype {tensor.dtype}; allowed is int64")
        _require(
            tensor.device == x.device,
            f"{op}: {name} is on {tensor.device}; allowed is {x.device}, where x is",
        )
    for name, tensor in (("step", step), ("seed", seed)):
        _check_shape(op, name, tensor, ())
    for name, tensor in (("sample", sample), ("slice_index", slice_index)):
        _check_shape(op, name, tensor, (x.shape[0],))


# --------------------------------------------------------------------------- the functions


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
    _check_float("noise", x0=x0, table=table)
    _check_inference("noise", x0=x0)
    _check_rows("noise", x0, step, seed, sample, slice_index)
    _check_shape("noise", "t", t, (x0.shape[0],))
    _require(t.dtype == torch.int64, f"noise: t has dtype {t.dtype}; allowed is int64")
    _require(
        table.ndim == 2 and table.shape[1] == 2,
        f"noise: table has shape {tuple(table.shape)}; allowed is (T, 2)",
    )
    return torch.ops.ddmd.noise(x0, t, table, step, seed, sample, slice_index)


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

    Which sampler it is, and what the network predicts, is in the table: see
    `ddmd.Schedule.sampler` and, for the formula, `reference.denoise_step`.

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
    x0 : (R, ...) of x's type, optional
        Holds the previous step's predicted x_0, gets this one's (needed by 2M).

    Returns
    -------
    x itself.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    _check_float("denoise_step", x=x, output=output, table=table, x0=x0)
    _check_inference("denoise_step", x=x, output=output, x0=x0)
    _check_rows("denoise_step", x, step, seed, sample, slice_index)
    _check_shape("denoise_step", "output", output, tuple(x.shape))
    if x0 is not None:
        _check_shape("denoise_step", "x0", x0, tuple(x.shape))
    _require(
        table.ndim == 2 and table.shape[1] == len(COLUMNS),
        f"denoise_step: table has shape {tuple(table.shape)}; allowed is (N, {len(COLUMNS)})",
    )
    torch.ops.ddmd.denoise_step(x, output, table, step, seed, sample, slice_index, x0)
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
    _check_float("discrepancy_maps", recon_a=recon_a, recon_b=recon_b)
    _check_inference("discrepancy_maps", recon_a=recon_a, recon_b=recon_b)
    for name, recon in (("recon_a", recon_a), ("recon_b", recon_b)):
        _require(
            recon.ndim == 5 and recon.shape[0] > 0 and recon.shape[2] > 0,
            f"discrepancy_maps: {name} has shape {tuple(recon.shape)}; allowed is (K, Z, C, H, W) "
            "with K and C at least 1",
        )
    _check_shape("discrepancy_maps", "recon_b", recon_b, (recon_b.shape[0], *recon_a.shape[1:]))
    _require(
        recon_b.dtype == recon_a.dtype,
        f"discrepancy_maps: recon_b has dtype {recon_b.dtype}; allowed is recon_a's {recon_a.dtype}",
    )
    return torch.ops.ddmd.discrepancy_maps(recon_a, recon_b)


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
    _check_float("gaussian_kl", mu_q=mu_q, logvar_q=logvar_q, mu_p=mu_p, logvar_p=logvar_p)
    for name, tensor in (("logvar_q", logvar_q), ("mu_p", mu_p), ("logvar_p", logvar_p)):
        _check_shape("gaussian_kl", name, tensor, tuple(mu_q.shape))
    _require(
        reduction in ("none", "mean", "sum"),
        f"gaussian_kl: reduction is {reduction!r}; allowed are 'none', 'mean' and 'sum'",
    )
    return torch.ops.ddmd.gaussian_kl(mu_q, logvar_q, mu_p, logvar_p, reduction)


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
    _check_float("pairwise_sqdist", z=z)
    _require(z.ndim == 2, f"pairwise_sqdist: z has shape {tuple(z.shape)}; allowed is (n, d)")
    _check_shape("pairwise_sqdist", "group", group, (z.shape[0],))
    _require(group.dtype == torch.int64, f"pairwise_sqdist: group has dtype {group.dtype}; allowed is int64")
    _require(num_groups >= 1, f"pairwise_sqdist: num_groups is {num_groups}; allowed is at least 1")
    if group.device.type == "cpu" and len(group):  # on a GPU, looking would be a synchronisation
        low, high = int(group.min()), int(group.max())
        _require(
            low >= 0 and high < num_groups,
            f"pairwise_sqdist: group holds {low if low < 0 else high}; allowed are 0 to {num_groups - 1}",
        )
    return torch.ops.ddmd.pairwise_sqdist(z, group, num_groups)


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
    _check_float("ensemble_variance", samples=samples)
    _check_inference("ensemble_variance", samples=samples)
    _require(correction in (0, 1), f"ensemble_variance: correction is {correction}; allowed are 0 and 1")
    _require(
        samples.ndim >= 1 and samples.shape[0] > correction,
        f"ensemble_variance: samples has shape {tuple(samples.shape)}; allowed is (S, ...) with S at "
        f"least {correction + 1} for correction={correction}",
    )
    return torch.ops.ddmd.ensemble_variance(samples, correction=correction)


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
    _check_float("ensemble_update", mean=mean, m2=m2, samples=samples)
    _check_inference("ensemble_update", mean=mean, m2=m2, samples=samples)
    _check_state("ensemble_update", mean, m2, count)
    _check_shape("ensemble_update", "samples", samples, (*samples.shape[:1], *mean.shape))
    if count == 0:
        mean.zero_()
        m2.zero_()
    torch.ops.ddmd.ensemble_update(mean, m2, count, samples)
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
    _check_float("ensemble_merge", mean=mean, m2=m2, other_mean=other_mean, other_m2=other_m2)
    _check_inference("ensemble_merge", mean=mean, m2=m2, other_mean=other_mean, other_m2=other_m2)
    _check_state("ensemble_merge", mean, m2, count)
    _check_state("ensemble_merge", other_mean, other_m2, other_count)
    _check_shape("ensemble_merge", "other_mean", other_mean, tuple(mean.shape))
    if other_count:
        if count == 0:
            mean.zero_()
            m2.zero_()
        torch.ops.ddmd.ensemble_merge(mean, m2, count, other_mean, other_m2, other_count)
    return count + other_count


def _check_state(op: str, mean: Tensor, m2: Tensor, count: int) -> None:
    for name, tensor in (("mean", mean), ("m2", m2)):
        _require(
            tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous(),
            f"{op}: {name} is {tensor.dtype} with strides {tensor.stride()}; allowed is contiguous float32",
        )
    _check_shape(op, "m2", m2, tuple(mean.shape))
    _require(count >= 0, f"{op}: count is {count}; allowed is 0 or more")


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
    _check_float(
        "group_norm_silu", x=x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual
    )
    if x.ndim < 2:
        raise ValueError(f"group_norm_silu: x has shape {tuple(x.shape)}; allowed is (N, C, ...)")
    n, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"group_norm_silu: num_groups is {num_groups}; allowed is a divisor of the {channels} channels"
        )
    for name, tensor, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (n, channels)),
        ("shift", shift, (n, channels)),
        ("residual", residual, x.shape),
    ):
        if tensor is not None:
            _check_shape("group_norm_silu", name, tensor, shape)
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"group_norm_silu: residual has dtype {residual.dtype}; allowed is x's {x.dtype}")
    if x.numel() == 0:
        return x.clone()
    return torch.ops.ddmd.group_norm_silu(x, num_groups, weight, bias, scale, shift, residual, eps)[0]
