"""The samplers: their update coefficients (DDIM, DDPM, DPM-Solver++ 2M) and the user's choice of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddmd import validation

MAX_SAMPLES = 10_000
MAX_STEPS = 100_000  # of a schedule, and so of a sampler
Sampler = Literal["ddim", "ddpm", "dpm++2m"]
SAMPLERS: tuple[Sampler, ...] = ("ddim", "ddpm", "dpm++2m")

QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"steps": 1, "stop": 0.98, "shared_noise": False, "rater_sd": 0.0, "rater_mean": 0.0},
    "draws": {
        "samples": 16,
        "steps": 10,
        "sampler": "ddim",
        "eta": 0.0,
        "stop": 0.0,
        "shared_noise": True,
        "rater_sd": 0.8,
        "rater_mean": 0.0,
    },
}
"""Named sampling: "fast" is the posterior mean in one step; with "draws" each sample is a mask of its own."""


def quality_of(quality: str | None, draws: bool) -> str | None:
    """The named sampling that a caller asks for: "draws" where the drawn masks are to be kept.

    Parameters
    ----------
    quality : one of QUALITIES, optional
    draws : whether drawn masks are to be kept

    Returns
    -------
    str, or None for the weights' own sampling

    Raises
    ------
    ValueError
        If there is no such quality, or draws of "fast" are asked for: its samples are one posterior mean, and no masks
        of their own.
    """
    if quality is not None:
        validation.choice("quality", quality, tuple(QUALITIES))
    if draws and quality == "fast":
        raise ValueError(
            'draws and quality "fast" exclude each other: the posterior mean has no drawn masks; leave out one of them'
        )
    return "draws" if draws else quality


@dataclass(frozen=True)
class SamplingConfig:
    """How masks are sampled: the user's choice. A weights file stores the defaults (all but seed and batch).

    Parameters
    ----------
    samples : int
        S, the size of the implicit ensemble.
    steps : int
        N, denoising steps of each sample.
    sampler : "ddim", "ddpm" or "dpm++2m"
    eta : float in [0, 1]
        Of DDIM: 0 is deterministic given x_T, 1 is DDPM.
    stop : float in [0, 1)
        Share of T at which the steps end and x_0 is predicted; see `Schedule.timesteps`.
    seed : int
        64-bit key of the noise.
    batch : int, optional
        Most slices computed at once; by default what suits the device, halved where memory does not suffice.
    mirror : bool
        Every second sample is drawn on the slice's mirror image and mirrored back, so that samples also
        differ in what the networks make of the image.
    shared_noise : bool
        All slices of a volume get the same noise, so that a sample is coherent through the plane. The noise of
        each slice alone stays standard normal.
    rater_sd : float in [0, 4]
        Standard deviation of a shift of all logits of a sample, see `rater_shifts`.
    rater_mean : float in [-8, 8]
        Mean of that shift.

    Raises
    ------
    ValueError
        If a value is of another type or out of range; the message names it. Numbers of numpy are taken.

    Examples
    --------
    >>> SamplingConfig(samples=2, steps=3).sampler
    'ddim'
    """

    samples: int = 5
    steps: int = 5
    sampler: Sampler = "ddim"
    eta: float = 0.0
    stop: float = 0.0
    seed: int = 0
    batch: int | None = None
    mirror: bool = False
    shared_noise: bool = False
    rater_sd: float = 0.0
    rater_mean: float = 0.0

    def __post_init__(self) -> None:
        batch = None if self.batch is None else validation.integer("batch", self.batch, 1, 2**31 - 1)
        stop = validation.real("stop", self.stop, 0.0, 1.0)
        if stop == 1.0:
            raise ValueError("stop is 1.0; allowed are 0 to less than 1")
        checked = {
            "samples": validation.integer("samples", self.samples, 1, MAX_SAMPLES),
            "steps": validation.integer("steps", self.steps, 1, MAX_STEPS),
            "sampler": validation.choice("sampler", self.sampler, SAMPLERS),
            "eta": validation.real("eta", self.eta, 0.0, 1.0),
            "stop": stop,
            "seed": validation.integer("seed", self.seed, -(2**63), 2**63 - 1),
            "batch": batch,
            "mirror": validation.flag("mirror", self.mirror),
            "shared_noise": validation.flag("shared_noise", self.shared_noise),
            "rater_sd": validation.real("rater_sd", self.rater_sd, 0.0, 4.0),
            "rater_mean": validation.real("rater_mean", self.rater_mean, -8.0, 8.0),
        }
        for name, value in checked.items():  # as Python's own numbers: they are written to JSON
            object.__setattr__(self, name, value)


def rater_shifts(samples: int, sd: float, mean: float = 0.0) -> Tensor:
    """Shifts of the logits of S samples: raters differ in how much of the same image they mark.

    A random effect on the intercept of a logistic model, one value for all voxels of a sample. Its normal
    quantiles are taken along an additive recurrence (golden ratio), so that few samples are spread evenly,
    the first is shifted by the mean, and more samples leave those before as they are.

    Parameters
    ----------
    samples : int
    sd : float
        Standard deviation of the shifts.
    mean : float
        Draws of many steps mark more than the posterior mean does; a negative mean takes that back.

    Returns
    -------
    (S,) float32 on the CPU

    Examples
    --------
    >>> rater_shifts(3, 1.0)
    tensor([ 0.0000, -1.1849,  0.6313])
    """
    place = torch.arange(samples, dtype=torch.float64, device="cpu") * ((math.sqrt(5.0) - 1.0) / 2.0) + 0.5
    quantiles: Tensor = torch.special.ndtri(place % 1.0)
    return (mean + sd * quantiles).float()


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
    lam_then = torch.cat((lam[1:], lam.new_full((1,), math.inf)))
    h = lam_then - lam  # infinite at the last step, where x_0 itself is the answer
    to_x = ((1.0 - then) / (1.0 - now)).sqrt()
    gain = -then.sqrt() * torch.expm1(-h)
    half_ratio = torch.zeros_like(h)  # 1 / (2 r) with r = h_{i-1} / h_i
    half_ratio[1:-1] = h[1:-1] / (2.0 * h[:-2])
    return gain * (1.0 + half_ratio), to_x, -gain * half_ratio
