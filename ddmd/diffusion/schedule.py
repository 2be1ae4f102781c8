"""The noise schedule of the diffusion of lesion masks, and its tables for noising and sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ddmd import ops, validation
from ddmd.diffusion.samplers import (
    MAX_STEPS,
    SAMPLERS,
    Sampler,
    ddim_coefficients,
    dpm_solver_2m_coefficients,
)

Kind = Literal["cosine", "linear"]
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
    kind: Kind = "cosine"
    prediction: Prediction = "sample"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", validation.integer("steps", self.steps, 1, MAX_STEPS))
        validation.choice("kind", self.kind, get_args(Kind))
        validation.choice("prediction", self.prediction, get_args(Prediction))

    def alpha_bar(self) -> Tensor:
        """(T,) float64 on the CPU: the share of the signal's variance left after step t."""
        if self.kind == "linear":
            beta = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64, device="cpu")
            return torch.cumprod(1.0 - beta, 0)
        time = torch.arange(self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
        f = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1.0 - f[1:] / f[:-1]).clamp(max=0.999)
        return torch.cumprod(1.0 - beta, 0)

    def noising_table(self) -> Tensor:
        """(T + 1, 2) float32 for `ops.noise`; row T is pure noise."""
        alpha_bar = functional.pad(self.alpha_bar(), (0, 1))
        return torch.stack((alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()), 1).float()

    def timesteps(self, n: int, stop: float = 0.0) -> Tensor:
        """The steps that are taken: evenly spaced from T - 1 towards stop T; the last one's successor is x_0.

        Averaged over a lesion, x_t shows a smooth mask long before any one pixel does. What is uncertain is
        therefore decided in the first few percent of the steps, and later steps only sharpen it: steps that
        stop early draw masks that still differ. Chen (2023), "On the importance of noise scheduling",
        reports the same of large images.

        Parameters
        ----------
        n : int
            N, from 1 to (1 - stop) T.
        stop : float in [0, 1)

        Returns
        -------
        (n,) int64 on the CPU, descending

        Raises
        ------
        ValueError
            If an argument is out of range.

        Examples
        --------
        >>> Schedule(steps=1000).timesteps(4).tolist()
        [999, 749, 499, 249]
        """
        stop = validation.real("stop", stop, 0.0, 1.0)
        if stop == 1.0:
            raise ValueError("stop is 1.0; allowed are 0 to less than 1")
        n = validation.integer("steps", n, 1, round((1.0 - stop) * self.steps))
        edges = torch.linspace(self.steps, stop * self.steps, n + 1, dtype=torch.float64, device="cpu")
        return edges[:-1].round().long() - 1

    def coefficients(
        self, n: int, sampler: Sampler = "ddim", eta: float = 0.0, clip: float = 1.0, stop: float = 0.0
    ) -> Tensor:
        """The table of a sampler for `ops.denoise_step`: a row a step, columns `ops.COLUMNS`.

        Parameters
        ----------
        n : int
            N steps, those of `timesteps(n, stop)`.
        sampler : "ddim", "ddpm" or "dpm++2m"
            "ddim" is Song, Meng, Ermon (2021, eq. 12 and 16) with the noise estimate made anew from the
            clamped x_0; "ddpm" is the posterior q(x_{t-1} | x_t, x_0) of Ho et al. (eq. 6, 7) on the
            chosen steps, which is DDIM with eta = 1; "dpm++2m" is algorithm 2 of Lu et al. (2022).
        eta : float in [0, 1]
            Of "ddim" alone.
        clip : float
            The predicted x_0 is clamped to [-clip, clip].
        stop : float in [0, 1)

        Returns
        -------
        (n, 8) float32 on the CPU

        Raises
        ------
        ValueError
            If an argument is out of range.
        """
        validation.choice("sampler", sampler, SAMPLERS)
        eta = validation.real("eta", eta, 0.0, 1.0)
        alpha_bar = self.alpha_bar()
        times = self.timesteps(n, stop)
        now = alpha_bar[times]
        then = functional.pad(alpha_bar[times[1:]], (0, 1), value=1.0)
        a, s = now.sqrt(), (1.0 - now).sqrt()
        table = torch.zeros(len(times), len(ops.COLUMNS), dtype=torch.float64, device="cpu")
        table[:, 0], table[:, 1] = {
            "epsilon": (1.0 / a, -s / a),
            "sample": (torch.zeros_like(a), torch.ones_like(a)),
            "v": (a, -s),
        }[self.prediction]
        if sampler == "dpm++2m":
            table[:, 2], table[:, 3], table[:, 5] = dpm_solver_2m_coefficients(now, then)
        elif sampler in ("ddim", "ddpm"):
            eta = 1.0 if sampler == "ddpm" else eta
            table[:, 2], table[:, 3], table[:, 6] = ddim_coefficients(now, then, eta)
        else:
            raise ValueError(f"sampler is {sampler!r}, which has no coefficients")
        table[:, 7] = clip
        return table.float()

    sampler = coefficients  # its name until 0.1
