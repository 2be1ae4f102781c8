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
HORNS = ("frontal left", "frontal right", "occipital left", "occipital right")
NO_HORN = 1e4  # coordinate of the tip of a horn that a slice does not show: far from everything
HORN_LENGTH_MM = 15.0  # from the frontal to the occipital end of a ventricle in a slice that shows its horns
HORN_TIP_MM = 2.0  # of a horn from its end, over which its tip is averaged
SURFACE_MM = (-20, 100)  # range of the distance inside the brain's surface


class DeviceSlices:
    """Slices of every case on one canvas, the box of each case in its middle.

    Attributes
    ----------
    image : (M, C, H, W) float16, half robust z-scores less that of air; air is 0.
    depth : (M, H, W) int8, millimetres inside the brain's surface, negative outside.
    fluid : (M, H, W) int8, millimetres to the ventricles, `NO_FLUID_MM` where a slice shows none.
    mask, weight : (M, H, W) uint8 and float16, what is taken for lesion and how far it is trusted.
    present : (cases, C) bool, the sequences that each case has; those that are absent are air.
    horns : (M, 4, 2) float32, tips (x, y) of the frontal and the occipital horns, left and right, in pixels from the
        canvas's middle; `NO_HORN` where a slice shows none.
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
        self.present = np.stack([case.there for case in cases])
        self.horns = torch.full((total, len(HORNS), 2), NO_HORN, dtype=torch.float32, device=device)
        for number, case in enumerate(cases):
            rows, (ys, xs) = self.rows(number), self.box(number)
            above_air = np.maximum(case.image.astype(np.float32) - LOW, 0.0).astype(np.float16)
            self.image[rows, :, ys, xs] = torch.from_numpy(above_air).to(device)
            depth, fluid, horns = guide_maps(case, mm)
            corner = np.array([xs.start - (width - 1) / 2, ys.start - (height - 1) / 2], np.float32)
            self.horns[rows] = torch.from_numpy(horns + corner).to(device)
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

    def planes(
        self,
        case: int,
        zs: Sequence[int] | np.ndarray,
        context: int,
        mirrored: bool,
        presence: bool = False,
    ) -> Tensor:
        """Half robust z-scores (Z, P C, h, w) of slices of one case as the network sees them, and what is there."""
        rows, (ys, xs) = self.rows(case), self.box(case)
        around = np.array([self.cases[case].around(int(z), context) for z in zs]) + rows.start
        image = self.image[torch.from_numpy(around).to(self.device)][..., ys, xs].float().flatten(1, 2) + LOW
        channels = self.image.shape[1]
        groups = [image]
        if mirrored:
            groups.append(image[:, context * channels : (context + 1) * channels].flip(-1))
        if presence:
            there = torch.from_numpy(self.present[case].astype(np.float32)).to(self.device)
            groups.append(there[None, :, None, None].expand(len(image), -1, *image.shape[2:]))
        return torch.cat(groups, 1)


def guide_maps(case: PreparedCase, mm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where lesions of each kind may lie: millimetres inside the brain's surface, and to the ventricles, and horns.

    Returns
    -------
    depth, fluid : (Z, H, W) int8
    horns : (Z, 4, 2) float32, (x, y) in pixels from the first one; `NO_HORN` where there is none.
    """
    depth = np.full(case.brain.shape, SURFACE_MM[0], np.int8)
    fluid = np.full(case.brain.shape, NO_FLUID_MM, np.int8)
    horns = np.full((len(case.brain), len(HORNS), 2), NO_HORN, np.float32)
    areas = case.brain.sum(axis=(1, 2))
    middle, _ = _boxes(case.brain)
    columns = np.arange(case.brain.shape[2]) - (case.brain.shape[2] - 1) / 2
    for z, brain in enumerate(case.brain):
        if not areas[z]:
            continue
        inside = ndimage.distance_transform_edt(brain) - ndimage.distance_transform_edt(~brain)
        depth[z] = np.clip(np.round(inside * mm), *SURFACE_MM)
        if areas[z] < LARGE_AREA * areas.max() or not case.fluid_dark:
            continue
        ventricle = (depth[z] > DEEP_MM) & (case.image[z, list(case.fluid_dark)] < FLUID).all(axis=0)
        ventricle &= np.abs(columns - middle[z, 1]) * mm < MIDLINE_MM
        parts, count = ndimage.label(ventricle)
        wide = ndimage.maximum(ndimage.distance_transform_edt(ventricle) * mm, parts, np.arange(count + 1))
        ventricle &= (wide >= HALF_WIDTH_MM)[parts]
        if ventricle.any():
            away = ndimage.distance_transform_edt(~ventricle) * mm
            fluid[z] = np.clip(np.ceil(away), 0, NO_FLUID_MM)
            horns[z] = horn_tips(ventricle, columns > middle[z, 1], mm)
    return depth, fluid, horns


def horn_tips(ventricle: np.ndarray, right: np.ndarray, mm: float) -> np.ndarray:
    """Tips (4, 2) of the lateral ventricles' horns in one slice, in the order of `HORNS`, as `guide_maps` has them.

    A side whose ventricle is shorter than `HORN_LENGTH_MM` shows a part of it that has no horn.

    Parameters
    ----------
    ventricle : (H, W) bool, rows from posterior to anterior.
    right : (W,) bool, the columns of one side.
    mm : float, millimetres a pixel.
    """
    tips = np.full((len(HORNS), 2), NO_HORN, np.float32)
    for side, chosen in enumerate((~right, right)):
        y, x = np.nonzero(ventricle & chosen)
        if not len(y) or (y.max() - y.min() + 1) * mm < HORN_LENGTH_MM:
            continue
        for end, tip in ((0, y.max()), (2, y.min())):
            tips[end + side] = x[np.abs(y - tip) * mm <= HORN_TIP_MM].mean(), tip
    return tips


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
