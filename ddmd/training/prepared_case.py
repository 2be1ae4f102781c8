"""A patient's slices on the model's grid, read once, with what is known of each."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddmd.cohort.cases import Case
from ddmd.inference import slices
from ddmd.io.atomic import atomic_path
from ddmd.io.brain_extraction import brain_within
from ddmd.training.config import TrainConfig

BRIGHT_FLUID = "t2"  # the sequence on which cerebrospinal fluid is bright; it is dark on the others


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
    present: np.ndarray | None = None  # (C,) bool: the sequences that are there; None: all
    fluid_dark: tuple[int, ...] = (0,)  # the sequences on which the ventricles are dark

    @property
    def there(self) -> np.ndarray:
        """(C,) bool: the sequences that are there."""
        return np.ones(self.image.shape[1], bool) if self.present is None else self.present

    @property
    def key(self) -> str:
        """What its masks are kept under."""
        return f"{self.case.source} {self.case.name}"

    def around(self, z: int, context: int) -> list[int]:
        """Slice z between its neighbours; those beyond the ends are the last ones."""
        last = len(self.image) - 1
        return [min(max(z + i * self.offset, 0), last) for i in range(-context, context + 1)]


def sequences_of(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sequences that every case has, and those that it may have."""
    return ((), config.sequences) if config.denoiser.presence else (config.sequences, ())


def load_cases(cases: Sequence[Case], config: TrainConfig, read_masks: bool) -> list[PreparedCase]:
    """Read the volumes once. Masks are opened only where `read_masks` says so; they then give the labels."""
    prepared = []
    grid = slices.SliceGrid(mm=config.mm)
    for case in cases:
        volume = case.volume(*sequences_of(config))
        cut = slices.extract(volume, config.sequences, grid)
        image, head = cut.image.numpy(), cut.brain[:, 0].numpy()
        present = cut.present.numpy() > 0
        there = [int(i) for i in np.flatnonzero(present)]
        dark = tuple(i for i in there if config.sequences[i] != BRIGHT_FLUID)
        item = PreparedCase(
            case=case,
            image=image.astype(np.float16),
            brain=brain_within(image[:, (dark or there)[0]], head, grid.mm),
            head=head,
            label=case.labels()[cut.index.numpy()],
            offset=cut.offset,
            offset_mm=cut.offset * volume.spacing[2],
            present=present,
            fluid_dark=dark,
        )
        if read_masks and case.masks is not None:
            item.mask = slices.to_grid(case.lesion(), cut)[:, 0].numpy().astype(np.float16)
            item.weight = np.ones_like(item.mask)
            item.label = np.any(item.mask, axis=(1, 2)).astype(np.int8)
        prepared.append(item)
    return prepared


def save_pseudo_masks(cases: Sequence[PreparedCase], path: Path) -> None:
    """Write the masks and weights of all patients to one file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    for item in cases:
        if item.mask is not None and item.weight is not None:
            arrays |= {f"mask {item.key}": item.mask.astype(bool), f"weight {item.key}": item.weight}
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def load_pseudo_masks(cases: Sequence[PreparedCase], path: Path) -> None:
    """Give all patients the masks and weights that `save_pseudo_masks` wrote.

    Raises
    ------
    ValueError
        If the file is damaged, or of other patients; it says what to delete.
    """
    advice = "delete it, and the masks are made anew"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole file of pseudo-masks ({error}); {advice}") from None
    for item in cases:
        mask, weight = found.get(f"mask {item.key}"), found.get(f"weight {item.key}")
        for array in (mask, weight):
            if array is not None and (array.shape != item.brain.shape or not np.isfinite(array).all()):
                raise ValueError(f"{path}: the pseudo-mask of {item.key} does not fit its slices; {advice}")
        if (mask is None) != (weight is None):
            raise ValueError(f"{path}: the pseudo-mask of {item.key} is not whole; {advice}")
        item.mask = None if mask is None else mask.astype(np.float16)
        item.weight = None if weight is None else weight.astype(np.float16)
