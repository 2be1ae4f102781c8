"""The noising and the denoising update, their noise made inside: one read of each input, one write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from ddmd.kernels.launch import INTERPRETED, float32, on

POSITIONS = 256  # Philox counters a program: four elements each


@triton.jit
def _cos_sin(angle, FAST: tl.constexpr):
    """Cosine and sine of an angle in [-pi, pi]; FAST is within 2^-20.9, by the special function unit."""
    if FAST:
        cosine = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sine = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
    return cosine, sine


@triton.jit
def _pair(r, v, FAST: tl.constexpr):
    """Box-Muller: two normal draws of two 32-bit words, as `reference.normal` has it."""
    u = ((r >> 8).to(tl.int32) + 1).to(tl.float32) * (1.0 / 16777216.0)
    revolutions = (v >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
    radius = tl.sqrt(-2.0 * tl.log(u))
    cosine, sine = _cos_sin((revolutions - 0.5) * 6.283185307179586, FAST)
    return -radius * cosine, -radius * sine


@triton.jit
def _words(position, step, sample, slice_index, seed):
    """Four Philox words of each position; counter (position, step, sample, slice), key seed."""
    c0 = position.to(tl.uint32)
    zero = c0 * 0
    return philox_impl(
        c0,
        zero + step.to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero + slice_index.to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        10,
    )


@triton.jit
def _normal(position, step, sample, slice_index, seed, BP: tl.constexpr, FAST: tl.constexpr):
    """(4 BP,) normal draws of elements 4 position and on, in their order."""
    w0, w1, w2, w3 = _words(position, step, sample, slice_index, seed)
    z0, z1 = _pair(w0, w1, FAST)
    z2, z3 = _pair(w2, w3, FAST)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * BP,))


@triton.jit
def denoise_step_fwd_kernel(
    x_ptr,  # (R, row_size), read and written
    output_ptr,  # (R, row_size)
    x0_ptr,  # (R, row_size), read and written, or x_ptr
    table_ptr,  # (N, 8) float32
    step_ptr,  # () int64
    seed_ptr,  # () int64
    sample_ptr,  # (R,) int64
    slice_ptr,  # (R,) int64
    row_size,
    table_rows,  # N; NaN is written for a step outside it
    HAS_PREVIOUS_X0: tl.constexpr,
    BP: tl.constexpr,
    FAST: tl.constexpr,
):
    blocks = tl.cdiv(row_size, 4 * BP)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    step = tl.load(step_ptr)
    table = table_ptr + step * 8
    valid = (step >= 0) & (step < table_rows)
    nan = float("nan")
    x0_from_x, x0_from_output = tl.load(table, valid, other=nan), tl.load(table + 1, valid, other=nan)
    to_x0, to_x = tl.load(table + 2, valid, other=nan), tl.load(table + 3, valid, other=nan)
    to_output, to_previous = tl.load(table + 4, valid, other=nan), tl.load(table + 5, valid, other=nan)
    sigma, clip = tl.load(table + 6, valid, other=nan), tl.load(table + 7, valid, other=nan)
    first = block.to(tl.int64) * (4 * BP)  # 64-bit starts, 32-bit offsets
    element = tl.arange(0, 4 * BP)
    inside = element < tl.minimum(row_size - first, 4 * BP).to(tl.int32)
    start = row.to(tl.int64) * row_size + first
    x = tl.load(x_ptr + start + element, inside, other=0.0).to(tl.float32)
    output = tl.load(output_ptr + start + element, inside, other=0.0).to(tl.float32)
    predicted = x0_from_x * x + x0_from_output * output
    predicted = tl.maximum(predicted, -clip, propagate_nan=tl.PropagateNan.ALL)
    predicted = tl.minimum(predicted, clip, propagate_nan=tl.PropagateNan.ALL)
    new = to_x0 * predicted + to_x * x + to_output * output
    if sigma != 0.0:
        position = block * BP + tl.arange(0, BP)
        z = _normal(
            position, step, tl.load(sample_ptr + row), tl.load(slice_ptr + row), tl.load(seed_ptr), BP, FAST
        )
        new += sigma * z
    if HAS_PREVIOUS_X0:
        previous = tl.load(x0_ptr + start + element, inside, other=0.0).to(tl.float32)
        new += to_previous * previous
        tl.store(x0_ptr + start + element, predicted.to(x0_ptr.dtype.element_ty), inside)
    tl.store(x_ptr + start + element, new.to(x_ptr.dtype.element_ty), inside)


@triton.jit
def noise_fwd_kernel(
    x0_ptr,  # (R, row_size)
    x_ptr,  # (R, row_size), written
    t_ptr,  # (R,) int64
    table_ptr,  # (T, 2) float32
    step_ptr,  # () int64
    seed_ptr,  # () int64
    sample_ptr,  # (R,) int64
    slice_ptr,  # (R,) int64
    row_size,
    table_rows,  # T; NaN is written for a t outside it
    BP: tl.constexpr,
    FAST: tl.constexpr,
):
    blocks = tl.cdiv(row_size, 4 * BP)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    t = tl.load(t_ptr + row)
    valid = (t >= 0) & (t < table_rows)
    signal = tl.load(table_ptr + t * 2, valid, other=float("nan"))
    sigma = tl.load(table_ptr + t * 2 + 1, valid, other=float("nan"))
    first = block.to(tl.int64) * (4 * BP)  # 64-bit starts, 32-bit offsets
    element = tl.arange(0, 4 * BP)
    inside = element < tl.minimum(row_size - first, 4 * BP).to(tl.int32)
    start = row.to(tl.int64) * row_size + first
    x0 = tl.load(x0_ptr + start + element, inside, other=0.0).to(tl.float32)
    position = block * BP + tl.arange(0, BP)
    z = _normal(
        position,
        tl.load(step_ptr),
        tl.load(sample_ptr + row),
        tl.load(slice_ptr + row),
        tl.load(seed_ptr),
        BP,
        FAST,
    )
    tl.store(x_ptr + start + element, (signal * x0 + sigma * z).to(x_ptr.dtype.element_ty), inside)


@triton.jit
def pure_noise_fwd_kernel(
    x_ptr,  # (R, row_size), written
    step_ptr,  # () int64
    seed_ptr,  # () int64
    sample_ptr,  # (R,) int64
    slice_ptr,  # (R,) int64
    row_size,
    BP: tl.constexpr,
    FAST: tl.constexpr,
):
    """x_T: what `noise_fwd_kernel` writes for a signal of 0 and a sigma of 1."""
    blocks = tl.cdiv(row_size, 4 * BP)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    first = block.to(tl.int64) * (4 * BP)  # 64-bit starts, 32-bit offsets
    element = tl.arange(0, 4 * BP)
    inside = element < tl.minimum(row_size - first, 4 * BP).to(tl.int32)
    start = row.to(tl.int64) * row_size + first
    z = _normal(
        block * BP + tl.arange(0, BP),
        tl.load(step_ptr),
        tl.load(sample_ptr + row),
        tl.load(slice_ptr + row),
        tl.load(seed_ptr),
        BP,
        FAST,
    )
    tl.store(x_ptr + start + element, z.to(x_ptr.dtype.element_ty), inside)


@triton.jit
def philox_fwd_kernel(counter_ptr, key_ptr, word_ptr, n, BP: tl.constexpr):
    """Words (4, n) int32 of counters (4, n) int32 under a key () int64: for tests of the stream."""
    i = tl.program_id(0) * BP + tl.arange(0, BP)
    inside = i < n
    key = tl.load(key_ptr)
    w0, w1, w2, w3 = philox_impl(
        tl.load(counter_ptr + i, inside, other=0).to(tl.uint32, bitcast=True),
        tl.load(counter_ptr + n + i, inside, other=0).to(tl.uint32, bitcast=True),
        tl.load(counter_ptr + 2 * n + i, inside, other=0).to(tl.uint32, bitcast=True),
        tl.load(counter_ptr + 3 * n + i, inside, other=0).to(tl.uint32, bitcast=True),
        (key & 0xFFFFFFFF).to(tl.uint32),
        ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
        10,
    )
    tl.store(word_ptr + i, w0.to(tl.int32, bitcast=True), inside)
    tl.store(word_ptr + n + i, w1.to(tl.int32, bitcast=True), inside)
    tl.store(word_ptr + 2 * n + i, w2.to(tl.int32, bitcast=True), inside)
    tl.store(word_ptr + 3 * n + i, w3.to(tl.int32, bitcast=True), inside)


def _grid(x: Tensor) -> tuple[tuple[int], int]:
    row_size = x.numel() // x.shape[0]
    return (x.shape[0] * triton.cdiv(row_size, 4 * POSITIONS),), row_size


def philox(counters: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 words (4, n) int32 of counters (4, n) int32 under a seed () int64."""
    words = torch.empty_like(counters)
    n = counters.shape[1]
    with on(counters):
        philox_fwd_kernel[(triton.cdiv(n, POSITIONS),)](counters, seed, words, n, POSITIONS)
    return words


