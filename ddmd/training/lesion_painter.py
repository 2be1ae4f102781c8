"""Lesions painted on slices that have none, or transplanted from one patient's slice to another's, in batches.

What is painted where is drawn on the host (`lesion_parameters`); pixels are computed on the device and never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ddmd.training import lesion_shapes
from ddmd.training.geometry import pixel_grid
from ddmd.training.intensity_scale import AIR_MARGIN, HIGH, LOW
from ddmd.training.lesion_parameters import LARGE
from ddmd.training.lesion_shapes import SUB_LEVELS, Surroundings, smooth_noise
from ddmd.training.sample_random import NoiseFields

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


def paint(
    values: dict[str, Tensor],
    lists: dict[str, Tensor],
    turns: list[Tensor],
    around: Surroundings,
    fields: NoiseFields,
) -> Lesions:
    """Compute painted lesions.

    Parameters
    ----------
    values, lists : what `draw_lesions` and `lesion_lists` give, on the device.
    turns : list of int64 tensors
        Places in the list of large lesions; those of one turn are of different samples.
    around : Surroundings
    fields : NoiseFields
    """
    depth, fluid, mm = around.depth, around.fluid, around.mm
    n, size, planes = len(depth), depth.shape[-1], around.levels.shape[1]
    grid = pixel_grid(size, depth.device)
    cumulative = lesion_shapes.placement(values, depth, fluid, mm)
    centre = lesion_shapes.centres(values, cumulative, around.reflection, around.offset, size, mm)
    typical = values["radius"][:, 0] / mm
    wander = 0.28 * smooth_noise(fields, around.grid, typical * 0.7)
    wander = wander + 0.12 * smooth_noise(fields, around.grid, typical * 0.25)
    brain = (depth / mm + 0.5).clamp(0, 1)
    alpha = torch.zeros((n, planes, size, size), dtype=torch.float32, device=depth.device)
    scaled, inside = torch.zeros_like(alpha), torch.zeros_like(depth)
    push = torch.zeros((n, size, size, 2), dtype=torch.float32, device=depth.device)
    for turn in turns:
        row, number = lists["large_row"][turn], lists["large_number"][turn]
        from_centre = grid - centre[row, number][:, None, None]
        surface = lesion_shapes.inside_surface(
            values, row, number, from_centre, wander[row], around.levels, mm
        )
        share = lesion_shapes.pixel_share(values, row, number, surface, mm)
        alpha = alpha.index_copy(0, row, torch.maximum(alpha[row], share))
        factor = values["factor"][row, number][:, None, None, None]
        scaled = scaled.index_copy(0, row, torch.maximum(scaled[row], share * factor))
        own = surface[:, planes // 2, SUB_LEVELS // 2]
        inside = inside.index_copy(0, row, torch.maximum(inside[row], own))
        moved = lesion_shapes.mass_effect(values, row, number, from_centre, mm)
        push = push.index_copy(0, row, push[row] + moved)
    beside = [lesion_shapes.ventricle_bands(values, around, fields)]
    beside.append(lesion_shapes.ventricle_caps(values, around, fields))
    shares = [(share, share) for share in beside]
    if len(lists["small_row"]):
        shares.append(lesion_shapes.small_lesions(values, lists, centre, wander, around.levels, mm))
    for share, scaled_share in shares:
        alpha, scaled = torch.maximum(alpha, share), torch.maximum(scaled, scaled_share)
    if len(row := lists["territory_row"]):
        own_values = {name: value[row] for name, value in values.items()}
        mirror = around.reflection[row], around.offset[row]
        share = lesion_shapes.territory(own_values, depth[row], *mirror, planes, mm, fields.rows(row))
        alpha = alpha.index_copy(0, row, torch.maximum(alpha[row], share))
        scaled = scaled.index_copy(0, row, torch.maximum(scaled[row], share))
    factor = torch.where(alpha > 1e-3, scaled / alpha.clamp(min=1e-3), 1.0)
    tissue = torch.where(values["kind"][:, None, None] == LARGE, 1.0, fluid.clamp(0, 1))  # not the ventricles
    return Lesions(alpha * (brain * tissue)[:, None], factor, inside, push)


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
    noise = smooth_noise(fields, grid, values["texture_cell"])
    per_row = (slice(None), None, None)
    deepest = lesions.inside.amax((1, 2)).clamp(min=1.0)[per_row]
    core_from = values["core_from"][per_row]
    core = ((lesions.inside / deepest - core_from) * 4).clamp(0, 1)
    rim = ((lesions.inside > 0) & (lesions.inside < values["rim_mm"][per_row] / mm)).float()
    gaps = smooth_noise(fields, grid, 1.5 * lesions.inside.amax((1, 2)).clamp(min=4.0))
    rim = torch.where(values["broken"][per_row], rim * (gaps + 0.3).clamp(0, 1), rim)
    ring = (lesions.inside - core_from * deepest) / (values["ring_mm"][per_row] / mm)
    ring = torch.exp(-ring.square()) * (lesions.inside > 0) * (gaps + 0.8).clamp(0, 1)
    middle = lesions.alpha[:, lesions.alpha.shape[1] // 2]
    solid = (middle >= 0.5).float()
    own = planes[:, planes.shape[1] // 2]
    around = (own * solid[:, None]).sum((2, 3)) / solid.sum((1, 2)).clamp(min=1.0)[:, None]

    def of_sequence(name: str, profile: Tensor) -> Tensor:
        """(N, C, S, S): a profile (N, S, S) times each sequence's own amplitude (N, C)."""
        return values[name][:, :, None, None] * profile[:, None]

    parts = (("texture", noise), ("core", core), ("rim", rim), ("ring", ring))
    profile = torch.stack([of_sequence(name, part) for name, part in parts]).sum(0)
    level = of_sequence("level", lesions.factor.flatten(1, 2)).unflatten(2, lesions.factor.shape[1:3])
    replaced = values["replaced"][:, None, None, None, None]
    target = torch.lerp(planes, around[:, None, :, None, None].expand_as(planes), replaced)
    target = target + level.transpose(1, 2) + profile[:, None]
    alpha = lesions.alpha[:, :, None] * (planes > AIR_MARGIN)  # the brain ends here in this plane
    return torch.lerp(planes, target, alpha).clamp(0.0, HIGH - LOW)


