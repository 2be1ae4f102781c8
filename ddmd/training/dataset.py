"""Training samples: packed slices in memory, and which of them, painted or not, make sample i."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch.utils.data import Dataset

from ddmd.cohort.cases import Case
from ddmd.inference import slices
from ddmd.models.denoiser import DenoiserConfig
from ddmd.training.augmentation import Augmentation
from ddmd.training.brain_extraction import brain_within
from ddmd.training.config import TrainConfig
from ddmd.training.lesion_painter import LesionPainter, carve

AIR = slices.BACKGROUND * slices.INTENSITY_SCALE
NEAR_MM = 25.0  # normal slices this far from a positive one are half as likely to be painted on
STRIPPED = 0.25  # chance that what is outside the brain is taken away, with a rim of it or with more
NEGATIVE_WEIGHT = (
    0.03  # trust in "no lesion here" on a positive slice of which no more than its label is known
)
RIM = 6  # pixels around a painted lesion that are likely to be normal


@dataclass
class PreparedCase:
    """One patient's slices on the model's grid, in float16, with what is known of each."""

    case: Case
    image: np.ndarray  # (Z, C, H, W) float16
    brain: np.ndarray  # (Z, H, W) bool: where lesions may be painted
    head: np.ndarray  # (Z, H, W) bool: what is not air; nothing else where the skull was taken away
    label: np.ndarray  # (Z,) int8: 1 has a lesion, 0 has none, -1 not known
    offset: int
    offset_mm: float
    mask: np.ndarray | None = None  # (Z, H, W) float16: annotator's (pixel track) or pseudo (image)
    weight: np.ndarray | None = None  # (Z, H, W) float16: how far the mask is trusted

    @property
    def key(self) -> str:
        """What its masks are kept under."""
        return f"{self.case.source} {self.case.name}"

    @property
    def nearness(self) -> np.ndarray:
        """(Z,) how much anatomy a slice shares with those that have lesions: brain area, and closeness.

        Lesion-free slices of patients lie mostly at the ends of the head, lesions do not.
        """
        area = self.brain.sum(axis=(1, 2)).astype(np.float64) + 1.0
        positive = np.flatnonzero(self.label == 1)
        if not len(positive):
            return area
        apart = np.abs(np.arange(len(self.label))[:, None] - positive).min(axis=1)
        return area / (1.0 + (apart * self.offset_mm / self.offset / NEAR_MM) ** 2)

    def around(self, z: int, context: int) -> list[int]:
        """Slice z between its neighbours; those beyond the ends are the last ones."""
        last = len(self.image) - 1
        return [min(max(z + i * self.offset, 0), last) for i in range(-context, context + 1)]

    def planes(self, z: int, context: int) -> np.ndarray:
        """(P, C, H, W) float32: slice z between its neighbours."""
        return self.image[self.around(z, context)].astype(np.float32)


def with_mirror(planes: np.ndarray, seen: DenoiserConfig) -> np.ndarray:
    """Planes (P, C, H, W), followed by the middle one's mirror image where the network sees it."""
    middle = planes[seen.context : seen.context + 1]
    return np.concatenate((planes, middle[..., ::-1])) if seen.mirrored else planes


def load_cases(cases: Sequence[Case], config: TrainConfig, read_masks: bool) -> list[PreparedCase]:
    """Read the volumes once. Masks are opened only where `read_masks` says so; they then give the labels."""
    packed = []
    grid = slices.SliceGrid(mm=config.mm)
    for case in cases:
        volume = case.volume(config.sequences)
        cut = slices.extract(volume, config.sequences, grid)
        image, head = cut.image.numpy(), cut.brain[:, 0].numpy()
        item = PreparedCase(
            case=case,
            image=image.astype(np.float16),
            brain=brain_within(image[:, 0], head, grid.mm),
            head=head,
            label=case.labels()[cut.index.numpy()],
            offset=cut.offset,
            offset_mm=cut.offset * volume.spacing[2],
        )
        if read_masks and case.masks is not None:
            item.mask = slices.to_grid(case.lesion(), cut)[:, 0].numpy().astype(np.float16)
            item.weight = np.ones_like(item.mask)
            item.label = np.any(item.mask, axis=(1, 2)).astype(np.int8)
        packed.append(item)
    return packed


