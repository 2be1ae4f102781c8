"""From a volume to axial slices on the model's grid, and from maps on that grid back to the volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddmd.io.intensities import LOWEST
from ddmd.io.volume import Volume, VolumeError
from ddmd.io.z_scores import robust_z_scores_
from ddmd.models.description import SliceGrid

__all__ = ["SliceGrid", "Slices", "extract", "pinned_like", "planes_at", "to_grid"]

CONTEXT_MM = 5.0  # distance between a slice and the neighbour the network sees with it
MARGIN_MM = 4.0  # kept around the brain
INTENSITY_SCALE = 0.5  # robust z-scores times this are what the networks see


@dataclass(frozen=True)
class Slices:
    """The non-empty axial slices of one volume, on the device that they were prepared for.

    image : (Z, C, H, W) float32, rows run from posterior to anterior, columns from left to right; a sequence that
        is absent is air.
    brain : (Z, 1, H, W) bool, the region where lesions are looked for.
    region : (Z, y, x) bool, the same region on the part of the canonical grid that was kept.
    index : (Z,) int64 on the CPU, the canonical slice each is.
    offset : int, canonical slices between a slice and its neighbour.
    """

    image: Tensor
    brain: Tensor
    region: Tensor
    index: Tensor
    offset: int
    grid: SliceGrid
    shape: tuple[int, int, int]  # canonical (X, Y, Z)
    box: tuple[slice, slice]  # the part of (X, Y) that was kept
    scaled: tuple[int, int]  # H, W of that part on the grid, before padding
    present: Tensor  # (C,) float32 on the CPU: 1 for the sequences that are there, else 0
    sequences: tuple[str, ...]  # the C sequences
    ready: Any = None  # CUDA event after which other streams may read the tensors; None on a CPU

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def used_by(self, stream: Any) -> None:
        """A CUDA stream reads the tensors: it waits until they are ready, and their memory stays until it has."""
        if self.ready is not None:
            stream.wait_event(self.ready)
            for values in (self.image, self.brain, self.region):
                values.record_stream(stream)

    def planes(self, context: int, mirrored: bool = False, presence: bool = False) -> Tensor:
        """(Z, C (2 context + 1 + mirrored + presence), H, W), as `planes_at` gives them, of every slice."""
        rows = torch.arange(len(self), dtype=torch.int64, device=self.image.device)
        present = self.present.to(self.image.device) if presence else None
        return planes_at(self.image, rows, self.offset, context, mirrored, present)

    def to_canonical(self, maps: Tensor) -> Tensor:
        """Maps (Z, M, H, W) on the slices' grid -> float32 (M, x, y, Z) on the part of the canonical grid kept.

        That part is `box` in plane and `index` through it; `place` puts it into the whole.
        """
        return self.to_own_pixels(self.without_padding(maps).float()).permute(1, 3, 2, 0)

    def without_padding(self, maps: Tensor) -> Tensor:
        """Maps (..., H, W) on the slices' grid without what was padded: (..., h, w), in the memory of the maps."""
        (top, height), (left, width) = _placement(maps.shape[-2:], self.scaled)
        return maps[..., top : top + height, left : left + width]

    def to_own_pixels(self, maps: Tensor) -> Tensor:
        """Maps without padding (Z, M, h, w) float32 -> (Z, M, y, x) in the pixels of the volume."""
        xs, ys = self.box
        size = (ys.stop - ys.start, xs.stop - xs.start)
        if size == self.scaled:
            return maps
        antialias = size[0] < self.scaled[0] or size[1] < self.scaled[1]
        return functional.interpolate(maps, size=size, mode="bilinear", antialias=antialias)

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


