"""Shapes of painted lesions: each lesion's share of every pixel, where it lies, and how it pushes tissue aside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ddmd.training.geometry import pixel_grid, transformed
from ddmd.training.lesion_parameters import JUXTACORTICAL, PERIVENTRICULAR
from ddmd.training.sample_random import NoiseFields

PATCH = 32  # pixels of a side of the window that a small lesion is computed in
NOISE_CELLS = 80  # of a canvas of noise; cells are at least 2 pixels
SUB_LEVELS = 3  # at which a plane is cut, evenly over its thickness


def smooth_noise(fields: NoiseFields, at: Tensor, cell: Tensor) -> Tensor:
    """Noise of about unit scale (N, S, S) that varies over `cell` (N,) pixels.

    Parameters
    ----------
    at : (S, S, 2) or (N, S, S, 2) coordinates (x, y) in pixels from the middle.
    """
    canvas = fields.normal(1, NOISE_CELLS, NOISE_CELLS)
    at = (at / cell.clamp(min=2.0)[:, None, None, None]) * (2.0 / NOISE_CELLS)
    return functional.grid_sample(canvas, at, padding_mode="reflection", align_corners=False)[:, 0]


def plane_levels(gap: Tensor, thickness: Tensor, planes: int) -> Tensor:
    """Where lesions are cut (N, P, SUB_LEVELS), in pixels above the middle plane.

    A slice shows the mean over its thickness, so each plane is cut at several levels (partial volume).

    Parameters
    ----------
    gap, thickness : (N,) pixels between planes, and of a plane
    planes : int, P
    """
    plane = torch.arange(planes, dtype=torch.float32, device=gap.device) - planes // 2
    sub = torch.arange(SUB_LEVELS, dtype=torch.float32, device=gap.device) - SUB_LEVELS // 2
    return (
        plane[None, :, None] * gap[:, None, None] + sub[None, None] * (thickness / SUB_LEVELS)[:, None, None]
    )


def placement(values: dict[str, Tensor], depth: Tensor, fluid: Tensor, mm: float) -> Tensor:
    """(N, S S) cumulative chance of each pixel to be a lesion's centre."""
    inside = (depth > 3.0 * mm) & (fluid > 0)
    near = inside & (fluid <= 8.0)
    cortex = inside & (depth <= 7.0)
    place = values["place"][:, None, None]
    wanted = torch.where(place == PERIVENTRICULAR, near, torch.where(place == JUXTACORTICAL, cortex, inside))
    enough = wanted.flatten(1).sum(1) >= 20
    wanted = torch.where(enough[:, None, None], wanted, inside)
    return wanted.flatten(1).float().cumsum(1)


