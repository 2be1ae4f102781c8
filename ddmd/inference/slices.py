"""From a volume to axial slices on the model's grid, and from maps on that grid back to the volume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddmd.io.volume import Volume, VolumeError
from ddmd.models.description import SliceGrid

__all__ = ["SliceGrid", "Slices", "extract", "planes_at", "to_grid"]

CONTEXT_MM = 5.0  # distance between a slice and the neighbour the network sees with it
MARGIN_MM = 4.0  # kept around the brain
BACKGROUND = -4.0  # what `Volume.normalised` gives air
INTENSITY_SCALE = 0.5  # robust z-scores times this are what the networks see


@dataclass(frozen=True)
class Slices:
    """The non-empty axial slices of one volume.

    image : (Z, C, H, W) float32, rows run from posterior to anterior, columns from left to right; a sequence that
        is absent is air.
    brain : (Z, 1, H, W) bool, the region where lesions are looked for.
    index : (Z,) int64, the canonical slice each is.
    offset : int, canonical slices between a slice and its neighbour.
    """

    image: Tensor
    brain: Tensor
    index: Tensor
    offset: int
    grid: SliceGrid
    shape: tuple[int, int, int]  # canonical (X, Y, Z)
    box: tuple[slice, slice]  # the part of (X, Y) that was kept
    scaled: tuple[int, int]  # H, W of that part on the grid, before padding
    present: Tensor  # (C,) float32: 1 for the sequences that are there, else 0
    sequences: tuple[str, ...]  # the C sequences

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def planes(self, context: int, mirrored: bool = False, presence: bool = False) -> Tensor:
        """(Z, C (2 context + 1 + mirrored + presence), H, W), as `planes_at` gives them, of every slice."""
        rows = torch.arange(len(self), dtype=torch.int64, device=self.image.device)
        present = self.present.to(self.image.device) if presence else None
        return planes_at(self.image, rows, self.offset, context, mirrored, present)

    def to_canonical(self, maps: Tensor) -> Tensor:
        """Maps (Z, M, H, W) on the slices' grid -> float32 (M, x, y, Z) on the part of the canonical grid kept.

        That part is `box` in plane and `index` through it; `place` puts it into the whole.
        """
        height, width = self.scaled
        top, left = _padding(maps.shape[2], height)[0], _padding(maps.shape[3], width)[0]
        maps = maps[:, :, top : top + height, left : left + width].float()
        xs, ys = self.box
        size = (ys.stop - ys.start, xs.stop - xs.start)
        if size != (height, width):
            maps = functional.interpolate(
                maps, size=size, mode="bilinear", antialias=size[0] < height or size[1] < width
            )
        return maps.permute(1, 3, 2, 0)

    def place(self, part: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
        """The part of the canonical grid that was kept (x, y, Z) in the whole (X, Y, Z), 0 elsewhere.

        Parameters
        ----------
        part : (x, y, Z)
        whole : (X, Y, Z) zeros to write into, optional
        """
        if whole is None:
            whole = np.zeros(self.shape, dtype=np.float32)
        whole[self.box[0], self.box[1], _as_slice(self.index.cpu().numpy())] = part
        return whole

    def part_of(self, values: np.ndarray) -> np.ndarray:
        """The part (x, y, Z) that was kept of values on the canonical grid (X, Y, Z)."""
        return values[self.box][:, :, _as_slice(self.index.cpu().numpy())]


def planes_at(
    image: Tensor,
    rows: Tensor,
    offset: int,
    context: int,
    mirrored: bool,
    present: Tensor | None = None,
) -> Tensor:
    """Slices with their neighbours: (R, C (2 context + 1 + mirrored + presence), H, W), on the image's device.

    Each slice lies after its neighbours below and before those above, `DenoiserConfig.middle_planes`.

    Parameters
    ----------
    image : (Z, C, H, W)
    rows : (R,) int64
        Which slices.
    offset : int
        Slices between a slice and its neighbour; at both ends the last slice is its own neighbour.
    context : int
        Neighbours on either side.
    mirrored : bool
        Whether the left-right mirror image of the slice comes next.
    present : (C,) float32, optional
        1 for the sequences that are there, else 0: a plane of each comes last.
    """
    last = max(len(image) - 1, 0)
    planes = [image[(rows + i * offset).clamp(0, last)] for i in range(-context, context + 1)]
    if mirrored:
        planes.append(image[rows].flip(-1))
    if present is not None:
        planes.append(present[None, :, None, None].expand(len(rows), -1, *image.shape[2:]))
    return torch.cat(planes, 1)


def _as_slice(index: np.ndarray) -> slice | np.ndarray:
    """Ascending positions as a slice where none is left out, which numpy copies faster."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _padding(size: int, inner: int) -> tuple[int, int]:
    before = (size - inner) // 2
    return before, size - inner - before


