"""The sum of the partial sums that the programs of a first pass wrote: in a fixed order, the same bits every time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddmd.kernels.launch import empty_float32, power_of_two


@triton.jit
def sum_fwd_kernel(partial_ptr, out_ptr, n, scale, BLOCK: tl.constexpr):
    """() float32: the partial sums (n,) in a fixed order, times scale."""
    total = tl.zeros((BLOCK,), tl.float32)
    start = n * 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, i < n, other=0.0)
        start += BLOCK
    tl.store(out_ptr, tl.sum(total) * scale)


def total(partial: Tensor, scale: float) -> Tensor:
    """() float32: the partial sums (n,) times scale."""
    out = empty_float32((), partial)
    sum_fwd_kernel[(1,)](partial, out, len(partial), scale, min(power_of_two(len(partial)), 2048))
    return out
