"""What lesions are painted on a training sample: kinds, places, sizes and contrasts, drawn on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import numpy as np
from pydantic import ConfigDict, Field

from ddmd.training.sample_random import SampleRandom

Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
Amount = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1000)]
Angle = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1.5708)]
Size = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1000)]
MAX_LESIONS = 40
SMALL_PX = 5.5  # lesions of a smaller radius are computed in a window
KINDS = ("large", "middling", "small", "many", "bands", "caps", "territory")
LARGE, MIDDLING, SMALL, MANY, BANDS, CAPS, TERRITORY = range(7)
PLACES = ("anywhere", "periventricular", "juxtacortical")
ANYWHERE, PERIVENTRICULAR, JUXTACORTICAL = range(3)
BOTH, FRONTAL, OCCIPITAL = range(3)  # horns of the ventricles that caps are on


@dataclass(frozen=True)
class PainterConfig:
    """Ranges the painter draws from: sizes in mm, contrast in half robust z-scores.

    Parameters
    ----------
    kinds : tuple of 7 float
        Shares of slices with one large lesion (glioma), a few of middling size, small ones (multiple sclerosis),
        many small ones, confluent bands along the ventricles and caps on their horns (white matter
        hyperintensities), and a part of the territory of an artery (stroke).
    territory_width : (low, high)
        Half the angle, in radians, that an artery's territory takes of a slice, seen from the middle of the brain.
    territory_mm : (low, high)
        Depth of a territory, from the brain's surface.
    territory_contrast : (low, high)
        How much brighter a territory is on FLAIR. Never faint: a hemisphere that is a little brighter than the other
        is no infarct.
    band_mm, cap_mm : (low, high)
        Depth of bands and of caps, from the ventricles' wall.
    cap_reach_mm : (low, high)
        How far a cap follows the wall from the tip of a horn.
    bands_with_caps : float
        Chance that bands have caps, too.
    contrast, faint_contrast : (low, high)
        How much brighter lesions are on FLAIR; the second in a share `faint` of slices.
    t2_contrast, t1_contrast : (low, high)
        Contrast on T2 and on T1, as a share of that on FLAIR: brighter on T2, darker on T1 and T1ce.
    enhancing : tuple of 3 float
        Chances that a large, a middling and a small lesion enhances on T1ce: as a broken ring around the core, and
        as a whole where it is small.
    enhancement : (low, high)
        How much brighter what enhances is on T1ce.
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

    kinds: tuple[Share, ...] = (0.35, 0.2, 0.2, 0.07, 0.1, 0.08, 0.0)
    territory_width: tuple[Angle, Angle] = (0.15, 0.7)
    territory_mm: tuple[Size, Size] = (8.0, 45.0)
    territory_contrast: tuple[Size, Size] = (0.8, 2.4)
    large_mm: tuple[Size, Size] = (10.0, 34.0)
    middling_mm: tuple[Size, Size] = (4.5, 11.0)
    small_mm: tuple[Size, Size] = (1.6, 5.0)
    band_mm: tuple[Size, Size] = (1.5, 14.0)
    cap_mm: tuple[Size, Size] = (3.0, 12.0)
    cap_reach_mm: tuple[Amount, Amount] = (4.0, 14.0)
    bands_with_caps: Share = 0.5
    contrast: tuple[Size, Size] = (0.3, 2.4)
    faint: Share = 0.15
    faint_contrast: tuple[Size, Size] = (0.15, 0.4)
    t2_contrast: tuple[Amount, Amount] = (0.2, 1.3)
    t1_contrast: tuple[Amount, Amount] = (0.05, 0.7)
    enhancing: tuple[Share, Share, Share] = (0.7, 0.3, 0.1)
    enhancement: tuple[Amount, Amount] = (0.5, 2.5)
    replaced: tuple[Share, Share] = (0.2, 1.0)
    texture: Amount = 0.25
    dark: Share = 0.05
    core: Share = 0.35
    rim: Share = 0.15
    displacement: Amount = 5.0
    periventricular: Share = 0.4
    juxtacortical: Share = 0.2
    symmetric: Share = 0.3
    edge: tuple[Size, Size] = (0.5, 3.5)
    not_bright: Share = 0.5
    broken_rim: Share = 0.6

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if len(self.kinds) != len(KINDS) or not any(self.kinds):
            raise ValueError(
                f"kinds is {list(self.kinds)}; allowed are {len(KINDS)} shares, not all 0: {', '.join(KINDS)}"
            )
        if self.periventricular + self.juxtacortical > 1:
            raise ValueError(
                f"periventricular and juxtacortical are {self.periventricular} and {self.juxtacortical}; allowed are "
                "chances whose sum is at most 1"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                raise ValueError(f"{field.name} is {list(value)}; allowed are two numbers that do not fall")


def draw_lesions(
    random: SampleRandom, config: PainterConfig, hard: np.ndarray, sequences: Sequence[str] = ("flair",)
) -> dict[str, np.ndarray]:
    """What is painted on each sample, lengths in mm.

    Parameters
    ----------
    random : SampleRandom of N samples.
    config : PainterConfig
    hard : (N,) bool
        Whether lesions that are no brighter than their surroundings are among them.
    sequences : tuple of str
        The C sequences that they are painted in.

    Returns
    -------
    dict of arrays whose first axis is N; those of single lesions have MAX_LESIONS as the second, and level,
    by_sequence, core, rim and ring have C.
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
            random.integers(0, 3),
            np.zeros(n, np.int64),
        ),
    )
    count = np.where(symmetric, np.minimum(2 * count, most), count)
    sizes = (config.large_mm, config.middling_mm, *(5 * [config.small_mm]))
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
    capped = (kind == CAPS) | ((kind == BANDS) & random.chance(config.bands_with_caps))
    horns = random.choice((0.5, 0.35, 0.15))  # both, frontal, occipital
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
        "cap": random.log_uniform(*config.cap_mm) * capped,
        "cap_reach": random.uniform(*config.cap_reach_mm),
        "cap_frontal": (horns != OCCIPITAL).astype(float),
        "cap_occipital": (horns != FRONTAL).astype(float),
        "reach": random.uniform(0.2, 1.0, 2),  # of bands, caps and territories in the neighbouring planes
        "push": random.uniform(0.0, config.displacement) * (kind == LARGE) * random.chance(0.4),
    }
    values |= _draw_territory(random, config, values)
    values |= _draw_look(random, config, hard & (kind <= MIDDLING), values)
    return values | _by_sequence(_draw_sequences(random, config, values), values, sequences)


def _draw_territory(
    random: SampleRandom, config: PainterConfig, values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Depth, half angle, direction and level of a territory; nothing is drawn where the painter paints none."""
    if not config.kinds[TERRITORY]:
        return {name: np.zeros(len(random)) for name in ("territory", "territory_width", "territory_angle")}
    territory = values["kind"] == TERRITORY
    return {
        "territory": random.log_uniform(*config.territory_mm) * territory,
        "territory_width": random.log_uniform(*config.territory_width),
        "territory_angle": random.uniform(-np.pi, np.pi),
        "level": np.where(territory, random.log_uniform(*config.territory_contrast), values["level"]),
    }


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
        "ring_mm": random.uniform(1.0, 3.0),
    }


