"""GroupNorm + SiLU with scale, shift and residual, channels last, forward and backward.

Statistics come from chunks of pixels (mean and M2 of each channel, merged as Chan et al. do), so that
they are as sound as a two-pass mean and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ddmd.kernels.launch import on, power_of_two
from torch import Tensor

TILE = 4096  # elements a program holds at a time


@triton.jit
def group_norm_moments_fwd_kernel(
    x_ptr,  # (N, pixels, C)
    mean_ptr,  # (N, chunks, C) float32, written
    m2_ptr,  # (N, chunks, C) float32, written
    pixels,
    channels,
    chunks,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    c = tl.arange(0, BC)
    pixel = chunk * BP + tl.arange(0, BP)
    where = (pixel < pixels)[:, None] & (c < channels)[None, :]
    at = (image * pixels + pixel[:, None]) * channels + c[None, :]
    x = tl.load(x_ptr + at, where, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - chunk * BP, BP).to(tl.float32)
    mean = tl.sum(x, 0) / count
    deviation = tl.where(where, x - mean[None, :], 0.0)
    out = (image * chunks + chunk) * channels + c
    tl.store(mean_ptr + out, mean, c < channels)
    tl.store(m2_ptr + out, tl.sum(deviation * deviation, 0), c < channels)


@triton.jit
def group_norm_merge_fwd_kernel(
    part_mean_ptr,  # (N, chunks, C) float32
    part_m2_ptr,  # (N, chunks, C) float32
    mean_ptr,  # (N, G) float32, written
    rstd_ptr,  # (N, G) float32, written
    pixels,
    channels,
    chunks,
    groups,
    eps,
    BP: tl.constexpr,  # pixels of a chunk
    BK: tl.constexpr,  # chunks at a time
    BG: tl.constexpr,  # channels of a group, at least
):
    image = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    per_group = channels // groups
    c = tl.arange(0, BG)
    total = tl.zeros((BK, BG), tl.float32)
    start = g * 0
    while start < chunks:
        k = start + tl.arange(0, BK)
        where = (k < chunks)[:, None] & (c < per_group)[None, :]
        at = (image * chunks + k[:, None]) * channels + g * per_group + c[None, :]
        count = tl.minimum(pixels - k * BP, BP).to(tl.float32)
        total += tl.load(part_mean_ptr + at, where, other=0.0) * count[:, None]
        start += BK
    size = (per_group * pixels).to(tl.float32)
    mean = tl.sum(tl.sum(total, 1), 0) / size
    square = tl.zeros((BK, BG), tl.float32)
    start = g * 0
    while start < chunks:
        k = start + tl.arange(0, BK)
        where = (k < chunks)[:, None] & (c < per_group)[None, :]
        at = (image * chunks + k[:, None]) * channels + g * per_group + c[None, :]
        count = tl.minimum(pixels - k * BP, BP).to(tl.float32)
        delta = tl.load(part_mean_ptr + at, where, other=0.0) - mean
        square += tl.where(
            where, tl.load(part_m2_ptr + at, where, other=0.0) + delta * delta * count[:, None], 0.0
        )
        start += BK
    variance = tl.sum(tl.sum(square, 1), 0) / size
    tl.store(mean_ptr + image * groups + g, mean)
    tl.store(rstd_ptr + image * groups + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def group_norm_silu_fwd_kernel(
    x_ptr,  # (N, pixels, C)
    gain_ptr,  # (N, C) float32
    offset_ptr,  # (N, C) float32
    residual_ptr,  # (N, pixels, C), or x_ptr
    y_ptr,  # (N, pixels, C), written
    pixels,
    channels,
    chunks,
    RESIDUAL: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    c = tl.arange(0, BC)
    pixel = chunk * BP + tl.arange(0, BP)
    where = (pixel < pixels)[:, None] & (c < channels)[None, :]
    at = (image * pixels + pixel[:, None]) * channels + c[None, :]
    gain = tl.load(gain_ptr + image * channels + c, c < channels, other=0.0)
    offset = tl.load(offset_ptr + image * channels + c, c < channels, other=0.0)
    value = tl.load(x_ptr + at, where, other=0.0).to(tl.float32) * gain[None, :] + offset[None, :]
    y = value * tl.sigmoid(value)
    if RESIDUAL:
        y += tl.load(residual_ptr + at, where, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), where)


@triton.jit
def _slope(value):
    """Derivative of silu."""
    s = tl.sigmoid(value)
    return s * (1.0 + value * (1.0 - s))


@triton.jit
def group_norm_sums_bwd_kernel(
    grad_ptr,  # (N, pixels, C)
    x_ptr,  # (N, pixels, C)
    gain_ptr,  # (N, C) float32; offset, multiple and centre likewise
    offset_ptr,
    multiple_ptr,
    centre_ptr,
    sum_ptr,  # (N, chunks, C) float32, written
    sum_h_ptr,  # (N, chunks, C) float32, written
    pixels,
    channels,
    chunks,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    c = tl.arange(0, BC)
    inside = c < channels
    pixel = chunk * BP + tl.arange(0, BP)
    where = (pixel < pixels)[:, None] & inside[None, :]
    at = (image * pixels + pixel[:, None]) * channels + c[None, :]
    of = image * channels + c
    gain = tl.load(gain_ptr + of, inside, other=0.0)
    offset = tl.load(offset_ptr + of, inside, other=0.0)
    multiple = tl.load(multiple_ptr + of, inside, other=0.0)
    centre = tl.load(centre_ptr + of, inside, other=0.0)
    x = tl.load(x_ptr + at, where, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, where, other=0.0).to(tl.float32)
    g = grad * _slope(x * gain[None, :] + offset[None, :])
    h = x * multiple[None, :] + centre[None, :]
    out = (image * chunks + chunk) * channels + c
    tl.store(sum_ptr + out, tl.sum(g, 0), inside)
    tl.store(sum_h_ptr + out, tl.sum(g * h, 0), inside)


@triton.jit
def group_norm_silu_bwd_kernel(
    grad_ptr,  # (N, pixels, C)
    x_ptr,  # (N, pixels, C)
    gain_ptr,  # (N, C) float32, as are the next six
    offset_ptr,
    multiple_ptr,
    centre_ptr,
    inner_ptr,
    mean_g_ptr,
    mean_gh_ptr,
    d_x_ptr,  # (N, pixels, C), written
    pixels,
    channels,
    chunks,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    c = tl.arange(0, BC)
    inside = c < channels
    pixel = chunk * BP + tl.arange(0, BP)
    where = (pixel < pixels)[:, None] & inside[None, :]
    at = (image * pixels + pixel[:, None]) * channels + c[None, :]
    of = image * channels + c
    gain = tl.load(gain_ptr + of, inside, other=0.0)
    offset = tl.load(offset_ptr + of, inside, other=0.0)
    multiple = tl.load(multiple_ptr + of, inside, other=0.0)
    centre = tl.load(centre_ptr + of, inside, other=0.0)
    inner = tl.load(inner_ptr + of, inside, other=0.0)
    mean_g = tl.load(mean_g_ptr + of, inside, other=0.0)
    mean_gh = tl.load(mean_gh_ptr + of, inside, other=0.0)
    x = tl.load(x_ptr + at, where, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, where, other=0.0).to(tl.float32)
    g = grad * _slope(x * gain[None, :] + offset[None, :])
    h = x * multiple[None, :] + centre[None, :]
    d_x = multiple[None, :] * (g * inner[None, :] - mean_g[None, :] - h * mean_gh[None, :])
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), where)


def _layout(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x with channels last in memory, and the format that the result goes back to."""
    if x.ndim != 4:
        flat = x.reshape(*x.shape[:2], -1, 1)
        return flat.contiguous(memory_format=torch.channels_last), torch.contiguous_format
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last), (
        torch.channels_last if last else torch.contiguous_format
    )