def extract(
    volume: Volume,
    sequences: tuple[str, ...],
    grid: SliceGrid,
    device: torch.device = torch.device("cpu"),  # noqa: B008, it cannot change
) -> Slices:
    """Cut a volume into slices: cropped to the brain, normalised, resampled in plane, padded.

    The host finds the box round the brain, takes bias fields away and lays the sequences and the brain side by side.
    They are uploaded in one copy, and all else is done on the device; the host does not wait for it.

    Parameters
    ----------
    volume : Volume
    sequences : tuple of str
        The C sequences, in the order the networks take them. Those that the volume lacks are absent.
    grid : SliceGrid
    device : torch.device
        That the slices are to be on.

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
    taken = [s for s in sequences if s in volume.images]
    values, brain, inside = _upload(volume, taken, (xs, ys), index, device)
    kept = brain if volume.reference is None else brain | inside
    count = int(np.count_nonzero(volume.brain if volume.reference is None else volume.reference))
    image = torch.full(
        (len(index), len(sequences), *full), LOWEST * INTENSITY_SCALE, dtype=torch.float32, device=device
    )
    rows, columns = (slice(before, before + n) for before, n in _placement(full, (height, width)))
    for planes, sequence in zip(values, taken, strict=True):
        robust_z_scores_(planes, inside, count)
        if not volume.skull:
            planes.masked_fill_(~brain, LOWEST)
        target = image[:, sequences.index(sequence), rows, columns]
        torch.mul(_resized(planes, (height, width)), INTENSITY_SCALE, out=target)
    region_on_grid = torch.zeros((len(index), 1, *full), dtype=torch.bool, device=device)
    scaled = kept if kept.shape[1:] == (height, width) else _resized(kept.float(), (height, width)) > 0.5
    region_on_grid[:, 0, rows, columns] = scaled
    return Slices(
        image=image,
        brain=region_on_grid,
        region=kept,
        index=torch.from_numpy(index),
        offset=max(1, round(CONTEXT_MM / spacing[2])),
        grid=grid,
        shape=region.shape,
        box=(xs, ys),
        scaled=(height, width),
        present=torch.tensor(there, dtype=torch.float32, device="cpu"),
        sequences=tuple(sequences),
        ready=torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None,
    )


def to_grid(values: np.ndarray, like: Slices) -> Tensor:
    """A map on the volume's canonical grid (X, Y, Z) -> (Z, 1, H, W) float32 on that of the slices, on the CPU."""
    full = (like.image.shape[2], like.image.shape[3])
    part = np.ascontiguousarray(like.part_of(values).transpose(2, 1, 0), dtype=np.float32)
    (top, height), (left, width) = _placement(full, like.scaled)
    right, bottom = full[1] - left - width, full[0] - top - height
    return functional.pad(_resized(torch.from_numpy(part), like.scaled), (left, right, top, bottom))[:, None]


def pinned_like(values: Tensor) -> Tensor:
    """Room on the CPU for a tensor's values, pinned where they are on a GPU: the copy need not be waited for."""
    return torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)


def _upload(
    volume: Volume, sequences: list[str], box: tuple[slice, slice], index: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Intensities (C, Z, y, x) float32, the brain and where statistics are taken (Z, y, x) bool, on the device.

    They lie side by side in one buffer, pinned where it goes to a GPU, so that one copy uploads them.
    """
    shape = (len(index), *(axis.stop - axis.start for axis in reversed(box)))
    voxels, levels = int(np.prod(shape)), _as_slice(index)
    masks = [volume.brain] if volume.reference is None else [volume.brain, volume.reference]
    size = 4 * voxels * len(sequences)
    host = torch.empty(
        size + voxels * len(masks), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
    )

    def parts(buffer: Tensor) -> tuple[Tensor, Tensor]:
        return (
            buffer[:size].view(torch.float32).view(len(sequences), *shape),
            buffer[size:].view(torch.bool).view(len(masks), *shape),
        )

    images = (volume.bias_corrected(sequence) for sequence in sequences)  # one at a time in memory
    for part, sources in zip(parts(host), (images, masks), strict=True):
        for target, source in zip(part.numpy(), sources, strict=True):
            np.copyto(target, source[box][:, :, levels].transpose(2, 1, 0))
    values, on_device = parts(host.to(device, non_blocking=True))
    return values, on_device[0], on_device[-1]


def _resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Planes (Z, h, w) float32 -> (Z, H, W), bilinear, antialiased where they shrink."""
    if planes.shape[1:] == size:
        return planes
    shrinking = planes.shape[1] > size[0] or planes.shape[2] > size[1]
    return functional.interpolate(planes[:, None], size=size, mode="bilinear", antialias=shrinking)[:, 0]


def _placement(full: tuple[int, ...], inner: tuple[int, int]) -> list[tuple[int, int]]:
    """Where rows and columns of the inner size begin in the padded ones, and their number."""
    return [(_padding(f, n)[0], n) for f, n in zip(full, inner, strict=True)]
