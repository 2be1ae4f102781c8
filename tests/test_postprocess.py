"""Lesions of a probability map against a flood fill written out, and the score against what it promises."""

from collections import deque
from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from ddmd.evaluation.case_metrics import case_metrics
from ddmd.inference.draws import summarise_draws
from ddmd.inference.postprocess import (
    SCORE_ML,
    LesionCriteria,
    find_lesions,
    label_components,
    lesion_evidence,
    lesion_score,
)
from ddmd.io.volume import Volume


def flood_fill(mask):
    """Components (26 neighbours) as lists of voxels, by a queue."""
    open_voxels, components = set(map(tuple, np.argwhere(mask))), []
    while open_voxels:
        queue, component = deque([open_voxels.pop()]), []
        while queue:
            voxel = queue.popleft()
            component.append(voxel)
            for step in product((-1, 0, 1), repeat=3):
                neighbour = tuple(int(a + b) for a, b in zip(voxel, step, strict=True))
                if neighbour in open_voxels:
                    open_voxels.remove(neighbour)
                    queue.append(neighbour)
        components.append(component)
    return components


@pytest.mark.parametrize(("large_ml", "share"), [(0.3, 0.5), (0.3, 1.0), (0.0, 0.5), (1e4, 0.5)])
def test_large_lesions_reach_out_to_their_outline(rng, large_ml, share):
    """All by flood fill: what is accepted at the threshold, and where that is large in a region, the region near it."""
    probability = np.clip(rng.random((14, 11, 9)).astype(np.float32) ** 4, 0, 1)
    affine = np.diag([2.0, 4.0, 3.0, 1.0])
    criteria = LesionCriteria(0.5, 0.03, 0.8, large_ml=large_ml, outline_share=share)
    voxel_ml, reach = 0.024, np.array([2, 1, 1])  # of 5 mm
    accepted = np.zeros(probability.shape, bool)
    for component in flood_fill(probability >= 0.5):
        at = tuple(np.array(component).T)
        accepted[at] = len(component) * voxel_ml >= 0.03 and probability[at].max() >= 0.8
    outlined, large, core = accepted.copy(), [], []
    for region in flood_fill(probability >= 0.5 * share):
        kept = [voxel for voxel in region if accepted[voxel]]
        if kept and len(kept) * voxel_ml >= large_ml - 1e-9:
            large, core = large + region, core + kept
    for voxel in large:
        outlined[voxel] |= (abs(np.array(core) - voxel) <= reach).all(1).any()
    components = [c for c in flood_fill(outlined) if any(accepted[voxel] for voxel in c)]
    labels = label_components(probability, affine, criteria)
    assert {tuple(v) for v in np.argwhere(labels)} == {voxel for c in components for voxel in c}
    sizes = np.bincount(labels.ravel())[1:]
    assert sorted(sizes, reverse=True) == sizes.tolist() == sorted(map(len, components), reverse=True)
    assert bool(large) == (large_ml < 1e4)
    assert ((labels > 0) != accepted).any() == (share < 1 and large_ml < 1e4)


def test_two_parts_within_one_outline_are_large_together():
    probability = np.zeros((12, 3, 3), np.float32)
    probability[1:11, 1, 1] = 0.4
    probability[2:4, 1, 1] = probability[8:10, 1, 1] = 0.9
    ten_mm, four_mm = np.diag([10.0, 10.0, 10.0, 1.0]), np.diag([4.0, 10.0, 25.0, 1.0])  # 1 ml a voxel
    parts = LesionCriteria(0.6, large_ml=5.0, outline_share=0.5)
    assert label_components(probability, four_mm, parts).max() == 2, "4 ml together"
    whole = LesionCriteria(0.6, large_ml=4.0, outline_share=0.5)
    assert np.array_equal(label_components(probability, ten_mm, whole) > 0, probability > 0.5), (
        "5 mm is no voxel"
    )
    found = label_components(probability, four_mm, whole)
    assert found[:, 1, 1].tolist() == [0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0], "one voxel of 4 mm, not two"
    assert whole.outline == pytest.approx(0.3)
    with pytest.raises(ValueError, match="outline_share is 0"):
        LesionCriteria(0.6, outline_share=0.0)


