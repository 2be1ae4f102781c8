"""Gradients of GroupNorm + SiLU, channels last.

With g = grad silu'(gain x + offset), d x = gain g + base + tilt (x - mean), where base and tilt are means over the group
(`reference.group_norm_silu_backward` has the formula). Where all pixels of some groups fit into the registers of a
program, x and the gradient are read once; elsewhere twice. The same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.group_norm_tiles import (
    channels_last,
    gain_and_offset,
    keep_packed,
    plan_of,
    sigmoid,
    sums_over_groups,
)
from ddmd.kernels.launch import INTERPRETED, empty_float32, on, power_of_two
from ddmd.kernels.tiles import tile
from ddmd.ops import reference

TILE = 4096  # elements that a program holds at a time, where it does not keep them
AFFINE_IMAGES, AFFINE_CHANNELS = 64, 16  # that a program holds at a time of the sums over pixels


@triton.jit
def _channel_coefficients(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, image, channel, channels, inside,
    PER_GROUP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """mean and rstd of each channel's group, and gain and offset: silu(gain x + offset) was the result."""
    group = image * (channels // PER_GROUP) + channel // PER_GROUP
    mean = tl.load(mean_ptr + group, inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + group, inside, other=0.0).to(tl.float32)
    gain, offset = gain_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd, image, channel, channels, inside, HAS_SCALE, HAS_SHIFT
    )  # fmt: skip
    return mean, rstd, gain, offset


@triton.jit
def _before_silu(grad, x, gain, offset, FAST: tl.constexpr):
    """Gradient for gain x + offset, of a tile (pixels, channels)."""
    value = x.to(tl.float32) * gain[None, :] + offset[None, :]
    s = sigmoid(value, FAST)
    return grad.to(tl.float32) * (s * (1.0 + value * (1.0 - s)))


@triton.jit
def _store_d_x(g, x, gain, mean, base, tilt, d_x_ptr, at, where):
    """Store gain g + base + tilt (x - mean) of a tile (pixels, channels)."""
    d_x = gain[None, :] * g + (base[None, :] + tilt[None, :] * (x.to(tl.float32) - mean[None, :]))
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), where)


