"""Random numbers of training samples: decided by (seed, stage, index of the sample in the run) alone.

Scalars are drawn on the host by Philox4x64 (numpy), fields of noise on the device by the Philox4x32 of `ops.noise`.
Neither depends on how samples are batched or on how many processes share a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ddmd import ops

UNIFORMS_PER_SAMPLE = 1024
OWN_FIELDS = 1000  # fields of noise that a batch does not reach
Array = np.ndarray[Any, Any]


class SampleRandom:
    """Random columns for a batch of samples; each call takes the next unused ones.

    Parameters
    ----------
    seed : int, at least 0
    stage : int
        Number of the training stage, so that stages differ.
    index : (N,) int64
        Place of each sample in the run.
    """

    def __init__(self, seed: int, stage: int, index: Array) -> None:
        self.index = index
        key = np.array([seed, stage], np.uint64)
        self._uniforms = np.stack(
            [
                np.random.Generator(
                    np.random.Philox(counter=np.array([0, 0, 0, i], np.uint64), key=key)
                ).random(UNIFORMS_PER_SAMPLE)
                for i in index
            ]
        )
        self._used = 0

    def __len__(self) -> int:
        return len(self.index)

    def unit(self, *shape: int) -> Array:
        """(N, *shape) float64, uniform in [0, 1)."""
        count = int(np.prod(shape, dtype=int))
        first, self._used = self._used, self._used + count
        if self._used > UNIFORMS_PER_SAMPLE:
            raise RuntimeError(f"a sample needs more than {UNIFORMS_PER_SAMPLE} random numbers")
        return self._uniforms[:, first : self._used].reshape(len(self.index), *shape)

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        """(N, *shape), uniform between two bounds."""
        return np.asarray(low + (high - low) * self.unit(*shape))

    def log_uniform(self, low: float, high: float, *shape: int) -> Array:
        """(N, *shape), uniform in the logarithm."""
        return np.asarray(np.exp(self.uniform(float(np.log(low)), float(np.log(high)), *shape)))

    def normal(self, *shape: int) -> Array:
        """(N, *shape), standard normal."""
        return np.asarray(special.ndtri(np.clip(self.unit(*shape), 1e-12, 1 - 1e-12)))

    def chance(self, probability: float | Array, *shape: int) -> Array:
        """(N, *shape) bool, true with a probability."""
        return np.asarray(self.unit(*shape) < probability)

    def integers(self, low: int | Array, high: int | Array, *shape: int) -> Array:
        """(N, *shape) int64 from low up to, not including, high."""
        drawn: Array = np.floor(self.unit(*shape) * (np.asarray(high) - low)) + low
        return drawn.astype(np.int64)

    def choice(self, shares: Sequence[float] | Array) -> Array:
        """(N,) int64: which of the shares; those of 0 are never taken."""
        return pick(np.cumsum(np.asarray(shares, np.float64)), self.unit())


def pick(cumulative: Array, unit: Array) -> Array:
    """Indices drawn by cumulative shares (K,), one for each number in [0, 1); shares of 0 are never taken."""
    found = np.searchsorted(cumulative, unit * cumulative[-1], side="right")
    return np.asarray(np.minimum(found, int(np.searchsorted(cumulative, cumulative[-1]))))


class NoiseFields:
    """Normal noise on the device for a batch of samples; each call takes the next fields."""

    def __init__(self, seed: int, stage: int, index: Tensor) -> None:
        device = index.device
        self._seed = torch.full((), seed, dtype=torch.int64, device=device)
        self._sample, self._stage = index, torch.full_like(index, stage)
        self._table = torch.eye(2, dtype=torch.float32, device=device)[1:]
        self._fields = 0

    def rows(self, rows: Tensor) -> NoiseFields:
        """Noise of some of the samples, apart from that of all of them."""
        own = copy.copy(self)
        own._sample, own._stage = self._sample[rows], self._stage[rows]
        own._fields = self._fields + OWN_FIELDS
        return own

    def normal(self, *shape: int) -> Tensor:
        """(N, *shape) float32, standard normal."""
        self._fields += 1
        device = self._sample.device
        zeros = torch.zeros((len(self._sample), *shape), dtype=torch.float32, device=device)
        step = torch.full((), self._fields, dtype=torch.int64, device=device)
        t = torch.zeros_like(self._sample)
        return ops.noise(zeros, t, self._table, step, self._seed, self._sample, self._stage)


def to_device(arrays: dict[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Host arrays as tensors on the device, by one copy that the host does not wait for.

    Floats become float32, integers int64 (below 2^24), booleans bool.
    """
    flat = torch.from_numpy(
        np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays.values()])
        if arrays
        else np.zeros(0, np.float32)
    )
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    out = {}
    for (name, array), part in zip(
        arrays.items(), flat.split([int(a.size) for a in arrays.values()]), strict=True
    ):
        part = part.view(array.shape)
        kind = array.dtype.kind
        out[name] = part.to(torch.int64) if kind in "iu" else part > 0.5 if kind == "b" else part
    return out
