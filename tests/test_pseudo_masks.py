"""Pseudo-masks: the components a teacher takes for lesion on positive slices, and their loss weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddmd.cohort.cases import Case
from ddmd.models.denoiser import DenoiserConfig
from ddmd.training.config import DenoiserStage
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.prepared_case import PreparedCase
from ddmd.training.pseudo_masks import (
    FAR_WEIGHT,
    NEAR_MARGIN_PX,
    TEACHER_CERTAINTY,
    candidate_components,
    make_pseudo_mask,
    teacher_uncertainty,
    thresholds,
    update_pseudo_masks,
)


def disc(shape: tuple[int, int], centre: tuple[int, int], radius: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


@pytest.fixture
def lesion() -> np.ndarray:
    return disc((96, 96), (40, 52), 12)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_components_only_on_positive_slices_and_where_something_is_probable(lesion):
    levels = np.array([0.4, 0.4, 0.1, 0.4, 0.0, 0.0, 0.1], np.float32)
    probability = levels[:, None, None] * lesion
    threshold = thresholds(probability, np.array([False, True, True, True, True, True, True]))
    assert threshold.tolist() == [np.inf, pytest.approx(0.2), np.inf, pytest.approx(0.2), *[np.inf] * 3]
    found = candidate_components(probability, threshold)
    assert found.any(axis=(1, 2)).tolist() == [False, True, False, True, False, False, False], (
        "not on a negative slice, nor where it is faint"
    )
    assert overlap(found[1], lesion) > 0.98, "half of the peak is the threshold where the peak is low"


def test_components_much_smaller_than_the_largest_are_left_out(lesion):
    speck = disc(lesion.shape, (70, 40), 2)
    probability = np.stack([0.9 * (lesion | speck)] * 3).astype(np.float32)
    found = candidate_components(probability, np.full(3, 0.45))
    assert (found & lesion).any()
    assert not (found & speck).any()


def test_uncertainty_falls_as_components_are_more_probable(lesion):
    found = lesion[None]
    levels = (0.3, TEACHER_CERTAINTY[0], sum(TEACHER_CERTAINTY) / 2, TEACHER_CERTAINTY[1], 1.0)
    levels_of = [teacher_uncertainty(level * found.astype(np.float64), found) for level in levels]
    assert levels_of == pytest.approx([1, 1, 0.5, 0, 0])
    assert teacher_uncertainty(np.ones(found.shape), np.zeros_like(found)) == 1.0, "nothing was found"


def test_intermediate_probabilities_get_zero_loss_weight(lesion):
    core, rim = disc(lesion.shape, (40, 52), 6), disc(lesion.shape, (40, 52), 15)
    probability = np.where(core, 1.0, np.where(lesion, 0.7, np.where(rim, 0.2, 0.0))).astype(np.float32)
    mask, weight = make_pseudo_mask(lesion, probability, np.zeros(lesion.shape), 0.5)
    assert (mask == core).all()
    assert (weight == np.where(core | ~rim, 1.0, 0.0)).all()
    mask, weight = make_pseudo_mask(lesion, probability, np.zeros(lesion.shape), 0.5, limits=(0.3, 0.6))
    assert (mask == lesion).all()
    assert (weight == 1.0).all(), "nothing lies between closer limits"


def test_an_uncertain_component_is_lesion_as_a_whole_and_far_pixels_get_little_weight(lesion):
    probability = np.where(lesion, 0.4, 0.0).astype(np.float32)
    probability[disc(lesion.shape, (40, 52), 3)] = 1.0
    far = ~disc(lesion.shape, (40, 52), 12 + NEAR_MARGIN_PX + 1)
    near = (
        disc(lesion.shape, (40, 52), 12 + NEAR_MARGIN_PX / 2) & ~lesion
    )  # NEAR_MARGIN_PX counts steps along the axes
    for uncertainty, left in ((0.0, 1.0), (0.5, (1 + FAR_WEIGHT) / 2), (1.0, FAR_WEIGHT)):
        mask, weight = make_pseudo_mask(lesion, probability, np.zeros(lesion.shape), 0.3, uncertainty)
        assert (mask == lesion).all() == (uncertainty == 1.0)
        assert (weight[near] == 1.0).all()
        assert weight[far] == pytest.approx(left)


def test_weights_are_less_where_draws_disagree(lesion):
    deviation = np.where(lesion, 0.3, 0.0)
    _, weight = make_pseudo_mask(lesion, lesion.astype(np.float32), deviation, 0.5)
    assert weight[lesion] == pytest.approx(0.5)
    assert (weight[~lesion] == 1.0).all()


def test_pixels_outside_components_change_nothing_and_faint_components_are_not_negatives(lesion):
    probability = np.where(lesion, 0.8, 0.0).astype(np.float32)
    probability[80, 20:22] = 1.0  # a speck that opening took away
    mask, weight = make_pseudo_mask(lesion, probability, np.zeros(lesion.shape), 0.5)
    assert (mask == lesion).all()
    assert (weight[80, 20:22] == 0).all()
    faint = np.where(lesion, 0.08, 0.0).astype(np.float32)
    faint[40, 52] = 0.2
    mask, weight = make_pseudo_mask(lesion, faint, np.zeros(lesion.shape), 0.07, 0.5)
    assert mask.sum() == 1
    assert (weight[lesion & ~mask] == 0).all()


def stand_in(stage: DenoiserStage, drawn: torch.Tensor) -> SimpleNamespace:
    """A teacher that draws the same (H, W) on every slice, and its mirror image on mirror images."""
    return SimpleNamespace(
        eval=lambda: None, train=lambda: None, stage=stage, condition=SimpleNamespace(config=DenoiserConfig()),
        draw=lambda image, seed: (drawn if image[0, 0, 0, 0] < 0.5 else drawn.flip(-1)).expand(2, len(image), 1, -1, -1),
    )  # fmt: skip


def examination(label: list[int], shape: tuple[int, int]) -> PreparedCase:
    """Slices that the stand-in tells from their mirror images."""
    image = np.zeros((len(label), 1, *shape), np.float16)
    image[..., :, -1] = 1
    brain = np.ones((len(label), *shape), bool)
    return PreparedCase(
        Case("a", "a", "set", {}), image, brain, brain, np.array(label, np.int8), offset=1, offset_mm=1.0
    )


@pytest.mark.parametrize("uncertain", [True, False])
def test_an_uncertain_teacher_takes_whole_components_for_lesion(lesion, uncertain):
    """On positive slices alone; without teacher uncertainty, intermediate probabilities get zero loss weight."""
    core = disc(lesion.shape, (40, 52), 8)
    drawn = torch.from_numpy(np.where(core, 0.6, np.where(lesion, 0.25, 0.0)).astype(np.float32))
    teacher = stand_in(DenoiserStage(teacher_uncertainty=uncertain, share_symmetric=0.0), drawn)
    item = examination([1, 1, 1, 1, 0], lesion.shape)
    summary = update_pseudo_masks(teacher, DeviceSlices([item], torch.device("cpu"), 1.0), seed=0)
    assert (summary["made"], summary["skipped"], summary["mean_uncertainty"]) == (4, 0, float(uncertain))
    assert not item.mask[4].any()
    far = ~disc(lesion.shape, (40, 52), 12 + NEAR_MARGIN_PX + 1)
    assert (item.mask[0] == (lesion if uncertain else core)).mean() > 0.995, "but for what opening takes"
    assert item.weight[0][far] == pytest.approx(FAR_WEIGHT if uncertain else 1.0, rel=1e-3)
    assert (item.weight[0][lesion & (item.mask[0] == 0)] == 0).all()


@pytest.mark.parametrize("follow", [True, False])
def test_pseudo_masks_end_at_the_edges_that_the_image_shows(lesion, follow):
    """The teacher's mask is too wide, and what it has between the limits teaches nothing unless edges say more."""
    wide, rim = disc(lesion.shape, (40, 52), 14), disc(lesion.shape, (40, 52), 16)
    drawn = torch.from_numpy(np.where(wide, 0.9, np.where(rim, 0.4, 0.0)).astype(np.float32))
    stage = DenoiserStage(follow_edges=follow, pseudo_mask_limits=(0.3, 0.7), share_symmetric=0.0)
    item = examination([1] * 4, lesion.shape)
    item.image[:, 0, lesion] = 0.4  # less than 0.5, by which the stand-in knows mirror images
    update_pseudo_masks(stand_in(stage, drawn), DeviceSlices([item], torch.device("cpu"), 1.0), seed=0)
    mask, weight = item.mask[1] > 0, item.weight[1]
    if follow:
        assert overlap(mask, lesion) > 0.97
        assert (weight[rim & ~wide] == 1).all(), "certain that this is none"
    else:
        assert overlap(mask, wide) > 0.97
        assert (weight[rim & ~wide] == 0).all()


def test_no_edge_is_followed_where_the_first_sequence_is_absent(lesion):
    wide = disc(lesion.shape, (40, 52), 14)
    drawn = torch.from_numpy(np.where(wide, 0.9, 0.0).astype(np.float32))
    masks = []
    for present in (np.array([True]), np.array([False])):
        item = examination([1] * 4, lesion.shape)
        item.image[:, 0, lesion] = 0.4
        slices = DeviceSlices([item], torch.device("cpu"), 1.0)
        item.present = present
        update_pseudo_masks(
            stand_in(DenoiserStage(follow_edges=True, share_symmetric=0.0), drawn), slices, seed=0
        )
        masks.append(item.mask[1] > 0)
    assert overlap(masks[0], lesion) > 0.95
    assert overlap(masks[1], wide) > 0.95
