"""What both directions of GroupNorm + SiLU share: how a call is cut into programs, and what is computed of a channel.

Where all pixels of some groups fit into the registers of a program, an image is read once; elsewhere twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.launch import power_of_two


@triton.jit
def sigmoid(value, FAST: tl.constexpr):
    """1 / (1 + exp(-value)); FAST by the special function unit, a few units in the last place off."""
    if FAST:
        result = tl.inline_asm_elementwise(
            "{.reg .f32 t; ex2.approx.ftz.f32 t, $1; add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t;}",
            "=f,f", [value * -1.4426950408889634], tl.float32, True, 1,
        )  # fmt: skip
    else:
        result = tl.sigmoid(value)
    return result


@triton.jit
def keep_packed(x, FAST: tl.constexpr):
    """x itself, which the compiler does not know: 16-bit values are converted again rather than kept as 32 bits."""
    if FAST and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)
    return x


@triton.jit
def sums_over_groups(values, c, PER_GROUP: tl.constexpr):
    """(BC,) for each channel c the sum of values (BC,) over the channels of its group."""
    same = c[:, None] // PER_GROUP == c[None, :] // PER_GROUP
    return tl.sum(tl.where(same, values[None, :], 0.0), 1)


@triton.jit
def gain_and_offset(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd, image, channel, channels, inside,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """gain and offset of each channel: silu(gain x + offset) is the result."""
    gain = tl.load(weight_ptr + channel, inside, other=0.0).to(tl.float32)
    offset = tl.load(bias_ptr + channel, inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + tl.load(scale_ptr + image * channels + channel, inside, other=0.0).to(tl.float32)
        gain *= factor
        offset *= factor
    gain *= rstd
    offset -= mean * gain
    if HAS_SHIFT:
        offset += tl.load(shift_ptr + image * channels + channel, inside, other=0.0).to(tl.float32)
    return gain, offset


def channels_last(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x with channels last in memory, and the format that the result goes back to."""
    if x.ndim != 4:
        flat = x.reshape(*x.shape[:2], -1, 1)
        return flat.contiguous(memory_format=torch.channels_last), torch.contiguous_format
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last), (
        torch.channels_last if last else torch.contiguous_format
    )


@dataclass(frozen=True)
class Plan:
    """How one call is cut: a program for each slab of whole groups, or for each chunk of pixels.

    Parameters
    ----------
    slab : int
        Channels of a program that keeps all pixels of theirs in registers; 0 where they are too many.
    full, rest : int
        Pixels of its two tiles, powers of two: the first is full, and the second may be none.
    chunk_pixels, chunks : int
        Of a program of the first of two passes, and how many of them make an image.
    """

    slab: int
    full: int
    rest: int
    chunk_pixels: int
    chunks: int


SECTOR = 32  # bytes of the least that is read
MANY = 1024  # programs that fill a device
LONGEST = 8  # tiles of a program of the first of two passes
MOST_CHANNELS = 64  # of a slab: their sums over groups take the square of it


@functools.lru_cache(maxsize=256)
def plan_of(
    images: int, pixels: int, channels: int, num_groups: int, size: int, resident: int, sums: int
) -> Plan:
    """size: bytes of an element; resident and sums: elements of a program that keeps, and that sums, them."""
    per_group = channels // num_groups
    slab = next(
        (m * per_group for m in range(1, num_groups + 1) if num_groups % m == 0 and m * per_group * size >= SECTOR),
        channels,
    )  # fmt: skip
    full = 1 << (pixels.bit_length() - 1)
    rest = power_of_two(pixels - full) if pixels > full else 0
    if (
        (full + rest) * power_of_two(slab) > resident
        or power_of_two(slab) > MOST_CHANNELS
        or pixels * channels >= 2**31
    ):
        slab = 0
    step = max(1, sums // power_of_two(channels))
    tiles = max(1, min(LONGEST, images * triton.cdiv(pixels, step) // MANY))
    return Plan(slab, full, rest, tiles * step, triton.cdiv(pixels, tiles * step))
