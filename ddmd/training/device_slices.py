"""All slices of a training run, resident in the device's memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ddmd.training.intensity_scale import FLUID, LOW
from ddmd.training.prepared_case import PreparedCase

DEEP_MM = 15.0  # inside the brain's surface: dark pixels there are ventricles, not sulci
MIDLINE_MM = 35.0  # from the middle of the brain's box: farther dark pixels are fissures
LARGE_AREA = 0.6  # of the largest brain area of a case: smaller slices show no lateral ventricle
HALF_WIDTH_MM = 3.5  # of a ventricle somewhere; fissures are thinner
NO_FLUID_MM = 100  # distance to the ventricles of a slice that shows none
SURFACE_MM = (-20, 100)  # range of the distance inside the brain's surface


class DeviceSlices:
    """Slices of every case on one canvas, the box of each case in its middle.

    Attributes
    ----------
    image : (M, C, H, W) float16, half robust z-scores less that of air; air is 0.
    depth : (M, H, W) int8, millimetres inside the brain's surface, negative outside.
    fluid : (M, H, W) int8, millimetres to the ventricles, `NO_FLUID_MM` where a slice shows none.
    mask, weight : (M, H, W) uint8 and float16, what is taken for lesion and how far it is trusted.
    """

    def __init__(self, cases: Sequence[PreparedCase], device: torch.device, mm: float) -> None:
        self.cases, self.device, self.mm = cases, device, mm
        counts = [len(case.image) for case in cases]
        self.first = np.concatenate(([0], np.cumsum(counts)))
        height = max(case.image.shape[-2] for case in cases)
        width = max(case.image.shape[-1] for case in cases)
        total, channels = int(self.first[-1]), cases[0].image.shape[1]
        canvas = (total, height, width)
        self.image = torch.zeros((total, channels, height, width), dtype=torch.float16, device=device)
        self.depth = torch.full(canvas, SURFACE_MM[0], dtype=torch.int8, device=device)
        self.fluid = torch.full(canvas, NO_FLUID_MM, dtype=torch.int8, device=device)
        self.mask = torch.zeros(canvas, dtype=torch.uint8, device=device)
        self.weight = torch.zeros(canvas, dtype=torch.float16, device=device)
        self.middle = np.zeros((total, 2), np.float32)  # of the brain, from the canvas's middle: y, x
        self.extent = np.zeros((total, 2), np.float32)  # of the brain's box: y, x
        for number, case in enumerate(cases):
            rows, (ys, xs) = self.rows(number), self.box(number)
            above_air = np.maximum(case.image.astype(np.float32) - LOW, 0.0).astype(np.float16)
            self.image[rows, :, ys, xs] = torch.from_numpy(above_air).to(device)
            depth, fluid = guide_maps(case, mm)
            self.depth[rows, ys, xs] = torch.from_numpy(depth).to(device)
            self.fluid[rows, ys, xs] = torch.from_numpy(fluid).to(device)
            self.middle[rows], self.extent[rows] = _boxes(case.brain)
        self.update_masks()

    def __len__(self) -> int:
        return int(self.first[-1])

    def rows(self, case: int) -> slice:
        """Where the slices of a case are."""
        return slice(int(self.first[case]), int(self.first[case + 1]))

    def box(self, case: int) -> tuple[slice, slice]:
        """Rows and columns of the canvas that a case fills."""
        shape, full = self.cases[case].image.shape[-2:], self.image.shape[-2:]
        top, left = ((f - n) // 2 for f, n in zip(full, shape, strict=True))
        return slice(top, top + shape[0]), slice(left, left + shape[1])

    def update_masks(self) -> None:
        """Copy the cases' masks and weights, which change with every round of pseudo-masks."""
        self.mask.zero_()
        self.weight.fill_(1.0)
        for number, case in enumerate(self.cases):
            if case.mask is not None and case.weight is not None:
                rows, (ys, xs) = self.rows(number), self.box(number)
                self.mask[rows, ys, xs] = torch.from_numpy((case.mask > 0.5).astype(np.uint8)).to(self.device)
                self.weight[rows, ys, xs] = torch.from_numpy(case.weight.astype(np.float16)).to(self.device)

    def planes(self, case: int, zs: Sequence[int] | np.ndarray, context: int, mirrored: bool) -> Tensor:
        """Half robust z-scores (Z, P C, h, w) of slices of one case as the network sees them."""
        rows, (ys, xs) = self.rows(case), self.box(case)
        around = np.array([self.cases[case].around(int(z), context) for z in zs]) + rows.start
        image = self.image[torch.from_numpy(around).to(self.device)][..., ys, xs].float().flatten(1, 2) + LOW
        if not mirrored:
            return image
        channels = self.image.shape[1]
        middle = image[:, context * channels : (context + 1) * channels]
        return torch.cat((image, middle.flip(-1)), 1)


def guide_maps(case: PreparedCase, mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Where lesions of each kind may lie: millimetres inside the brain's surface, and to the ventricles.

    Returns
    -------
    depth, fluid : (Z, H, W) int8
    """
    depth = np.full(case.brain.shape, SURFACE_MM[0], np.int8)
    fluid = np.full(case.brain.shape, NO_FLUID_MM, np.int8)
    areas = case.brain.sum(axis=(1, 2))
    middle, _ = _boxes(case.brain)
    columns = np.arange(case.brain.shape[2]) - (case.brain.shape[2] - 1) / 2
    for z, brain in enumerate(case.brain):
        if not areas[z]:
            continue
        inside = ndimage.distance_transform_edt(brain) - ndimage.distance_transform_edt(~brain)
        depth[z] = np.clip(np.round(inside * mm), *SURFACE_MM)
        if areas[z] < LARGE_AREA * areas.max():
            continue
        ventricle = (depth[z] > DEEP_MM) & (case.image[z, 0] < FLUID)
        ventricle &= np.abs(columns - middle[z, 1]) * mm < MIDLINE_MM
        parts, count = ndimage.label(ventricle)
        wide = ndimage.maximum(ndimage.distance_transform_edt(ventricle) * mm, parts, np.arange(count + 1))
        ventricle &= (wide >= HALF_WIDTH_MM)[parts]
        if ventricle.any():
            away = ndimage.distance_transform_edt(~ventricle) * mm
            fluid[z] = np.clip(np.ceil(away), 0, NO_FLUID_MM)
    return depth, fluid


def _boxes(brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle, from that of the slice, and extent (Z, 2) of the box around the brain of each slice."""
    shape = np.array(brain.shape[1:])
    middle, extent = np.zeros((len(brain), 2)), np.tile(shape.astype(float), (len(brain), 1))
    for z, plane in enumerate(brain):
        for axis in (0, 1):
            inside = np.flatnonzero(plane.any(axis=1 - axis))
            if len(inside):
                middle[z, axis] = (inside[0] + inside[-1] + 1 - shape[axis]) / 2
                extent[z, axis] = inside[-1] - inside[0] + 1
    return middle, extent
