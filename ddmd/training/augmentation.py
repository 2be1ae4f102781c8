"""Augmentation of a batch on the device: contrast, bias fields, resolution and noise, and the chance of each.

Planes are half robust z-scores less that of air, so that air is 0. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddmd.training.intensity_scale import AIR_MARGIN, HIGH, LOW
from ddmd.training.sample_random import NoiseFields, SampleRandom

MAX_SPREAD = 3.0  # a curve that leaves less than a third of the tissue's range is not wholly undone
CURVE_POINTS = 17  # of a contrast curve, evenly spaced from air to the brightest
BLUR_RADIUS = 4
ZOOMS = (0.35, 0.45, 0.55, 0.65, 0.8)  # of the coarse grids that lost resolution is simulated on


@dataclass(frozen=True)
class Augmentation:
    """Chance of each change, and how strong the geometric ones and bias fields are.

    Parameters
    ----------
    flip, affine, elastic : float
        Chances: left-right; rotation with scale, shear and shift; a smooth displacement.
    rotation, shear, scale, shift, elastic_px : float
        Largest rotation (rad), shear, relative change of size, shift (pixels); typical displacement (pixels).
    contrast : float
        Chance of a random monotone curve and of a gain and an offset about the tissue's median. Median and
        interquartile range of the curve's result are what they were, as of any normalised volume.
    bias, strong_bias : float
        Chances of a weak and of a strong multiplicative field.
    weak_field, strong_field : (low, high)
        Range of the standard deviation of the field's logarithm.
    local_bias : float
        Chance that the field has a bump, as beside a coil's element, or one on either side of the head.
    bump, bump_size : (low, high)
        Range of the bump's height in the field's logarithm, and of its standard deviation as a share of the plane.
    blur, coarse, ringing, noise, saturation : float
        Chances of lost sharpness, lost resolution, Gibbs ringing, white noise, and the brightest tissue cut off.
    """

    flip: float = 0.5
    affine: float = 0.7
    elastic: float = 0.2
    rotation: float = 0.35
    shear: float = 0.1
    scale: float = 0.35
    shift: float = 12.0
    elastic_px: float = 3.0
    contrast: float = 0.7
    bias: float = 0.45
    strong_bias: float = 0.25
    weak_field: tuple[float, float] = (0.01, 0.1)
    strong_field: tuple[float, float] = (0.1, 0.4)
    local_bias: float = 0.35
    bump: tuple[float, float] = (0.05, 0.25)
    bump_size: tuple[float, float] = (0.05, 0.2)
    blur: float = 0.25
    coarse: float = 0.2
    ringing: float = 0.1
    noise: float = 0.5
    saturation: float = 0.1


def draw_intensities(random: SampleRandom, config: Augmentation) -> dict[str, np.ndarray]:
    """What is changed in each sample, on the host."""
    gamma = random.uniform(0.65, 1.5)
    at = np.linspace(0.0, 1.0, CURVE_POINTS)
    bent = np.cumsum(0.25 + random.unit(CURVE_POINTS - 1), axis=1)
    bent = np.concatenate((np.zeros((len(random), 1)), bent / bent[:, -1:]), 1)
    curve = np.where(random.chance(0.5)[:, None], at ** gamma[:, None], bent)
    curve = np.where(random.chance(config.contrast)[:, None], curve, at)
    gain = 1.0 + random.uniform(-0.25, 0.35) * random.chance(config.contrast)
    offset = random.uniform(-0.25, 0.25) * random.chance(config.contrast)
    kind = random.choice((max(0.0, 1 - config.bias - config.strong_bias), config.bias, config.strong_bias))
    field = np.choose(
        kind, (0.0 * gamma, random.uniform(*config.weak_field), random.uniform(*config.strong_field))
    )
    height = random.uniform(*config.bump) * np.where(random.chance(0.25), -1.0, 1.0)
    return {
        "curve": curve * (HIGH - LOW),
        "gain": gain,
        "offset": offset,
        "field": field,
        "coefficients": random.normal(9),
        "bump": height * random.chance(config.local_bias),
        "bump_at": random.uniform(-0.7, 0.7, 2),
        "bump_size": random.uniform(*config.bump_size),
        "both_sides": random.chance(0.4),
        "blurred": random.chance(config.blur),
        "sigma": random.uniform(0.3, 1.2, 2),
        "zoom": np.where(random.chance(config.coarse), random.integers(0, len(ZOOMS)), -1),
        "ringing": np.where(random.chance(config.ringing), random.uniform(0.4, 0.8), 0.0),
        "noise": random.uniform(0.0, 0.2) * random.chance(config.noise),
        "saturation": np.where(random.chance(config.saturation), random.uniform(0.97, 0.999), 2.0),
    }


def tissue_quantiles(planes: Tensor, tissue: Tensor, quantiles: tuple[float, ...] | Tensor) -> Tensor:
    """(N, Q) quantiles of the tissue in every sixth pixel of planes (N, C, S, S); 0 without tissue."""
    values = planes[..., ::6, ::6].flatten(1)
    there = tissue[..., ::6, ::6].flatten(1)
    ordered = values.masked_fill(~there, float("inf")).sort(1).values
    count = there.sum(1, keepdim=True)
    if isinstance(quantiles, tuple):
        wanted = torch.stack([torch.full_like(planes[:, 0, 0, 0], q) for q in quantiles], 1)
    else:
        wanted = quantiles
    at = (wanted * (count - 1).clamp(min=0)).long()
    return torch.where(count > 0, ordered.gather(1, at), torch.zeros_like(wanted))


def bias_field(coefficients: Tensor, strength: Tensor, size: int) -> Tensor:
    """(N, 1, S, S) multiplicative field: the exponential of a cubic polynomial of a given standard deviation."""
    at = torch.linspace(-1.0, 1.0, size, dtype=torch.float32, device=coefficients.device)
    y, x = torch.meshgrid(at, at, indexing="ij")
    basis = torch.stack((x, y, x * x, x * y, y * y, x**3, x * x * y, x * y * y, y**3))
    log_field = (coefficients @ basis.flatten(1)).view(-1, 1, size, size)
    log_field = log_field - log_field.mean((2, 3), keepdim=True)
    spread = log_field.std((2, 3), keepdim=True).clamp(min=1e-6)
    return torch.exp(log_field / spread * strength[:, None, None, None])


def local_field(height: Tensor, at: Tensor, spread: Tensor, both_sides: Tensor, size: int) -> Tensor:
    """(N, 1, S, S) multiplicative field: the exponential of a Gaussian bump, and of its left-right mirror image.

    Parameters
    ----------
    height : (N,) float32, of the field's logarithm.
    at : (N, 2) float32, y and x of its centre; the plane reaches from -1 to 1.
    spread : (N,) float32, its standard deviation as a share of the plane.
    both_sides : (N,) bool
    size : int, S
    """
    line = torch.linspace(-1.0, 1.0, size, dtype=torch.float32, device=height.device)

    def profile(centre: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((line - centre[:, None]) / (2 * spread[:, None])) ** 2)

    rows, columns = profile(at[:, 0]), profile(at[:, 1])
    columns = torch.where(both_sides[:, None], torch.maximum(columns, columns.flip(-1)), columns)
    return torch.exp(height[:, None, None] * rows[:, :, None] * columns[:, None, :])[:, None]


def _curved(planes: Tensor, curve: Tensor) -> Tensor:
    """Piecewise linear curves (N, CURVE_POINTS) from air to the brightest, applied to planes (N, C, S, S)."""
    at = (planes * ((CURVE_POINTS - 1) / (HIGH - LOW))).clamp(0, CURVE_POINTS - 1 - 1e-4)
    low = at.long()
    flat = low.flatten(1)
    left, right = curve.gather(1, flat), curve.gather(1, flat + 1)
    return torch.lerp(left, right, (at - low).flatten(1)).view_as(planes)


def _blur(planes: Tensor, sigma: Tensor) -> Tensor:
    """Planes (N, C, S, S) blurred by Gaussians of sigma (N, 2) pixels along y and x."""
    n, c = planes.shape[:2]
    at = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float32, device=planes.device)
    kernel = torch.exp(-0.5 * (at / sigma[..., None]) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(c, 0)
    flat = planes.reshape(1, n * c, *planes.shape[2:])
    flat = functional.conv2d(flat, kernel[:, 0].view(-1, 1, 2 * BLUR_RADIUS + 1, 1), padding=(BLUR_RADIUS, 0), groups=n * c)  # fmt: skip
    flat = functional.conv2d(flat, kernel[:, 1].view(-1, 1, 1, 2 * BLUR_RADIUS + 1), padding=(0, BLUR_RADIUS), groups=n * c)  # fmt: skip
    return flat.view_as(planes)


def _ringing(planes: Tensor, kept: Tensor) -> Tensor:
    """Spatial frequencies above a share `kept` (N,) of the highest are cut off."""
    spectrum = torch.fft.rfft2(planes)
    fy = torch.fft.fftfreq(planes.shape[-2], dtype=torch.float32, device=planes.device)
    fx = torch.fft.rfftfreq(planes.shape[-1], dtype=torch.float32, device=planes.device)
    radius = torch.hypot(fy[:, None], fx[None]) * 2
    spectrum = spectrum * (radius <= kept[:, None, None, None])
    cut: Tensor = torch.fft.irfft2(spectrum, s=planes.shape[-2:])
    return cut


def _coarse(planes: Tensor, zoom: float) -> Tensor:
    """Resolution lost on a grid that is `zoom` times as fine."""
    small = functional.interpolate(planes, scale_factor=zoom, mode="area")
    return functional.interpolate(small, size=planes.shape[-2:], mode="bilinear", align_corners=False)


def change_intensities(
    planes: Tensor, values: dict[str, Tensor], drawn: dict[str, np.ndarray], fields: NoiseFields
) -> Tensor:
    """Planes (N, C, S, S) as another scanner would have made them; air stays air.

    Parameters
    ----------
    planes : float32, air is 0.
    values : what `draw_intensities` gives, on the device.
    drawn : the same on the host, which decides what is launched for which rows.
    fields : NoiseFields

    Returns
    -------
    (N, C, S, S) float32 in [0, HIGH - LOW]
    """
    tissue = planes > AIR_MARGIN
    quartiles = (0.25, 0.5, 0.75)
    before = tissue_quantiles(planes, tissue, quartiles)
    size = planes.shape[-1]
    changed = planes * bias_field(values["coefficients"], values["field"], size)
    changed = changed * local_field(
        values["bump"], values["bump_at"], values["bump_size"], values["both_sides"], size
    )
    changed = _curved(changed, values["curve"])
    after = tissue_quantiles(changed, tissue, quartiles)
    left = after[:, 2] - after[:, 0]
    spread = ((before[:, 2] - before[:, 0]) / left.clamp(min=AIR_MARGIN)).clamp(max=MAX_SPREAD)
    spread = torch.where(left > AIR_MARGIN, spread, 1.0) * values["gain"]
    middle = before[:, 1] + values["offset"]
    per_row = (slice(None), None, None, None)
    changed = (changed - after[:, 1][per_row]) * spread[per_row] + middle[per_row]
    changed = torch.where(tissue, changed, 0.0)
    changed = _acquire(changed, values, drawn)
    changed = changed + fields.normal(*planes.shape[1:]) * values["noise"][per_row]
    limit = tissue_quantiles(changed, tissue, values["saturation"][:, None].clamp(max=1.0))
    limit = torch.where(values["saturation"][:, None] <= 1.0, limit, HIGH - LOW)
    changed = torch.minimum(changed, limit[:, :, None, None])
    changed = changed.clamp(2 * AIR_MARGIN, HIGH - LOW)  # dark tissue is not air
    return torch.where(tissue, changed, 0.0)


def _acquire(planes: Tensor, values: dict[str, Tensor], drawn: dict[str, np.ndarray]) -> Tensor:
    """Blur, lost resolution and ringing, each of the rows that it was drawn for."""
    device = planes.device

    def rows_where(chosen: np.ndarray) -> Tensor | None:
        if not chosen.any():
            return None
        at = torch.from_numpy(np.flatnonzero(chosen))
        return at.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else at

    rows = rows_where(drawn["blurred"])
    if rows is not None:
        planes = planes.index_copy(0, rows, _blur(planes[rows], values["sigma"][rows]))
    for number, zoom in enumerate(ZOOMS):
        rows = rows_where(drawn["zoom"] == number)
        if rows is not None:
            planes = planes.index_copy(0, rows, _coarse(planes[rows], zoom))
    rows = rows_where(drawn["ringing"] > 0)
    if rows is not None:
        planes = planes.index_copy(0, rows, _ringing(planes[rows], values["ringing"][rows]))
    return planes