def test_an_outline_leaves_out_what_joins_the_lesion_only_out_of_reach():
    """A lesion whose outline bends back: what is near in space but joined far away is no lesion of its own."""
    probability = np.zeros((12, 6, 1), np.float32)
    probability[1:4, 1, 0] = 0.9
    probability[4:11, 1, 0] = probability[10, 1:4, 0] = probability[2:11, 3, 0] = 0.4
    found = label_components(
        probability, np.diag([1.0, 2.0, 3.0, 1.0]), LesionCriteria(0.6, outline_share=0.5)
    )
    assert np.array_equal(np.argwhere(found), [[x, 1, 0] for x in range(1, 9)])


@pytest.mark.parametrize(("min_ml", "min_peak"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.9), (0.06, 0.8)])
def test_labels_and_rows_are_those_of_a_flood_fill(rng, min_ml, min_peak):
    probability = rng.random((14, 11, 9)).astype(np.float32) ** 3
    uncertainty = rng.random(probability.shape).astype(np.float32)
    affine = np.array([[0, -2.0, 0, 5], [3.0, 0, 0, -7], [0, 0.5, 4.0, 1], [0, 0, 0, 1]])  # 24 mm3 a voxel
    criteria = LesionCriteria(0.4, min_ml, min_peak)
    result = find_lesions(probability, uncertainty, affine, criteria)
    wanted = []
    for component in flood_fill(probability >= 0.4):
        at = tuple(np.array(component).T)
        if len(component) * 0.024 >= min_ml - 1e-9 and probability[at].max() >= min_peak:
            wanted.append(at)
    assert len(result.lesions) == len(wanted)
    assert result.labels.dtype == np.int32
    assert result.labels.max(initial=0) == len(wanted)
    assert np.array_equal(result.mask, result.labels > 0)
    volumes = [lesion.volume_ml for lesion in result.lesions]
    assert volumes == sorted(volumes, reverse=True)
    for at in wanted:
        (number,) = np.unique(result.labels[at])
        assert (result.labels == number).sum() == len(at[0])
        lesion = result.lesions[number - 1]
        assert lesion.volume_ml == pytest.approx(len(at[0]) * 0.024)
        assert lesion.peak_probability == pytest.approx(probability[at].max())
        assert lesion.mean_probability == pytest.approx(probability[at].astype(float).mean())
        assert lesion.mean_uncertainty == pytest.approx(uncertainty[at].astype(float).mean())
        centre = [affine[:3, :3] @ voxel + affine[:3, 3] for voxel in zip(*at, strict=True)]
        assert lesion.centre_mm == pytest.approx(np.mean(centre, axis=0))


def test_a_map_without_candidates_has_no_lesions():
    result = find_lesions(*np.zeros((2, 5, 5, 5), np.float32), np.eye(4), LesionCriteria(0.5))
    assert result.lesions == ()
    assert not result.labels.any()
    assert result.labels.shape == (5, 5, 5)


def test_nan_is_never_lesion():
    probability = np.full((3, 3, 3), np.nan, np.float32)
    probability[1, 1, 1] = 0.9
    labels = label_components(probability, np.eye(4), LesionCriteria(0.5))
    assert labels.sum() == labels[1, 1, 1] == 1


def test_evidence_is_the_mean_of_the_most_probable_half_millilitre():
    probability = np.zeros((20, 20, 20), np.float32)
    probability[:2, 0, 0] = 0.5, 1.0
    count = round(SCORE_ML * 1000)
    assert lesion_evidence(probability, 0.001) == pytest.approx(1.5 / count), "the rest counts as 0"
    probability[5:15] = np.linspace(0.1, 0.9, 4000, dtype=np.float32).reshape(10, 20, 20)
    assert lesion_evidence(probability, 0.001) == pytest.approx(
        np.sort(probability, None)[-count:].mean(), rel=1e-5
    )
    assert lesion_evidence(np.full((2, 2, 2), 0.9, np.float32), 0.01) == pytest.approx(0.9 * 8 / 50)


