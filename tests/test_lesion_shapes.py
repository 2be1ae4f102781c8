"""Shapes of painted lesions: caps on the ventricles' horns, and slices that are thick."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from ddmd.training.batch_maker import BatchMaker
from ddmd.training.config import DataEntry, DenoiserStage, TrainConfig
from ddmd.training.device_slices import NO_HORN, DeviceSlices, guide_maps, horn_tips
from ddmd.training.geometry import pixel_grid
from ddmd.training.lesion_parameters import BANDS, CAPS
from ddmd.training.lesion_shapes import SUB_LEVELS, inside_surface, pixel_share, plane_levels
from tests.test_painting import SIZE, STILL, maker, only, prepared


def ends(ventricle: np.ndarray) -> np.ndarray:
    """(4, 2) ends (x, y) of the two ventricles of `prepared`, counted from the corner."""
    y, x = np.nonzero(ventricle)
    left = x < SIZE / 2
    return np.array([(x[side].mean(), y[side].max()) for side in (left, ~left)]
                    + [(x[side].mean(), y[side].min()) for side in (left, ~left)])  # fmt: skip


def test_the_tips_of_the_horns_are_the_ends_of_the_ventricles(rng):
    case = prepared(rng)
    ventricle = (case.image[2, 0] < -0.75) & case.brain[2]
    _, _, horns = guide_maps(case, 1.0)
    assert horns[2] == pytest.approx(ends(ventricle), abs=1.0)
    slices = DeviceSlices([case], torch.device("cpu"), 1.0)
    assert slices.horns[2].numpy() == pytest.approx(ends(ventricle) - (SIZE - 1) / 2, abs=1.0)


def test_what_is_short_or_not_there_has_no_horn():
    ventricle = np.zeros((64, 64), bool)
    right = np.arange(64) >= 32
    assert (horn_tips(ventricle, right, 1.0) == NO_HORN).all()
    ventricle[20:50, 25:30] = True
    ventricle[30:38, 36:40] = True  # 8 mm
    tips = horn_tips(ventricle, right, 1.0)
    assert tips[0] == pytest.approx([27, 49])
    assert tips[2] == pytest.approx([27, 20])
    assert (tips[[1, 3]] == NO_HORN).all()
    assert (horn_tips(ventricle, right, 0.4) == NO_HORN).all()


def test_caps_lie_on_the_horns_on_both_sides_and_leave_the_walls_between_free(rng):
    case = prepared(rng)
    ventricle = (case.image[2, 0] < -0.75) & case.brain[2]
    away = ndimage.distance_transform_edt(~ventricle)
    y = np.abs(np.arange(SIZE) - (SIZE - 1) / 2)[:, None] + np.zeros((SIZE, SIZE))
    shares, sides, ends_used = {}, [], set()
    for kind, changed in (
        (CAPS, {"cap_mm": (5.0, 8.0)}),
        (BANDS, {"bands_with_caps": 0.0, "band_mm": (5.0, 8.0)}),
    ):
        batch = maker(case, only(kind, small_mm=(1.6, 1.7), cap_reach_mm=(4.0, 6.0), **changed)).samples(
            0, 24
        )
        between = []
        for mask in batch["mask"][:, 0].numpy() > 0:
            near = mask & (away < 6)
            assert not (mask & ventricle).any()
            if near.sum() > 60:
                between.append((near & (y < 6)).sum() / near.sum())
                if kind == CAPS:
                    sides.append(min(near[:, : SIZE // 2].sum(), near[:, SIZE // 2 :].sum()) / near.sum())
                    middle = SIZE // 2
                    ends_used.add((bool(near[:middle].sum() > 20), bool(near[middle:].sum() > 20)))
        assert len(between) >= 10
        shares[kind] = np.median(between)
    assert shares[CAPS] < 0.02 < 0.1 < shares[BANDS]
    assert np.median(sides) > 0.3
    assert ends_used >= {(True, True), (False, True)}, "frontal horns alone, and both"


@pytest.mark.parametrize("thickness", [1.0, 3.0, 5.0, 8.0])
def test_slices_of_any_thickness_hold_the_volume_of_a_lesion(rng, thickness):
    radius, size, planes = 9.0, 48, 2 * int(np.ceil(12.0 / thickness)) + 1
    values = {
        "radius": torch.tensor([[radius]]), "axes": torch.ones(1, 1, 3), "angle": torch.zeros(1, 1),
        "depth": torch.tensor([[rng.uniform(-0.3, 0.3)]]).float(), "edge": torch.tensor([[0.5]]),
    }  # fmt: skip
    row = torch.zeros(1, dtype=torch.int64)
    levels = plane_levels(torch.tensor([thickness]), torch.tensor([thickness]), planes)
    assert levels.shape == (1, planes, SUB_LEVELS)
    offset = pixel_grid(size, torch.device("cpu"))[None]
    surface = inside_surface(values, row, row, offset, torch.zeros(1, size, size), levels, 1.0)
    share = pixel_share(values, row, row, surface, 1.0)
    assert float(share.sum()) * thickness == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.06)
    blurred = ((share > 0.05) & (share < 0.95)).float().sum() / (share >= 0.05).float().sum()
    assert blurred < 0.35 if thickness <= 1.0 else blurred > 0.35, "thick slices show soft edges"


def test_thick_slices_are_means_of_thin_ones(rng):
    one, count = prepared(rng), 31
    z = np.arange(count)
    levels = (
        0.004 * (z - 3.0) ** 2 - 1.0
    )  # of a parabola, the mean of three differs from the middle by its curvature
    brain = np.repeat(one.brain[:1], count, 0)
    image = np.where(brain, levels[:, None, None], -2.0)[:, None].astype(np.float16)
    label = np.ones(count, np.int8)
    label[15] = 0  # all samples are of this slice
    case = replace(one, image=image, brain=brain, head=brain, label=label, offset=5, offset_mm=5.0)
    stage = DenoiserStage(
        share_normal=1.0, share_painted=0.0, share_painted_beside=0.0, share_masked=0.0, share_symmetric=0.0
    )
    config = TrainConfig(data=(DataEntry("set"),), size=SIZE, denoiser_stage=stage)
    slices = DeviceSlices([case], torch.device("cpu"), 1.0)
    batches = BatchMaker(slices, config, "lesions", {"set": 1.0}, augmentation_config=STILL, stripped=0.0)
    shown = batches.samples(0, 200)["planes"][:, :, SIZE // 2, SIZE // 2].numpy()
    apart = np.sqrt(np.maximum(shown[:, 1] - levels[15], 0) / (0.004 * 2 / 3))
    assert apart == pytest.approx(np.round(apart), abs=0.35)
    assert set(np.round(apart).astype(int)) <= {0, 1, 2, 3}
    assert np.mean(apart > 0.5) == pytest.approx(0.15, abs=0.08)