def centres(
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


def inside_surface(
    values: dict[str, Tensor],
    row: Tensor,
    number: Tensor,
    offset: Tensor,
    wander: Tensor,
    levels: Tensor,
    mm: float,
) -> Tensor:
    """Pixels inside the surface (L, P, T, h, w) of lesions, at offsets (L, h, w, 2) from their centres.

    levels : (N, P, T) pixels above the middle plane, as `plane_levels` gives them.
    """
    radius = values["radius"][row, number] / mm
    axes = values["axes"][row, number] * radius[:, None]
    angle = values["angle"][row, number][:, None, None]
    cos, sin = angle.cos(), angle.sin()
    x, y = offset.unbind(-1)
    u = (cos * y + sin * x) / axes[:, 0, None, None]
    v = (cos * x - sin * y) / axes[:, 1, None, None]
    w = levels[row] / axes[:, 2, None, None] + values["depth"][row, number][:, None, None]
    away = torch.sqrt((u * u + v * v)[:, None, None] + (w * w)[..., None, None])
    return (1.0 + wander[:, None, None] - away) * radius[:, None, None, None, None]


def pixel_share(values: dict[str, Tensor], row: Tensor, number: Tensor, surface: Tensor, mm: float) -> Tensor:
    """Share of each pixel (L, P, h, w), the mean over a plane's thickness, of surfaces (L, P, T, h, w).

    Lesions of fewer than 3 pixels in the middle plane are left out.
    """
    edge = torch.minimum(values["edge"][row, number], values["radius"][row, number]) / mm
    share = (0.5 + surface / (2 * edge[:, None, None, None, None])).clamp(0, 1).mean(2)
    visible = (share[:, share.shape[1] // 2] >= 0.5).flatten(1).sum(1) >= 3
    return share * visible[:, None, None, None]


def mass_effect(values: dict[str, Tensor], row: Tensor, number: Tensor, offset: Tensor, mm: float) -> Tensor:
    """Tissue moves outwards, most at the lesion's edge: where each pixel (L, S, S, 2) comes from."""
    radius = (values["radius"][row, number] / mm)[:, None, None, None]
    shift = torch.minimum(values["push"][row][:, None, None, None] / mm, 0.5 * radius)  # never folded over
    away = offset.norm(dim=-1, keepdim=True) + 1e-3
    moved: Tensor = -offset / away * shift * (away / radius) * torch.exp(1 - away / radius)
    return moved


def small_lesions(
    values: dict[str, Tensor],
    lists: dict[str, Tensor],
    centre: Tensor,
    wander: Tensor,
    levels: Tensor,
    mm: float,
) -> tuple[Tensor, Tensor]:
    """Shares of small lesions, each computed in a window around it and put together by their maximum."""
    n, size, device, planes = len(wander), wander.shape[-1], wander.device, levels.shape[1]
    row, number = lists["small_row"], lists["small_number"]
    middle = centre[row, number]
    corner = torch.floor(middle + (size - 1) / 2).long() - PATCH // 2 + 1  # (x, y) in the image
    window = torch.arange(PATCH, device=device)
    x, y = corner[:, 0, None] + window, corner[:, 1, None] + window
    at = torch.stack((x[:, None, :].expand(-1, PATCH, -1), y[:, :, None].expand(-1, -1, PATCH)), -1)
    offset = at - (size - 1) / 2 - middle[:, None, None]
    inner = at.clamp(0, size - 1)
    own = wander[row[:, None, None], inner[..., 1], inner[..., 0]]
    surface = inside_surface(values, row, number, offset, own, levels, mm)
    share = pixel_share(values, row, number, surface, mm)
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


@dataclass(frozen=True)
class Surroundings:
    """Where in the brain the pixels of N samples are.

    depth, fluid : (N, S, S) millimetres inside the brain's surface, and to the ventricles.
    frontal, occipital : (N, S, S) millimetres to the nearest tip of a frontal and of an occipital horn.
    reflection, offset : (N, 2, 2), (N, 2), the mirror image p' = R p + o, for what lies on the other side.
    levels : (N, P, T) as `plane_levels` gives them.
    thickness_mm : (N,) of a plane.
    mm : millimetres a pixel.
    """

    depth: Tensor
    fluid: Tensor
    frontal: Tensor
    occipital: Tensor
    reflection: Tensor
    offset: Tensor
    levels: Tensor
    thickness_mm: Tensor
    mm: float

    @property
    def grid(self) -> Tensor:
        """(N, S, S, 2) coordinates of the pixels from the middle."""
        size = self.depth.shape[-1]
        return pixel_grid(size, self.depth.device)[None].expand(len(self.depth), -1, -1, -1)


def _symmetric_noise(around: Surroundings, cell_mm: Tensor, fields: NoiseFields) -> Tensor:
    """Noise (N, S, S) that is mostly alike on both sides of the head."""
    grid = around.grid
    own = smooth_noise(fields, grid, cell_mm / around.mm)
    canvas = fields.normal(1, NOISE_CELLS, NOISE_CELLS)
    scale = (2.0 / NOISE_CELLS) / (cell_mm / around.mm).clamp(min=2.0)[:, None, None, None]
    both = [
        functional.grid_sample(canvas, at * scale, padding_mode="reflection", align_corners=False)[:, 0]
        for at in (grid, transformed(grid, around.reflection, around.offset))
    ]
    return 0.5 * (both[0] + both[1]) + 0.3 * own


def _rim_of_ventricles(values: dict[str, Tensor], around: Surroundings, width: Tensor) -> Tensor:
    """Share of each pixel (N, P, S, S) of what lies on the ventricles, `width` (N, S, S) mm deep."""
    planes = around.levels.shape[1]
    side = planes // 2
    one = torch.ones_like(around.thickness_mm)
    reach = torch.stack(
        [one if p == side else values["reach"][:, 0 if p < side else 1] for p in range(planes)], 1
    )
    deep = width[:, None] * reach[..., None, None]
    largest = width.amax((1, 2))
    # walls of the ventricles are oblique: a thick slice shows the mean of where they are
    edge = torch.minimum(values["edge"][:, 0], 0.5 * largest) + 0.25 * around.thickness_mm
    edge = torch.minimum(edge, 0.75 * largest).clamp(min=0.25)[:, None, None, None]
    share = (0.5 + (deep - around.fluid[:, None]) / (2 * edge)).clamp(0, 1)
    return share * around.fluid[:, None].clamp(0, 1) * (around.depth[:, None] > 4.0) * (deep > 0)


def ventricle_bands(values: dict[str, Tensor], around: Surroundings, fields: NoiseFields) -> Tensor:
    """Confluent bands (N, P, S, S) along the ventricles, mostly alike on both sides."""
    shape = _symmetric_noise(around, values["band_cell"], fields)
    width = values["band"][:, None, None] * (0.7 + 0.7 * shape).clamp(0.0, 2.0)
    return _rim_of_ventricles(values, around, width) * (values["band"] > 0)[:, None, None, None]


def ventricle_caps(values: dict[str, Tensor], around: Surroundings, fields: NoiseFields) -> Tensor:
    """Caps (N, P, S, S) on the frontal and occipital horns, on both sides: thickest at the horn's tip."""
    shape = _symmetric_noise(around, values["band_cell"], fields)
    reach = (values["cap_reach"] + values["cap"])[:, None, None]
    horns = (
        (1.0 - (distance / reach).square()).clamp(min=0.0) * values[name][:, None, None]
        for name, distance in (("cap_frontal", around.frontal), ("cap_occipital", around.occipital))
    )
    width = values["cap"][:, None, None] * torch.maximum(*horns) * (0.9 + 0.3 * shape).clamp(0.3, 1.5)
    return _rim_of_ventricles(values, around, width) * (values["cap"] > 0)[:, None, None, None]


def territory(
    values: dict[str, Tensor],
    depth: Tensor,
    reflection: Tensor,
    offset: Tensor,
    planes: int,
    mm: float,
    fields: NoiseFields,
) -> Tensor:
    """A part of an artery's territory (N, P, S, S): a sector of the brain from its surface inwards, on one side.

    Parameters
    ----------
    values : what `draw_lesions` gives, of these N samples.
    depth, reflection, offset : as `Surroundings` has them.
    planes : int, P
    mm : millimetres a pixel.
    """
    size, side = depth.shape[-1], planes // 2
    grid = pixel_grid(size, depth.device)[None].expand(len(depth), -1, -1, -1)
    brain = (depth > 0).float()[..., None]
    middle = (grid * brain).sum((1, 2)) / brain.sum((1, 2)).clamp(min=1.0)
    away = grid - middle[:, None, None]
    angle = values["territory_angle"]
    towards = torch.stack((angle.cos(), angle.sin()), -1)
    along = (away * towards[:, None, None]).sum(-1)
    across = away[..., 0] * towards[:, None, None, 1] - away[..., 1] * towards[:, None, None, 0]
    turned = torch.atan2(across, along).abs()
    cell = torch.full_like(angle, 12.0 / mm)
    width = values["territory_width"][:, None, None] * (1.0 + 0.25 * smooth_noise(fields, grid, cell))
    sector = (width - turned) * away.norm(dim=-1) * mm
    # the falx ends a territory: half of what lies between a pixel and its mirror image is the way to it
    apart = 0.5 * (grid - transformed(grid, reflection, offset))
    normal = towards - (reflection @ towards[..., None])[..., 0]
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    sector = torch.minimum(sector, (apart * normal[:, None, None]).sum(-1) * mm)
    reach = values["territory"][:, None, None] * (1.0 + 0.3 * smooth_noise(fields, grid, cell))
    edge = values["edge"][:, 0, None, None]
    one = torch.ones_like(values["reach"][:, 0])
    shares = []
    for plane in range(planes):
        of_plane = one if plane == side else values["reach"][:, 0 if plane < side else 1]
        surface = torch.minimum(sector, reach * of_plane[:, None, None] - depth)
        shares.append((0.5 + surface / (2 * edge)).clamp(0, 1) * (depth > 0))
    return torch.stack(shares, 1)
