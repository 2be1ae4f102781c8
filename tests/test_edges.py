"""Where a lesion ends by its brightness."""

import numpy as np
import pytest
from scipy import ndimage

from ddmd.training.edges import HALF_CONTRAST_LOGITS, REACH_PX, follow_edges


def disc(radius: float, centre: tuple[int, int] = (40, 40), shape: tuple[int, int] = (80, 80)) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture
def head() -> np.ndarray:
    return np.ones((3, 80, 80), bool)


@pytest.fixture
def texture() -> np.ndarray:
    """Brightness of healthy tissue, standard deviation 0.1 after smoothing."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(3, 80, 80)), (0, 0.5, 0.5))
    return (0.1 * noise / noise.std()).astype(np.float32)


@pytest.mark.parametrize("teacher_radius", [10, 12, 16])
def test_too_large_and_too_small_masks_end_at_the_edge(head, texture, teacher_radius):
    lesion = np.stack([disc(12)] * 3)
    teacher = disc(teacher_radius).astype(float)
    probability = np.stack([0.95 * ndimage.gaussian_filter(teacher, 2.5)] * 3).astype(np.float32)
    components = probability >= 0.5
    followed = follow_edges(probability, components, lesion + texture, head)
    assert overlap(followed >= 0.5, lesion) > 0.95
    assert overlap(followed >= 0.5, lesion) >= overlap(components, lesion)
    assert followed.dtype == np.float32


def test_brightness_moves_the_logit_by_what_it_says(head):
    image = np.zeros((3, 80, 80), np.float32)
    image[:, 20:60, 20:60] = 1.0
    probability = np.zeros_like(image)
    probability[:, 22:58, 22:58] = 0.9
    probability[:, 23:25, 23:57] = 0.3
    followed = follow_edges(probability, probability >= 0.5, image, head)
    logit = np.log(np.maximum(followed, 1e-9) / (1 - followed))
    assert logit[1, 40, 40] == pytest.approx(np.log(9) + HALF_CONTRAST_LOGITS, abs=1e-3), (
        "as bright as the core"
    )
    assert logit[1, 23, 40] == pytest.approx(np.log(3 / 7) + HALF_CONTRAST_LOGITS, abs=1e-3)
    dark = followed[1, 40, 62]
    assert dark == pytest.approx(
        1 / (1 + np.exp(-np.log(1e-3 / (1 - 1e-3)) + HALF_CONTRAST_LOGITS)), rel=1e-3
    )


def test_nothing_changes_without_a_clear_edge_or_surroundings(head, texture):
    probability = np.stack([0.9 * disc(12)] * 3).astype(np.float32)
    components = probability >= 0.5
    for image in (texture, np.zeros_like(texture), -10 * components + texture, 0.03 * components + texture):
        assert (follow_edges(probability, components, image, head) == probability).all()
    assert (follow_edges(probability, components, components + texture, components) == probability).all()
    assert (follow_edges(probability, np.zeros_like(components), texture, head) == probability).all()


def test_what_is_far_or_another_component_or_outside_the_head_is_left_alone(texture):
    one, other = np.stack([disc(8, (25, 25))] * 3), np.stack([disc(8, (25, 44))] * 3)
    other[:, :, :35] = False
    head = np.ones((3, 80, 80), bool)
    head[:, :14] = False
    image = one + texture
    image[0, 40:60, 40:60] = 1.0  # as bright as the lesion, far from it
    probability = np.where(one | other, 0.8, 0.1).astype(np.float32)
    followed = follow_edges(probability, one | other, image, head)
    assert (followed[one & head] > 0.8).mean() > 0.99
    assert (followed[other] == np.float32(0.8)).all(), (
        "dark: no edge of its own, and not moved by its neighbour"
    )
    away = np.stack([ndimage.distance_transform_edt(~plane) for plane in one])
    assert (followed[(away > REACH_PX) & ~other] == np.float32(0.1)).all()
    assert (followed[~head] == probability[~head]).all()


def test_components_of_one_slice_leave_other_slices_alone(head, texture):
    one = np.zeros((3, 80, 80), bool)
    one[1] = disc(10)
    probability = np.where(one, 0.8, 0.1).astype(np.float32)
    followed = follow_edges(probability, one, one + texture, head)
    assert (followed[[0, 2]] == probability[[0, 2]]).all()
    assert (followed[1][one[1]] > 0.8).mean() > 0.99


def test_a_contrast_of_one_and_a_half_spreads_moves_half_as_far(head):
    lesion = np.stack([disc(12)] * 3)
    image = np.zeros((3, 80, 80), np.float32)
    image[:, ::4] = 1.0  # stripes, smoothed alike everywhere
    spread = ndimage.gaussian_filter(image, (0, 0.5, 0.5))[:, 8:72, 8:72].std()
    image += np.float32(1.5 * spread) * lesion
    probability = np.where(lesion, 0.8, 0.1).astype(np.float32)
    gain = {}
    for strength in (1.0, 20.0):
        followed = follow_edges(probability, lesion, image + (strength - 1) * spread * lesion, head)
        gain[strength] = np.median(np.log(followed / (1 - followed))[lesion] - np.log(4))
    assert gain[1.0] == pytest.approx(HALF_CONTRAST_LOGITS / 2, rel=0.2)
    assert gain[20.0] == pytest.approx(HALF_CONTRAST_LOGITS, rel=0.05)


def test_a_lesion_at_the_border_of_the_image_is_followed_too(head, texture):
    lesion = np.stack([disc(12, (2, 40))] * 3)
    probability = np.stack([0.95 * ndimage.gaussian_filter(disc(16, (2, 40)).astype(float), 2.5)] * 3)
    followed = follow_edges(probability.astype(np.float32), probability >= 0.5, lesion + texture, head)
    assert overlap(followed >= 0.5, lesion) > 0.95