def _draw_sequences(
    random: SampleRandom, config: PainterConfig, values: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Of each sequence, what the amplitudes on FLAIR are multiplied by, and the amplitude (N,) of a ring.

    Lesions hold water: they are bright on T2 and dark on T1, whether they are brighter than their surroundings on
    FLAIR or, as what is fluid, darker. A core is fluid, too. Gliomas take up contrast in a ring around the core.
    """
    kind, zero = values["kind"], np.zeros(len(random))
    watery = np.where(values["level"] < 0, -1.0, 1.0)
    t2, t1 = random.uniform(*config.t2_contrast), random.uniform(*config.t1_contrast)
    chances = np.asarray(config.enhancing)[np.minimum(kind, SMALL)]
    enhances = random.chance(chances)
    amount = random.uniform(*config.enhancement)
    ringed = enhances & (kind <= MIDDLING)
    nodular = enhances & (kind == SMALL) & (np.abs(values["level"]) > 0)
    whole = watery * amount / np.maximum(np.abs(values["level"]), 0.1)  # the level on T1ce is then `amount`
    like_flair = {
        "level": zero + 1.0,
        "texture": zero + 1.0,
        "core": zero + 1.0,
        "rim": zero + 1.0,
        "ring": zero,
    }
    bright = {"level": t2 * watery, "texture": t2, "core": -random.uniform(0.0, 0.5)}
    dark = {"level": -t1 * watery, "texture": -t1, "core": random.uniform(0.2, 0.8), "rim": -0.3 * t1}
    enhanced = {"level": np.where(nodular, whole, dark["level"]), "ring": amount * ringed}
    looks = {"flair": {}, "t2": bright, "t1": dark, "t1ce": dark | enhanced}
    return {sequence: like_flair | look for sequence, look in looks.items()}


def _by_sequence(
    looks: dict[str, dict[str, np.ndarray]], values: dict[str, np.ndarray], sequences: Sequence[str]
) -> dict[str, np.ndarray]:
    """Amplitudes (N, C) of level, texture, core, rim and ring; a sequence of no known name looks like FLAIR."""
    looked = [looks.get(sequence, looks["flair"]) for sequence in sequences]
    amplitudes = {
        "level": values["level"], "texture": values["texture"], "core": -values["core"], "rim": values["rim"],
        "ring": np.ones_like(values["level"]),
    }  # fmt: skip
    return {
        name: np.stack([amplitude * look[name] for look in looked], 1)
        for name, amplitude in amplitudes.items()
    }


def lesion_lists(drawn: dict[str, np.ndarray], mm: float) -> dict[str, np.ndarray]:
    """Rows and numbers of the lesions by size: `large_row`, `large_number`, `small_row`, `small_number`.

    `territory_row` has the rows with a part of an artery's territory.
    """
    row, number = np.nonzero(np.arange(MAX_LESIONS) < drawn["count"][:, None])
    small = drawn["radius"][row, number] / mm < SMALL_PX
    return {
        "large_row": row[~small], "large_number": number[~small],
        "small_row": row[small], "small_number": number[small],
        "territory_row": np.flatnonzero(drawn["kind"] == TERRITORY),
    }  # fmt: skip
