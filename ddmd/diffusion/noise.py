"""Noise that is the same however rows are batched: its coordinates, and x_T."""

from __future__ import annotations

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


def pure_noise(like: Tensor, at: Coordinates) -> Tensor:
    """x_T for every row of `like` (R, 1, H, W): standard normal, the same however rows are batched."""
    device = like.device
    t = torch.zeros(like.shape[0], dtype=torch.int64, device=device)
    table = torch.eye(2, dtype=torch.float32, device=device)[1:]  # made on the device: a copy would wait
    step = torch.full((), FIRST_STEP, dtype=torch.int64, device=device)
    return ops.noise(torch.zeros_like(like), t, table, step, at.seed, at.sample, at.slice_index)
