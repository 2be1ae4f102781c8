"""Maps and draws of slices on the volume they are of: smoothed through the plane, on its own grid."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddmd.inference.ensemble import Maps, quantised
from ddmd.inference.slices import Slices, pinned_like
from ddmd.io.volume import Volume, VolumeError
from ddmd.models.checkpoint import System

SMOOTHED_SLICES = 16  # of one product with the band of the smoothing matrix round the diagonal
CACHED_PIXELS = 4096  # smoothed at once on a CPU, so that they stay in its cache


@dataclass(frozen=True)
class Prepared:
    """A volume and its slices on a system's grid: what `Detector.detect` computes on."""

    volume: Volume
    slices: Slices


@dataclass(frozen=True)
class VolumeMaps:
    """`Maps` of one volume: float32 (X, Y, Z) on its canonical grid, zero outside the brain."""

    probability: NDArray[np.float32]
    uncertainty: NDArray[np.float32]
    inter: NDArray[np.float32]
    intra: NDArray[np.float32]


class DetectionError(VolumeError):
    """Maps of a case that are not finite; the message names the case and says what to do."""


def smooth_through_plane(maps: Tensor, sigma: float) -> Tensor:
    """Convolve maps (Z, ...) along Z with a Gaussian cut off at 4 sigma; the end slices repeat.

    As `scipy.ndimage.gaussian_filter1d(mode="nearest")` does. Sums are in float64: in float32 their last bit may
    depend on where the arrays lie in memory, and equal input has to give equal bytes.

    Parameters
    ----------
    maps : (Z, ...) float32
    sigma : float, in slices
    """
    count, radius = len(maps), int(4.0 * sigma + 0.5)
    if radius == 0:
        return maps
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64, device=maps.device)
    weights = torch.exp(-0.5 * (distance / sigma).square())
    weights = weights / weights.sum()
    rows = torch.arange(count, dtype=torch.int64, device=maps.device)[:, None]
    columns = (rows + distance.long()).clamp(0, count - 1)
    matrix = torch.zeros(count, count, dtype=torch.float64, device=maps.device)
    matrix.scatter_add_(1, columns, weights.expand(count, -1))
    values = maps.reshape(count, -1)
    smooth = torch.empty(values.shape, dtype=torch.float32, device=maps.device)
    pixels = CACHED_PIXELS if maps.device.type == "cpu" else max(1, values.shape[1])
    for part, target in zip(values.split(pixels, 1), smooth.split(pixels, 1), strict=True):
        part = part.double()
        for first in range(0, count, SMOOTHED_SLICES):  # the matrix is 0 away from its diagonal
            last = min(first + SMOOTHED_SLICES, count)
            low, high = max(first - radius, 0), min(last + radius, count)
            target[first:last] = matrix[first:last, low:high] @ part[low:high]
    return smooth.view(maps.shape)


def maps_in_part(slices: Slices, maps: Maps, sigma: float) -> tuple[Tensor, Tensor]:
    """Maps of slices on the part of the volume's own grid that the slices were cut from.

    Probability and uncertainty are smoothed through the plane, all are 0 outside the region of the search. Everything
    is done on the device of the maps, and the host does not wait for it.

    Parameters
    ----------
    slices : Slices
    maps : Maps
    sigma : float, of the smoothing, in slices

    Returns
    -------
    (4, Z, y, x) float32, in the order of the fields of `Maps`; and (4, 2) float32, the least and the greatest value
    of each map, NaN where it holds one
    """
    if maps.probability.is_cuda:
        slices.used_by(torch.cuda.current_stream(maps.probability.device))
    extremes = torch.stack([torch.stack(torch.aminmax(values)) for values in maps.tensors()])
    region = slices.region.to(maps.probability.device)
    parts = torch.empty((4, *region.shape), dtype=torch.float32, device=region.device)
    for number, (values, part) in enumerate(zip(maps.tensors(), parts, strict=True)):
        values = slices.without_padding(values)
        if number < 2:
            values = smooth_through_plane(values, sigma)
        values = slices.to_own_pixels(values)[:, 0]
        if number < 2:
            values = values.clamp(0.0, 1.0 if number == 0 else None)
        torch.mul(values, region, out=part)
    return parts, extremes


def maps_on_volume(prepared: Prepared, maps: Maps, system: System) -> VolumeMaps:
    """Maps of slices on the volume they are of; probability and uncertainty smoothed through the plane.

    One copy brings them from the device, and the host waits for that one alone.

    Parameters
    ----------
    prepared : Prepared
    maps : Maps
    system : System
        That they were made with; its description says how wide the smoothing is.

    Raises
    ------
    DetectionError
        If a map is not finite, naming it and the volume.
    """
    slices, volume, description = prepared.slices, prepared.volume, system.description
    sigma = description.through_plane_mm / volume.spacing[2]
    parts, extremes = (to_host(values) for values in maps_in_part(slices, maps, sigma))
    if maps.probability.is_cuda:
        torch.cuda.current_stream(maps.probability.device).synchronize()
    names = [n for n, ends in zip(maps.named(), extremes.numpy(), strict=True) if not np.isfinite(ends).all()]
    if names:
        raise DetectionError(
            f"{volume.name}: its maps of {', '.join(names)} are not finite: the weights {description.name} overflow "
            f"in {str(system.dtype).removeprefix('torch.')}; use precision float32, or other weights"
        )
    return VolumeMaps(*(slices.place(part.T, volume.empty_map()) for part in parts.numpy()))


def to_host(values: Tensor) -> Tensor:
    """A tensor on the CPU, where it is when the stream has come so far; from a GPU into pinned memory."""
    return values if values.device.type == "cpu" else pinned_like(values).copy_(values, non_blocking=True)


def draws_in_part(
    prepared: Prepared,
    draws: Tensor,
    sigma: float,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> NDArray[np.uint8]:
    """Draws on the part of the volume's canonical grid that the slices were cut from; see `Slices.part_of`.

    They are smoothed through the plane as the probability is, so that their mean is the probability.

    Parameters
    ----------
    prepared : Prepared
    draws : (S, Z, 1, H, W) uint8, of `Maps`
    sigma : float, of the smoothing, in slices
    device : torch.device
        That each is restored on.

    Returns
    -------
    (S, x, y, Z) uint8
        255 for probability 1; 0 outside the brain.
    """
    slices = prepared.slices
    region = slices.region.to(device)
    parts = torch.empty(
        (len(draws), *region.shape), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
    )
    with torch.inference_mode():
        for target, draw in zip(parts, draws, strict=True):
            draw = slices.without_padding(draw.to(device, non_blocking=True)).float() / 255
            values = slices.to_own_pixels(smooth_through_plane(draw, sigma))[:, 0].clamp_(0.0, 1.0)
            target.copy_(quantised(values).mul_(region), non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return np.ascontiguousarray(parts.numpy().transpose(0, 3, 2, 1))


def draws_image(prepared: Prepared, part: NDArray[np.uint8]) -> nib.Nifti1Image:
    """Draws (S, x, y, Z) of `draws_in_part` as a uint8 image (X, Y, Z, S) on the input's own grid."""
    volume, slices = prepared.volume, prepared.slices
    images = (volume.to_native(slices.place(draw), np.uint8) for draw in part)
    first = next(images)
    values = np.empty((*first.shape, len(part)), np.uint8, order="F")
    values[..., 0] = np.asanyarray(first.dataobj)
    for number, image in enumerate(images, 1):
        values[..., number] = np.asanyarray(image.dataobj)
    return type(first)(values, first.affine, first.header)
