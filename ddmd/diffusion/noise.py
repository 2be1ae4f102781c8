"""Noise that is the same however rows are batched: its coordinates, and x_T."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddmd import ops

FIRST_STEP = -1  # step coordinate of the noise that x_T is made of; the loop counts from 0


@dataclass(frozen=True)
class Coordinates:
    """Key and counters of the noise of R rows, on the device of the rows."""

    seed: Tensor  # () int64
    sample: Tensor  # (R,) int64
    slice_index: Tensor  # (R,) int64


def pure_noise(shape: Sequence[int] | Tensor, at: Coordinates, dtype: torch.dtype = torch.float32) -> Tensor:
    """x_T for R rows: standard normal, the same however rows are batched.

    Parameters
    ----------
    shape : (R, ...) of int
        A tensor, whose shape and type were taken in 0.1, still works, with a FutureWarning.
    at : Coordinates
    dtype : float32, bfloat16 or float16

    Returns
    -------
    (R, ...) tensor on the device of the coordinates

    Examples
    --------
    >>> row = torch.zeros(1, dtype=torch.int64)
    >>> pure_noise((1, 1, 8, 8), Coordinates(row[0], row, row)).shape
    torch.Size([1, 1, 8, 8])
    """
    if isinstance(shape, Tensor):
        warnings.warn(
            "pure_noise(tensor, at) becomes pure_noise(tensor.shape, at, dtype=tensor.dtype)",
            FutureWarning,
            stacklevel=2,
        )
        dtype, shape = shape.dtype, shape.shape
    step = torch.full((), FIRST_STEP, dtype=torch.int64, device=at.sample.device)
    return ops.pure_noise(shape, step, at.seed, at.sample, at.slice_index, dtype)
