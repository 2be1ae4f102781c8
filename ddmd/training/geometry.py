"""Where the pixels of training samples come from: rotation, scale, shear, shift, elastic displacement and mirror."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddmd.training.augmentation import Augmentation
from ddmd.training.sample_random import NoiseFields, SampleRandom

ELASTIC_CELLS = 5  # of the coarse grid that an elastic displacement is drawn on


@dataclass(frozen=True)
class Geometry:
    """Where each pixel of the output comes from: canvas = shift + matrix (pixel + displacement).

    Coordinates are (x, y) pixels from the middle of the output and of the canvas.

    matrix : (N, 2, 2), shift : (N, 2), displacement : (N, S, S, 2) float32.
    """

    matrix: Tensor
    shift: Tensor
    displacement: Tensor

    def canvas(self) -> Tensor:
        """(N, S, S, 2) canvas coordinates of every output pixel."""
        size = self.displacement.shape[1]
        pixels = pixel_grid(size, self.matrix.device) + self.displacement
        return transformed(pixels, self.matrix, self.shift)


def transformed(points: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """matrix (N, 2, 2) points + shift (N, 2), of points ([N,] H, W, 2) as (x, y): (N, H, W, 2)."""
    x, y = points.unbind(-1)  # products of 2x2 matrices, written out: batched ones are slow
    m, s = matrix[:, :, :, None, None], shift[:, :, None, None]
    return torch.stack(
        (m[:, 0, 0] * x + m[:, 0, 1] * y + s[:, 0], m[:, 1, 0] * x + m[:, 1, 1] * y + s[:, 1]), -1
    )


def pixel_grid(size: int, device: torch.device) -> Tensor:
    """(S, S, 2) coordinates (x, y) of pixels from the middle of a square."""
    at = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)


def draw_geometry(
    random: SampleRandom, config: Augmentation, middle: np.ndarray, extent: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """Matrix (N, 2, 2), shift (N, 2), elastic amplitude and the mirror's reflection, on the host.

    Parameters
    ----------
    middle, extent : (N, 2), (y, x), of the box around each slice's brain.
    size : int, pixels of a side of the output.
    """
    count = len(random)
    moved = random.chance(config.affine)
    angle = random.uniform(-config.rotation, config.rotation) * moved
    scale = 1.0 + random.uniform(-config.scale, config.scale, 2) * moved[:, None]
    shear = random.uniform(-config.shear, config.shear) * moved
    flip = np.where(random.chance(config.flip), -1.0, 1.0)
    cos, sin, one, zero = np.cos(angle), np.sin(angle), np.ones(count), np.zeros(count)
    rotation = np.stack((cos, -sin, sin, cos), -1).reshape(-1, 2, 2)
    sheared = np.stack((one, shear, zero, one), -1).reshape(-1, 2, 2)
    scaled = np.stack((scale[:, 0] * flip, zero, zero, scale[:, 1]), -1).reshape(-1, 2, 2)
    matrix = rotation @ sheared @ scaled
    slack = np.maximum(extent - size, 0.0) / 2
    jitter = random.uniform(-1, 1, 2) * (slack + config.shift * moved[:, None])
    shift = (middle + jitter)[:, ::-1]  # (x, y)
    amplitude = config.elastic_px * random.uniform(0.3, 1.0) * random.chance(config.elastic)
    return {"matrix": matrix, "shift": np.ascontiguousarray(shift), "elastic": amplitude}


def draw_mirror(
    random: SampleRandom, matrix: np.ndarray, shift: np.ndarray, symmetric: float
) -> dict[str, np.ndarray]:
    """Reflection p' = R p + o (N, 2, 2), (N, 2) about the head's midline, and where none is made.

    Half of the reflections are about a vertical line, as at inference, where a tilted head is not turned upright.
    """
    flip = np.diag([-1.0, 1.0])
    inverse = np.linalg.inv(matrix)
    reflection = inverse @ flip @ matrix
    offset = (inverse @ (flip @ shift[..., None] - shift[..., None]))[..., 0]
    true = {"true_reflection": reflection, "true_offset": offset}
    upright = random.chance(0.5)
    middle = -(inverse @ shift[..., None])[..., 0]
    reflection = np.where(upright[:, None, None], flip, reflection)
    offset = np.where(upright[:, None], middle * np.array([2.0, 0.0]), offset)
    same = random.chance(symmetric)
    reflection = np.where(same[:, None, None], np.eye(2), reflection)
    return true | {"reflection": reflection, "reflection_offset": np.where(same[:, None], 0.0, offset)}


def elastic_displacement(amplitude: Tensor, size: int, fields: NoiseFields) -> Tensor:
    """(N, S, S, 2) smooth displacement in pixels."""
    coarse = fields.normal(2, ELASTIC_CELLS, ELASTIC_CELLS) * amplitude[:, None, None, None]
    fine = functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fine.permute(0, 2, 3, 1)


def sample_canvas(maps: Tensor, canvas: Tensor, mode: str = "bilinear") -> Tensor:
    """Maps (N, C, H, W) at canvas coordinates (N, S, S, 2); 0 outside."""
    height, width = maps.shape[-2:]
    extent = torch.full((2,), 2.0 / width, dtype=torch.float32, device=maps.device)
    extent[1] = 2.0 / height
    return functional.grid_sample(maps, canvas * extent, mode=mode, padding_mode="zeros", align_corners=False)


def reflect(plane: Tensor, reflection: Tensor, offset: Tensor) -> Tensor:
    """Planes (N, C, S, S) seen in the mirror p' = R p + o; pixels from the middle."""
    size = plane.shape[-1]
    return sample_canvas(plane, transformed(pixel_grid(size, plane.device), reflection, offset))
