"""Lesions painted on slices that have none, or transplanted from one patient's slice to another's, in batches.

What is painted where is drawn on the host (`lesion_parameters`); pixels are computed on the device and never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ddmd.training.geometry import pixel_grid, transformed
from ddmd.training.intensity_scale import AIR_MARGIN, HIGH, LOW
from ddmd.training.lesion_parameters import JUXTACORTICAL, LARGE, PERIVENTRICULAR
from ddmd.training.sample_random import NoiseFields

PATCH = 32  # pixels of a side of the window that a small lesion is computed in
NOISE_CELLS = 80  # of a canvas of noise; cells are at least 2 pixels
TRANSPLANT_RIM = (1.0, 8.0)  # pixels around a transplanted lesion over which its own surroundings fade out


@dataclass(frozen=True)
class Lesions:
    """Painted lesions of N samples before they are put into an image.

    alpha : (N, P, S, S) the lesions' share of each pixel.
    factor : (N, P, S, S) the lesion's own factor on the level.
    inside : (N, S, S) pixels inside the surface, on the middle plane.
    push : (N, S, S, 2) displacement (x, y) in pixels by mass effect.
    """

    alpha: Tensor
    factor: Tensor
    inside: Tensor
    push: Tensor


def smooth_noise(fields: NoiseFields, at: Tensor, cell: Tensor) -> Tensor:
    """Noise of about unit scale (N, S, S) that varies over `cell` (N,) pixels.

    Parameters
    ----------
    at : (S, S, 2) or (N, S, S, 2) coordinates (x, y) in pixels from the middle.
    """
    canvas = fields.normal(1, NOISE_CELLS, NOISE_CELLS)
    at = (at / cell.clamp(min=2.0)[:, None, None, None]) * (2.0 / NOISE_CELLS)
    return functional.grid_sample(canvas, at, padding_mode="reflection", align_corners=False)[:, 0]


def _placement(values: dict[str, Tensor], depth: Tensor, fluid: Tensor, mm: float) -> Tensor:
    """(N, S S) cumulative chance of each pixel to be a lesion's centre."""
    inside = (depth > 3.0 * mm) & (fluid > 0)
    near = inside & (fluid <= 8.0)
    cortex = inside & (depth <= 7.0)
    place = values["place"][:, None, None]
    wanted = torch.where(place == PERIVENTRICULAR, near, torch.where(place == JUXTACORTICAL, cortex, inside))
    enough = wanted.flatten(1).sum(1) >= 20
    wanted = torch.where(enough[:, None, None], wanted, inside)
    return wanted.flatten(1).float().cumsum(1)


def _centres(
    values: dict[str, Tensor], cumulative: Tensor, reflection: Tensor, offset: Tensor, size: int, mm: float
) -> Tensor:
    """(N, MAX_LESIONS, 2) centres (x, y) in pixels from the middle; partners are mirrored."""
    total = cumulative[:, -1:]
    at = torch.searchsorted(cumulative, values["where"] * total, right=True).clamp(max=size * size - 1)
    x, y = at % size, torch.div(at, size, rounding_mode="floor")
    centre = torch.stack((x, y), -1) - (size - 1) / 2
    first = centre[:, 0::2]
    partner = first @ reflection.transpose(1, 2) + offset[:, None] + values["jitter"][:, 0::2] / mm
    paired = torch.stack((first, partner), 2).flatten(1, 2)
    return torch.where(values["symmetric"][:, None, None], paired, centre)


def _surface(
    values: dict[str, Tensor],
    row: Tensor,
    number: Tensor,
    offset: Tensor,
    wander: Tensor,
    gap: Tensor,
    planes: int,
    mm: float,
) -> Tensor:
    """Pixels inside the surface (L, P, h, w) of lesions, at offsets (L, h, w, 2) from their centres."""
    radius = values["radius"][row, number] / mm
    axes = values["axes"][row, number] * radius[:, None]
    angle = values["angle"][row, number][:, None, None]
    cos, sin = angle.cos(), angle.sin()
    x, y = offset.unbind(-1)
    u = (cos * y + sin * x) / axes[:, 0, None, None]
    v = (cos * x - sin * y) / axes[:, 1, None, None]
    level = torch.arange(planes, dtype=torch.float32, device=wander.device) - planes // 2
    w = level[None] * gap[row][:, None] / axes[:, 2:] + values["depth"][row, number][:, None]
    away = torch.sqrt((u * u + v * v)[:, None] + (w * w)[..., None, None])
    return (1.0 + wander[:, None] - away) * radius[:, None, None, None]