def denoise_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    x0: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    state, previous = x.contiguous(), None if x0 is None else x0.contiguous()
    grid, row_size = _grid(x)
    with on(x):
        denoise_step_fwd_kernel[grid](
            state, output.contiguous(), state if previous is None else previous, float32(table), step, seed,
            sample.contiguous(), slice_index.contiguous(), row_size, len(table), previous is not None, POSITIONS,
            not INTERPRETED,
        )  # fmt: skip
    if state is not x:
        x.copy_(state)
    if x0 is not None and previous is not None and previous is not x0:
        x0.copy_(previous)


def noise(
    x0: Tensor, t: Tensor, table: Tensor, step: Tensor, seed: Tensor, sample: Tensor, slice_index: Tensor
) -> Tensor:
    out = torch.empty_like(x0, memory_format=torch.contiguous_format)
    if x0.numel() == 0:
        return out
    grid, row_size = _grid(x0)
    with on(x0):
        noise_fwd_kernel[grid](
            x0.contiguous(), out, t.contiguous(), float32(table), step, seed, sample.contiguous(),
            slice_index.contiguous(), row_size, len(table), POSITIONS, not INTERPRETED,
        )  # fmt: skip
    return out


def pure_noise(
    shape: Sequence[int],
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype or torch.float32, device=sample.device)
    if out.numel() == 0:
        return out
    grid, row_size = _grid(out)
    with on(out):
        pure_noise_fwd_kernel[grid](
            out,
            step,
            seed,
            sample.contiguous(),
            slice_index.contiguous(),
            row_size,
            POSITIONS,
            not INTERPRETED,
        )
    return out
