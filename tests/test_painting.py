"""What painted lesions and augmentation promise, on slices of noise inside an ellipse."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from ddmd.cohort.cases import Case
from ddmd.training import geometry, lesion_shapes
from ddmd.training.augmentation import Augmentation, local_field
from ddmd.training.batch_maker import BatchMaker
from ddmd.training.config import DataEntry, DenoiserStage, TrainConfig
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.intensity_scale import AIR_MARGIN, HIGH, LOW
from ddmd.training.lesion_painter import TRANSPLANT_RIM, transplant
from ddmd.training.lesion_parameters import (
    BANDS,
    KINDS,
    LARGE,
    MANY,
    SMALL,
    TERRITORY,
    PainterConfig,
    draw_lesions,
)
from ddmd.training.prepared_case import PreparedCase
from ddmd.training.sample_random import NoiseFields, SampleRandom, pick

STILL = Augmentation(**{f.name: 0.0 for f in fields(Augmentation) if f.type == "float"})
PLAIN = PainterConfig(displacement=0.0, dark=0.0, faint=0.0)
SIZE, EXACT = 144, 2e-3  # slices are kept in float16


def only(kind: int, config: PainterConfig = PLAIN, **changed) -> PainterConfig:
    return replace(config, kinds=tuple(float(i == kind) for i in range(len(KINDS))), **changed)


def prepared(rng, offset_mm: float = 5.0, ventricles: bool = True) -> PreparedCase:
    """Five normal slices (144, 144): an ellipse of tissue with two dark ventricles, air around it."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    brain = (y / 66) ** 2 + (x / 58) ** 2 < 1
    tissue = rng.normal(0, 0.15, (5, SIZE, SIZE)).clip(-0.6, 0.6)  # never as dark as fluid
    plane = np.where(brain, tissue, LOW)
    if ventricles:
        plane[:, (np.abs(np.abs(x) - 9) < 5) & (np.abs(y) < 20)] = -1.3
    image = plane[:, None].astype(np.float16)
    inside = np.repeat(brain[None], 5, 0)
    return PreparedCase(Case("a", "a", "set", {}), image, inside, inside, np.zeros(5, np.int8), 1, offset_mm)


def maker(case, painter=PLAIN, augment=STILL, stage=None, mirrored=False, seed=0) -> BatchMaker:
    stage = stage or DenoiserStage(
        share_normal=0.0, share_painted=1.0, share_transplanted=0.0, share_painted_beside=0.0,
        share_masked=0.0, hard_from=1.0, share_symmetric=0.0,
    )  # fmt: skip
    config = TrainConfig(data=(DataEntry("set"),), size=SIZE, denoiser_stage=stage, seed=seed)
    config = replace(config, denoiser=replace(config.denoiser, mirrored=mirrored))
    slices = DeviceSlices([case], torch.device("cpu"), 1.0)
    made = BatchMaker(
        slices,
        config,
        "lesions",
        {"set": 1.0},
        augmentation_config=augment,
        painter_config=painter,
        stripped=0.0,
    )
    return made


def middle(case: PreparedCase) -> torch.Tensor:
    """Tissue's mean level of a slice that nothing was painted on."""
    return torch.from_numpy(case.image[2, 0].astype(np.float32))


# --------------------------------------------------------------------------- random numbers


def test_random_numbers_do_not_depend_on_how_samples_are_batched(seed):
    whole = SampleRandom(seed, 3, np.arange(8)).unit(5)
    parts = [SampleRandom(seed, 3, np.arange(i, i + 2)).unit(5) for i in (0, 2, 4, 6)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, SampleRandom(seed, 2, np.arange(8)).unit(5)), "stages differ"
    index = torch.arange(8)
    fields_of = [NoiseFields(seed, 3, i).normal(2, 9) for i in (index, index[:3], index[3:])]
    assert torch.equal(fields_of[0], torch.cat(fields_of[1:]))