def _box(brain: np.ndarray, spacing: tuple[float, ...]) -> tuple[slice, slice]:
    edges = []
    for axis in (0, 1):
        inside = np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(MARGIN_MM / spacing[axis])
        edges.append(
            slice(max(int(inside[0]) - margin, 0), min(int(inside[-1]) + margin + 1, brain.shape[axis]))
        )
    return edges[0], edges[1]


def extract(volume: Volume, sequences: tuple[str, ...], grid: SliceGrid) -> Slices:
    """Cut a volume into slices: cropped to the brain, resampled in plane, padded, normalised.

    Parameters
    ----------
    volume : Volume
    sequences : tuple of str
        The C sequences, in the order the networks take them. Those that the volume lacks are absent.
    grid : SliceGrid

    Returns
    -------
    Slices

    Raises
    ------
    VolumeError
        If the volume has none of the sequences.
    """
    there = [sequence in volume.images for sequence in sequences]
    if not any(there):
        raise VolumeError(
            f"{volume.name}: the weights take {', '.join(sequences)} and the volume has {', '.join(volume.images)}"
        )
    spacing = volume.spacing
    region = volume.search_region
    xs, ys = _box(region, spacing)
    index = np.flatnonzero(region.any(axis=(0, 1)))
    height, width = (
        max(1, round((axis.stop - axis.start) * spacing[i] / grid.mm)) for i, axis in ((1, ys), (0, xs))
    )

    full = tuple(-(-n // grid.multiple) * grid.multiple for n in (height, width))

    def cut(values: np.ndarray, background: float) -> Tensor:
        return _cut(values, (xs, ys), index, (height, width), full, background)

    brain = cut(region.astype(np.float32), 0.0) > 0.5
    air = torch.full(brain.shape, BACKGROUND, dtype=torch.float32, device="cpu")
    image = torch.cat(
        [cut(volume.normalised(s), BACKGROUND) if s in volume.images else air for s in sequences], 1
    )
    return Slices(
        image=image * INTENSITY_SCALE,
        brain=brain,
        index=torch.from_numpy(index),
        offset=max(1, round(CONTEXT_MM / spacing[2])),
        grid=grid,
        shape=region.shape,
        box=(xs, ys),
        scaled=(height, width),
        present=torch.tensor(there, dtype=torch.float32, device="cpu"),
        sequences=tuple(sequences),
    )


def to_grid(values: np.ndarray, like: Slices) -> Tensor:
    """A map on the volume's canonical grid (X, Y, Z) -> (Z, 1, H, W) float32 on that of the slices."""
    full = (like.image.shape[2], like.image.shape[3])
    return _cut(values, like.box, like.index.numpy(), like.scaled, full, 0.0)


def _cut(
    values: np.ndarray,
    box: tuple[slice, slice],
    index: np.ndarray,
    size: tuple[int, int],
    full: tuple[int, ...],
    background: float,
) -> Tensor:
    planes = torch.from_numpy(
        np.ascontiguousarray(values[box][:, :, index].transpose(2, 1, 0), dtype=np.float32)
    )[:, None]
    if planes.shape[2:] != size:
        shrinking = planes.shape[2] > size[0] or planes.shape[3] > size[1]
        planes = functional.interpolate(planes, size=size, mode="bilinear", antialias=shrinking)
    (top, bottom), (left, right) = (_padding(f, n) for f, n in zip(full, size, strict=True))
    return functional.pad(planes, (left, right, top, bottom), value=background)
