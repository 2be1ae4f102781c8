"""Contrast of components against medians written out, and which components are too faint beside the main one."""

import numpy as np
import pytest

from ddmd.evaluation.case_metrics import THRESHOLDS, case_metrics
from ddmd.inference.lesion_contrast import RING_MM, BrightImage, bright_enough, lesion_contrasts
from ddmd.inference.make_detection import make_detection
from ddmd.inference.postprocess import LesionCriteria, find_lesions, label_components
from ddmd.inference.volume_maps import Prepared, VolumeMaps
from ddmd.io.volume import Volume
from tests.volumes import tiny_system

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def volume_of(images: dict[str, np.ndarray], affine: np.ndarray = AFFINE) -> Volume:
    brain = np.ones(next(iter(images.values())).shape, np.uint8)
    return Volume.from_array(images, affine, brain=brain, skull="off", bias="off")


def blobs(*corners: tuple[int, int, int]) -> np.ndarray:
    """Blocks of 4 x 3 x 2 voxels, labelled from 1 in the order given, in a volume of 40 x 30 x 6."""
    labels = np.zeros((40, 30, 6), np.int32)
    for number, (x, y, z) in enumerate(corners, 1):
        labels[x : x + 4, y : y + 3, z : z + 2] = number
    return labels


def written_out(labels, image, around, radius):
    """The definition, voxel by voxel."""
    contrasts = []
    for number in range(1, labels.max() + 1):
        inside, ring = [], []
        for voxel in np.ndindex(labels.shape):
            box = tuple(slice(max(0, v - r), v + r + 1) for v, r in zip(voxel, radius, strict=True))
            if labels[voxel] == number:
                inside.append(image[voxel])
            elif around[voxel] and (labels[box] == number).any():
                ring.append(image[voxel])
        contrasts.append(np.median(inside) - np.median(ring) if ring else np.nan)
    return contrasts


def test_contrasts_are_those_of_the_definition(rng):
    labels = blobs((0, 0, 0), (36, 27, 4), (8, 4, 1), (14, 4, 1))
    image = rng.normal(size=labels.shape).astype(np.float32)
    around = (labels == 0) & (rng.random(labels.shape) < 0.8)
    found = lesion_contrasts(labels, [1, 2, 3, 4], image, around, (4, 2, 0))
    assert found == pytest.approx(written_out(labels, image, around, (4, 2, 0)), rel=1e-6)
    assert lesion_contrasts(labels, [3], image, around, (4, 2, 0)) == pytest.approx(found[2:3])


def test_a_component_without_surroundings_has_no_contrast_and_stays():
    labels = blobs((8, 4, 1), (20, 20, 1))
    around = np.zeros(labels.shape, bool)
    around[18:26, 18:26, 1] = True
    around &= labels == 0
    contrasts = lesion_contrasts(labels, [1, 2], labels.astype(np.float32), around, (4, 2, 0))
    assert np.isnan(contrasts[0])
    assert contrasts[1] == 2.0
    assert bright_enough(contrasts, np.array([1.0, 5.0]), 1.0).tolist() == [True, True]


@pytest.mark.parametrize("main", [0.0, -1.0, np.nan])
def test_all_stay_where_the_main_component_is_not_bright(main):
    assert bright_enough(np.array([main, -3.0, 2.0]), np.array([9.0, 1.0, 1.0]), 0.5).all()
    assert bright_enough(np.zeros(0), np.zeros(0), 0.5).shape == (0,)


def two_lesions(strength: float):
    """Probability 0.9 in both, contrast 1 in the larger and `strength` in the smaller one; the head ends nearby."""
    labels = blobs((0, 4, 1), (4, 4, 1), (20, 20, 1))
    labels[labels == 2] = 1
    image = 100 + 10 * (labels == 1) + 10 * strength * (labels == 3)
    return labels, np.where(labels > 0, np.float32(0.9), np.float32(0.1)), image.astype(np.float32)


@pytest.mark.parametrize(("strength", "found"), [(0.45, 1), (0.55, 2), (3.0, 2)])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.01, -50.0)])
def test_faint_components_are_no_lesions_whatever_the_unit_of_the_image(strength, found, scale, offset):
    labels, probability, image = two_lesions(strength)
    bright = BrightImage(scale * image + offset, np.ones(labels.shape, bool), (4, 2, 0))
    criteria = LesionCriteria(0.5, min_relative_contrast=0.5)
    lesions = find_lesions(probability, 0 * probability, AFFINE, criteria, bright)
    assert len(lesions.lesions) == lesions.labels.max() == found
    assert np.array_equal(lesions.mask, (labels == 1) | ((labels == 3) & (found == 2)))
    assert label_components(probability, 0.006, criteria, bright).max() == found
    for without in (
        label_components(probability, 0.006, criteria),
        label_components(probability, 0.006, LesionCriteria(0.5), bright),
    ):
        assert without.max() == 2, "one without an image, one without the criterion"


def test_what_another_criterion_leaves_out_is_not_the_main_component():
    labels, probability, image = two_lesions(0.3)
    probability[labels == 3] = 0.95
    bright = BrightImage(image, np.ones(labels.shape, bool), (4, 2, 0))
    kept = label_components(probability, 0.006, LesionCriteria(0.5, 0.0, 0.92, 0.5), bright)
    assert np.array_equal(kept > 0, labels == 3)


def test_the_image_is_flair_and_the_ring_has_the_same_width_in_any_voxels(rng):
    image = 1 + rng.random((40, 30, 6)).astype(np.float32)
    volume = volume_of({"t1": image, "flair": 2 * image})
    bright = BrightImage.of(volume)
    assert np.array_equal(bright.values, volume.images["flair"])
    assert np.array_equal(bright.tissue, volume.search_region)
    assert bright.radius == (RING_MM, RING_MM / 2, 0)
    coarse = volume_of({"flair": image}, np.diag([9.0, 9.0, 9.0, 1.0]))
    assert BrightImage.of(coarse).radius == (1, 1, 0)
    assert BrightImage.of(volume_of({"t1": image})) is None


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_evaluation_and_detection_apply_what_the_weights_say(rng, least):
    labels, probability, image = two_lesions(0.3)
    volume = volume_of({"flair": image + 0.1 * rng.random(image.shape).astype(np.float32)})
    criteria = LesionCriteria(0.5, min_relative_contrast=least)
    truth = labels == 1
    case = case_metrics("p", "p", volume, probability, 0 * probability, truth, criteria)
    false = int((labels == 3).sum()) * (least == 0.0)
    assert case.confusion[:3].tolist() == [truth.sum(), false, 0]
    assert case.by_threshold[np.argmin(np.abs(THRESHOLDS - 0.5))].tolist() == case.confusion.tolist()
    assert case.by_threshold[0].tolist() == [truth.sum(), (~truth).sum(), 0, 0], "all of it is one component"

    system = tiny_system()
    maps = VolumeMaps(probability, 0 * probability, 0 * probability, 0 * probability)
    found = make_detection(
        system, Prepared(volume, None), maps, None, system.description.sampling_config, criteria, False, 0.0
    )
    assert len(found.lesions) == 1 + (least == 0.0)
    assert found.provenance["MinRelativeContrast"] == least