def transplant(
    planes: Tensor, depth: Tensor, donor: Tensor, masks: Tensor, rim: Tensor, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Put the lesions of one patient's slice, with a rim of what is around them, into another's.

    As CarveMix does (Zhang et al., MICCAI 2021): at the same place, so that they lie where lesions do.

    Parameters
    ----------
    planes, donor : (N, P, C, S, S) float32, air is 0.
    depth : (N, S, S) of the slice that is given the lesions.
    masks : (N, P, S, S) in [0, 1], lesions of the donor's planes.
    rim : (N,) pixels over which the donor's surroundings fade out.
    present : (N, C) bool, optional
        The sequences that both have. What the others show does not fit together, and should not be used.

    Returns
    -------
    planes : (N, P, C, S, S) float32
    share : (N, S, S) float32 in [0, 1], how much of the middle plane is the donor's.
    """
    share = (masks > 0.5).float()
    step = 1.0 / rim[:, None, None, None]
    for _ in range(int(TRANSPLANT_RIM[1])):
        share = torch.maximum(share, functional.max_pool2d(share, 3, 1, 1) - step)
    both = (planes > AIR_MARGIN) & (donor > AIR_MARGIN)
    if present is not None:
        both = both | ~present[:, None, :, None, None]
    tissue = both.all(2) & (depth > 0)[:, None]
    share = share * tissue
    return torch.lerp(planes, donor, share[:, :, None]), share[:, share.shape[1] // 2]
