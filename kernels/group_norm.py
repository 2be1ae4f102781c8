"""GroupNorm + SiLU with scale, shift and residual, channels last.

Where all pixels of some groups fit into the registers of a program, x is read once. Elsewhere statistics come from
chunks of pixels (mean and M2 of each channel, merged as Chan et al. do), and x is read twice. Both are as sound
as a two-pass mean, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.group_norm_tiles import (
    Plan,
    channels_last,
    gain_and_offset,
    keep_packed,
    plan_of,
    sigmoid,
    sums_over_groups,
)
from ddmd.kernels.launch import INTERPRETED, empty_float32, on, power_of_two
from ddmd.kernels.tiles import Tile, tile
from ddmd.ops import reference


@triton.jit
def _finish(x, gain, offset, residual_ptr, y_ptr, at, where, HAS_RESIDUAL: tl.constexpr, FAST: tl.constexpr):
    """Store silu(gain x + offset) + residual of a tile (pixels, channels)."""
    value = x.to(tl.float32) * gain[None, :] + offset[None, :]
    y = value * sigmoid(value, FAST)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, where, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), where)


@triton.jit
def group_norm_resident_fwd_kernel(
    x_ptr,  # (N, pixels, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (N, C), or weight_ptr
    shift_ptr,  # (N, C), or weight_ptr
    residual_ptr,  # (N, pixels, C), or x_ptr
    y_ptr,  # (N, pixels, C), written
    mean_ptr,  # (N, G) float32, written
    rstd_ptr,  # (N, G) float32, written
    pixels,
    channels,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PER_GROUP: tl.constexpr,  # channels of a group
    SLAB: tl.constexpr,  # channels of a program: whole groups
    BP: tl.constexpr,  # pixels of the first tile, which is full
    BR: tl.constexpr,  # pixels of the second tile, at least, or 0
    BC: tl.constexpr,
    FAST: tl.constexpr,
):
    """All pixels of some groups of one image stay in registers: one read of x, one write of y."""
    slabs = channels // SLAB
    image = (tl.program_id(0) // slabs).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < SLAB
    channel = tl.program_id(0) % slabs * SLAB + c
    start = image * pixels * channels + tl.program_id(0) % slabs * SLAB  # 64-bit starts, 32-bit offsets
    at = tl.arange(0, BP)[:, None] * channels + c[None, :]
    where = tl.broadcast_to(inside[None, :], (BP, BC))
    x = tl.load(x_ptr + start + at, where, other=0.0)
    total = tl.sum(x.to(tl.float32), 0)
    if BR > 0:
        pixel = BP + tl.arange(0, BR)
        rest_at = pixel[:, None] * channels + c[None, :]
        rest_where = (pixel < pixels)[:, None] & inside[None, :]
        rest = tl.load(x_ptr + start + rest_at, rest_where, other=0.0)
        total += tl.sum(rest.to(tl.float32), 0)
    size = tl.cast(pixels, tl.float32) * PER_GROUP
    mean = sums_over_groups(total, c, PER_GROUP) / size
    x = keep_packed(x, FAST)
    delta = x.to(tl.float32) - mean[None, :]
    square = tl.sum(delta * delta, 0)
    x = keep_packed(x, FAST)
    if BR > 0:
        rest_delta = tl.where(rest_where, rest.to(tl.float32) - mean[None, :], 0.0)
        square += tl.sum(rest_delta * rest_delta, 0)
    rstd = 1.0 / tl.sqrt(sums_over_groups(square, c, PER_GROUP) / size + eps)
    group = image * (channels // PER_GROUP) + channel // PER_GROUP
    first_of_group = inside & (c % PER_GROUP == 0)
    tl.store(mean_ptr + group, mean, first_of_group)
    tl.store(rstd_ptr + group, rstd, first_of_group)
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd, image, channel, channels, inside, HAS_SCALE, HAS_SHIFT
    )  # fmt: skip
    if BR > 0:
        _finish(
            rest, gain, offset, residual_ptr + start, y_ptr + start, rest_at, rest_where, HAS_RESIDUAL, FAST
        )
    _finish(x, gain, offset, residual_ptr + start, y_ptr + start, at, where, HAS_RESIDUAL, FAST)


@triton.jit
def group_norm_moments_fwd_kernel(
    x_ptr,  # (N, pixels, C)
    mean_ptr,  # (N, chunks, C) float32, written
    m2_ptr,  # (N, chunks, C) float32, written
    pixels,
    channels,
    chunks,
    chunk_pixels,
    BP: tl.constexpr,
    BC: tl.constexpr,
    U: tl.constexpr,
):
    """Mean and M2 of each channel in a chunk of pixels, by sums about the mean of its first U BP pixels."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    c = tl.arange(0, BC)
    inside = (c < channels)[None, None, :]
    first = chunk * chunk_pixels  # 64-bit starts, 32-bit offsets
    count = tl.minimum(pixels - first, chunk_pixels).to(tl.int32)
    start = x_ptr + (image * pixels + first) * channels
    pixel = (tl.arange(0, U)[:, None] * BP + tl.arange(0, BP)[None, :])[:, :, None]
    at = pixel * channels + c[None, None, :]
    x = tl.load(start + at, (pixel < count) & inside, other=0.0)
    pivot = tl.sum(tl.sum(x.to(tl.float32), 0), 0) / tl.minimum(count, U * BP).to(tl.float32)
    delta = tl.where((pixel < count) & inside, x.to(tl.float32) - pivot[None, None, :], 0.0)
    total = tl.sum(delta, 0)
    square = tl.sum(delta * delta, 0)
    done = count * 0 + U * BP
    while done + U * BP <= count:
        x = tl.load(start + done * channels + at, tl.broadcast_to(inside, (U, BP, BC)), other=0.0)
        delta = x.to(tl.float32) - pivot[None, None, :]
        total += tl.sum(delta, 0)
        square += tl.sum(delta * delta, 0)
        done += U * BP
    if done < count:
        where = (pixel < count - done) & inside
        x = tl.load(start + done * channels + at, where, other=0.0)
        delta = tl.where(where, x.to(tl.float32) - pivot[None, None, :], 0.0)
        total += tl.sum(delta, 0)
        square += tl.sum(delta * delta, 0)
    own = tl.sum(total, 0)
    own_mean = own / count.to(tl.float32)
    out = (image * chunks + chunk) * channels + c
    tl.store(mean_ptr + out, pivot + own_mean, c < channels)
    tl.store(m2_ptr + out, tl.sum(square, 0) - own * own_mean, c < channels)


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
    chunk_pixels,
    groups,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
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
        count = tl.minimum(pixels - k.to(tl.int64) * chunk_pixels, chunk_pixels).to(tl.float32)
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
        count = tl.minimum(pixels - k.to(tl.int64) * chunk_pixels, chunk_pixels).to(tl.float32)
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
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd, image, channel, channels, inside, HAS_SCALE, HAS_SHIFT
    )  # fmt: skip
    tl.store(gain_ptr + image * channels + channel, gain, inside)
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
    FAST: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    c = tl.arange(0, BC)
    pixel = chunk * BP + tl.arange(0, BP)
    where = (pixel < pixels)[:, None] & (c < channels)[None, :]
    at = (image * pixels + pixel[:, None]) * channels + c[None, :]
    gain = tl.load(gain_ptr + image * channels + c, c < channels, other=0.0)
    offset = tl.load(offset_ptr + image * channels + c, c < channels, other=0.0)
    x = tl.load(x_ptr + at, where, other=0.0)
    _finish(x, gain, offset, residual_ptr, y_ptr, at, where, HAS_RESIDUAL, FAST)


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
    last, layout = channels_last(x)
    n, channels = x.shape[:2]
    pixels = x.numel() // (n * channels)
    resident, sums, whole = tile("resident", x), tile("sums", x), tile("elementwise", x)
    plan = plan_of(
        n, pixels, channels, num_groups, x.element_size(), resident.elements, sums.elements * sums.unroll
    )
    statistics = empty_float32((2, n, num_groups), x)
    mean, rstd = statistics[0], statistics[1]
    y = torch.empty_like(last)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_or_weight = weight if scale is None else scale.contiguous()
    shift_or_weight = weight if shift is None else shift.contiguous()
    residual_or_x = last if residual is None else channels_last(residual)[0]
    has = (scale is not None, shift is not None)
    with on(x):
        if plan.slab:
            group_norm_resident_fwd_kernel[(n * (channels // plan.slab),)](
                last, weight, bias, scale_or_weight, shift_or_weight, residual_or_x, y, mean, rstd, pixels, channels,
                eps, *has, residual is not None, channels // num_groups, plan.slab, plan.full, plan.rest,
                power_of_two(plan.slab), not INTERPRETED, num_warps=resident.warps,
            )  # fmt: skip
        else:
            _in_two_passes(
                last, weight, bias, scale_or_weight, shift_or_weight, residual_or_x, y, mean, rstd, eps, *has,
                residual is not None, num_groups, plan, sums, whole,
            )  # fmt: skip
    if last is x:
        return y, mean, rstd
    return y.reshape(x.shape).contiguous(memory_format=layout), mean, rstd


def _in_two_passes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    has_scale: bool,
    has_shift: bool,
    has_residual: bool,
    num_groups: int,
    plan: Plan,
    sums: Tile,
    whole: Tile,
) -> None:
    """Statistics of chunks, of groups, and then the result: two reads of x."""
    n, channels = x.shape[:2]
    pixels = x.numel() // (n * channels)
    parts = empty_float32((2, n, plan.chunks, channels), x)
    coefficients = empty_float32((2, n, channels), x)
    tile_channels = power_of_two(channels)
    group_norm_moments_fwd_kernel[(n * plan.chunks,)](
        x, parts[0], parts[1], pixels, channels, plan.chunks, plan.chunk_pixels,
        max(1, sums.elements // tile_channels), tile_channels, sums.unroll, num_warps=sums.warps,
    )  # fmt: skip
    group_channels = power_of_two(channels // num_groups)
    group_norm_merge_fwd_kernel[(n * num_groups,)](
        parts[0], parts[1], weight, bias, scale, shift, mean, rstd, coefficients[0], coefficients[1], pixels,
        channels, plan.chunks, plan.chunk_pixels, num_groups, eps, has_scale, has_shift,
        min(max(1, 1024 // group_channels), power_of_two(plan.chunks)), group_channels,
    )  # fmt: skip
    tile_pixels = max(1, whole.elements // tile_channels)
    chunks = triton.cdiv(pixels, tile_pixels)
    group_norm_silu_fwd_kernel[(n * chunks,)](
        x, coefficients[0], coefficients[1], residual, y, pixels, channels, chunks, has_residual, tile_pixels,
        tile_channels, not INTERPRETED, num_warps=whole.warps,
    )  # fmt: skip
