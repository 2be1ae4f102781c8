"""What every launcher needs: the device of its tensors, and whether kernels are being interpreted."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # inline PTX has no interpreter


def on(tensor: torch.Tensor) -> Any:
    """Make the tensor's device the current one; Triton launches on that."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def why_no_launcher() -> str | None:
    """Why Triton cannot launch on the GPU of this machine, or None where it can.

    Triton compiles a small C module against libcuda and Python's headers when it first launches, and before
    3.7 one more for each kernel. The former is compiled here, or comes from Triton's cache.
    """
    advice = "install a C compiler (gcc or clang, or set CC) and the headers of Python"
    try:
        from triton.backends.nvidia import driver

        if hasattr(driver, "make_launcher") and triton.knobs.build.impl is None and not _has_c_compiler():
            return f"Triton finds no C compiler; {advice}"
        _ = triton.runtime.driver.active.utils
    except (
        Exception
    ) as failure:  # Triton says it with RuntimeError, AssertionError, OSError, CalledProcessError
        words = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        return f"Triton cannot build its launcher ({words}); {advice}"
    return None


def _has_c_compiler() -> bool:
    named = os.environ.get("CC")
    return any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"]))


def float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor as contiguous float32: itself where it is that already."""
    return x.to(torch.float32).contiguous()


def empty_float32(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised float32 tensor on the device of another, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: extents of Triton blocks."""
    return 1 << max(n - 1, 0).bit_length()
