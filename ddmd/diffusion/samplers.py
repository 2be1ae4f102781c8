"""The samplers' update coefficients: DDIM, DDPM and DPM-Solver++ (2M)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Sampler = Literal["ddim", "ddpm", "dpm++2m"]
SAMPLERS: tuple[Sampler, ...] = ("ddim", "ddpm", "dpm++2m")


def ddim_coefficients(now: Tensor, then: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of predicted x_0, x_t and fresh noise (Song, Meng, Ermon, 2021, eq. 12 and 16).

    Parameters
    ----------
    now, then : (N,) float64
        alpha_bar before and after each step.
    eta : float
        0 is deterministic; 1 is DDPM's posterior (Ho, Jain, Abbeel, 2020, eq. 6 and 7).
    """
    variance = eta**2 * (1.0 - then) / (1.0 - now) * (1.0 - now / then)
    direction = (1.0 - then - variance).clamp(min=0.0).sqrt()
    a, s = now.sqrt(), (1.0 - now).sqrt()
    return then.sqrt() - direction * a / s, direction / s, variance.sqrt()


def dpm_solver_2m_coefficients(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of predicted x_0, x_t and the previous predicted x_0; first order at both ends.

    Algorithm 2 of Lu et al. (2022), "DPM-Solver++".

    Parameters
    ----------
    now, then : (N,) float64
        alpha_bar before and after each step.
    """
    lam = 0.5 * torch.log(now / (1.0 - now))
    lam_then = torch.cat((lam[1:], torch.tensor([math.inf], dtype=torch.float64)))
    h = lam_then - lam  # infinite at the last step, where x_0 itself is the answer
    to_x = ((1.0 - then) / (1.0 - now)).sqrt()
    gain = -then.sqrt() * torch.expm1(-h)
    half_ratio = torch.zeros_like(h)  # 1 / (2 r) with r = h_{i-1} / h_i
    half_ratio[1:-1] = h[1:-1] / (2.0 * h[:-2])
    return gain * (1.0 + half_ratio), to_x, -gain * half_ratio
