"""Maps and draws of slices on the volume they are of: smoothed through the plane, on its own grid."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddmd.inference.ensemble import quantised
from ddmd.inference.slices import Slices
from ddmd.io.volume import Volume


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
    return (matrix @ maps.flatten(1).double()).float().view(maps.shape)


def draws_in_part(prepared: Prepared, draws: Tensor, sigma: float) -> NDArray[np.uint8]:
    """Draws on the part of the volume's canonical grid that the slices were cut from; see `Slices.part_of`.

    They are smoothed through the plane as the probability is, so that their mean is the probability.

    Parameters
    ----------
    prepared : Prepared
    draws : (S, Z, 1, H, W) uint8, of `Maps`
    sigma : float, of the smoothing, in slices

    Returns
    -------
    (S, x, y, Z) uint8
        255 for probability 1; 0 outside the brain.
    """
    slices = prepared.slices
    brain = slices.part_of(prepared.volume.search_region)
    part = np.empty((len(draws), *brain.shape), np.uint8)
    with torch.inference_mode():
        for target, draw in zip(part, draws, strict=True):
            values = smooth_through_plane(draw.float() / 255, sigma)
            target[:] = quantised(slices.to_canonical(values)[0].clamp_(0.0, 1.0)).numpy()
    part *= brain
    return part


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