def test_shares_are_kept_and_those_of_nothing_are_never_taken(rng):
    shares = np.array([0.0, 0.2, 0.0, 0.8, 0.0])
    taken = pick(np.cumsum(shares), np.append(rng.random(20000), (0.0, np.nextafter(1, 0))))
    assert np.bincount(taken, minlength=5)[[0, 2, 4]].sum() == 0
    assert np.mean(taken == 3) == pytest.approx(0.8, abs=0.02)


# --------------------------------------------------------------------------- painting


def test_batches_are_decided_by_seed_and_index(rng, seed):
    case = prepared(rng)
    first = maker(case, PainterConfig(), Augmentation(), mirrored=True, seed=seed)
    again = maker(case, PainterConfig(), Augmentation(), mirrored=True, seed=seed)
    whole = first.samples(7, 6)
    parts = [again.samples(7 + i, 2) for i in (0, 2, 4)]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.cat([p[name] for p in parts]), rtol=1e-5, atol=1e-5)
    other = maker(case, PainterConfig(), Augmentation(), mirrored=True, seed=seed + 1).samples(7, 6)
    assert not torch.equal(whole["planes"], other["planes"])


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_lesions_lie_in_the_brain_leave_air_alone_and_brighten_what_the_mask_marks(rng, kind):
    case = prepared(rng)
    batch = maker(case, only(kind, core=0.0, contrast=(0.6, 2.0))).samples(0, 24)
    planes, mask = batch["planes"], batch["mask"][:, 0] > 0
    brain = torch.from_numpy(case.brain[0])
    assert planes.isfinite().all()
    assert LOW <= planes.min() <= planes.max() <= HIGH
    assert not (mask & ~brain).any()
    assert (planes[:, :, ~brain] == LOW).all()
    gains = [
        float(p[1][m].mean() - middle(case)[m].mean())
        for p, m in zip(planes, mask, strict=True)
        if m.sum() > 10
    ]
    assert len(gains) >= 10
    assert np.median(gains) > 0.3
    assert batch["weight"].eq(1.0).all()


def test_what_is_far_from_every_lesion_is_unchanged(rng):
    case = prepared(rng)
    case.image[:] = case.image[2]
    batch = maker(case, only(SMALL)).samples(0, 12)
    for planes, mask in zip(batch["planes"], batch["mask"], strict=True):
        lesion = mask[0].numpy() > 0
        far = ndimage.distance_transform_edt(~lesion) > 17 if lesion.any() else np.ones(lesion.shape, bool)
        assert (planes[1].numpy()[far] - case.image[2, 0].astype(np.float32)[far]) == pytest.approx(
            0, abs=EXACT
        )