def paint(
    values: dict[str, Tensor],
    lists: dict[str, Tensor],
    turns: list[Tensor],
    depth: Tensor,
    fluid: Tensor,
    reflection: Tensor,
    offset: Tensor,
    gap: Tensor,
    planes: int,
    mm: float,
    fields: NoiseFields,
) -> Lesions:
    """Compute painted lesions.

    Parameters
    ----------
    values, lists : what `draw_lesions` and `lesion_lists` give, on the device.
    turns : list of int64 tensors
        Places in the list of large lesions; those of one turn are of different samples.
    depth, fluid : (N, S, S)
        mm inside the brain's surface, and mm to the ventricles.
    reflection, offset : (N, 2, 2), (N, 2)
        The mirror image p' = R p + o, for partners on the other side.
    gap : (N,) pixels between planes.
    planes : int
    mm : float, millimetres a pixel.
    fields : NoiseFields
    """
    n, size, device = len(depth), depth.shape[-1], depth.device
    grid = pixel_grid(size, device)
    centre = _centres(values, _placement(values, depth, fluid, mm), reflection, offset, size, mm)
    typical = values["radius"][:, 0] / mm
    wander = 0.28 * smooth_noise(fields, grid[None].expand(n, -1, -1, -1), typical * 0.7)
    wander = wander + 0.12 * smooth_noise(fields, grid[None].expand(n, -1, -1, -1), typical * 0.25)
    brain = (depth / mm + 0.5).clamp(0, 1)
    alpha = torch.zeros((n, planes, size, size), dtype=torch.float32, device=device)
    scaled, inside = torch.zeros_like(alpha), torch.zeros_like(depth)
    push = torch.zeros((n, size, size, 2), dtype=torch.float32, device=device)
    for turn in turns:
        row, number = lists["large_row"][turn], lists["large_number"][turn]
        from_centre = grid - centre[row, number][:, None, None]
        surface = _surface(values, row, number, from_centre, wander[row], gap, planes, mm)
        share = _share(values, row, number, surface, mm)
        alpha = alpha.index_copy(0, row, torch.maximum(alpha[row], share))
        factor = values["factor"][row, number][:, None, None, None]
        scaled = scaled.index_copy(0, row, torch.maximum(scaled[row], share * factor))
        inside = inside.index_copy(0, row, torch.maximum(inside[row], surface[:, planes // 2]))
        moved = _mass_effect(values, row, number, from_centre, mm)
        push = push.index_copy(0, row, push[row] + moved)
    if len(lists["small_row"]):
        small_alpha, small_scaled = _small(values, lists, centre, wander, gap, planes, mm)
        alpha, scaled = torch.maximum(alpha, small_alpha), torch.maximum(scaled, small_scaled)
    band = _bands(values, depth, fluid, grid, reflection, offset, planes, mm, fields)
    alpha, scaled = torch.maximum(alpha, band), torch.maximum(scaled, band)
    factor = torch.where(alpha > 1e-3, scaled / alpha.clamp(min=1e-3), 1.0)
    tissue = torch.where(values["kind"][:, None, None] == LARGE, 1.0, fluid.clamp(0, 1))  # not the ventricles
    return Lesions(alpha * (brain * tissue)[:, None], factor, inside, push)


def _share(values: dict[str, Tensor], row: Tensor, number: Tensor, surface: Tensor, mm: float) -> Tensor:
    """Share of each pixel (L, P, h, w); lesions of fewer than 3 pixels in the middle plane are left out."""
    edge = torch.minimum(values["edge"][row, number], values["radius"][row, number]) / mm
    share = (0.5 + surface / (2 * edge[:, None, None, None])).clamp(0, 1)
    visible = (share[:, share.shape[1] // 2] >= 0.5).flatten(1).sum(1) >= 3
    return share * visible[:, None, None, None]


def _mass_effect(values: dict[str, Tensor], row: Tensor, number: Tensor, offset: Tensor, mm: float) -> Tensor:
    """Tissue moves outwards, most at the lesion's edge: where each pixel (L, S, S, 2) comes from."""
    radius = (values["radius"][row, number] / mm)[:, None, None, None]
    shift = torch.minimum(values["push"][row][:, None, None, None] / mm, 0.5 * radius)  # never folded over
    away = offset.norm(dim=-1, keepdim=True) + 1e-3
    moved: Tensor = -offset / away * shift * (away / radius) * torch.exp(1 - away / radius)
    return moved


def _small(
    values: dict[str, Tensor],
    lists: dict[str, Tensor],
    centre: Tensor,
    wander: Tensor,
    gap: Tensor,
    planes: int,
    mm: float,
) -> tuple[Tensor, Tensor]:
    """Shares of small lesions, each computed in a window around it and put together by their maximum."""
    n, size, device = len(wander), wander.shape[-1], wander.device
    row, number = lists["small_row"], lists["small_number"]
    middle = centre[row, number]
    corner = torch.floor(middle + (size - 1) / 2).long() - PATCH // 2 + 1  # (x, y) in the image
    window = torch.arange(PATCH, device=device)
    x, y = corner[:, 0, None] + window, corner[:, 1, None] + window
    at = torch.stack((x[:, None, :].expand(-1, PATCH, -1), y[:, :, None].expand(-1, -1, PATCH)), -1)
    offset = at - (size - 1) / 2 - middle[:, None, None]
    inner = at.clamp(0, size - 1)
    own = wander[row[:, None, None], inner[..., 1], inner[..., 0]]
    surface = _surface(values, row, number, offset, own, gap, planes, mm)
    share = _share(values, row, number, surface, mm)
    padded = size + 2 * PATCH
    place = (at[..., 1] + PATCH).clamp(0, padded - 1) * padded + (at[..., 0] + PATCH).clamp(0, padded - 1)
    plane = row[:, None] * planes + torch.arange(planes, device=device)
    index = (plane[..., None, None] * padded * padded + place[:, None]).flatten()
    canvases = []
    for values_of in (share, share * values["factor"][row, number][:, None, None, None]):
        flat = torch.zeros(n * planes * padded * padded, dtype=torch.float32, device=device)
        flat = flat.scatter_reduce(0, index, values_of.flatten(), "amax")
        canvases.append(flat.view(n, planes, padded, padded)[..., PATCH:-PATCH, PATCH:-PATCH])
    return canvases[0], canvases[1]


def _bands(
    values: dict[str, Tensor],
    depth: Tensor,
    fluid: Tensor,
    grid: Tensor,
    reflection: Tensor,
    offset: Tensor,
    planes: int,
    mm: float,
    fields: NoiseFields,
) -> Tensor:
    """Confluent bands and caps (N, P, S, S) around the ventricles, mostly alike on both sides."""
    n = len(depth)
    mirrored = transformed(grid, reflection, offset)
    own = smooth_noise(fields, grid[None].expand(n, -1, -1, -1), values["band_cell"] / mm)
    noise = fields.normal(1, NOISE_CELLS, NOISE_CELLS)
    both = [
        functional.grid_sample(
            noise,
            at / (values["band_cell"] / mm).clamp(min=2.0)[:, None, None, None] * (2.0 / NOISE_CELLS),
            padding_mode="reflection",
            align_corners=False,
        )[:, 0]
        for at in (grid[None].expand(n, -1, -1, -1), mirrored)
    ]
    shape = 0.5 * (both[0] + both[1]) + 0.3 * own
    width = values["band"][:, None, None] * (0.7 + 0.7 * shape).clamp(0.0, 2.0)
    one = torch.ones_like(values["band"])
    side = planes // 2
    reach = torch.stack(
        [one if p == side else values["reach"][:, 0 if p < side else 1] for p in range(planes)], 1
    )
    width = width[:, None] * reach[..., None, None]
    edge = torch.minimum(values["edge"][:, 0], 0.5 * values["band"]).clamp(min=0.25)[:, None, None, None]
    share = (0.5 + (width - fluid[:, None]) / (2 * edge)).clamp(0, 1)
    share = share * fluid[:, None].clamp(0, 1) * (depth[:, None] > 4.0) * (width > 0)
    return share * (values["band"] > 0)[:, None, None, None]


def fill(
    planes: Tensor, lesions: Lesions, values: dict[str, Tensor], mm: float, fields: NoiseFields
) -> Tensor:
    """Put painted lesions into planes.

    Parameters
    ----------
    planes : (N, P, C, S, S) float32, air is 0.
    lesions : Lesions
    values : what `draw_lesions` gives, on the device.

    Returns
    -------
    (N, P, C, S, S) float32 in [0, HIGH - LOW]
    """
    n, size = len(planes), planes.shape[-1]
    grid = pixel_grid(size, planes.device)[None].expand(n, -1, -1, -1)
    texture = values["texture"][:, None, None] * smooth_noise(fields, grid, values["texture_cell"])
    per_row = (slice(None), None, None)
    deepest = lesions.inside.amax((1, 2)).clamp(min=1.0)
    core = ((lesions.inside / deepest[per_row] - values["core_from"][per_row]) * 4).clamp(0, 1)
    rim = ((lesions.inside > 0) & (lesions.inside < values["rim_mm"][per_row] / mm)).float()
    gaps = (smooth_noise(fields, grid, 1.5 * deepest.clamp(min=4.0)) + 0.3).clamp(0, 1)
    rim = torch.where(values["broken"][per_row], rim * gaps, rim)
    profile = texture - values["core"][per_row] * core + values["rim"][per_row] * rim
    middle = lesions.alpha[:, lesions.alpha.shape[1] // 2]
    solid = (middle >= 0.5).float()
    own = planes[:, planes.shape[1] // 2]
    around = (own * solid[:, None]).sum((2, 3)) / solid.sum((1, 2)).clamp(min=1.0)[:, None]
    level = values["level"][:, None, None, None] * lesions.factor + profile[:, None]
    replaced = values["replaced"][:, None, None, None, None]
    target = torch.lerp(planes, around[:, None, :, None, None].expand_as(planes), replaced)
    target = target + level[:, :, None]
    alpha = lesions.alpha[:, :, None] * (planes > AIR_MARGIN)  # the brain ends here in this plane
    return torch.lerp(planes, target, alpha).clamp(0.0, HIGH - LOW)


def transplant(
    planes: Tensor, depth: Tensor, donor: Tensor, masks: Tensor, rim: Tensor
) -> tuple[Tensor, Tensor]:
    """Put the lesions of one patient's slice, with a rim of what is around them, into another's.

    As CarveMix does (Zhang et al., MICCAI 2021): at the same place, so that they lie where lesions do.

    Parameters
    ----------
    planes, donor : (N, P, C, S, S) float32, air is 0.
    depth : (N, S, S) of the slice that is given the lesions.
    masks : (N, P, S, S) in [0, 1], lesions of the donor's planes.
    rim : (N,) pixels over which the donor's surroundings fade out.

    Returns
    -------
    planes : (N, P, C, S, S) float32
    share : (N, S, S) float32 in [0, 1], how much of the middle plane is the donor's.
    """
    share = (masks > 0.5).float()
    step = 1.0 / rim[:, None, None, None]
    for _ in range(int(TRANSPLANT_RIM[1])):
        share = torch.maximum(share, functional.max_pool2d(share, 3, 1, 1) - step)
    tissue = ((planes > AIR_MARGIN) & (donor > AIR_MARGIN)).all(2) & (depth > 0)[:, None]
    share = share * tissue
    return torch.lerp(planes, donor, share[:, :, None]), share[:, share.shape[1] // 2]
