"""Draws on request: the samples themselves, on the input's grid, and what only they tell."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from ddmd.diffusion.samplers import QUALITIES, SamplingConfig, rater_shifts
from ddmd.inference import detector as detector_module
from ddmd.inference import ensemble
from ddmd.inference.detector import Detector
from ddmd.inference.draws import (
    calibrated_interval,
    leave_out_faint,
    lesion_volumes,
    scale_to_cover,
    summarise_draws,
    volume_interval,
)
from ddmd.inference.lesion_contrast import BrightImage
from ddmd.inference.session import Session, detect_slices
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from tests.volumes import head, tiny_system


@pytest.fixture
def detector():
    return Detector(tiny_system())


@pytest.fixture
def image(rng):
    values, affine = head(rng, (40, 48, 8))
    affine = affine @ np.diag([-1.0, 1.0, 1.0, 1.0])  # stored from right to left
    return nib.Nifti1Image(values, affine)


def test_draws_are_masks_on_the_input_grid_whose_mean_is_the_probability(detector, image):
    detection = detector.detect(image, sequences="flair", samples=4, steps=3, draws=True)
    assert detection.draws.shape == (*image.shape, 4)
    assert detection.draws.get_data_dtype() == np.uint8
    assert np.array_equal(detection.draws.affine, image.affine)
    mean = np.asarray(detection.draws.dataobj).mean(-1) / 255
    assert np.abs(mean - np.asarray(detection.probability.dataobj)).max() < 0.006
    assert np.ptp(np.asarray(detection.draws.dataobj), axis=-1).max() > 0, "draws differ"


def test_faint_components_are_no_lesions_in_draws_either():
    """Two blocks, of contrast 10 and 3; the second draw marks the fainter alone, and there it is the main one."""
    draws = np.zeros((2, 20, 12, 3), np.uint8)
    draws[0, 2:6, 4:8], draws[:, 12:15, 4:7] = 200, 255
    draws[:, 18, 10] = 100  # no lesion
    image = np.where(draws[0] == 200, 10.0, np.where(draws[0] == 255, 3.0, 0.0)).astype(np.float32)
    bright = BrightImage(image, np.ones(image.shape, bool), (2, 2, 0))
    for least, left in ((0.25, draws), (0.35, np.where((draws == 255) & ([[[[1]]], [[[0]]]]), 0, draws))):
        changed = draws.copy()
        assert leave_out_faint(changed, bright, least) is changed
        assert np.array_equal(changed, left)


@pytest.mark.parametrize("least", [0.0, 0.7])
def test_detected_draws_meet_the_contrast_that_the_weights_ask_for(image, least, monkeypatch):
    calls = []

    def recorded(draws, bright, min_relative_contrast):
        calls.append((draws.shape[1:], bright.values.shape, min_relative_contrast))
        return draws * 0

    monkeypatch.setattr(detector_module, "leave_out_faint", recorded)
    system = tiny_system()
    detector = Detector(replace(system, description=replace(system.description, min_relative_contrast=least)))
    found = detector.detect(image, sequences="flair", samples=3, steps=2, draws=True)
    assert [(one == other, asked) for one, other, asked in calls] == ([(True, least)] if least else [])
    assert np.asarray(found.draws.dataobj).any() == (least == 0.0)


def test_draws_are_kept_on_request_only(detector, image):
    plain = detector.detect(image, sequences="flair")
    assert plain.draws is None
    assert plain.volume_interval_ml is None
    assert all(lesion.existence is None for lesion in plain.lesions)
    assert plain.description()["LesionMlIntervalKind"] == "probability from 0.75 to 0.25"
    assert not any("existence" in row for row in plain.lesion_rows())
    streamed = detector.detect(image, sequences="flair", quality="draws", samples=3, steps=2)
    assert streamed.draws is None
    assert streamed.volume_interval_ml is not None


def test_draws_are_those_of_the_quality_draws(image):
    """Intervals are fitted to that quality: samples of the posterior mean hardly differ, and theirs would be too narrow."""
    system = tiny_system()
    fast = replace(system.description, sampling=system.description.sampling | {"stop": 0.98})
    detector = Detector(replace(system, description=fast))
    assert detector.sampling_config().stop == 0.98
    kept = detector.detect(image, sequences="flair", samples=3, steps=2, draws=True)
    named = detector.detect(image, sequences="flair", samples=3, steps=2, quality="draws")
    assert kept.provenance["Sampling"] == named.provenance["Sampling"]
    assert kept.provenance["Sampling"]["stop"] == 0.0
    assert kept.volume_interval_ml == named.volume_interval_ml
    with pytest.raises(ValueError, match="quality is 'best'"):
        detector.detect(image, quality="best", draws=True)
    with pytest.raises(ValueError, match="draws is 1"):
        next(detector.detect_all([image], quality="fast", draws=1))
    for refused in (detector.detect, lambda one, **options: list(detector.detect_all([one], **options))):
        with pytest.raises(ValueError, match='draws and quality "fast" exclude each other'):
            refused(image, quality="fast", draws=True)


def test_figures_of_draws_are_in_the_files(detector, image, tmp_path):
    detection = detector.detect(image, sequences="flair", samples=5, steps=2, draws=True)
    assert detection.lesions
    for lesion in detection.lesions:
        low, high = lesion.volume_interval_ml
        assert 0 <= lesion.existence <= 1
        assert 0 <= low <= high
    low, high = detection.volume_interval_ml
    described = detection.description()
    assert described["LesionMlInterval"] == pytest.approx([low, high], rel=1e-3)
    assert described["LesionMlIntervalKind"] == "90 % of the drawn masks"
    assert detection.lesion_ml_interval == (low, high)
    assert "VolumeIntervalMl" not in described, "one name for the interval"
    paths = detection.save(tmp_path)
    stored = nib.load(paths["draws"])
    assert np.array_equal(np.asarray(stored.dataobj), np.asarray(detection.draws.dataobj))
    header, first = paths["lesions"].read_text().splitlines()[:2]
    assert header.split("\t")[-3:] == ["existence", "volume_low_ml", "volume_high_ml"]
    assert float(first.split("\t")[-3]) == detection.lesions[0].existence


@pytest.mark.parametrize("captured", [False, True])
def test_kept_draws_are_the_samples(rng, captured, monkeypatch):
    values, affine = head(rng, (40, 48, 8))
    slices = extract(Volume.from_array({"flair": values}, affine), ("flair",), SliceGrid(4.0, 16))
    drawn, draw = [], ensemble.draw_samples
    monkeypatch.setattr(ensemble, "draw_samples", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    config = SamplingConfig(samples=4, steps=2, mirror=True, batch=100)
    session = Session(tiny_system(), (lambda work: work) if captured else None)
    kept = session.run(slices, config, keep_draws=True).draws
    samples = torch.cat(drawn)[:, : len(slices)]  # 0, 2, then 1, 3 on the mirror image
    wanted = torch.stack([samples[0], samples[2].flip(-1), samples[1], samples[3].flip(-1)])
    assert kept.dtype == torch.uint8
    assert kept.shape == wanted.shape
    assert float((kept.float() / 255 - wanted).abs().max()) <= 0.5 / 255 + 1e-6
    assert session.run(slices, config).draws is None


def test_shared_noise_makes_equal_slices_equal(rng):
    values, affine = head(rng, (40, 48, 8))
    slices = extract(Volume.from_array({"flair": values}, affine), ("flair",), SliceGrid(4.0, 16))
    slices = replace(slices, image=slices.image[3:4].repeat(len(slices), 1, 1, 1))
    config = SamplingConfig(samples=2, steps=3, eta=1.0)
    own = detect_slices(tiny_system(), slices, config).probability
    shared = detect_slices(tiny_system(), slices, replace(config, shared_noise=True)).probability
    assert float((own[3] - own[4]).abs().max()) > 1e-2
    assert float((shared[3] - shared[4]).abs().max()) < 1e-5


def test_a_rater_marks_more_or_less_everywhere(rng):
    values, affine = head(rng, (40, 48, 8))
    slices = extract(Volume.from_array({"flair": values}, affine), ("flair",), SliceGrid(4.0, 16))
    config = SamplingConfig(samples=6, steps=1)
    session = Session(tiny_system())
    plain = session.run(slices, config, keep_draws=True).draws.float().mean((1, 2, 3, 4))
    shifted = session.run(slices, replace(config, rater_sd=1.0), keep_draws=True).draws
    gain = shifted.float().mean((1, 2, 3, 4)) - plain
    assert torch.equal(gain.argsort(), rater_shifts(6, 1.0).argsort())
    assert float(gain[0]) == 0.0, "the first sample is not shifted"


def test_shifts_are_standard_normal_quantiles_in_few_samples():
    shifts = rater_shifts(512, 2.0).double() / 2.0
    cdf = torch.special.ndtr(shifts).sort().values
    assert float((cdf - torch.linspace(0, 1, 512)).abs().max()) < 0.01
    assert torch.equal(rater_shifts(512, 2.0)[:16], rater_shifts(16, 2.0))
    assert torch.allclose(rater_shifts(16, 2.0, -1.5), rater_shifts(16, 2.0) - 1.5)


def test_a_mean_shift_alone_moves_every_sample(rng):
    values, affine = head(rng, (40, 48, 8))
    slices = extract(Volume.from_array({"flair": values}, affine), ("flair",), SliceGrid(4.0, 16))
    config = SamplingConfig(samples=3, steps=1)
    session = Session(tiny_system())
    plain = session.run(slices, config, keep_draws=True).draws.float()
    less = session.run(slices, replace(config, rater_mean=-1.0), keep_draws=True).draws.float()
    inside = (plain > 25) & (plain < 230)
    logits = [torch.logit(draws[inside] / 255) for draws in (plain, less)]
    assert float((logits[1] - logits[0]).median()) == pytest.approx(-1.0, abs=0.1)


def test_named_sampling_gives_way_to_single_options(detector):
    config = detector.sampling_config(quality="draws", steps=7)
    assert (config.steps, config.samples, config.stop, config.shared_noise) == (7, 16, 0.0, True)
    assert detector.sampling_config(quality="fast").steps == 1
    assert detector.sampling_config(eta=0.25, stop=0.5).eta == 0.25
    assert {"fast", "draws"} == set(QUALITIES)
    with pytest.raises(ValueError, match="quality"):
        detector.sampling_config(quality="best")


def test_volumes_of_lesions_are_the_components_that_touch_them():
    labels = np.zeros((12, 4, 4), np.int32)
    labels[1:3, 1, 1], labels[8, 1, 1] = 1, 2
    draws = np.zeros((4, 12, 4, 4), bool)
    draws[0, 1:5, 1, 1] = True  # lesion 1 with two voxels more
    draws[1, 1:9, 1, 1] = True  # both in one: voxel 5 is as far from 2 as from 8
    draws[2, 11, 3, 3] = True  # beside both
    affine = np.diag([1.0, 1.0, 500.0, 1.0])  # 0.5 ml a voxel
    volumes = lesion_volumes(labels, draws, affine)
    assert volumes[0] == pytest.approx([2.0, 0.0])
    assert volumes[1].sum() == pytest.approx(4.0)
    assert volumes[1].min() >= 1.499
    assert volumes[2:].sum() == 0.0
    assert lesion_volumes(labels * 0, draws, affine).shape == (4, 0)


def test_the_calibrated_interval_just_reaches_the_volume_that_chose_its_scale(rng):
    volumes = np.exp(rng.standard_normal(40) * 0.4) * 10
    for true in (1.0, 9.0, 60.0):
        scale = scale_to_cover(volumes, true)
        low, high = calibrated_interval(volumes, scale * (1 + 1e-9))
        assert low <= true <= high
        low, high = calibrated_interval(volumes, scale * 0.99)
        assert not low <= true <= high
    assert calibrated_interval(volumes, 1.0) == volume_interval(volumes)
    assert scale_to_cover(np.full(5, 3.0), 4.0) == float("inf")


def test_the_summary_is_counted_from_the_masks(rng):
    draws = np.where(rng.random((9, 6, 6, 6)) < 0.4, 200, 100).astype(np.uint8)
    labels = np.zeros((6, 6, 6), np.int32)
    labels[2, 2, 2] = 1
    summary = summarise_draws(draws, labels, np.diag([1.0, 2.0, 3.0, 1.0]), scale=1.0)
    counts = (draws >= 128).sum((1, 2, 3)) * 0.006
    assert summary.volumes_ml == pytest.approx(counts)
    assert summary.volume_interval_ml == pytest.approx(tuple(np.quantile(counts, (0.05, 0.95))))
    assert summary.existence[0] == pytest.approx((draws[:, 2, 2, 2] >= 128).mean())


def test_an_evaluation_measures_draws_against_raters(rng, tmp_path):
    pytest.importorskip("monai", reason="the extra ddmd[evaluate] is not installed")
    from ddmd.cohort.cases import Case
    from ddmd.evaluation.evaluate import evaluate_case

    values, affine = head(rng)
    truth = (values > 180).astype(np.uint8)
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("flair", "lesion", "rater1", "rater2")}
    nib.save(nib.Nifti1Image(values, affine), paths["flair"])
    for name, shift in (("lesion", 0), ("rater1", 0), ("rater2", 1)):
        nib.save(nib.Nifti1Image(np.roll(truth, shift, 0), affine), paths[name])
    case = Case(
        "p", "p", "made up", {"flair": (paths["flair"],)}, masks=(paths["lesion"],),
        rater_masks=(paths["rater1"], paths["rater2"]),
    )  # fmt: skip
    detector = Detector(tiny_system())
    config = detector.sampling_config(samples=4, steps=2)
    row = evaluate_case(detector, case, None, config, draws=True).row
    for kind in ("draws", "one_step_draws", "random_thresholds"):
        assert 0 <= row[f"{kind}_distance"] <= 2, kind
    assert row["volume_low_ml"] <= row["volume_high_ml"]
    assert "draws_distance" not in evaluate_case(detector, case, None, config).row
