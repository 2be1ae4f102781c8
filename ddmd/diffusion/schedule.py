"""The noise schedule of the diffusion of lesion masks, and its tables for noising and sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddmd import ops
from ddmd.diffusion.samplers import SAMPLERS, Sampler, ddim_coefficients, dpm_solver_2m_coefficients

Prediction = Literal["epsilon", "sample", "v"]


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule of T steps and what the network predicts.

    Parameters
    ----------
    steps : int
        T. 1000 as in DDPM (Ho, Jain, Abbeel, 2020).
    kind : "cosine" or "linear"
        Nichol and Dhariwal (2021, eq. 17), or beta from 1e-4 to 0.02 (Ho et al.).
    prediction : "sample", "epsilon" or "v"
        The network's output: x_0, the noise (the paper's epsilon_theta), or
        v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans and Ho, 2022). Each is a
        linear function of the other two given x_t, and the tables below absorb the difference.
    """

    steps: int = 1000
    kind: Literal["cosine", "linear"] = "cosine"
    prediction: Prediction = "sample"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; allowed is at least 1")
        if self.kind not in ("cosine", "linear"):
            raise ValueError(f"kind is {self.kind!r}; allowed are 'cosine' and 'linear'")
        if self.prediction not in ("epsilon", "sample", "v"):
            raise ValueError(f"prediction is {self.prediction!r}; allowed are 'epsilon', 'sample' and 'v'")

    def alpha_bar(self) -> Tensor:
        """(T,) float64: the share of the signal's variance left after step t."""
        if self.kind == "linear":
            return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64), 0)
        time = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        f = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1.0 - f[1:] / f[:-1]).clamp(max=0.999)
        return torch.cumprod(1.0 - beta, 0)

    def noising_table(self) -> Tensor:
        """(T + 1, 2) float32 for `ops.noise`; row T is pure noise."""
        alpha_bar = torch.cat((self.alpha_bar(), torch.zeros(1, dtype=torch.float64)))
        return torch.stack((alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()), 1).float()

    def timesteps(self, n: int, stop: float = 0.0) -> Tensor:
        """(n,) int64, descending from T - 1 towards stop T, evenly spaced; the last one's successor is x_0.

        A mask is smooth and the noise is not: averaged over a lesion, x_t shows the mask long before a
        pixel does, and what is undecided is decided in the first few percent of the way. Steps that
        stop there draw masks that differ; after that, steps only sharpen what is decided. (Chen, 2023,
        "On the importance of noise scheduling", says the same of large images.)
        """
        if not 0.0 <= stop < 1.0:
            raise ValueError(f"stop is {stop}; allowed are 0 to less than 1")
        most = round((1.0 - stop) * self.steps)
        if not 1 <= n <= most:
            raise ValueError(f"steps is {n}; allowed are 1 to {most}")
        return (
            torch.linspace(self.steps, stop * self.steps, n + 1, dtype=torch.float64)[:-1].round().long() - 1
        )

    def sampler(
        self, n: int, kind: Sampler = "ddim", eta: float = 0.0, clip: float = 1.0, stop: float = 0.0
    ) -> Tensor:
        """(n, 8) float32 coefficients for `ops.denoise_step`, columns `ops.COLUMNS`.

        The steps are `timesteps(n, stop)`.

        "ddim" is Song, Meng, Ermon (2021, eq. 12 and 16) with the noise estimate made anew from the
        clamped x_0; "ddpm" is the posterior q(x_{t-1} | x_t, x_0) of Ho et al. (eq. 6, 7) on the
        chosen steps, which is DDIM with eta = 1; "dpm++2m" is algorithm 2 of Lu et al. (2022).
        """
        if kind not in SAMPLERS:
            raise ValueError(f"sampler is {kind!r}; allowed are {', '.join(SAMPLERS)}")
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta is {eta}; allowed are 0 to 1")
        alpha_bar = self.alpha_bar()
        times = self.timesteps(n, stop)
        now = alpha_bar[times]
        then = torch.cat((alpha_bar[times[1:]], torch.ones(1, dtype=torch.float64)))
        a, s = now.sqrt(), (1.0 - now).sqrt()
        table = torch.zeros(n, len(ops.COLUMNS), dtype=torch.float64)
        table[:, 0], table[:, 1] = {
            "epsilon": (1.0 / a, -s / a),
            "sample": (torch.zeros_like(a), torch.ones_like(a)),
            "v": (a, -s),
        }[self.prediction]
        if kind == "dpm++2m":
            table[:, 2], table[:, 3], table[:, 5] = dpm_solver_2m_coefficients(now, then)
        else:
            eta = 1.0 if kind == "ddpm" else eta
            table[:, 2], table[:, 3], table[:, 6] = ddim_coefficients(now, then, eta)
        table[:, 7] = clip
        return table.float()