@triton.jit
def group_norm_resident_bwd_kernel(
    grad_ptr,  # (N, pixels, C)
    x_ptr,  # (N, pixels, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (N, C), or weight_ptr
    shift_ptr,  # (N, C), or weight_ptr
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    sum_ptr,  # (N, C) float32, written: sums of g over the pixels
    sum_h_ptr,  # (N, C) float32, written: sums of g times the normalised x
    d_x_ptr,  # (N, pixels, C), written
    pixels,
    channels,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PER_GROUP: tl.constexpr,  # channels of a group
    SLAB: tl.constexpr,  # channels of a program: whole groups
    BP: tl.constexpr,  # pixels of the first tile, which is full
    BR: tl.constexpr,  # pixels of the second tile, at least, or 0
    BC: tl.constexpr,
    FAST: tl.constexpr,
):
    """All pixels of some groups of one image stay in registers: one read of x and of the gradient, one write."""
    slabs = channels // SLAB
    image = (tl.program_id(0) // slabs).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < SLAB
    channel = tl.program_id(0) % slabs * SLAB + c
    start = image * pixels * channels + tl.program_id(0) % slabs * SLAB  # 64-bit starts, 32-bit offsets
    mean, rstd, gain, offset = _channel_coefficients(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, image, channel, channels, inside,
        PER_GROUP, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    at = tl.arange(0, BP)[:, None] * channels + c[None, :]
    where = tl.broadcast_to(inside[None, :], (BP, BC))
    x = tl.load(x_ptr + start + at, where, other=0.0)
    grad = tl.load(grad_ptr + start + at, where, other=0.0)
    g = _before_silu(grad, x, gain, offset, FAST)
    total = tl.sum(g, 0)
    total_x = tl.sum(g * (x.to(tl.float32) - mean[None, :]), 0)
    x = keep_packed(x, FAST)
    grad = keep_packed(grad, FAST)
    if BR > 0:
        pixel = BP + tl.arange(0, BR)
        rest_at = pixel[:, None] * channels + c[None, :]
        rest_where = (pixel < pixels)[:, None] & inside[None, :]
        rest = tl.load(x_ptr + start + rest_at, rest_where, other=0.0)
        rest_grad = tl.load(grad_ptr + start + rest_at, rest_where, other=0.0)
        rest_g = _before_silu(rest_grad, rest, gain, offset, FAST)
        total += tl.sum(rest_g, 0)
        total_x += tl.sum(rest_g * (rest.to(tl.float32) - mean[None, :]), 0)
    size = tl.cast(pixels, tl.float32) * PER_GROUP
    base = -sums_over_groups(total * gain, c, PER_GROUP) / size
    tilt = -rstd * rstd * (sums_over_groups(total_x * gain, c, PER_GROUP) / size)
    tl.store(sum_ptr + image * channels + channel, total, inside)
    tl.store(sum_h_ptr + image * channels + channel, total_x * rstd, inside)
    if BR > 0:
        _store_d_x(rest_g, rest, gain, mean, base, tilt, d_x_ptr + start, rest_at, rest_where)
    g = _before_silu(grad, x, gain, offset, FAST)
    _store_d_x(g, x, gain, mean, base, tilt, d_x_ptr + start, at, where)


@triton.jit
def group_norm_sums_bwd_kernel(
    grad_ptr,  # (N, pixels, C)
    x_ptr,  # (N, pixels, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (N, C), or weight_ptr
    shift_ptr,  # (N, C), or weight_ptr
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    part_ptr,  # (N, chunks, C) float32, written: sums of g over the pixels of a chunk
    part_x_ptr,  # (N, chunks, C) float32, written: sums of g times x - mean
    pixels,
    channels,
    chunks,
    chunk_pixels,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < channels
    mean, _, gain, offset = _channel_coefficients(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, image, c, channels, inside, PER_GROUP,
        HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    first = chunk * chunk_pixels  # 64-bit starts, 32-bit offsets
    count = tl.minimum(pixels - first, chunk_pixels).to(tl.int32)
    start = (image * pixels + first) * channels
    pixel = tl.arange(0, BP)
    at = pixel[:, None] * channels + c[None, :]
    total = tl.zeros((BC,), tl.float32)
    total_x = tl.zeros((BC,), tl.float32)
    done = count * 0
    while done < count:
        where = (pixel < count - done)[:, None] & inside[None, :]
        x = tl.load(x_ptr + start + at, where, other=0.0)
        grad = tl.load(grad_ptr + start + at, where, other=0.0)
        g = _before_silu(grad, x, gain, offset, FAST)
        total += tl.sum(g, 0)
        total_x += tl.sum(g * (x.to(tl.float32) - mean[None, :]), 0)
        start += BP * channels
        done += BP
    out = (image * chunks + chunk) * channels + c
    tl.store(part_ptr + out, total, inside)
    tl.store(part_x_ptr + out, total_x, inside)


@triton.jit
def group_norm_merge_bwd_kernel(
    part_ptr,  # (N, chunks, C) float32
    part_x_ptr,  # (N, chunks, C) float32
    weight_ptr,  # (C,)
    scale_ptr,  # (N, C), or weight_ptr
    rstd_ptr,  # (N, G)
    sum_ptr,  # (N, C) float32, written: sums of g over the pixels
    sum_h_ptr,  # (N, C) float32, written: sums of g times the normalised x
    base_ptr,  # (N, G) float32, written
    tilt_ptr,  # (N, G) float32, written
    pixels,
    channels,
    chunks,
    groups,
    HAS_SCALE: tl.constexpr,
    BK: tl.constexpr,  # chunks at a time
    BG: tl.constexpr,  # channels of a group, at least
):
    """Sums of one group of one image; d x = gain g + base + tilt (x - mean)."""
    image = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    per_group = channels // groups
    c = tl.arange(0, BG)
    inside = c < per_group
    channel = image * channels + g * per_group + c
    total = tl.zeros((BK, BG), tl.float32)
    total_x = tl.zeros((BK, BG), tl.float32)
    start = g * 0
    while start < chunks:
        k = start + tl.arange(0, BK)
        where = (k < chunks)[:, None] & inside[None, :]
        at = (image * chunks + k[:, None]) * channels + g * per_group + c[None, :]
        total += tl.load(part_ptr + at, where, other=0.0)
        total_x += tl.load(part_x_ptr + at, where, other=0.0)
        start += BK
    rstd = tl.load(rstd_ptr + image * groups + g).to(tl.float32)
    gain = tl.load(weight_ptr + g * per_group + c, inside, other=0.0).to(tl.float32) * rstd
    if HAS_SCALE:
        gain *= 1.0 + tl.load(scale_ptr + channel, inside, other=0.0).to(tl.float32)
    of_channel = tl.sum(total, 0)
    of_channel_x = tl.sum(total_x, 0)
    tl.store(sum_ptr + channel, of_channel, inside)
    tl.store(sum_h_ptr + channel, of_channel_x * rstd, inside)
    size = (tl.cast(per_group, tl.int64) * pixels).to(tl.float32)  # 2^31 elements and more
    tl.store(base_ptr + image * groups + g, -tl.sum(of_channel * gain, 0) / size)
    tl.store(tilt_ptr + image * groups + g, -rstd * rstd * (tl.sum(of_channel_x * gain, 0) / size))


@triton.jit
def group_norm_silu_bwd_kernel(
    grad_ptr,  # (N, pixels, C)
    x_ptr,  # (N, pixels, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (N, C), or weight_ptr
    shift_ptr,  # (N, C), or weight_ptr
    mean_ptr,  # (N, G)
    rstd_ptr,  # (N, G)
    base_ptr,  # (N, G) float32
    tilt_ptr,  # (N, G) float32
    d_x_ptr,  # (N, pixels, C), written
    pixels,
    channels,
    chunks,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < channels
    mean, _, gain, offset = _channel_coefficients(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, image, c, channels, inside, PER_GROUP,
        HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    group = image * (channels // PER_GROUP) + c // PER_GROUP
    base = tl.load(base_ptr + group, inside, other=0.0)
    tilt = tl.load(tilt_ptr + group, inside, other=0.0)
    pixel = chunk * BP + tl.arange(0, BP)
    where = (pixel < pixels)[:, None] & inside[None, :]
    at = (image * pixels + pixel[:, None]) * channels + c[None, :]
    x = tl.load(x_ptr + at, where, other=0.0)
    grad = tl.load(grad_ptr + at, where, other=0.0)
    g = _before_silu(grad, x, gain, offset, FAST)
    _store_d_x(g, x, gain, mean, base, tilt, d_x_ptr, at, where)


@triton.jit
def group_norm_affine_bwd_kernel(
    sum_ptr,  # (N, C) float32
    sum_h_ptr,  # (N, C) float32
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    scale_ptr,  # (N, C), or weight_ptr
    d_weight_ptr,  # (C,) float32, written
    d_bias_ptr,  # (C,) float32, written
    d_scale_ptr,  # (N, C) float32, written
    images,
    channels,
    HAS_SCALE: tl.constexpr,
    BN: tl.constexpr,  # images at a time
    BC: tl.constexpr,
):
    """Gradients of weight, bias and scale, of the sums over pixels; those of shift are the sums themselves."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    weight = tl.load(weight_ptr + c, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BN, BC), tl.float32)
    d_bias = tl.zeros((BN, BC), tl.float32)
    start = tl.program_id(0) * 0
    while start < images:
        image = start + tl.arange(0, BN)
        where = (image < images)[:, None] & inside[None, :]
        at = image.to(tl.int64)[:, None] * channels + c[None, :]
        total = tl.load(sum_ptr + at, where, other=0.0)
        total_h = tl.load(sum_h_ptr + at, where, other=0.0)
        tl.store(d_scale_ptr + at, total_h * weight[None, :] + total * bias[None, :], where)
        if HAS_SCALE:
            factor = 1.0 + tl.load(scale_ptr + at, where, other=0.0).to(tl.float32)
            total *= factor
            total_h *= factor
        d_weight += total_h
        d_bias += total
        start += BN
    tl.store(d_weight_ptr + c, tl.sum(d_weight, 0), inside)
    tl.store(d_bias_ptr + c, tl.sum(d_bias, 0), inside)


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
    last, layout = channels_last(x)
    last_grad = channels_last(grad)[0]
    n, channels = x.shape[:2]
    pixels = x.numel() // (n * channels)
    resident = tile("resident_backward", x)
    plan = plan_of(n, pixels, channels, num_groups, x.element_size(), resident.elements, TILE)
    sums = empty_float32((2, n, channels), x)  # of g, and of g times the normalised x
    d_x = torch.empty_like(last)
    weight, bias, mean, rstd = weight.contiguous(), bias.contiguous(), mean.contiguous(), rstd.contiguous()
    scale_or_weight = weight if scale is None else scale.contiguous()
    shift_or_weight = weight if shift is None else shift.contiguous()
    has = (scale is not None, shift is not None)
    read = (last_grad, last, weight, bias, scale_or_weight, shift_or_weight, mean, rstd)
    per_group = channels // num_groups
    with on(x):
        if plan.slab:
            group_norm_resident_bwd_kernel[(n * (channels // plan.slab),)](
                *read, sums[0], sums[1], d_x, pixels, channels, *has, per_group, plan.slab, plan.full, plan.rest,
                power_of_two(plan.slab), not INTERPRETED, num_warps=resident.warps,
            )  # fmt: skip
        else:
            parts, groups = (
                empty_float32((2, n, plan.chunks, channels), x),
                empty_float32((2, n, num_groups), x),
            )
            tile_channels, group_channels = power_of_two(channels), power_of_two(per_group)
            tile_pixels = max(1, TILE // tile_channels)
            group_norm_sums_bwd_kernel[(n * plan.chunks,)](
                *read, parts[0], parts[1], pixels, channels, plan.chunks, plan.chunk_pixels, *has, per_group,
                tile_pixels, tile_channels, not INTERPRETED,
            )  # fmt: skip
            group_norm_merge_bwd_kernel[(n * num_groups,)](
                parts[0], parts[1], weight, scale_or_weight, rstd, sums[0], sums[1], groups[0], groups[1], pixels,
                channels, plan.chunks, num_groups, has[0],
                min(max(1, 1024 // group_channels), power_of_two(plan.chunks)), group_channels,
            )  # fmt: skip
            chunks = triton.cdiv(pixels, tile_pixels)
            group_norm_silu_bwd_kernel[(n * chunks,)](
                *read, groups[0], groups[1], d_x, pixels, channels, chunks, *has, per_group, tile_pixels,
                tile_channels, not INTERPRETED,
            )  # fmt: skip
        d_weight, d_bias = empty_float32((channels,), x), empty_float32((channels,), x)
        d_scale = empty_float32((n, channels), x)
        group_norm_affine_bwd_kernel[(triton.cdiv(channels, AFFINE_CHANNELS),)](
            sums[0], sums[1], weight, bias, scale_or_weight, d_weight, d_bias, d_scale, n, channels, has[0],
            min(power_of_two(n), AFFINE_IMAGES), AFFINE_CHANNELS,
        )  # fmt: skip
    if last is not x:
        d_x = d_x.reshape(x.shape).contiguous(memory_format=layout)
    return d_x, d_weight, d_bias, d_scale, sums[0]
