"""What every launcher needs: the device of its tensors, and whether kernels are being interpreted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # inline PTX has no interpreter


def on(tensor: torch.Tensor) -> Any:
    """Make the tensor's device the current one; Triton launches on that."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor as contiguous float32: itself where it is that already."""
    return x.to(torch.float32).contiguous()


def empty_float32(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised float32 tensor on the device of another, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: extents of Triton blocks."""
    return 1 << max(n - 1, 0).bit_length()
