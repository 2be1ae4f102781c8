"""Shapes, types and strides of the result of each op, by its arguments: what torch.compile and meta tensors ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddmd.ops import reference


def _accumulator(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _pure_noise(
    shape: Sequence[int],
    step: Tensor,
    seed: Tensor,
    sample: Tensor,
    slice_index: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype or torch.float32, device=sample.device)


def _maps(recon_a: Tensor, recon_b: Tensor) -> tuple[Tensor, Tensor]:
    _, z, _, h, w = recon_a.shape
    return _accumulator(recon_a, (z, 1, h, w)), _accumulator(recon_a, (z, 1, h, w))


def _kl(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str = "sum") -> Tensor:
    return _accumulator(mu_q, mu_q.shape if reduction == "none" else ())


def _kl_backward(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, reduction: str
) -> tuple[Tensor, ...]:
    return tuple(_contiguous(t) for t in (mu_q, logvar_q, mu_p, logvar_p))


def _variance(samples: Tensor, *, correction: int = 1) -> tuple[Tensor, Tensor]:
    return _accumulator(samples, samples.shape[1:]), _accumulator(samples, samples.shape[1:])


def _norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = (x.shape[0], num_groups)
    y = torch.empty_like(x, memory_format=reference.norm_layout(x))
    return y, _accumulator(x, statistics), _accumulator(x, statistics)


def _norm_backward(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, channels = x.shape[:2]
    shapes = ((channels,), (channels,), (n, channels), (n, channels))
    d_x = torch.empty_like(x, memory_format=reference.norm_layout(x))
    return d_x, *(_accumulator(x, shape) for shape in shapes)


RESULTS: dict[str, Callable[..., Any]] = {
    "noise": lambda x0, *_: _contiguous(x0),
    "pure_noise": _pure_noise,
    "denoise_step": lambda *_, **__: None,
    "discrepancy_maps": _maps,
    "gaussian_kl": _kl,
    "gaussian_kl_backward": _kl_backward,
    "pairwise_sqdist": lambda z, group, num_groups: _accumulator(z, ()),
    "pairwise_sqdist_backward": lambda grad, z, group, num_groups: _contiguous(z),
    "ensemble_variance": _variance,
    "ensemble_update": lambda *_: None,
    "ensemble_merge": lambda *_: None,
    "group_norm_silu": _norm,
    "group_norm_silu_backward": _norm_backward,
}
