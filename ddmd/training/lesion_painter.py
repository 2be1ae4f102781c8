"""Lesions painted on slices that have none, or transplanted from one patient's slice to another's, in batches.

What is painted where is drawn on the host (`draw_lesions`); pixels are computed on the device and never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddmd.training.sample_random import NoiseFields, SampleRandom

LOW, HIGH = -2.0, 3.0  # air, and the brightest a plane gets: robust z-scores times 0.5
FLUID = -0.75  # what is darker than this deep in the brain, on FLAIR, is cerebrospinal fluid
AIR_MARGIN = 0.02  # what is closer to LOW than this is air
MAX_LESIONS = 40
PATCH = 32  # pixels of a side of the window that a small lesion is computed in
SMALL_PX = 5.5  # lesions of a smaller radius are computed in a window
KINDS = ("large", "middling", "small", "many", "bands")
LARGE, MIDDLING, SMALL, MANY, BANDS = range(5)
PLACES = ("anywhere", "periventricular", "juxtacortical")
ANYWHERE, PERIVENTRICULAR, JUXTACORTICAL = range(3)
NOISE_CELLS = 80  # of a canvas of noise; cells are at least 2 pixels
TRANSPLANT_RIM = (1.0, 8.0)  # pixels around a transplanted lesion over which its own surroundings fade out


@dataclass(frozen=True)
class PainterConfig:
    """Ranges the painter draws from: sizes in mm, contrast in half robust z-scores.

    Parameters
    ----------
    kinds : tuple of 5 float
        Shares of slices with one large lesion (glioma), a few of middling size, small ones (multiple sclerosis),
        many small ones, and confluent bands and caps around the ventricles (white matter hyperintensities).
    contrast, faint_contrast : (low, high)
        How much brighter lesions are; the second in a share `faint` of slices.
    replaced : (low, high)
        Share of the tissue's own signal that the lesion's level replaces.
    dark : float
        Chance that a lesion is darker than its surroundings.
    core, rim : float
        Chances of a darker core and of a brighter rim in a lesion that is not small.
    displacement : float
        Largest shift, in mm, by which a large lesion pushes the tissue around it.
    periventricular, juxtacortical : float
        Chances that lesions that are not large keep to the ventricles, or to the brain's surface.
    symmetric : float
        Chance that each lesion of a slice has a partner on the other side.
    edge : (low, high)
        Half width of a lesion's soft edge, in mm.
    not_bright : float
        Chance that, where hard lesions are asked for, one that is not small is no brighter than its surroundings:
        a bright rim around an interior like them, tissue whose texture is effaced, or dark.
    broken_rim : float
        Chance that the rim of such a lesion is there on a part of its surface only.
    """

    kinds: tuple[float, ...] = (0.35, 0.2, 0.2, 0.07, 0.18)
    large_mm: tuple[float, float] = (10.0, 34.0)
    middling_mm: tuple[float, float] = (4.5, 11.0)
    small_mm: tuple[float, float] = (1.6, 5.0)
    band_mm: tuple[float, float] = (1.5, 14.0)
    contrast: tuple[float, float] = (0.3, 2.4)
    faint: float = 0.15
    faint_contrast: tuple[float, float] = (0.15, 0.4)
    replaced: tuple[float, float] = (0.2, 1.0)
    texture: float = 0.25
    dark: float = 0.05
    core: float = 0.35
    rim: float = 0.15
    displacement: float = 5.0
    periventricular: float = 0.4
    juxtacortical: float = 0.2
    symmetric: float = 0.3
    edge: tuple[float, float] = (0.5, 3.5)
    not_bright: float = 0.5
    broken_rim: float = 0.6


def draw_lesions(random: SampleRandom, config: PainterConfig, hard: np.ndarray) -> dict[str, np.ndarray]:
    """What is painted on each sample, lengths in mm.

    Parameters
    ----------
    random : SampleRandom of N samples.
    config : PainterConfig
    hard : (N,) bool
        Whether lesions that are no brighter than their surroundings are among them.

    Returns
    -------
    dict of arrays whose first axis is N; those of single lesions have MAX_LESIONS as the second.
    """
    n, most = len(random), MAX_LESIONS
    kind = random.choice(config.kinds)
    symmetric = random.chance(config.symmetric) & (kind != LARGE)
    count = np.choose(
        kind,
        (
            np.ones(n, np.int64),
            random.integers(1, 4),
            random.integers(1, 16),
            random.integers(15, most + 1),
            random.integers(0, 5),
        ),
    )
    count = np.where(symmetric, np.minimum(2 * count, most), count)
    sizes = (config.large_mm, config.middling_mm, config.small_mm, config.small_mm, config.small_mm)
    low, high = (np.log([size[i] for size in sizes])[kind] for i in (0, 1))
    contrast = np.where(
        random.chance(config.faint),
        random.log_uniform(*config.faint_contrast),
        random.log_uniform(*config.contrast),
    )
    place = np.where(
        kind == LARGE,
        ANYWHERE,
        random.choice(
            (
                max(0.0, 1 - config.periventricular - config.juxtacortical),
                config.periventricular,
                config.juxtacortical,
            )
        ),
    )
    values = {
        "kind": kind,
        "place": place,
        "symmetric": symmetric,
        "count": count,
        "level": contrast * np.where(random.chance(config.dark), -1.0, 1.0),
        "replaced": random.uniform(*config.replaced),
        "texture": config.texture * random.unit(),
        "texture_cell": random.uniform(2.0, 8.0),
        "radius": np.exp(low[:, None] + (high - low)[:, None] * random.unit(most)),
        "where": random.unit(most),
        "jitter": random.normal(most, 2) * 2.0,
        "axes": np.clip(np.exp(0.25 * random.normal(most, 3)), 0.55, 1.6),
        "angle": random.uniform(0.0, np.pi, most),
        "depth": random.uniform(-0.75, 0.75, most),
        "factor": random.uniform(0.8, 1.2, most),
        "edge": random.log_uniform(*config.edge, most),
        "band": random.log_uniform(*config.band_mm) * (kind == BANDS),
        "band_cell": random.log_uniform(6.0, 40.0),
        "reach": random.uniform(0.2, 1.0, 2),  # of bands in the neighbouring planes
        "push": random.uniform(0.0, config.displacement) * (kind == LARGE) * random.chance(0.4),
    }
    return values | _draw_look(random, config, hard & (kind <= MIDDLING), values)


def _draw_look(
    random: SampleRandom, config: PainterConfig, hard: np.ndarray, values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Core and rim of large and middling lesions; of hard ones, the level and the push, too."""
    solid = (values["kind"] <= MIDDLING) & (values["level"] > 0)
    level = np.abs(values["level"])
    core = level * random.uniform(0.4, 1.6) * (random.chance(config.core) & solid)
    rim = level * random.uniform(0.1, 0.5) * (random.chance(config.rim) & solid)
    rim_mm = np.full(len(random), 3.0)
    looks = random.choice((0.5, 0.35, 0.15))  # ring, effaced, dark
    ring = (random.uniform(-0.5, 0.2), random.uniform(0.5, 1.0), random.uniform(0.25, 1.1))
    effaced = (random.uniform(-0.05, 0.35), random.uniform(0.75, 1.0), 0.0 * level)
    dark = (
        -random.uniform(0.2, 1.2),
        random.uniform(0.3, 0.9),
        random.uniform(0.2, 0.8) * random.chance(0.5),
    )
    chosen = hard & random.chance(config.not_bright)
    hard_level, hard_replaced, hard_rim = (
        np.choose(looks, parts) for parts in zip(ring, effaced, dark, strict=True)
    )
    pushed = random.uniform(0.0, config.displacement)
    return {
        "level": np.where(chosen, hard_level, values["level"]),
        "factor": np.where(chosen[:, None], 1.0, values["factor"]),
        "replaced": np.where(chosen, hard_replaced, values["replaced"]),
        "core": np.where(chosen, 0.0, core),
        "core_from": random.uniform(0.3, 0.6),
        "rim": np.where(chosen, hard_rim, rim),
        "rim_mm": np.where(chosen & (looks == 0), random.uniform(1.5, 5.0), rim_mm),
        "broken": chosen & random.chance(config.broken_rim),
        "push": np.where(chosen, pushed, values["push"]),
    }


