"""What every launcher needs: the device of its tensors, and whether kernels are being interpreted."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # inline PTX has no interpreter


def on(tensor: torch.Tensor) -> Any:
    """Make the tensor's device the current one; Triton launches on that."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: extents of Triton blocks."""
    return 1 << max(n - 1, 0).bit_length()
