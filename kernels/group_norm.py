"""GroupNorm + SiLU with scale, shift and residual, channels last, forward and backward.

Statistics come from chunks of pixels (mean and M2 of each channel, merged as Chan et al. do), so that
they are as sound as a two-pass mean and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.launch import empty_float32, on, power_of_two
from ddmd.ops import reference

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
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
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
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (N, C), or weight_ptr
    shift_ptr,  # (N, C), or weight_ptr
    mean_ptr,  # (N, G) float32, written
    rstd_ptr,  # (N, G) float32, written
    gain_ptr,  # (N, C) float32, written
    offset_ptr,  # (N, C) float32, written
    pixels,
    channels,
    chunks,
    groups,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BP: tl.constexpr,  # pixels of a chunk
    BK: tl.constexpr,  # chunks at a time
    BG: tl.constexpr,  # channels of a group, at least
):
    """Statistics of one group of one image; silu(gain x + offset) is the result for each of its channels."""
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
        count = tl.minimum(pixels - k.to(tl.int64) * BP, BP).to(tl.float32)
        total += tl.load(part_mean_ptr + at, where, other=0.0) * count[:, None]
        start += BK
    size = (per_group.to(tl.int64) * pixels).to(tl.float32)  # 2^31 elements and more
    mean = tl.sum(tl.sum(total, 1), 0) / size
    square = tl.zeros((BK, BG), tl.float32)
    start = g * 0
    while start < chunks:
        k = start + tl.arange(0, BK)
        where = (k < chunks)[:, None] & (c < per_group)[None, :]
        at = (image * chunks + k[:, None]) * channels + g * per_group + c[None, :]
        count = tl.minimum(pixels - k.to(tl.int64) * BP, BP).to(tl.float32)
        delta = tl.load(part_mean_ptr + at, where, other=0.0) - mean
        square += tl.where(
            where, tl.load(part_m2_ptr + at, where, other=0.0) + delta * delta * count[:, None], 0.0
        )
        start += BK
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(square, 1), 0) / size + eps)
    tl.store(mean_ptr + image * groups + g, mean)
    tl.store(rstd_ptr + image * groups + g, rstd)
    channel = g * per_group + c
    inside = c < per_group
    gain = tl.load(weight_ptr + channel, inside, other=0.0).to(tl.float32)
    offset = tl.load(bias_ptr + channel, inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + tl.load(scale_ptr + image * channels + channel, inside, other=0.0).to(tl.float32)
        gain *= factor
        offset *= factor
    offset -= mean * rstd * gain
    if HAS_SHIFT:
        offset += tl.load(shift_ptr + image * channels + channel, inside, other=0.0).to(tl.float32)
    tl.store(gain_ptr + image * channels + channel, gain * rstd, inside)
    tl.store(offset_ptr + image * channels + channel, offset, inside)


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
    HAS_RESIDUAL: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    c = tl.arange(0, BC)
    pixel = chunk * BP + tl.arange(0, BP)
    where = (pixel < pixels)[:, None] & (c < channels)[None, :]
    at = (image * pixels + pixel[:, None]) * channels + c[None, :]
    gain = tl.load(gain_ptr + image * channels + c, c < channels, other=0.0)
    offset = tl.load(offset_ptr + image * channels + c, c < channels, other=0.0)
    value = tl.load(x_ptr + at, where, other=0.0).to(tl.float32) * gain[None, :] + offset[None, :]
    y = value * tl.sigmoid(value)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, where, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), where)


@triton.jit
def _silu_slope(value):
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
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
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
    g = grad * _silu_slope(x * gain[None, :] + offset[None, :])
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
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
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
    g = grad * _silu_slope(x * gain[None, :] + offset[None, :])
    h = x * multiple[None, :] + centre[None, :]
    d_x = multiple[None, :] * (g * inner[None, :] - mean_g[None, :] - h * mean_gh[None, :])
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), where)


def _channels_last(x: Tensor) -> tuple[Tensor, torch.memory_format]:
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
    tile_channels = power_of_two(channels)
    tile_pixels = max(1, TILE // tile_channels)
    return pixels, channels, triton.cdiv(pixels, tile_pixels), tile_pixels, tile_channels


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
    factor = torch.ones_like(multiple) if scale is None else 1.0 + scale.float()
    inner = weight.float() * factor
    gain = inner * multiple
    offset = bias.float() * factor + centre * inner
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
    if x.numel() == 0:
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, residual, eps)
    last, layout = _channels_last(x)
    n = x.shape[0]
    pixels, channels, chunks, tile_pixels, tile_channels = _extents(last)
    part_mean, part_m2 = (empty_float32((n, chunks, channels), x) for _ in range(2))
    mean, rstd = (empty_float32((n, num_groups), x) for _ in range(2))
    gain, offset = (empty_float32((n, channels), x) for _ in range(2))
    y = torch.empty_like(last)
    group_channels = power_of_two(channels // num_groups)
    weight, bias = weight.contiguous(), bias.contiguous()
    with on(x):
        group_norm_moments_fwd_kernel[(n * chunks,)](
            last, part_mean, part_m2, pixels, channels, chunks, tile_pixels, tile_channels
        )
        group_norm_merge_fwd_kernel[(n * num_groups,)](
            part_mean, part_m2, weight, bias, weight if scale is None else scale.contiguous(),
            weight if shift is None else shift.contiguous(), mean, rstd, gain, offset, pixels, channels, chunks,
            num_groups, eps, scale is not None, shift is not None, tile_pixels, max(1, 1024 // group_channels),
            group_channels,
        )  # fmt: skip
        group_norm_silu_fwd_kernel[(n * chunks,)](
            last, gain, offset, last if residual is None else _channels_last(residual)[0], y, pixels, channels, chunks,
            residual is not None, tile_pixels, tile_channels,
        )  # fmt: skip
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
    if x.numel() == 0:
        return reference.group_norm_silu_backward(grad, x, num_groups, weight, bias, scale, shift, mean, rstd)
    last, layout = _channels_last(x)
    last_grad = _channels_last(grad)[0]
    n = x.shape[0]
    pixels, channels, chunks, tile_pixels, tile_channels = _extents(last)
    part = empty_float32((2, n, chunks, channels), x)
    d_x = torch.empty_like(last)
    gain, offset, inner, multiple, centre = _coefficients(num_groups, weight, bias, scale, shift, mean, rstd)
    with on(x):
        group_norm_sums_bwd_kernel[(n * chunks,)](
            last_grad,
            last,
            gain,
            offset,
            multiple,
            centre,
            part[0],
            part[1],
            pixels,
            channels,
            chunks,
            tile_pixels,
            tile_channels,
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
            last_grad, last, gain, offset, multiple, centre, inner, mean_g.contiguous(), mean_gh.contiguous(), d_x,
            pixels, channels, chunks, tile_pixels, tile_channels,
        )  # fmt: skip
    d_scale = sums_gh * weight.float() + sums_g * bias.float()
    factor = 1.0 if scale is None else 1.0 + scale.float()
    d_x = d_x.reshape(x.shape).contiguous(memory_format=layout)
    return d_x, (sums_gh * factor).sum(0), (sums_g * factor).sum(0), d_scale, sums_g
