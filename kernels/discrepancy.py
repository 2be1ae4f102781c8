"""X and Y of two ensembles in one pass: every reconstruction is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.launch import empty_float32, on

PIXELS = 1024  # a program's


@triton.jit
def discrepancy_maps_fwd_kernel(
    a_ptr,  # (KA, Z, C, pixels)
    b_ptr,  # (KB, Z, C, pixels)
    inter_ptr,  # (Z, pixels) float32, written
    intra_ptr,  # (Z, pixels) float32, written
    slices,
    channels,
    pixels,
    KA: tl.constexpr,
    KB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(pixels, BLOCK)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK  # 64-bit starts, 32-bit offsets
    pixel = tl.arange(0, BLOCK)
    inside = pixel < tl.minimum(pixels - first, BLOCK).to(tl.int32)
    stride = tl.cast(slices, tl.int64) * channels * pixels  # `slices` of 1 is a constant and has no .to
    inter = tl.zeros((BLOCK,), tl.float32)
    intra = tl.zeros((BLOCK,), tl.float32)
    c = 0
    while c < channels:
        start = (z * channels + c) * pixels + first
        mean_a = tl.zeros((BLOCK,), tl.float32)
        mean_b = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(KA):  # Welford: the deviation needs no second read
            value = tl.load(a_ptr + (k * stride + start) + pixel, inside, other=0.0).to(tl.float32)
            delta = value - mean_a
            mean_a += delta * (1.0 / (k + 1))
            intra += delta * (value - mean_a)
        for k in tl.static_range(KB):
            mean_b += tl.load(b_ptr + (k * stride + start) + pixel, inside, other=0.0).to(tl.float32)
        inter += tl.abs(mean_b * (1.0 / KB) - mean_a)
        c += 1
    start = z * pixels + first
    tl.store(inter_ptr + start + pixel, inter / channels, inside)
    tl.store(intra_ptr + start + pixel, tl.sqrt(intra / (channels * KA)), inside)


def discrepancy_maps(recon_a: Tensor, recon_b: Tensor) -> tuple[Tensor, Tensor]:
    members, slices, channels, height, width = recon_a.shape
    inter = empty_float32((slices, 1, height, width), recon_a)
    intra = torch.empty_like(inter)
    pixels = height * width
    if slices * pixels == 0:
        return inter, intra
    grid = (slices * triton.cdiv(pixels, PIXELS),)
    with on(recon_a):
        discrepancy_maps_fwd_kernel[grid](
            recon_a.contiguous(), recon_b.contiguous(), inter, intra, slices, channels, pixels, members,
            recon_b.shape[0], PIXELS,
        )  # fmt: skip
    return inter, intra