def _extents(x: Tensor) -> tuple[int, int, int, int, int]:
    """pixels, channels, chunks, pixels of a tile, channels of a tile."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    wide = power_of_two(channels)
    tall = max(1, TILE // wide)
    return pixels, channels, triton.cdiv(pixels, tall), tall, wide


def _coefficients(
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gain, offset, inner, multiple, centre, each (N, C) float32: a few thousand numbers, by torch."""
    per_group = len(weight) // num_groups
    multiple = rstd.repeat_interleave(per_group, 1)
    centre = -mean.repeat_interleave(per_group, 1) * multiple
    up = torch.ones_like(multiple) if scale is None else 1.0 + scale.float()
    inner = weight.float() * up
    gain = inner * multiple
    offset = bias.float() * up + centre * inner
    if shift is not None:
        offset = offset + shift.float()
    return (
        gain.contiguous(),
        offset.contiguous(),
        inner.contiguous(),
        multiple.contiguous(),
        centre.contiguous(),
    )


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    laid, layout = _layout(x)
    n = x.shape[0]
    pixels, channels, chunks, tall, wide = _extents(laid)
    part = torch.empty(2, n, chunks, channels, device=x.device)
    mean, rstd = torch.empty(n, num_groups, device=x.device), torch.empty(n, num_groups, device=x.device)
    y = torch.empty_like(laid)
    per_group = power_of_two(channels // num_groups)
    with on(x):
        group_norm_moments_fwd_kernel[(n * chunks,)](
            laid, part[0], part[1], pixels, channels, chunks, tall, wide
        )
        group_norm_merge_fwd_kernel[(n * num_groups,)](
            part[0], part[1], mean, rstd, pixels, channels, chunks, num_groups, eps, tall,
            max(1, 1024 // per_group), per_group,
        )  # fmt: skip
        gain, offset, *_ = _coefficients(num_groups, weight, bias, scale, shift, mean, rstd)
        added = laid if residual is None else _layout(residual)[0]
        group_norm_silu_fwd_kernel[(n * chunks,)](
            laid, gain, offset, added, y, pixels, channels, chunks, residual is not None, tall, wide
        )
    return y.reshape(x.shape).contiguous(memory_format=layout), mean, rstd


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    laid, layout = _layout(x)
    laid_grad = _layout(grad)[0]
    n = x.shape[0]
    pixels, channels, chunks, tall, wide = _extents(laid)
    part = torch.empty(2, n, chunks, channels, device=x.device)
    d_x = torch.empty_like(laid)
    gain, offset, inner, multiple, centre = _coefficients(num_groups, weight, bias, scale, shift, mean, rstd)
    with on(x):
        group_norm_sums_bwd_kernel[(n * chunks,)](
            laid_grad,
            laid,
            gain,
            offset,
            multiple,
            centre,
            part[0],
            part[1],
            pixels,
            channels,
            chunks,
            tall,
            wide,
        )
        sums_g, sums_gh = part.sum(2)
        size = channels // num_groups * pixels
        mean_g, mean_gh = (
            ((s * inner).reshape(n, num_groups, -1).sum(2) / size).repeat_interleave(
                channels // num_groups, 1
            )
            for s in (sums_g, sums_gh)
        )
        group_norm_silu_bwd_kernel[(n * chunks,)](
            laid_grad, laid, gain, offset, multiple, centre, inner, mean_g.contiguous(), mean_gh.contiguous(), d_x,
            pixels, channels, chunks, tall, wide,
        )  # fmt: skip
    d_scale = sums_gh * weight.float() + sums_g * bias.float()
    up = 1.0 if scale is None else 1.0 + scale.float()
    d_x = d_x.reshape(x.shape).contiguous(memory_format=layout)
    return d_x, (sums_gh * up).sum(0), (sums_g * up).sum(0), d_scale, sums_g