def lesion_lists(drawn: dict[str, np.ndarray], mm: float) -> dict[str, np.ndarray]:
    """Rows and numbers of the lesions by size: `large_row`, `large_number`, `small_row`, `small_number`."""
    row, number = np.nonzero(np.arange(MAX_LESIONS) < drawn["count"][:, None])
    small = drawn["radius"][row, number] / mm < SMALL_PX
    return {
        "large_row": row[~small], "large_number": number[~small],
        "small_row": row[small], "small_number": number[small],
    }  # fmt: skip


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
    at = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
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
    seen = (share[:, share.shape[1] // 2] >= 0.5).flatten(1).sum(1) >= 3
    return share * seen[:, None, None, None]


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
    found = []
    for values_of in (share, share * values["factor"][row, number][:, None, None, None]):
        flat = torch.zeros(n * planes * padded * padded, dtype=torch.float32, device=device)
        flat = flat.scatter_reduce(0, index, values_of.flatten(), "amax")
        found.append(flat.view(n, planes, padded, padded)[..., PATCH:-PATCH, PATCH:-PATCH])
    return found[0], found[1]


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
    n, size = len(depth), depth.shape[-1]
    flat = grid.flatten(0, 1)[None].expand(n, -1, -1)
    mirrored = (flat @ reflection.transpose(1, 2) + offset[:, None]).view(n, size, size, 2)
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
    at = torch.arange(size, dtype=torch.float32, device=planes.device) - (size - 1) / 2
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)[None].expand(n, -1, -1, -1)
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