def save_pseudo_masks(packed: Sequence[PreparedCase], path: Path) -> None:
    """Write the masks and weights of all patients to one file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    for item in packed:
        if item.mask is not None and item.weight is not None:
            arrays |= {f"mask {item.key}": item.mask.astype(bool), f"weight {item.key}": item.weight}
    temporary = path.with_suffix(".partial.npz")
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def load_pseudo_masks(packed: Sequence[PreparedCase], path: Path) -> None:
    """Give all patients the masks and weights that `keep` wrote."""
    with np.load(path) as arrays:
        for item in packed:
            there = f"mask {item.key}" in arrays
            item.mask = arrays[f"mask {item.key}"].astype(np.float16) if there else None
            item.weight = arrays[f"weight {item.key}"] if there else None


def _cropped(
    arrays: Sequence[np.ndarray], fills: Sequence[float], shape: tuple[int, ...], at: tuple[int, ...]
) -> list[np.ndarray]:
    """Crop or pad the last two axes to a shape, the window starting at `at`."""
    out = []
    for array, fill in zip(arrays, fills, strict=True):
        height, width = array.shape[-2:]
        top, left = at
        window = np.full((*array.shape[:-2], *shape), fill, dtype=array.dtype)
        y0, y1 = max(top, 0), min(top + shape[0], height)
        x0, x1 = max(left, 0), min(left + shape[1], width)
        window[..., y0 - top : y1 - top, x0 - left : x1 - left] = array[..., y0:y1, x0:x1]
        out.append(window)
    return out


def _centre(brain: np.ndarray) -> np.ndarray:
    """The middle (2,) of the box around it."""
    at = np.argwhere(brain if brain.any() else ~brain)
    return (at.min(0) + at.max(0)) // 2


def _start(length: int, size: int, rng: np.random.Generator) -> int:
    slack = length - size
    return int(rng.integers(slack + 1)) if slack > 0 else slack // 2


class TrainingDataset(Dataset):
    """Sample i of a run: decided by (seed, stage, i) alone, so that a run resumes where it was.

    kind "normal" draws slices of A for the auto-encoders, "mixed" slices of B, and "lesions" what
    trains the denoiser: lesions painted on normal slices, normal slices as they are, lesions painted
    on positive slices beside the real ones, and slices of B with their mask, their pseudo-mask or, as bags,
    none.
    """

    def __init__(
        self,
        packed: Sequence[PreparedCase],
        config: TrainConfig,
        kind: str,
        weights: Mapping[str, float],
        count: int,
    ) -> None:
        self.packed, self.config, self.kind, self.count = packed, config, kind, count
        self.painter, self.augment = LesionPainter(), Augmentation()
        usable = {
            "normal": lambda p: p.label == 0,
            "paintable": lambda p: p.label == 0,
            "positive": lambda p: p.label == 1,
            "masked": lambda p: np.zeros(len(p.label), bool) if p.mask is None else p.mask.any(axis=(1, 2)),
            "mixed": lambda p: np.ones(len(p.label), bool),
        }
        self.choices = {
            name: [(i, np.flatnonzero(rule(p))) for i, p in enumerate(packed) if rule(p).any()]
            for name, rule in usable.items()
        }
        self.nearness = [p.nearness for p in packed]
        self.chances = {}
        for name, choices in self.choices.items():
            counts: dict[str, int] = {}
            for i, _ in choices:
                source = packed[i].case.source
                counts[source] = counts.get(source, 0) + 1
            chance = np.array(
                [weights[packed[i].case.source] / counts[packed[i].case.source] for i, _ in choices]
            )
            self.chances[name] = chance / chance.sum() if len(chance) else chance

    def __len__(self) -> int:
        return self.count

    def _pick(self, name: str, rng: np.random.Generator) -> tuple[PreparedCase, int]:
        choices = self.choices[name]
        if not choices:
            raise ValueError(f"the training data has no {name} slice; check its image-level labels")
        index, zs = choices[rng.choice(len(choices), p=self.chances[name])]
        chance = self.nearness[index][zs] if name == "paintable" else np.ones(len(zs))
        return self.packed[index], int(rng.choice(zs, p=chance / chance.sum()))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        stage = {"normal": 1, "mixed": 2, "lesions": 3}[self.kind]
        rng = np.random.default_rng((self.config.seed, stage, i))
        if self.kind != "lesions":
            item, z = self._pick(self.kind, rng)
            return self._finish(item, z, "as it is", 0, rng)
        stage_config, context = self.config.denoiser_stage, self.config.denoiser.context
        # as bags, positive slices without a mask are drawn, too
        bags = self.config.labels == "image" and stage_config.bag > 0
        kinds = {"as it is": ("normal", stage_config.normal), "painted": ("paintable", stage_config.painted),
                 "carved": ("paintable", stage_config.carved), "painted over": ("positive", stage_config.over),
                 "masked": ("positive" if bags else "masked", stage_config.masked)}  # fmt: skip
        shares = np.array([share for _, share in kinds.values()])
        there = np.array([bool(self.choices[choice]) for choice, _ in kinds.values()])
        there &= np.array([how not in ("carved", "masked") or bool(self.choices["masked"]) for how in kinds])
        shares = np.where(there, shares, 0.0)
        if not shares.any():
            raise ValueError(
                "no slice is there for any share of a batch above 0; check the image-level labels and the shares: "
                "before the first round of pseudo-masks there are no masked and no carved slices"
            )
        how = list(kinds)[rng.choice(len(kinds), p=shares / shares.sum())]
        item, z = self._pick(kinds[how][0], rng)
        hard = i >= stage_config.hard_from * stage_config.steps * stage_config.batch
        return self._finish(item, z, how, context, rng, hard)

    def _carved(
        self, planes: np.ndarray, brain: np.ndarray, context: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A normal slice with the lesions of another slice, what is lesion then, and how sure that is."""
        item, z = self._pick("masked", rng)
        assert item.mask is not None  # what is picked by its mask has one
        assert item.weight is not None
        at = tuple(_centre(item.brain[z]) - _centre(brain))
        donor, masks, sure = _cropped(
            (item.planes(z, context), item.mask[item.around(z, context)] > 0.5, item.weight[z]),
            (AIR, False, 1.0), brain.shape, at,
        )  # fmt: skip
        planes, share = carve(planes, brain, donor, masks, rng)
        mask = (masks[context] & (share > 0)).astype(np.float32)
        return planes, mask, np.where(share > 0, sure, 1.0).astype(np.float32)

    def _finish(
        self, item: PreparedCase, z: int, how: str, context: int, rng: np.random.Generator, hard: bool = False
    ) -> dict[str, torch.Tensor]:
        planes, brain = item.planes(z, context), item.brain[z]
        mask = np.zeros(brain.shape, np.float32)
        weight = np.ones(brain.shape, np.float32)
        if how in ("masked", "painted over") and (item.mask is None or not item.mask[z].any()):
            weight[:] = NEGATIVE_WEIGHT
        elif how in ("masked", "painted over") and item.mask is not None and item.weight is not None:
            mask, weight = item.mask[z].astype(np.float32), item.weight[z].astype(np.float32)
        if how == "carved":
            planes, mask, weight = self._carved(planes, brain, context, rng)
        if how.startswith("painted"):
            planes, painted = self.painter(planes, brain, self.config.mm, item.offset_mm, rng, hard)
            if how == "painted over" and painted.any():
                around = ndimage.binary_dilation(painted, iterations=RIM) & (mask == 0) & (weight > 0)
                weight[around] = np.maximum(weight[around], 0.3)
            mask, weight = np.maximum(mask, painted), np.where(painted, 1.0, weight).astype(np.float32)
        if self.kind == "lesions" and rng.random() < STRIPPED and brain.any():
            inner = brain | (mask > 0)  # bright lesions at the surface are not in the brain that was found
            kept = ndimage.distance_transform_edt(inner) - ndimage.distance_transform_edt(~inner)
            kept = kept > rng.uniform(-3.0, 4.0)
            planes = np.where(kept, planes, np.float32(AIR))
            mask = mask * kept
        if self.kind == "lesions":
            planes = with_mirror(planes, self.config.denoiser)
        size = self.config.size
        at = (_start(brain.shape[0], size, rng), _start(brain.shape[1], size, rng))
        planes, mask, weight = _cropped((planes, mask, weight), (AIR, 0.0, 1.0), (size, size), at)
        planes, maps = self.augment(planes, np.stack((mask, weight)), rng)
        sample = {
            "planes": torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32)).flatten(0, 1),
            "mask": torch.from_numpy((maps[:1] > 0.5).astype(np.float32)),
            "weight": torch.from_numpy(np.ascontiguousarray(maps[1:], dtype=np.float32)),
            "label": torch.tensor(int(item.label[z])),
        }
        if self.config.labels == "image":
            sample["bag"] = torch.tensor(float(how == "masked"))
        return sample
