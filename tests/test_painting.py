"""What painted lesions and augmentation promise, on slices of noise inside an ellipse."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ddmd.training.augmentation import Augmentation
from ddmd.training.lesion_painter import (
    AIR_MARGIN,
    CARVED_RIM,
    HIGH,
    LOW,
    LesionPainter,
    PainterConfig,
    carve,
)

STILL = Augmentation(
    **{field.name: 0.0 for field in dataclasses.fields(Augmentation)}
)  # changes nothing until one chance is raised
EXACT = 1e-6  # float32 less LOW and plus it again
LARGE = PainterConfig(kinds=(1.0, 0.0, 0.0), displacement=0.0)


@pytest.fixture
def head(rng):
    """Planes (3, 2, 128, 160) whose brains shrink upwards, and the brain of the middle one."""
    y, x = np.mgrid[:128, :160]
    inside = [((y - 64) / (52 - 5 * p)) ** 2 + ((x - 80) / (60 - 5 * p)) ** 2 < 1 for p in range(3)]
    planes = [np.where(b, rng.normal(0, 0.2, (2, 128, 160)), LOW) for b in inside]
    return np.stack(planes).astype(np.float32), inside[1]


def paint(head, seed, config=None):
    return LesionPainter(config)(*head, 1.0, 5.0, np.random.default_rng(seed))


def test_painting_is_decided_by_the_generator(head, seed):
    first, again, other = paint(head, seed), paint(head, seed), paint(head, seed + 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_painting_keeps_shape_type_range_and_its_input(head, seed):
    before = head[0].copy()
    planes, mask = paint(head, seed)
    assert planes.shape == before.shape
    assert planes.dtype == np.float32
    assert mask.shape == before.shape[2:]
    assert mask.dtype == bool
    assert np.isfinite(planes).all()
    assert planes.min() >= LOW
    assert planes.max() <= HIGH
    assert np.array_equal(head[0], before)


def test_lesions_lie_inside_the_brain_and_leave_air_alone(head, seed):
    painted = 0
    for i in range(40):
        planes, mask = paint(head, seed + i, PainterConfig(displacement=0.0))
        painted += mask.any()
        assert not (mask & ~head[1]).any()
        assert (planes[head[0] == LOW] == LOW).all()
    assert painted >= 30


def test_the_mask_is_where_the_middle_plane_changed(head, seed):
    inside, outside = [], []
    for i in range(40):
        planes, mask = paint(head, seed + i, PainterConfig(displacement=0.0))
        change = np.abs(planes[1] - head[0][1]).mean(0)
        if mask.any():
            inside.append((change[mask] > 0.05).mean())
            outside.append(change[~mask & head[1]].mean() / change[mask].mean())
    assert len(inside) >= 30
    assert np.median(inside) > 0.95, inside
    assert np.median(outside) < 0.1, outside


def test_what_is_far_from_every_lesion_is_unchanged(head, seed):
    for i in range(10):
        config = PainterConfig(kinds=(0.0, 0.0, 1.0))
        planes, mask = paint(head, seed + i, config)
        # now and then all lesions of a slice are too small to be painted, and all of it is far
        far = ndimage.distance_transform_edt(~mask) >= 15 if mask.any() else np.ones(mask.shape, bool)
        assert np.array_equal(planes[1][:, far], head[0][1][:, far])


def test_neighbouring_planes_share_a_large_lesion_and_lose_a_small_one(head, seed):
    def shared(kinds):
        ratios = []
        for i in range(30):
            planes, mask = paint(head, seed + i, PainterConfig(kinds=kinds, displacement=0.0, dark=0.0))
            if mask.any():
                change = np.abs(planes - head[0]).mean(1)[:, mask].mean(1)
                ratios.append(change[[0, 2]].mean() / change[1])
        return np.median(ratios)

    assert shared((1.0, 0.0, 0.0)) > 0.6
    assert shared((0.0, 0.0, 1.0)) < 0.4


@pytest.mark.parametrize(("dark", "sign"), [(0.0, 1), (1.0, -1)])
def test_lesions_are_brighter_unless_dark_ones_are_asked_for(head, seed, dark, sign):
    config, changes = PainterConfig(dark=dark, core=0.0, texture=0.0), []
    for i in range(20):
        planes, mask = paint(head, seed + i, config)
        if mask.any():
            changes.append(sign * (planes[1][:, mask].mean() - head[0][1][:, mask].mean()))
    assert len(changes) >= 15
    assert min(changes) > 0.1


def test_sizes_are_in_millimetres(head, seed):
    area = {
        mm: np.mean(
            [
                LesionPainter(LARGE)(*head, mm, 5.0, np.random.default_rng(seed + i))[1].sum()
                for i in range(30)
            ]
        )
        for mm in (1.0, 2.0)
    }
    assert 1.8 < area[1.0] / area[2.0] < 4.5, area


def test_an_empty_brain_is_left_as_it_is(head, seed):
    planes, mask = LesionPainter()(head[0], np.zeros_like(head[1]), 1.0, 5.0, np.random.default_rng(seed))
    assert np.array_equal(planes, head[0])
    assert not mask.any()


def test_a_carved_lesion_is_the_donors_and_the_rest_is_the_hosts(head, rng):
    planes, brain = head
    donor = np.where(planes > LOW, planes + 1, LOW).astype(np.float32)
    masks = np.zeros((3, 128, 160), bool)
    masks[:2, 50:70, 60:90] = True  # it does not reach the last plane
    out, share = carve(planes, brain, donor, masks, rng)
    assert np.array_equal(out[:2, :, 50:70, 60:90], donor[:2, :, 50:70, 60:90])
    assert np.array_equal(out[2], planes[2])
    far = ndimage.distance_transform_edt(~masks[1]) >= CARVED_RIM[1]
    assert np.array_equal(out[1][:, far], planes[1][:, far])
    assert (share[masks[1]] == 1).all()
    assert ((share > 0) & (share < 1)).any()
    outside, _ = carve(planes, brain, donor, np.ones_like(masks), rng)
    assert (outside[planes == LOW] == LOW).all()
    assert np.array_equal(outside[1][:, ~brain], planes[1][:, ~brain])


def test_augmentation_is_decided_by_the_generator_and_keeps_shapes(head, seed, rng):
    masks = (rng.random((2, 128, 160)) > 0.5).astype(np.float32)
    for i in range(30):
        a, b = (Augmentation()(head[0], masks, np.random.default_rng(seed + i)) for _ in range(2))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        assert a[0].shape == head[0].shape
        assert a[1].shape == masks.shape
        assert a[0].dtype == a[1].dtype == np.float32
        assert np.isfinite(a[0]).all()
        assert LOW <= a[0].min() <= a[0].max() <= HIGH
        assert 0 <= a[1].min() <= a[1].max() <= 1


def test_no_chance_no_change(head, rng):
    masks = head[1][None].astype(np.float32)
    planes, moved = STILL(head[0], masks, rng)
    assert np.abs(planes - head[0]).max() < EXACT
    assert np.array_equal(moved, masks)


def test_a_flip_moves_planes_and_masks_left_to_right_alike(head, rng):
    mask = rng.random((1, 128, 160)).astype(np.float32)
    planes, moved = replace(STILL, flip=1.0)(head[0], mask, rng)
    assert np.abs(planes - head[0][..., ::-1]).max() < EXACT
    assert np.array_equal(moved, mask[..., ::-1])


def test_geometry_keeps_masks_on_what_they_mark(rng):
    planes = np.full((3, 1, 96, 144), LOW, np.float32)
    planes[..., 30:60, 50:90] = 1.0
    masks = (planes[1] > 0).astype(np.float32)
    augment = replace(STILL, flip=0.5, affine=1.0, warp=1.0)
    for _ in range(10):
        moved, mask = augment(planes, masks, rng)
        seen, marked = moved[1, 0] > (LOW + 1) / 2, mask[0] > 0.5
        assert 2 * (seen & marked).sum() / (seen.sum() + marked.sum()) > 0.98


@pytest.mark.parametrize("part", ["contrast", "bias", "blur", "coarse", "ringing", "noise", "window"])
def test_intensity_changes_leave_masks_and_air_alone(head, rng, part):
    masks = head[1][None].astype(np.float32)
    changed = 0
    for _ in range(10):
        planes, same = replace(STILL, **{part: 1.0})(head[0], masks, rng)
        assert np.array_equal(same, masks)
        assert (planes[head[0] == LOW] == LOW).all()
        changed += np.abs(planes - head[0]).max() > EXACT
    assert changed == 10


def test_contrast_changes_keep_lesions_visible_and_the_tissues_median(rng):
    """As any volume is normalised: what a scanner does is not to hide a lesion, nor to move all of the tissue."""
    y, x = np.mgrid[:144, :144]
    brain = ((y - 72) / 60) ** 2 + ((x - 72) / 50) ** 2 < 1
    texture = ndimage.gaussian_filter(rng.normal(size=brain.shape), 3)
    away = np.hypot(y - 70, x - 90)
    lesion, ring = away < 14, (away > 16) & (away < 22)
    texture *= 0.5 / texture.std()
    texture[lesion] += np.median(texture[ring]) - np.median(texture[lesion])
    planes = np.where(brain, texture + 0.6 * lesion, LOW)[None, None].astype(np.float32)
    inside, outside = planes[0, 0][lesion], planes[0, 0][ring]
    augment = replace(STILL, contrast=0.7, bias=0.6)
    factors, medians = [], []
    for seed in range(200):
        out, _ = augment(planes, lesion[None].astype(np.float32), np.random.default_rng(seed))
        gained = np.median(out[0, 0][lesion]) - np.median(out[0, 0][ring])
        factors.append(gained / (np.median(inside) - np.median(outside)))
        medians.append(np.median(out[0, 0][brain]) - np.median(planes[0, 0][brain]))
        assert (out[0, 0][brain] > LOW + AIR_MARGIN).all(), "dark tissue became air"
    low, high = np.quantile(factors, (0.05, 0.95))
    assert 0.4 < low < 0.9, "lesions fade, but not away"
    assert 1.1 < high < 2.5
    assert 0.05 < np.std(medians) < 0.3


def test_hard_lesions_are_no_brighter_than_their_surroundings_and_the_others_as_ever():
    config = PainterConfig(kinds=(0.6, 0.4, 0.0), not_bright=1.0)
    rng = np.random.default_rng(4)
    planes = rng.normal(0, 0.2, (3, 1, 96, 96)).astype(np.float32)
    brain = np.ones((96, 96), bool)
    gains = {}
    for hard in (False, True):
        inside = []
        for seed in range(40):
            painted, mask = LesionPainter(config)(planes, brain, 1.0, 5.0, np.random.default_rng(seed), hard)
            core = ndimage.binary_erosion(mask, iterations=7)
            if core.sum() > 20:
                inside.append(float(painted[1, 0][core].mean()))
        assert len(inside) > 5
        gains[hard] = inside
    assert np.median(gains[False]) > 0.3
    assert max(gains[True]) < 0.6
    assert min(gains[True]) < -0.2
    never = LesionPainter(PainterConfig(not_bright=0.0))
    plain = LesionPainter(PainterConfig())(planes, brain, 1.0, 5.0, np.random.default_rng(1))
    drawn = never(planes, brain, 1.0, 5.0, np.random.default_rng(1), False)
    assert np.array_equal(plain[0], drawn[0])


def test_small_lesions_can_keep_to_the_ventricles():
    config = PainterConfig(kinds=(0.0, 0.0, 1.0), periventricular=1.0)
    planes = np.zeros((3, 1, 128, 128), np.float32)
    planes[:, 0, 56:72, 56:72] = -1.2
    away = ndimage.distance_transform_edt(planes[1, 0] > -1)
    for seed in range(10):
        _, mask = LesionPainter(config)(
            planes, np.ones((128, 128), bool), 1.0, 5.0, np.random.default_rng(seed)
        )
        if mask.any():
            assert away[mask].min() <= 9
            assert away[mask].max() <= 8 + 12