def test_a_volume_with_lesions_scores_above_every_volume_without(rng):
    levels = np.sort(np.concatenate(([0.0, 1.0], rng.random(50))))
    maps = [np.full((10, 10, 10), level, np.float32) for level in levels]
    without, with_lesions = (
        np.array([lesion_score(p, 0.001, found) for p in maps]) for found in (False, True)
    )
    for scores in (without, with_lesions):
        assert (np.diff(scores) >= 0).all(), "the score never falls as the evidence rises"
        inner = np.diff(scores[(levels > 0.01) & (levels < 0.99)])
        assert (inner > 0).all()
    assert 0 <= without.min() <= without.max() < 0.5 < with_lesions.min() <= with_lesions.max() <= 1


def test_a_network_that_broke_has_no_score():
    probability = np.zeros((20, 20, 20), np.float32)
    probability[0, 0, 0] = np.nan
    assert np.isnan(lesion_score(probability, 0.001, False))
    assert np.isnan(lesion_score(probability, 0.001, True))


def test_a_component_of_exactly_the_least_volume_is_a_lesion():
    probability = np.zeros((8, 8, 8), np.float32)
    probability[2, 2, 2:4] = 0.9  # two voxels
    probability[6, 6, 6] = 0.9
    for side in (3.0, np.nextafter(3.0, 0), 2.0 * 1.5):
        labels = label_components(
            probability, np.diag([1.0, 1.0, side, 1.0]), LesionCriteria(0.5, min_ml=0.006)
        )
        assert np.array_equal(labels > 0, np.where(probability > 0, [[[0, 0, 1, 1, 0, 0, 0, 0]]], 0))


def test_volumes_are_those_of_the_grid_whose_axes_are_not_at_right_angles(rng):
    """A voxel has 8 mm3, and sides of 1 x 1 x 10.2 mm. All that counts voxels agrees."""
    affine = np.diag([1.0, 1.0, 8.0, 1.0])
    affine[0, 2] = 6.4
    values = np.zeros((30, 30, 8), np.float32)
    values[5:25, 5:25] = rng.uniform(90, 110, (20, 20, 8))
    volume = Volume.from_array({"flair": values}, affine, brain=values > 0, skull="off", bias="off")
    probability = np.zeros(values.shape, np.float32)
    probability[8:13, 8:13, 2] = 0.9  # 25 voxels
    exactly, more = LesionCriteria(0.5, min_ml=0.2), LesionCriteria(0.5, min_ml=0.21)
    assert label_components(probability, affine, exactly).max() == 1
    assert label_components(probability, affine, more).max() == 0, (
        "by the product of the sides it would be 0.256 ml"
    )
    around = np.where(ndimage.binary_dilation(probability > 0), np.maximum(probability, 0.3), 0).astype(
        np.float32
    )
    for large_ml, outlined in ((0.2, True), (0.21, False)):
        criteria = LesionCriteria(0.5, large_ml=large_ml, outline_share=0.5)
        assert ((label_components(around, affine, criteria) > 0).sum() > 25) == outlined
    (lesion,) = find_lesions(probability, 0 * probability, affine, exactly).lesions
    row = case_metrics("p", "p", volume, probability, 0 * probability, probability > 0, exactly).row
    draws = np.where(probability > 0, 255, 0).astype(np.uint8)[None]
    summary = summarise_draws(draws, (probability > 0).astype(np.int32), affine, scale=1.0)
    found = (
        lesion.volume_ml,
        row["lesion_ml"],
        row["detected_ml"],
        *summary.volumes_ml,
        *summary.lesion_intervals_ml[0],
    )
    assert found == pytest.approx([0.2] * 6)
