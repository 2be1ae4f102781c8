"""Pseudo-masks: where the teacher sees lesion on positive slices, moved to the edge that the image shows."""

import numpy as np
import pytest

from ddmd.training.pseudo_masks import (
    BESIDE,
    DOUBTED,
    ELSEWHERE,
    GROWTH,
    SURE,
    bodies,
    doubt,
    grown,
    thresholds,
    trust,
)


def disc(shape: tuple[int, int], centre: tuple[int, int], radius: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


@pytest.fixture
def scan(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A noisy slice (96, 96) with a bright lesion, the lesion, and the brain."""
    brain, lesion = disc((96, 96), (48, 48), 40), disc((96, 96), (40, 52), 12)
    image = np.where(brain, rng.normal(0, 0.1, brain.shape) + 0.9 * lesion, -2.0)
    return image.astype(np.float32), lesion, brain


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_mask_that_covers_a_part_grows_to_the_edge_and_one_that_spills_shrinks_to_it(scan):
    image, lesion, brain = scan
    for start in (disc(brain.shape, (43, 50), 5), disc(brain.shape, (40, 52), 15)):
        before, after = overlap(start, lesion), overlap(grown(start, image, brain), lesion)
        assert after > 0.93 > before, f"{before:.2f} became {after:.2f}"


def test_growth_stays_near_the_mask_and_in_the_brain(scan):
    brain = scan[2]
    start = disc(brain.shape, (40, 52), 6)
    other = disc(
        brain.shape, (40, 52), 6 + 2 * GROWTH + 6
    )  # brighter tissue ends beyond what two steps reach
    mask = grown(start, np.where(other, 1.0, 0.0).astype(np.float32), brain)
    y, x = np.nonzero(mask)
    assert np.hypot(y - 40, x - 52).max() <= 6 + 2 * GROWTH + 2
    assert not (mask & ~brain).any()


def test_a_lesion_without_contrast_keeps_the_teachers_edge(scan):
    image, lesion, brain = scan
    assert (grown(lesion, np.zeros_like(image), brain) == lesion).all()
    assert (grown(lesion, -image, brain) == lesion).all(), "dark lesions are not grown"


def test_bodies_only_on_positive_slices_and_where_something_is_probable(scan):
    _, lesion, _ = scan
    levels = np.array([0.4, 0.4, 0.1, 0.4, 0.0, 0.0, 0.1], np.float32)
    probability = levels[:, None, None] * lesion
    threshold = thresholds(probability, np.array([False, True, True, True, True, True, True]))
    assert threshold.tolist() == [np.inf, pytest.approx(0.2), np.inf, pytest.approx(0.2), *[np.inf] * 3]
    large, small = bodies(probability, threshold)
    assert large.any(axis=(1, 2)).tolist() == [False, True, False, True, False, False, False], (
        "not on a negative slice, nor where it is faint"
    )
    assert overlap(large[1], lesion) > 0.98, "half of the peak is the threshold where the peak is low"
    assert not small.any()


def test_bodies_much_smaller_than_the_largest_are_set_apart(scan):
    _, lesion, brain = scan
    speck = disc(brain.shape, (70, 40), 2)
    probability = np.stack([0.9 * (lesion | speck)] * 3).astype(np.float32)
    large, small = bodies(probability, np.full(3, 0.45))
    assert (large & lesion).any()
    assert not (large & speck).any()
    assert (small & speck).any()


def test_trust_is_less_where_draws_disagree_and_where_the_masks_do(scan):
    _, lesion, _ = scan
    probability, sure = 0.8 * lesion.astype(np.float32), np.zeros(lesion.shape, np.float32)
    weight = trust(lesion, probability, sure, 0.4)
    assert weight.min() == weight.max() == 1.0
    unsure = trust(lesion, probability, np.where(lesion, 0.3, 0.0), 0.4)
    assert unsure[lesion].max() < 1.0
    assert unsure[~lesion].min() == 1.0
    moved = np.roll(lesion, 4, 0)
    weight = trust(moved, probability, sure, 0.4)
    assert weight[moved != lesion].max() <= DOUBTED
    assert weight[moved == lesion].min() == 1.0


def test_doubt_falls_as_what_was_found_is_surer(scan):
    found = scan[1][None]
    levels = (0.3, SURE[0], sum(SURE) / 2, SURE[1], 1.0)
    doubts = [doubt(level * found.astype(np.float64), found) for level in levels]
    assert doubts == pytest.approx([1, 1, 0.5, 0, 0])
    assert doubt(np.ones(found.shape), np.zeros_like(found)) == 1.0, "nothing was found"


def test_a_doubtful_mask_says_nothing_of_what_is_far_from_it(scan):
    _, lesion, _ = scan
    probability, sure = 0.8 * lesion.astype(np.float32), np.zeros(lesion.shape, np.float32)
    far = ~disc(lesion.shape, (40, 52), 12 + BESIDE + 1)
    near = disc(lesion.shape, (40, 52), 12 + BESIDE / 2)  # BESIDE counts steps along the axes
    for doubtful, left in ((0.0, 1.0), (0.5, (1 + ELSEWHERE) / 2), (1.0, ELSEWHERE)):
        weight = trust(lesion, probability, sure, 0.4, doubtful)
        assert weight[near].min() == 1.0
        assert weight[far] == pytest.approx(left)
