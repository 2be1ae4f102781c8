"""Batches of training samples, made on the device: which slices, painted or not, and how they are altered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddmd.training import augmentation, geometry, lesion_painter, lesion_parameters, lesion_shapes
from ddmd.training.augmentation import Augmentation
from ddmd.training.config import TrainConfig
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.geometry import Geometry
from ddmd.training.intensity_scale import LOW
from ddmd.training.lesion_parameters import PainterConfig
from ddmd.training.lesion_shapes import Surroundings
from ddmd.training.sample_random import NoiseFields, SampleRandom, to_device
from ddmd.training.slice_choice import MASKED, PAINTED, PAINTED_BESIDE, TRANSPLANTED, SliceChoice

Stage = Literal["normal", "mixed", "lesions"]
STAGES: dict[Stage, int] = {"normal": 1, "mixed": 2, "lesions": 3}  # A, B, and what the denoiser learns from
NEGATIVE_WEIGHT = (
    0.03  # trust in "no lesion here" on a positive slice of which no more than its label is known
)
BESIDE_WEIGHT = 0.3  # least trust in "no lesion here" around a painted lesion
BESIDE_PX = 6  # pixels around a painted lesion that are likely to be normal
STRIPPED = 0.25


class BatchMaker:
    """Makes the batch of any step: a function of (seed, stage, sample) and of the masks there are.

    Sample i of the run depends on i alone. Step s of a global batch of n has the samples s n to s n + n - 1,
    of which each process makes its own; so a resumed run repeats, and several processes do what one does.

    Parameters
    ----------
    slices : DeviceSlices
    config : TrainConfig
    stage : "normal", "mixed" or "lesions"
        Slices of A for the first auto-encoders, of B for the second, or what the denoiser learns from.
    weights : source -> share of the samples
    timesteps : int
        T of the diffusion.
    augmentation_config, painter_config : optional
    stripped : float
        Chance that what is outside the brain is taken away, with a rim of it or with more.
    """

    def __init__(
        self,
        slices: DeviceSlices,
        config: TrainConfig,
        stage: Stage,
        weights: Mapping[str, float],
        timesteps: int = 1000,
        augmentation_config: Augmentation | None = None,
        painter_config: PainterConfig | None = None,
        stripped: float = STRIPPED,
    ) -> None:
        self.slices, self.config, self.stage, self.timesteps = slices, config, stage, timesteps
        self.stripped = stripped
        self.augmentation = augmentation_config or Augmentation()
        self.painter = painter_config or config.painter
        self.context = config.denoiser.context if stage == "lesions" else 0
        self.batch = (config.denoiser_stage if stage == "lesions" else config.autoencoder_stage).batch
        self.choice = SliceChoice(slices, config, weights, self.context)

    def make(self, step: int, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
        """The samples of one process at a step.

        Returns
        -------
        dict of tensors on the device
            planes (N, P C [+ C of the mirror image] [+ C of presence], S, S) float32, half robust z-scores;
            label (N,) int64; index (N,) int64. Of the denoiser's stage also mask and weight (N, 1, S, S) float32,
            t (N,) int64 and, with image-level labels, bag (N,) float32. Of the auto-encoders' stages, where they
            take one of several sequences, sequence (N,) int64.
        """
        local = self.batch // processes
        return self.samples(step * self.batch + rank * local, local)

    def samples(self, first: int, count: int) -> dict[str, Tensor]:
        """Samples `first` to `first + count - 1` of the run."""
        device, stage = self.slices.device, STAGES[self.stage]
        index = np.arange(first, first + count, dtype=np.int64)
        random = SampleRandom(self.config.seed, stage, index)
        on_device = torch.arange(first, first + count, dtype=torch.int64, device=device)
        fields = NoiseFields(self.config.seed, stage, on_device)
        batch = self._lesions(random, fields) if self.stage == "lesions" else self._plain(random, fields)
        return batch | {"index": on_device}

    def _plain(self, random: SampleRandom, fields: NoiseFields) -> dict[str, Tensor]:
        """Slices alone, for the auto-encoders."""
        row = self.choice.rows(random, normal=self.stage == "normal")
        moved = self._draw_geometry(random, row)
        drawn = augmentation.draw_intensities(random, self.augmentation)
        arrays = {f"geometry {k}": v for k, v in moved.items()}
        arrays |= {f"intensity {k}": v for k, v in drawn.items()} | {
            "row": row,
            "label": self.choice.label[row],
        }
        single = self.config.denoiser.presence
        if single:
            arrays["sequence"] = self.choice.one_sequence(random, row)
        values = to_device(arrays, self.slices.device)
        canvas = self._geometry(_part(values, "geometry"), fields).canvas()
        image = self.slices.image[values["row"]]
        if single:
            image = image[torch.arange(len(image), device=image.device), values["sequence"]][:, None]
        planes = geometry.sample_canvas(image.float(), canvas)
        planes = augmentation.change_intensities(planes, _part(values, "intensity"), drawn, fields)
        batch = {"planes": planes + LOW, "label": values["label"]}
        return batch | ({"sequence": values["sequence"]} if single else {})

    def _draw_geometry(self, random: SampleRandom, row: np.ndarray) -> dict[str, np.ndarray]:
        return geometry.draw_geometry(
            random, self.augmentation, self.slices.middle[row], self.slices.extent[row], self.config.size
        )

    def _geometry(self, values: dict[str, Tensor], fields: NoiseFields) -> Geometry:
        elastic = geometry.elastic_displacement(values["elastic"], self.config.size, fields)
        return Geometry(values["matrix"], values["shift"], elastic)

    def _lesions(self, random: SampleRandom, fields: NoiseFields) -> dict[str, Tensor]:
        """What the denoiser learns from."""
        config, stage = self.config, self.config.denoiser_stage
        choice = self.choice
        kind, row, donor = choice.samples(random)
        near = choice.neighbours(random, row)
        donor_around = choice.neighbours(random, donor).rows
        moved = self._draw_geometry(random, row)
        mirror = geometry.draw_mirror(
            random,
            moved["matrix"],
            moved["shift"],
            stage.share_symmetric if config.denoiser.mirrored else 0.0,
        )
        drawn = [
            augmentation.draw_intensities(random, self.augmentation) for _ in range(len(config.sequences))
        ]
        hard = random.index >= stage.hard_from * stage.steps * stage.batch
        lesions = lesion_parameters.draw_lesions(random, self.painter, hard, config.sequences)
        painted = np.flatnonzero((kind == PAINTED) | (kind == PAINTED_BESIDE))
        transplanted = np.flatnonzero(kind == TRANSPLANTED)
        lesions = {k: v[painted] for k, v in lesions.items()}
        lists = lesion_parameters.lesion_lists(lesions, config.mm)
        own_mask = np.isin(kind, (PAINTED_BESIDE, MASKED))
        thick = np.flatnonzero((near.below != near.above).any(axis=1))
        arrays: dict[str, np.ndarray] = {
            "around": near.rows,
            "thick": thick,
            "below": near.below[thick],
            "above": near.above[thick],
            "label": choice.label[row],
            "gap": near.gap_mm / config.mm,
            "thickness_mm": near.thickness_mm,
            "painted": painted,
            "transplanted": transplanted,
            "donor": donor_around[transplanted],
            "donor_shift": (self.slices.middle[donor] - self.slices.middle[row])[transplanted, ::-1],
            "rim": random.uniform(*lesion_painter.TRANSPLANT_RIM)[transplanted],
            "own_mask": own_mask & choice.masked[row],
            "unknown": own_mask & ~choice.masked[row],
            "beside": (kind == PAINTED_BESIDE)[painted],
            "bag": kind == MASKED,
            "t": random.integers(0, self.timesteps),
            "stripped": random.chance(self.stripped),
            "stripped_at": random.uniform(-3.0, 4.0),
        }
        arrays |= {f"geometry {k}": v for k, v in moved.items()}
        arrays |= {f"mirror {k}": v for k, v in mirror.items()}
        for number, own in enumerate(drawn):
            arrays |= {f"intensity{number} {k}": v for k, v in own.items()}
        if config.denoiser.presence:
            arrays |= choice.sequences(random, row, donor, kind == TRANSPLANTED)
        arrays |= {f"lesion {k}": v for k, v in lesions.items()}
        arrays |= {f"list {k}": v for k, v in lists.items()}
        turns = _turns(lists["large_row"])
        arrays |= {f"turn {i}": turn for i, turn in enumerate(turns)}
        values = to_device(arrays, self.slices.device)
        values["turns"] = [values[f"turn {i}"] for i in range(len(turns))]  # type: ignore[assignment]
        planes, mask, weight = self._compose(values, len(thick), len(painted), len(transplanted), fields)
        changed = [
            augmentation.change_intensities(planes[:, :, c], _part(values, f"intensity{c}"), own, fields)
            for c, own in enumerate(drawn)
        ]
        groups = [torch.stack(changed, 2).flatten(1, 2)]
        if config.denoiser.mirrored:
            middle = groups[0][:, config.denoiser.middle_planes]
            groups.append(
                geometry.reflect(middle, values["mirror reflection"], values["mirror reflection_offset"])
            )
        groups = [group + LOW for group in groups]
        if config.denoiser.presence:
            there = values["present"].float()[:, :, None, None]
            groups.append(there.expand(-1, -1, *planes.shape[3:]))
        batch = {
            "planes": torch.cat(groups, 1),
            "mask": mask[:, None],
            "weight": weight[:, None],
            "label": values["label"],
            "t": values["t"],
        }
        if config.labels == "image":
            batch["bag"] = values["bag"].float()
        return batch

    def _compose(
        self,
        values: dict[str, Tensor],
        thick_count: int,
        painted_count: int,
        transplanted_count: int,
        fields: NoiseFields,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Planes (N, P, C, S, S), mask and weight (N, S, S) before intensities are changed."""
        slices, config = self.slices, self.config
        source = self._geometry(_part(values, "geometry"), fields)
        around, middle = values["around"], values["around"][:, self.context]
        guide = torch.stack((slices.depth[middle], slices.fluid[middle]), 1).float()
        outside = 20.0  # added, so that what lies beyond the canvas, which is 0, is far outside
        guide = geometry.sample_canvas(guide + outside, source.canvas()) - outside
        depth, fluid = guide.unbind(1)
        lesions = None
        rows = values["painted"]
        own_fields = fields.rows(rows)
        if painted_count:
            surroundings = self._surroundings(values, source, depth, fluid)
            turns: list[Tensor] = values["turns"]  # type: ignore[assignment]
            lesions = lesion_painter.paint(
                _part(values, "lesion"), _part(values, "list"), turns, surroundings, own_fields
            )
            displacement = source.displacement.index_add(0, rows, lesions.push)
            source = Geometry(source.matrix, source.shift, displacement)
        canvas = source.canvas()
        channels = slices.image.shape[1]
        image = slices.image[around].flatten(1, 2).float()
        known = self._known(middle)
        if thick_count:
            thick, beside = values["thick"], (values["below"], values["above"])
            images = [slices.image[rows].flatten(1, 2).float() for rows in beside]
            image = image.index_copy(0, thick, (image[thick] + images[0] + images[1]) / 3)
            others = [self._known(rows[:, self.context]) for rows in beside]
            known = known.index_copy(0, thick, (known[thick] + others[0] + others[1]) / 3)
        planes = geometry.sample_canvas(image, canvas).unflatten(1, (-1, channels))
        known = geometry.sample_canvas(known, canvas)
        own = values["own_mask"][:, None, None]
        mask = ((known[:, 0] > 0.5) & own).float()
        weight = torch.where(own, known[:, 1] + 1.0, 1.0)
        weight = torch.where(values["unknown"][:, None, None], NEGATIVE_WEIGHT, weight)
        if transplanted_count:
            planes, mask, weight = self._transplant(values, canvas, depth, planes, mask, weight)
        if lesions is not None:
            planes = planes.index_copy(
                0,
                rows,
                lesion_painter.fill(planes[rows], lesions, _part(values, "lesion"), config.mm, own_fields),
            )
            mask, weight = _add_painted(values, lesions.alpha[:, self.context], depth, mask, weight)
        rim = values["stripped_at"][:, None, None] * config.mm
        kept = (depth > rim) | (mask > 0) | ~values["stripped"][:, None, None]
        planes = planes * kept[:, None, None]
        if config.denoiser.presence:
            planes = planes * values["present"][:, None, :, None, None]
        return planes, mask, weight

    def _known(self, rows: Tensor) -> Tensor:
        """Masks, and weights less 1, (N, 2, H, W) of slices, on the canvas."""
        return torch.stack((self.slices.mask[rows].float(), self.slices.weight[rows].float() - 1.0), 1)

    def _surroundings(
        self, values: dict[str, Tensor], source: Geometry, depth: Tensor, fluid: Tensor
    ) -> Surroundings:
        """Where the pixels of the samples that are painted on lie in the brain."""
        rows, mm = values["painted"], self.config.mm
        horns = self.slices.horns[values["around"][rows, self.context]]
        away = (source.canvas()[rows][:, None] - horns[:, :, None, None]).norm(dim=-1) * mm
        thickness_mm = values["thickness_mm"][rows]
        levels = lesion_shapes.plane_levels(values["gap"][rows], thickness_mm / mm, values["around"].shape[1])
        return Surroundings(
            depth[rows], fluid[rows], away[:, :2].amin(1), away[:, 2:].amin(1),
            values["mirror true_reflection"][rows], values["mirror true_offset"][rows], levels, thickness_mm, mm,
        )  # fmt: skip

    def _transplant(
        self,
        values: dict[str, Tensor],
        canvas: Tensor,
        depth: Tensor,
        planes: Tensor,
        mask: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give some samples the lesions of others' slices, and what is lesion then, and how sure that is."""
        slices, rows, donor = self.slices, values["transplanted"], values["donor"]
        at = canvas[rows] + values["donor_shift"][:, None, None]
        image = geometry.sample_canvas(slices.image[donor].flatten(1, 2).float(), at)
        masks = geometry.sample_canvas(slices.mask[donor].float(), at)
        trust = geometry.sample_canvas(slices.weight[donor[:, self.context]].float()[:, None] - 1.0, at)
        given, share = lesion_painter.transplant(
            planes[rows],
            depth[rows],
            image.unflatten(1, (-1, planes.shape[2])),
            masks,
            values["rim"],
            values["both"][rows] if self.config.denoiser.presence else None,
        )
        there = share > 0
        new_mask = ((masks[:, self.context] > 0.5) & there).float()
        new_weight = torch.where(there, trust[:, 0] + 1.0, 1.0)
        return (
            planes.index_copy(0, rows, given),
            mask.index_copy(0, rows, new_mask),
            weight.index_copy(0, rows, new_weight),
        )


def _add_painted(
    values: dict[str, Tensor], alpha: Tensor, depth: Tensor, mask: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Painted lesions join the mask; beside known or unknown lesions, their surroundings are trusted, too."""
    rows = values["painted"]
    painted = (alpha >= 0.5) & (depth[rows] > 0)
    own_mask, own_weight = mask[rows], weight[rows]
    near = painted.float()
    for kernel in ((2 * BESIDE_PX + 1, 1), (1, 2 * BESIDE_PX + 1)):  # rows, then columns
        near = functional.max_pool2d(near, kernel, 1, (kernel[0] // 2, kernel[1] // 2))
    near = near > 0
    around = near & values["beside"][:, None, None] & (own_mask == 0) & (own_weight > 0)
    own_weight = torch.where(around, own_weight.clamp(min=BESIDE_WEIGHT), own_weight)
    own_weight = torch.where(painted, 1.0, own_weight)
    own_mask = torch.maximum(own_mask, painted.float())
    return mask.index_copy(0, rows, own_mask), weight.index_copy(0, rows, own_weight)


def _turns(row: np.ndarray) -> list[np.ndarray]:
    """Places in a list of lesions, so that those of one turn are of different samples."""
    turn = np.array([int((row[:i] == r).sum()) for i, r in enumerate(row)], np.int64)
    return [np.flatnonzero(turn == i) for i in range(int(turn.max(initial=-1)) + 1)]


def _part(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in values.items() if k.startswith(f"{prefix} ")}
