"""Lesions painted on slices that have none, or carved out of one patient's for another's.

Both are transforms of numpy arrays, decided by the generator they are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import ndimage

LOW, HIGH = -2.0, 3.0  # air, and the brightest a plane gets: robust z-scores times 0.5
FLUID = -0.75  # what is darker than this deep in the brain, on FLAIR, is cerebrospinal fluid
AIR_MARGIN = 0.02  # what is closer to LOW than this is air


@dataclass(frozen=True)
class PainterConfig:
    """Ranges the painter draws from: radii in mm, contrast in half robust z-scores.

    kinds : chances of one large lesion (glioma), a few of middling size, many small ones (multiple
    sclerosis, white-matter disease).
    dark : chance that a lesion is darker than its surroundings.
    core, rim : chances of a darker core and of a brighter rim in a lesion that is not small.
    displacement : largest shift, in mm, by which a large lesion pushes the tissue around it.
    periventricular : chance that small lesions keep to the surroundings of the ventricles.
    edge : half width of a lesion's soft edge, in mm.
    not_bright : chance that, where the painter is asked for hard lesions, one that is not small is no
        brighter than its surroundings: a bright rim around an interior like them, tissue whose texture
        is effaced, or dark.
    broken_rim : chance that the rim of such a lesion is there on a part of its surface only.
    """

    kinds: tuple[float, float, float] = (0.45, 0.25, 0.3)
    large_mm: tuple[float, float] = (10.0, 34.0)
    middling_mm: tuple[float, float] = (4.5, 11.0)
    small_mm: tuple[float, float] = (1.6, 5.0)
    contrast: tuple[float, float] = (0.3, 2.4)
    replaced: tuple[float, float] = (0.2, 1.0)
    texture: float = 0.25
    dark: float = 0.05
    core: float = 0.35
    rim: float = 0.15
    displacement: float = 5.0
    periventricular: float = 0.4
    edge: tuple[float, float] = (0.5, 3.5)
    not_bright: float = 0.5
    broken_rim: float = 0.6


@dataclass(frozen=True)
class _Look:
    """A lesion that is not bright: level inside, how far it replaces the tissue, and its rim (width in mm)."""

    level: float
    replaced: float
    rim: float = 0.0
    rim_mm: float = 3.0

    @classmethod
    def drawn(cls, rng: Generator) -> _Look:
        kind = rng.choice(3, p=(0.5, 0.35, 0.15))
        if kind == 0:  # ring
            level, replaced = rng.uniform(-0.5, 0.2), rng.uniform(0.5, 1.0)
            return cls(level, replaced, rng.uniform(0.25, 1.1), rng.uniform(1.5, 5.0))
        if kind == 1:  # effaced
            return cls(rng.uniform(-0.05, 0.35), rng.uniform(0.75, 1.0))
        rim = rng.uniform(0.2, 0.8) if rng.random() < 0.5 else 0.0
        return cls(-rng.uniform(0.2, 1.2), rng.uniform(0.3, 0.9), rim)


def smooth_noise(shape: tuple[int, int], cell: float, rng: Generator) -> np.ndarray:
    """Noise of unit scale (H, W) that varies over about `cell` pixels: a coarse grid, interpolated."""
    coarse = tuple(max(2, int(np.ceil(n / cell)) + 1) for n in shape)
    field = rng.standard_normal(coarse).astype(np.float32)
    zoom = [n / c for n, c in zip(shape, coarse, strict=True)]
    return ndimage.zoom(field, zoom, order=1, mode="nearest", grid_mode=True)


class LesionPainter:
    """Paint synthetic lesions on slices known to be normal.

    A lesion is an ellipsoid with a wandering surface, mostly hyperintense: tissue is brightened and
    partly replaced by the lesion's own level, with soft edges, texture, at times a dark core or a
    bright rim. The neighbouring planes show the same body where it still reaches them.
    """

    def __init__(self, config: PainterConfig | None = None) -> None:
        self.config = config or PainterConfig()

    def __call__(
        self,
        planes: np.ndarray,
        brain: np.ndarray,
        spacing_mm: float,
        offset_mm: float,
        rng: Generator,
        hard: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Paint one to twenty lesions.

        Parameters
        ----------
        planes : (P, C, H, W) float32
            A slice in the middle of its neighbours; robust z-scores times 0.5.
        brain : (H, W) bool
            Where lesions may be.
        spacing_mm, offset_mm : float
            Millimetres a pixel, and between planes.
        rng : Generator
        hard : bool
            Also lesions that are no brighter than their surroundings.

        Returns
        -------
        planes : (P, C, H, W) float32
        mask : (H, W) bool, where at least half of a pixel of the middle plane is lesion.
        """
        c = self.config
        planes, share = planes.copy(), np.zeros(brain.shape, np.float32)
        inside = np.argwhere(ndimage.binary_erosion(brain, iterations=3) if brain.any() else brain)
        if not len(inside):
            return planes, share > 0.5
        kind = rng.choice(3, p=c.kinds)
        low, high = (c.large_mm, c.middling_mm, c.small_mm)[kind]
        count = (1, int(rng.integers(1, 4)), int(rng.integers(1, 16)))[kind]
        contrast = float(np.exp(rng.uniform(*np.log(c.contrast))))
        sign = -1.0 if rng.random() < c.dark else 1.0
        look = _Look.drawn(rng) if hard and kind < 2 and rng.random() < c.not_bright else None
        if kind == 2 and rng.random() < c.periventricular:
            inside = self._beside_ventricles(planes, brain, spacing_mm, inside)
        for _ in range(count):
            radius = float(np.exp(rng.uniform(np.log(low), np.log(high)))) / spacing_mm
            centre = inside[rng.integers(len(inside))]
            level = sign * contrast * rng.uniform(0.8, 1.2)
            edge = min(float(np.exp(rng.uniform(*np.log(c.edge)))) / spacing_mm, radius)
            body = self._body(centre, radius, edge, planes.shape, brain, offset_mm / spacing_mm, rng)
            if body is None:
                continue
            box, alphas = body
            if (kind == 0 and rng.random() < 0.4) or look is not None:
                self._push(planes, centre, radius, spacing_mm, rng)
            self._fill(planes, box, alphas, level, kind, spacing_mm, look, rng)
            middle = alphas[len(alphas) // 2]
            share[box] = np.maximum(share[box], middle)
        return np.clip(planes, LOW, HIGH), (share >= 0.5) & brain

    @staticmethod
    def _beside_ventricles(
        planes: np.ndarray, brain: np.ndarray, spacing_mm: float, inside: np.ndarray
    ) -> np.ndarray:
        """Of the pixels `inside`, those within 8 mm of dark fluid deep in the brain, if there are any."""
        deep = ndimage.binary_erosion(brain, iterations=max(1, round(12 / spacing_mm)))
        fluid = deep & (planes[len(planes) // 2, 0] < FLUID)
        if fluid.sum() < 20:
            return inside
        away = ndimage.distance_transform_edt(~fluid) * spacing_mm
        near = inside[(away <= 8.0)[inside[:, 0], inside[:, 1]] & ~fluid[inside[:, 0], inside[:, 1]]]
        return near if len(near) else inside

    def _body(
        self,
        centre: np.ndarray,
        radius: float,
        edge: float,
        shape: tuple[int, ...],
        brain: np.ndarray,
        gap: float,
        rng: Generator,
    ) -> tuple[tuple[slice, slice], np.ndarray] | None:
        """The lesion's share of each pixel (P, h, w) in its bounding box."""
        reach = int(np.ceil(radius * 1.9)) + 3
        y0, x0 = (max(int(v) - reach, 0) for v in centre)
        y1, x1 = (min(int(v) + reach + 1, n) for v, n in zip(centre, brain.shape, strict=True))
        box = (slice(y0, y1), slice(x0, x1))
        y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
        angle = rng.uniform(0, np.pi)
        axes = radius * np.exp(rng.normal(0, 0.25, 3)).clip(0.55, 1.6)
        u = (np.cos(angle) * (y - centre[0]) + np.sin(angle) * (x - centre[1])) / axes[0]
        v = (-np.sin(angle) * (y - centre[0]) + np.cos(angle) * (x - centre[1])) / axes[1]
        size = (y1 - y0, x1 - x0)
        wander = 0.28 * smooth_noise(size, max(radius * 0.7, 2.0), rng) + 0.12 * smooth_noise(
            size, max(radius * 0.25, 2.0), rng
        )
        planes = shape[0]
        depth = rng.uniform(-0.75, 0.75)  # the middle plane need not cut the lesion where it is widest
        alphas = np.empty((planes, *size), np.float32)
        soft_brain = ndimage.uniform_filter(brain[box].astype(np.float32), 3)
        for p in range(planes):
            w = (p - planes // 2) * gap / axes[2] + depth
            distance = (1.0 + wander - np.sqrt(u * u + v * v + w * w)) * radius  # pixels inside the surface
            alphas[p] = np.clip(0.5 + distance / (2 * edge), 0, 1) * soft_brain
        return (box, alphas) if (alphas[planes // 2] >= 0.5).sum() >= 3 else None

    def _fill(
        self,
        planes: np.ndarray,
        box: tuple[slice, slice],
        alphas: np.ndarray,
        level: float,
        kind: int,
        spacing_mm: float,
        look: _Look | None,
        rng: Generator,
    ) -> None:
        c = self.config
        size = alphas.shape[1:]
        replaced = rng.uniform(*c.replaced)
        texture = c.texture * rng.random() * smooth_noise(size, rng.uniform(2, 8), rng)
        core = rim = 0.0
        if kind < 2 and level > 0:
            core = rng.uniform(0.4, 1.6) if rng.random() < c.core else 0.0
            rim = rng.uniform(0.1, 0.5) if rng.random() < c.rim else 0.0
        rim_pixels = 3.0
        if look is not None:
            level, replaced, core = look.level, look.replaced, 0.0
            rim, rim_pixels = look.rim / max(abs(level), 1e-3), look.rim_mm / spacing_mm
        middle = alphas[len(alphas) // 2]
        solid = middle >= 0.5
        deep = ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1] if core or rim else middle
        deepest = max(float(deep.max()), 1.0)
        profile = np.zeros(size, np.float32)
        if core:
            profile -= core * abs(level) * np.clip((deep / deepest - rng.uniform(0.3, 0.6)) * 4, 0, 1)
        if rim:
            there = ((deep > 0) & (deep < rim_pixels)).astype(np.float32)
            if look is not None and rng.random() < c.broken_rim:
                there *= np.clip(smooth_noise(size, 1.5 * max(deepest, 4.0), rng) + 0.3, 0, 1)
            profile += rim * abs(level) * there
        for channel in range(planes.shape[1]):
            own = planes[len(alphas) // 2, channel][box]
            around = float(np.median(own[solid])) if solid.any() else float(own.mean())
            for p, alpha in enumerate(alphas):
                tissue = planes[p, channel][box]
                target = (1 - replaced) * tissue + replaced * around + level + texture + profile
                alpha = np.where(tissue > LOW + AIR_MARGIN, alpha, 0.0)  # the brain ends here in this plane
                planes[p, channel][box] = tissue + alpha * (target - tissue)

    def _push(
        self, planes: np.ndarray, centre: np.ndarray, radius: float, spacing_mm: float, rng: Generator
    ) -> None:
        """Mass effect: tissue around the centre moves outwards, most at the lesion's edge."""
        h, w = planes.shape[-2:]
        shift = min(
            rng.uniform(0.0, self.config.displacement) / spacing_mm, 0.5 * radius
        )  # tissue is not folded over
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        dy, dx = y - centre[0], x - centre[1]
        distance = np.sqrt(dy * dy + dx * dx) + 1e-3
        amount = shift * (distance / radius) * np.exp(1 - distance / radius) / distance
        at = np.stack((y - dy * amount, x - dx * amount))
        for p in range(planes.shape[0]):
            for channel in range(planes.shape[1]):
                planes[p, channel] = ndimage.map_coordinates(planes[p, channel], at, order=1, mode="nearest")


CARVED_RIM = (1.0, 8.0)  # pixels around a carved lesion over which its own surroundings fade out


def carve(
    planes: np.ndarray, brain: np.ndarray, donor: np.ndarray, masks: np.ndarray, rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Put the lesions of one patient's slice, with a rim of what is around them, into another's.

    As CarveMix does (Zhang et al., MICCAI 2021): at the same place, so that they lie where lesions do.

    Parameters
    ----------
    planes, donor : (P, C, H, W) float32
        Slices in the middle of their neighbours.
    brain : (H, W) bool
        Of the slice that is given the lesions.
    masks : (P, H, W) bool
        Lesions of the donor's planes.
    rng : Generator

    Returns
    -------
    planes : (P, C, H, W) float32
    share : (H, W) float32 in [0, 1], how much of the middle plane is the donor's.
    """
    rim = rng.uniform(*CARVED_RIM)
    away = np.stack(
        [ndimage.distance_transform_edt(~m) if m.any() else np.full(m.shape, np.inf) for m in masks]
    )
    tissue = np.all((planes > LOW + AIR_MARGIN) & (donor > LOW + AIR_MARGIN), axis=1)
    share = np.clip(1.0 - away / rim, 0.0, 1.0).astype(np.float32) * (tissue & brain)
    return planes + share[:, None] * (donor - planes), share[len(share) // 2]