def test_a_territory_reaches_from_the_surface_inwards_on_one_side(rng):
    case = prepared(rng)
    ventricle = case.image[2, 0] < -0.75
    depth = ndimage.distance_transform_edt(case.brain[2])
    deepest, sectors = {}, []
    for reach in (10.0, 30.0):
        config = only(TERRITORY, territory_mm=(reach, reach + 0.1), edge=(0.5, 0.6))
        masks = maker(case, config, seed=int(rng.integers(1000))).samples(0, 24)["mask"][:, 0].numpy() > 0
        large = [mask for mask in masks if mask.sum() > 60]
        assert len(large) >= 12
        for mask in large:
            sides = mask[:, : SIZE // 2].sum(), mask[:, SIZE // 2 :].sum()
            assert min(sides) <= 0.02 * mask.sum(), "the falx ends it"
            assert not (mask & ventricle).any()
            assert (depth[mask] <= 2).any(), "it reaches the surface"
            y, x = np.nonzero(mask) - np.array([[(SIZE - 1) / 2]] * 2)
            angle = np.arctan2(y, x)
            sectors.append(np.ptp(np.angle(np.exp(1j * (angle - angle[np.argmax(x**2 + y**2)])))))
        deepest[reach] = np.median([depth[mask].max() for mask in large])
    assert 6 < deepest[10.0] < 16 < deepest[30.0]
    assert np.median(sectors) < np.pi / 2
    assert max(sectors) < np.pi


def test_a_territory_is_bright_also_where_other_lesions_are_faint_or_dark(seed):
    config = replace(
        PLAIN, kinds=(0.5, 0, 0, 0, 0, 0, 0.5), faint=1.0, dark=1.0, territory_contrast=(0.9, 1.1)
    )
    drawn = draw_lesions(SampleRandom(seed, 2, np.arange(60)), config, np.zeros(60, bool))
    territory = drawn["kind"] == TERRITORY
    level = drawn["level"][:, 0]
    assert 5 < territory.sum() < 55
    assert ((level[territory] >= 0.9) & (level[territory] <= 1.1)).all()
    assert (level[~territory] < 0).all()


def test_a_territory_ends_at_the_mirror_plane_however_the_head_is_turned(rng):
    """And it lies where its angle says, within the depth that is asked for."""
    size, mm, n = 96, 1.5, 24
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    turn, offset = rng.uniform(-0.6, 0.6, n), rng.uniform(-6.0, 6.0, n)
    normal = np.stack((np.cos(turn), np.sin(turn)), 1)  # of the mirror plane, in (x, y)
    reflection = np.eye(2) - 2 * normal[:, :, None] * normal[:, None]
    signed = normal[:, 0, None, None] * x + normal[:, 1, None, None] * y - offset[:, None, None]
    depth = (40.0 - np.hypot(x, y)) * mm + np.zeros((n, 1, 1))
    angle = rng.uniform(-np.pi, np.pi, n)
    values = {
        "territory": np.full(n, 20.0), "territory_width": np.full(n, 0.5), "territory_angle": angle,
        "edge": np.full((n, 1), 0.5), "reach": np.full((n, 2), 0.5),
    }  # fmt: skip

    def tensor(array):
        return torch.from_numpy(np.asarray(array, np.float32))

    fields = NoiseFields(int(rng.integers(1000)), 3, torch.arange(n))
    share = lesion_shapes.territory(
        {k: tensor(v) for k, v in values.items()}, tensor(depth), tensor(reflection),
        tensor(2 * offset[:, None] * normal), 3, mm, fields,
    )  # fmt: skip
    masks = share.numpy() > 0.5
    assert masks[:, 1].sum((1, 2)).min() > 0
    for i in range(n):
        middle, beside = masks[i, 1], masks[i, 0]
        assert (np.sign(signed[i][middle]) == np.sign(normal[i] @ [np.cos(angle[i]), np.sin(angle[i])])).all()
        assert not (middle & (depth[i] <= 0)).any()
        assert depth[i][middle].max() < 20.0 * 2.5
        assert (beside <= middle).all(), "half as deep"
        outwards = np.abs(np.angle(np.exp(1j * (np.arctan2(y, x)[middle] - angle[i]))))
        assert np.median(outwards) < 0.5
    depths = [depth[i][masks[i, 1]].max() for i in range(n)]
    assert 15 < np.median(depths) < 32


def test_bands_lie_round_the_ventricles_on_both_sides(rng):
    case = prepared(rng)
    ventricle = case.image[2, 0] < -0.75
    away = ndimage.distance_transform_edt(~ventricle)
    batch = maker(case, only(BANDS, band_mm=(6.0, 10.0), small_mm=(1.6, 1.7))).samples(0, 16)
    both = []
    for mask in batch["mask"][:, 0].numpy() > 0:
        big = mask & (away < 8)
        assert not (mask & ventricle).any()
        if big.sum() > 150:
            sides = big[:, : SIZE // 2].sum(), big[:, SIZE // 2 :].sum()
            both.append(min(sides) / max(sides))
    assert len(both) >= 8
    assert np.median(both) > 0.4


def test_many_small_lesions_and_partners_on_the_other_side(rng):
    case = prepared(rng)
    batch = maker(case, only(MANY, periventricular=0.0, juxtacortical=0.0, symmetric=0.0)).samples(0, 8)
    counts = [ndimage.label(m)[1] for m in batch["mask"][:, 0].numpy()]
    assert np.median(counts) >= 6
    pairs = maker(case, only(SMALL, periventricular=0.0, symmetric=1.0, small_mm=(4.0, 5.0))).samples(0, 24)
    shared = []
    for mask in pairs["mask"][:, 0].numpy() > 0:
        grown = ndimage.binary_dilation(mask, iterations=8)
        if mask.any():
            shared.append((grown[:, ::-1] & mask).sum() / mask.sum())
    assert np.median(shared) > 0.6


def test_lesions_keep_to_the_ventricles_or_to_the_surface(rng):
    case = prepared(rng)
    fluid = ndimage.distance_transform_edt((case.image[2, 0] > -0.75) | ~case.brain[2])  # not the air
    depth = ndimage.distance_transform_edt(case.brain[2])
    for distance, chosen in ((fluid, {"periventricular": 1.0, "juxtacortical": 0.0}), (depth, {"periventricular": 0.0, "juxtacortical": 1.0})):  # fmt: skip
        batch = maker(case, only(SMALL, symmetric=0.0, small_mm=(1.6, 3.0), **chosen)).samples(0, 16)
        for mask in batch["mask"][:, 0].numpy() > 0:
            parts, _ = ndimage.label(mask)
            for part in np.flatnonzero(np.bincount(parts.ravel())[1:] >= 3) + 1:  # not single pixels
                assert distance[parts == part].min() <= 10


def test_hard_lesions_are_no_brighter_than_their_surroundings(rng):
    case = prepared(rng, ventricles=False)
    stage = maker(case).config.denoiser_stage
    for hard in (False, True):
        config = replace(stage, hard_from=0.0 if hard else 1.0)
        batch = maker(case, only(LARGE, not_bright=1.0, core=0.0), stage=config).samples(0, 24)
        levels = []
        for planes, mask in zip(batch["planes"], batch["mask"], strict=True):
            core = ndimage.binary_erosion(mask[0].numpy() > 0, iterations=7)
            if core.sum() > 20:
                levels.append(float(planes[1].numpy()[core].mean()))
        assert len(levels) > 5
        assert (max(levels) < 0.6) if hard else (np.median(levels) > 0.3)


def test_an_empty_brain_is_left_as_it_is(rng):
    case = prepared(rng)
    case.brain[:] = False
    batch = maker(case).samples(0, 4)
    assert not batch["mask"].any()
    assert (batch["planes"].isfinite()).all()


def test_a_transplanted_lesion_is_the_donors_and_the_rest_is_the_hosts(rng):
    planes = torch.from_numpy(rng.uniform(1.0, 2.0, (1, 3, 1, 64, 64)).astype(np.float32))
    planes[..., :8] = 0.0
    donor = planes + 1
    masks = torch.zeros(1, 3, 64, 64)
    masks[:, :2, 20:30, 20:34] = 1  # it does not reach the last plane
    depth = torch.full((1, 64, 64), 5.0)
    out, share = transplant(planes, depth, donor, masks, torch.tensor([4.0]))
    assert torch.equal(out[:, :2, :, 20:30, 20:34], donor[:, :2, :, 20:30, 20:34])
    assert torch.equal(out[:, 2], planes[:, 2])
    far = ndimage.distance_transform_cdt(1 - masks[0, 1].numpy(), "chessboard") >= TRANSPLANT_RIM[1]
    assert torch.equal(out[0, 1, 0][far], planes[0, 1, 0][far])
    assert ((share > 0) & (share < 1)).any()
    everywhere, _ = transplant(planes, depth, donor, torch.ones_like(masks), torch.tensor([4.0]))
    assert (everywhere[planes == 0] == 0).all()


# --------------------------------------------------------------------------- augmentation


def test_no_chance_no_change(rng):
    case = prepared(rng)
    case.image[:] = case.image[2]
    stage = replace(maker(case).config.denoiser_stage, share_normal=1.0, share_painted=0.0)
    batch = maker(case, stage=stage).samples(0, 3)
    assert (batch["planes"][:, 1] - middle(case)).abs().max() < EXACT
    assert not batch["mask"].any()


def test_the_mirror_image_is_of_the_slice_or_the_slice_itself(rng):
    case = prepared(rng)
    stage = replace(maker(case).config.denoiser_stage, share_painted=1.0)
    for share in (0.0, 1.0):
        made = maker(case, stage=replace(stage, share_symmetric=share), mirrored=True)
        planes = made.samples(0, 4)["planes"]
        wanted = planes[:, 1] if share else planes[:, 1].flip(-1)
        assert (planes[:, 3] - wanted).abs().mean() < 0.01


def test_a_tilted_head_has_its_mirror_image_about_its_own_midline(rng):
    """Half of the reflections; the other half are about a vertical line, as at inference."""
    case = prepared(rng)
    case.image[:, 0][case.brain] = 0.0
    case.image[:, 0, 40:60, 90:110] = 1.5
    stage = replace(maker(case).config.denoiser_stage, share_normal=1.0, share_painted=0.0)
    turned = replace(STILL, affine=1.0, shear=0.0, scale=0.0, shift=0.0)
    made = maker(case, stage=stage, mirrored=True, augment=turned)
    planes = made.samples(0, 24)["planes"].numpy()
    brain = [(p[3] > LOW + 0.5) & (p[1] > LOW + 0.5) for p in planes]
    overlap = [b.sum() / (p[1] > LOW + 0.5).sum() for b, p in zip(brain, planes, strict=True)]
    assert min(overlap) > 0.8
    marks = [np.argwhere(p[3] > 0.7).mean(0) - np.argwhere(p[1] > 0.7).mean(0) for p in planes]
    assert all(np.hypot(*m) > 20 for m in marks), "the mark is on the other side"


@pytest.mark.parametrize(
    "part",
    ["contrast", "bias", "strong_bias", "local_bias", "blur", "coarse", "ringing", "noise", "saturation"],
)
def test_intensity_changes_leave_masks_and_air_alone(rng, seed, part):
    case = prepared(rng)
    lesions = only(
        LARGE, core=0.0, rim=0.0, contrast=(0.3, 1.5)
    )  # below the ceiling, where nothing can be cut
    plain = maker(case, lesions, seed=seed).samples(0, 6)
    changed = maker(case, lesions, replace(STILL, **{part: 1.0}), seed=seed).samples(0, 6)
    assert torch.equal(plain["mask"], changed["mask"])
    assert torch.equal(plain["planes"] == LOW, changed["planes"] == LOW)
    apart = (plain["planes"] - changed["planes"]).abs().amax((1, 2, 3))
    assert (apart > 0).all()


def test_strong_fields_change_one_side_against_the_other_and_leave_the_median(rng):
    case = prepared(rng)
    stage = replace(maker(case).config.denoiser_stage, share_normal=1.0, share_painted=0.0)
    strong = replace(STILL, strong_bias=1.0)
    planes = maker(case, stage=stage, augment=strong).samples(0, 24)["planes"][:, 1]
    tissue = torch.from_numpy(case.brain[2]) & (middle(case) > -0.75)
    medians = torch.stack([p[tissue].median() for p in planes])
    assert medians.abs().max() < 0.15
    inner = torch.from_numpy(ndimage.distance_transform_edt(tissue.numpy()) > 9)

    def smooth_spread(plane: torch.Tensor) -> float:
        smooth = torch.nn.functional.avg_pool2d(plane[None, None], 17, 1, 8)[0, 0]
        return float(smooth[inner].std())

    assert np.median([smooth_spread(p) for p in planes]) > 3 * smooth_spread(middle(case))


def test_a_local_field_is_a_bump_where_it_was_drawn_and_on_the_other_side(rng):
    size, height, (y, x), spread = 48, 0.2, (-0.3, 0.5), 0.1
    rows, columns = (np.mgrid[:size, :size] / (size - 1) - 0.5) * size
    squares = [(rows - y * size / 2) ** 2 + (columns - side * x * size / 2) ** 2 for side in (1, -1)]
    bumps = [np.exp(height * np.exp(-0.5 * square / (spread * size) ** 2)) for square in squares]
    values = torch.full((2,), height), torch.tensor([[y, x]] * 2), torch.full((2,), spread)
    found = local_field(*values, torch.tensor([False, True]), size)
    np.testing.assert_allclose(found[0, 0], bumps[0], rtol=1e-5)
    np.testing.assert_allclose(found[1, 0], np.maximum(*bumps), rtol=1e-5)
    assert (local_field(-values[0], *values[1:], torch.tensor([False, True]), size) <= 1).all()


def test_contrast_changes_keep_lesions_visible(rng):
    y, x = np.mgrid[:SIZE, :SIZE]
    away = np.hypot(y - 70, x - 90)
    lesion, ring = away < 14, (away > 16) & (away < 22)
    case = prepared(rng, ventricles=False)
    case.image[:, 0] += (0.6 * lesion * case.brain).astype(np.float16)
    stage = replace(maker(case).config.denoiser_stage, share_normal=1.0, share_painted=0.0)
    planes = maker(case, stage=stage, augment=replace(STILL, contrast=0.7, bias=0.5)).samples(0, 80)["planes"]
    gained = [float(p[1][lesion].median() - p[1][ring].median()) / 0.6 for p in planes]
    low, high = np.quantile(gained, (0.05, 0.95))
    assert low > 0.4, "lesions fade, but not away"
    assert high < 2.5
    assert (planes[:, 1][:, torch.from_numpy(case.brain[2])] > LOW + AIR_MARGIN).all(), (
        "dark tissue is not air"
    )


def test_geometry_moves_masks_with_what_they_mark(rng):
    case = prepared(rng, ventricles=False)
    marked = np.zeros((5, SIZE, SIZE), np.float16)
    marked[:, 50:80, 60:100] = 1
    case.image[:, 0][marked > 0] = 1.5
    case.mask, case.weight, case.label = marked, np.ones_like(marked), np.ones(5, np.int8)
    stage = replace(maker(case).config.denoiser_stage, share_masked=1.0, share_painted=0.0)
    moving = replace(Augmentation(), **{p: 0.0 for p in ("contrast", "bias", "strong_bias", "local_bias", "blur", "coarse", "ringing", "noise", "saturation")})  # fmt: skip
    batch = maker(case, stage=stage, augment=moving).samples(0, 16)
    for planes, mask in zip(batch["planes"], batch["mask"], strict=True):
        bright, inside = planes[1] > 0.75, mask[0] > 0
        assert 2 * (bright & inside).sum() / (bright.sum() + inside.sum()) > 0.95


def test_neighbouring_planes_share_a_large_lesion_and_lose_a_small_one(rng):
    case = prepared(rng, offset_mm=6.0)
    case.image[:] = case.image[2]

    def shared(kind):
        batch = maker(case, only(kind, symmetric=0.0, core=0.0, rim=0.0)).samples(0, 24)
        ratios = []
        for planes, mask in zip(batch["planes"], batch["mask"][:, 0] > 0, strict=True):
            change = (planes - middle(case)).abs()
            if mask.sum() > 5:
                ratios.append(float(change[[0, 2]][:, mask].mean() / change[1][mask].mean()))
        return np.median(ratios)

    assert shared(LARGE) > 0.5
    assert shared(SMALL) < 0.4


def test_reflection_twice_is_the_slice_again(rng):
    random = SampleRandom(1, 3, np.arange(6))
    moved = geometry.draw_geometry(random, Augmentation(), np.zeros((6, 2)), np.full((6, 2), 100.0), SIZE)
    mirror = geometry.draw_mirror(random, moved["matrix"], moved["shift"], 0.0)
    points = rng.normal(size=(6, 4, 2)) * 30
    once = points @ mirror["reflection"].transpose(0, 2, 1) + mirror["reflection_offset"][:, None]
    twice = once @ mirror["reflection"].transpose(0, 2, 1) + mirror["reflection_offset"][:, None]
    assert twice == pytest.approx(points)
