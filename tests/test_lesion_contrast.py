"""Contrast of components against medians written out, and which components are too faint beside the main one."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ddmd.evaluation.case_metrics import THRESHOLDS, case_metrics, counts_by_threshold
from ddmd.evaluation.metrics import confusion
from ddmd.inference.detector import Detector
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
                inside.append(float(image[voxel]))
            elif around[voxel] and (labels[box] == number).any():
                ring.append(float(image[voxel]))
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


@pytest.mark.parametrize("contrasts", [[0.0, -3.0], [-1.0, -3.0], [np.nan, -3.0], [np.nan, np.nan], []])
def test_all_stay_where_none_is_brighter_than_its_surroundings(contrasts):
    assert bright_enough(np.array(contrasts), np.ones(len(contrasts)), 0.5).tolist() == [True] * len(
        contrasts
    )


@pytest.mark.parametrize(("unseen", "stays"), [(0.0, False), (-1.0, False), (np.nan, True)])
def test_what_is_not_bright_is_never_the_main_component(unseen, stays):
    kept = bright_enough(np.array([unseen, 0.9, 2.0]), np.array([900.0, 1.0, 1.0]), 0.5)
    assert kept.tolist() == [stays, False, True]


@pytest.mark.parametrize(("mass", "stays"), [(8.9, False), (9.1, True)])
def test_the_main_component_is_that_with_the_largest_contrast_times_root_of_mass(mass, stays):
    """Contrasts 1 and 3: from 9 times the mass on, the fainter one is the main one, and nothing is faint beside it."""
    assert bright_enough(np.array([1.0, 3.0]), np.array([mass, 1.0]), 0.5).tolist() == [stays, True]


def two_lesions(strength: float):
    """Probability 0.9 in both, contrast 1 in the larger and `strength` in the smaller one; the head ends nearby."""
    labels = blobs((0, 4, 1), (4, 4, 1), (20, 20, 1))
    labels[labels == 2] = 1
    image = 100 + 10 * (labels == 1) + 10 * strength * (labels == 3)
    return labels, np.where(labels > 0, np.float32(0.9), np.float32(0.1)), image.astype(np.float32)


@pytest.mark.parametrize(("strength", "found"), [(0.45, [1]), (0.55, [1, 3]), (1.9, [1, 3]), (3.0, [3])])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.01, -50.0)])
def test_faint_components_are_no_lesions_whatever_the_unit_of_the_image(strength, found, scale, offset):
    labels, probability, image = two_lesions(strength)
    bright = BrightImage(scale * image + offset, np.ones(labels.shape, bool), (4, 2, 0))
    criteria = LesionCriteria(0.5, min_relative_contrast=0.5)
    lesions = find_lesions(probability, 0 * probability, AFFINE, criteria, bright)
    assert len(lesions.lesions) == lesions.labels.max() == len(found)
    assert np.array_equal(lesions.mask, np.isin(labels, found))
    assert label_components(probability, AFFINE, criteria, bright).max() == len(found)
    for without in (
        label_components(probability, AFFINE, criteria),
        label_components(probability, AFFINE, LesionCriteria(0.5), bright),
    ):
        assert without.max() == 2, "one without an image, one without the criterion"


def test_components_are_left_out_by_the_definition():
    """Of components numbered by scipy: the main one is seen most clearly, and rings lie in the tissue."""
    left_out = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        probability = np.zeros((22, 18, 7), np.float32)
        probability[3:-2, 1:-3, 1:-1] = (
            rng.random((17, 14, 5)) ** 3
        )  # rings reach beyond the box of the candidates
        image, tissue = (
            rng.normal(size=probability.shape).astype(np.float32),
            rng.random(probability.shape) < 0.8,
        )
        image += 3 * probability
        bright = BrightImage(image, tissue, (3, 2, 0))
        parts, count = ndimage.label(probability >= 0.55, np.ones((3, 3, 3)))
        accepted = [n for n in range(1, count + 1) if probability[parts == n].max() >= 0.8]
        around = tissue & (probability < 0.55)
        contrast = dict(zip(range(1, count + 1), written_out(parts, image, around, (3, 2, 0)), strict=True))
        main = max(accepted, key=lambda n: contrast[n] * probability[parts == n].sum() ** 0.5)
        kept = [n for n in accepted if not contrast[n] < 0.7 * contrast[main]]
        left_out += len(accepted) - len(kept)
        criteria = LesionCriteria(0.55, 0.0, 0.8, 0.7)
        assert np.array_equal(
            label_components(probability, np.diag([10.0, 10.0, 10.0, 1.0]), criteria, bright) > 0,
            np.isin(parts, kept),
        )
    assert left_out >= 5


def test_the_summed_probability_decides_between_equal_contrasts_not_the_volume():
    """47 voxels of 0.5 and contrast 6 beside 24 of 1 and contrast 4: 6 root(23.5) is more than 4 root(24)."""
    labels = blobs((4, 4, 1), (20, 20, 1), (24, 20, 1))
    large, surer = labels >= 2, labels == 1
    probability = np.where(large, 0.5, np.where(surer, 1.0, 0.0)).astype(np.float32)
    probability[20, 20, 1] = 0.0
    image = (6.0 * large + 4.0 * surer).astype(np.float32)
    bright = BrightImage(image, np.ones(labels.shape, bool), (4, 2, 0))

    def kept(share: float) -> np.ndarray:
        criteria = LesionCriteria(0.5, min_relative_contrast=share)
        return label_components(probability, np.diag([10.0, 10.0, 10.0, 1.0]), criteria, bright) > 0

    assert np.array_equal(kept(0.66), (labels > 0) & (probability > 0)), "4 of 6 is enough"
    assert np.array_equal(kept(0.68), large & (probability > 0))


@pytest.mark.parametrize("scale", [1.0, 0.3, 1 / 3, 0.7])
def test_exactly_the_least_contrast_is_enough_however_the_image_is_scaled(scale):
    labels, probability, _ = two_lesions(0.5)
    image = ((100 + 100 * (labels == 1) + 50 * (labels == 3)) * np.float32(scale)).astype(np.float32)
    bright = BrightImage(image, np.ones(labels.shape, bool), (4, 2, 0))
    criteria = LesionCriteria(0.5, min_relative_contrast=0.5)
    assert label_components(probability, np.diag([10.0, 10.0, 10.0, 1.0]), criteria, bright).max() == 2
    with pytest.raises(ValueError, match="min_relative_contrast is 5"):
        LesionCriteria(0.5, min_relative_contrast=5.0)


def test_what_another_criterion_leaves_out_is_not_the_main_component():
    labels, probability, image = two_lesions(0.3)
    probability[labels == 3] = 0.95
    bright = BrightImage(image, np.ones(labels.shape, bool), (4, 2, 0))
    kept = label_components(probability, AFFINE, LesionCriteria(0.5, 0.0, 0.92, 0.5), bright)
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
    criteria = LesionCriteria(0.5, min_relative_contrast=least, large_ml=7.0, outline_share=0.9)
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
    keys = ("MinRelativeContrast", "LargeLesionMl", "OutlineShare")
    assert [found.provenance[key] for key in keys] == [least, 7.0, 0.9]


def test_a_detector_asks_for_what_the_description_says():
    system = tiny_system()
    values = {"threshold": 0.41, "min_lesion_ml": 0.2, "min_peak": 0.7}
    values |= {"min_relative_contrast": 0.3, "large_lesion_ml": 5.0, "outline_share": 0.6}
    detector = Detector(replace(system, description=replace(system.description, **values)))
    assert detector.lesion_criteria() == LesionCriteria(0.41, 0.2, 0.7, 0.3, 5.0, 0.6)
    assert detector.lesion_criteria(0.8) == LesionCriteria(0.8, 0.2, 0.7, 0.3, 5.0, 0.6)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_counts_at_every_threshold_are_those_of_the_whole_volume(share):
    rng = np.random.default_rng(5)
    probability = np.zeros((24, 20, 8), np.float32)
    probability[6:-5, 5:-4, 2:-2] = rng.random((13, 11, 4)) ** 3
    probability[6, 5, 2] = np.float32(0.05 * share)
    truth = np.roll(probability > 0.6, 1, axis=0)
    inside = rng.random(truth.shape) < 0.9
    bright = BrightImage(rng.normal(size=truth.shape) + probability, rng.random(truth.shape) < 0.8, (4, 3, 0))
    criteria = LesionCriteria(0.5, 0.0, 0.6, 0.4, 0.02, share)
    affine = np.diag([1.0, 0.5, 2.0, 1.0])
    counts = counts_by_threshold(probability, truth, inside, affine, criteria, bright)
    for threshold, count in zip(THRESHOLDS, counts, strict=True):
        mask = (
            label_components(probability, affine, replace(criteria, threshold=float(threshold)), bright) > 0
        )
        assert count.tolist() == confusion(mask, truth, inside).tolist()
