"""The face: one volume in, maps on its grid out; promises about batches, seeds, axes and memory."""

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ddmd.inference import ensemble
from ddmd.inference.detector import DetectionError, Detector, _loaded, pick_device, smooth_through_plane
from ddmd.inference.ensemble import Maps
from ddmd.inference.postprocess import LesionCriteria, find_lesions
from ddmd.inference.session import SamplingConfig
from ddmd.io.volume import VolumeError
from ddmd.models import checkpoint
from ddmd.models.checkpoint import WeightsError
from tests.volumes import head, tiny_system

TOLERANCE = 1e-4  # of probability: convolutions of other batches round otherwise


@pytest.fixture
def detector() -> Detector:
    return Detector(tiny_system())


@pytest.fixture
def volume(rng):
    return head(rng)


def _detect(detector, volume, **options):
    return detector.detect(volume[0], affine=volume[1], sequences="flair", **options)


def _data(image):
    return np.asanyarray(image.dataobj)


def test_maps_are_on_the_inputs_grid_and_in_range(detector, volume):
    found = _detect(detector, volume)
    for image in (
        found.mask,
        found.probability,
        found.uncertainty,
        found.inter_discrepancy,
        found.intra_discrepancy,
    ):
        assert image.shape == volume[0].shape
        assert np.array_equal(image.affine, volume[1])
        assert np.isfinite(_data(image)).all()
        assert not _data(image)[volume[0] == 0].any()
    probability = _data(found.probability)
    assert probability.min() >= 0
    assert probability.max() <= 1
    assert 0 < probability.mean() < 1, "the small system should mark something and not everything"
    assert _data(found.uncertainty).max() > 0
    assert 0 <= found.score <= 1
    assert set(np.unique(_data(found.mask))) <= {0, 1}


def test_lesions_describe_the_mask(detector, volume):
    found = _detect(detector, volume)
    voxel_ml = abs(np.linalg.det(volume[1][:3, :3])) / 1000
    assert sum(lesion.volume_ml for lesion in found.lesions) == pytest.approx(
        _data(found.mask).sum() * voxel_ml
    )
    assert all(lesion.volume_ml >= 0.5 for lesion in found.lesions)
    assert all(0.5 <= lesion.mean_probability <= lesion.peak_probability <= 1 for lesion in found.lesions)


def test_a_lesions_row_by_hand():
    mask = np.zeros((10, 10, 10), bool)
    mask[2:4, 5, 5], mask[8, 8, 8] = True, True
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    affine[0, 3] = -5
    found = find_lesions(mask * 0.75, mask * 0.1, affine, LesionCriteria(0.5, min_ml=1.5))
    (lesion,) = found.lesions
    assert lesion.volume_ml == pytest.approx(2.0)
    assert lesion.centre_mm == pytest.approx((20.0, 50.0, 50.0))
    assert (lesion.peak_probability, lesion.mean_uncertainty) == pytest.approx((0.75, 0.1))
    assert found.mask.sum() == 2


def test_a_lesion_reaches_its_peak_somewhere():
    probability = np.zeros((10, 10, 10), np.float32)
    probability[1:4, 5, 5], probability[2, 5, 5], probability[7:9, 5, 5] = 0.6, 0.9, 0.7
    found = find_lesions(probability, probability * 0, np.eye(4), LesionCriteria(0.5, min_peak=0.8))
    assert found.mask.sum() == 3
    assert [lesion.peak_probability for lesion in found.lesions] == pytest.approx([0.9])
    assert len(find_lesions(probability, probability * 0, np.eye(4), LesionCriteria(0.5)).lesions) == 2


def test_maps_are_smoothed_across_slices_by_millimetres_and_not_within_them(detector, volume):
    values, affine = volume
    system = detector.system
    sigmas = {}
    for mm in (0.0, 3.0):
        description = dataclasses.replace(system.description, through_plane_mm=mm)
        sigmas[mm] = Detector(dataclasses.replace(system, description=description))
    prepared = detector.prepare(values, affine=affine)
    z, shape = len(prepared.slices), (len(prepared.slices), 1, *prepared.slices.image.shape[2:])
    point = torch.zeros(shape)
    point[z // 2] = 0.5
    maps = Maps(point, point * 0.1, point, point)
    sharp, smooth = (sigmas[mm].to_volume(prepared, maps) for mm in (0.0, 3.0))
    brain, at = prepared.volume.brain, int(prepared.slices.index[z // 2])
    deepest = np.unravel_index(brain.sum(axis=2).argmax(), brain.shape[:2])
    before, after = sharp.probability[deepest], smooth.probability[deepest]
    assert brain[deepest][[at, at + 1]].all()
    assert before.nonzero()[0].tolist() == [at]
    ratio = np.exp(-0.5 * (prepared.volume.spacing[2] / 3.0) ** 2)
    assert after[at + 1] / after[at] == pytest.approx(ratio, rel=1e-3)
    assert np.ptp(smooth.probability[:, :, at][brain[:, :, at]]) < 1e-6
    assert np.allclose(smooth.uncertainty, 0.1 * smooth.probability, atol=1e-6)
    assert np.array_equal(smooth.inter, sharp.inter)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m"])
def test_the_batch_does_not_change_the_result(detector, volume, sampler):
    whole = _detect(detector, volume, sampler=sampler, batch=100)
    for batch in (1, 3):
        other = _detect(detector, volume, sampler=sampler, batch=batch)
        assert np.abs(_data(whole.probability) - _data(other.probability)).max() < TOLERANCE
        assert np.abs(_data(whole.uncertainty) - _data(other.uncertainty)).max() < TOLERANCE


def test_the_same_seed_gives_the_same_bits_and_another_does_not(detector, volume):
    one, again, other = (_detect(detector, volume, seed=s) for s in (3, 3, 4))
    assert np.array_equal(_data(one.probability), _data(again.probability))
    assert not np.array_equal(_data(one.probability), _data(other.probability))


def test_turning_the_input_turns_the_result(detector, volume):
    image = nib.Nifti1Image(*volume)
    straight = detector.detect({"flair": image})
    for moves in ([[1, -1], [0, 1], [2, 1]], [[2, 1], [1, -1], [0, -1]], [[0, -1], [1, -1], [2, -1]]):
        turned = detector.detect({"flair": image.as_reoriented(np.array(moves))})
        for name in ("mask", "probability", "uncertainty", "inter_discrepancy"):
            back = nib.as_closest_canonical(getattr(turned, name))
            assert np.array_equal(_data(back), _data(getattr(straight, name)))
            np.testing.assert_allclose(back.affine, image.affine, atol=1e-6)
        assert [x.volume_ml for x in turned.lesions] == [x.volume_ml for x in straight.lesions]
        assert turned.lesions[0].centre_mm == pytest.approx(straight.lesions[0].centre_mm, abs=1e-4)


def test_statistics_do_not_grow_with_the_samples(detector, volume, monkeypatch):
    alive = []
    draw = ensemble.draw_samples

    def counted(*args):
        drawn = draw(*args)
        import gc

        alive.append(
            sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == drawn.shape)
        )
        return drawn

    monkeypatch.setattr(ensemble, "draw_samples", counted)
    found = _detect(detector, volume, samples=64, steps=1, batch=100)
    assert 16 < len(alive) <= 64, "the samples come in several batches"
    assert alive[-1] <= alive[2], f"{alive[2]} numbers alive after 3 batches, {alive[-1]} after all"
    assert np.isfinite(_data(found.uncertainty)).all()


def test_streamed_moments_are_those_of_all_samples_at_once(detector, volume, monkeypatch):
    drawn = []
    draw = ensemble.draw_samples
    monkeypatch.setattr(ensemble, "draw_samples", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    prepared = detector.prepare(volume[0], affine=volume[1])
    maps = detector.maps(prepared, SamplingConfig(samples=7, steps=2, batch=100))
    samples = torch.cat(drawn)
    assert torch.allclose(maps.probability, samples.mean(0), atol=1e-6)
    assert torch.allclose(maps.uncertainty, samples.var(0), atol=1e-6)


def test_memory_that_does_not_suffice_halves_the_batch(detector, volume, monkeypatch):
    sizes = []
    condition_on = ensemble.condition_on

    def scarce(system, planes):
        sizes.append(len(planes))
        if len(planes) > 3:
            raise torch.OutOfMemoryError("a made-up shortage")
        return condition_on(system, planes)

    wanted = _detect(detector, volume, batch=8)
    monkeypatch.setattr(ensemble, "condition_on", scarce)
    found = _detect(detector, volume, batch=8)
    assert sizes[:3] == [8, 4, 2]
    assert np.abs(_data(found.probability) - _data(wanted.probability)).max() < TOLERANCE


def test_many_volumes_are_each_what_they_are_alone(detector, rng):
    images = [nib.Nifti1Image(*head(rng, (40, 48, z))) for z in (6, 8, 7)]
    alone = [detector.detect(image, sequences="flair") for image in images]
    together = list(detector.detect_all(images, sequences="flair", seed=0))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(_data(one.probability), _data(other.probability))


def test_the_next_item_is_worked_on_meanwhile_and_no_more():
    import threading

    from ddmd.inference.prefetch import prefetch

    begun = [threading.Event() for _ in range(4)]

    def work(i):
        begun[i].set()
        if i == 1:
            raise ValueError("number 1 cannot be used")
        return i * 10

    taken = []
    for i, ready in prefetch(range(4), work):
        if i + 1 < 4:
            assert begun[i + 1].wait(5), "the next was not begun while this one is used"
        assert not any(event.is_set() for event in begun[i + 2 :])
        if i == 1:
            with pytest.raises(ValueError, match="number 1"):
                ready()
        else:
            taken.append(ready())
    assert taken == [0, 20, 30]
    assert list(prefetch([], work)) == []


@pytest.mark.parametrize("options", [
    {"samples": 0}, {"samples": True}, {"samples": 1.5}, {"samples": 10**9}, {"samples": "3"},
    {"steps": 1001}, {"steps": 2.5}, {"steps": 0}, {"steps": None, "sampler": "euler"}, {"sampler": 3},
    {"threshold": 1.0}, {"threshold": float("nan")}, {"threshold": 0}, {"threshold": "0.5"}, {"threshold": True},
    {"seed": 2**70}, {"seed": -(2**63) - 1}, {"seed": 1.0}, {"seed": None}, {"batch": 0}, {"batch": -1},
    {"batch": 2.0}, {"batch": True},
], ids=str)  # fmt: skip
def test_options_out_of_range_are_refused_by_name_before_anything_is_read(detector, options):
    name = [k for k, v in options.items() if k != "steps" or v is not None][-1]
    with pytest.raises(ValueError, match=rf"{name} is .*; allowed "):
        detector.detect("no such file.nii.gz", **options)
    with pytest.raises(ValueError, match=rf"{name} is .*; allowed "):
        next(iter(detector.detect_all(["no such file.nii.gz"], **options)))


def test_numbers_of_numpy_are_options_and_can_be_saved(detector, volume, tmp_path):
    import json

    given = {"samples": np.int64(2), "steps": np.uint8(3), "seed": np.int32(-4), "batch": np.int16(5)}
    one = _detect(detector, volume, **given, threshold=np.float32(0.5))
    other = _detect(detector, volume, samples=2, steps=3, seed=-4, batch=5, threshold=0.5)
    assert np.array_equal(_data(one.probability), _data(other.probability))
    json.dumps(dict(one.provenance))
    one.save(tmp_path)
    assert detector.sampling_config(**given) == detector.sampling_config(samples=2, steps=3, seed=-4, batch=5)
    assert detector.sampling_config(steps=torch.tensor(3)).steps == 3


def test_devices_by_their_usual_names(monkeypatch):
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    for wrong in ("tpu", "meta", "cpu:1", "cuda:x", "gpu:", "-1", "", 1.5):
        with pytest.raises(ValueError, match="device is .*; allowed are auto, cpu, cuda"):
            pick_device(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for absent in ("cuda", "gpu", "gpu:0", 0, "1"):
        with pytest.raises(ValueError, match="sees no CUDA device; use cpu"):
            pick_device(absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("gpu") == pick_device("cuda") == pick_device("auto") == torch.device("cuda")
    assert pick_device("gpu:1") == pick_device("cuda:1") == pick_device(1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="torch sees 2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["probability", "uncertainty", "inter", "intra"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused_with_the_case(detector, volume, name, value, monkeypatch):
    prepared = detector.prepare(volume[0], affine=volume[1])
    maps = detector.maps(prepared, detector.sampling_config())
    values = getattr(maps, name).clone()
    values[-1, 0, 0, 0] = value
    maps = dataclasses.replace(maps, **{name: values})
    with pytest.raises(DetectionError, match=rf"{prepared.volume.name}: its maps of {name} are not finite"):
        detector.to_volume(prepared, maps)
    monkeypatch.setattr(Detector, "maps", lambda *_, **__: maps)
    with pytest.raises(VolumeError):
        detector.detect(prepared)


def test_a_file_that_was_overwritten_is_loaded_anew(volume, tmp_path):
    import ddmd

    path = tmp_path / "weights.safetensors"
    image = nib.Nifti1Image(*volume)
    results = []
    for seed in (0, 1, 0):
        checkpoint.save(tiny_system(seed), path)
        results.append(_data(ddmd.detect({"flair": image}, weights=path, device="cpu").probability))
    assert not np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    again = tmp_path / "link.safetensors"
    again.symlink_to(path)
    before = _loaded.cache_info().hits
    ddmd.detect({"flair": image}, weights=str(again), device="cpu")
    assert _loaded.cache_info().hits == before + 1
    assert _loaded.cache_info().maxsize == 2
    path.unlink()
    with pytest.raises(checkpoint.WeightsError, match="no such weights"):
        ddmd.detect({"flair": image}, weights=path, device="cpu")


def test_smoothing_is_that_of_scipy(rng):
    from scipy import ndimage

    values = rng.random((9, 1, 5, 7)).astype(np.float32)
    for sigma in (0.05, 0.3, 1.5, 40.0):
        wanted = ndimage.gaussian_filter1d(values, sigma, axis=0, mode="nearest")
        assert np.abs(smooth_through_plane(torch.from_numpy(values), sigma).numpy() - wanted).max() < 2e-7


def test_two_sequences_are_taken_in_the_weights_order(volume):
    detector = Detector(tiny_system(sequences=("flair", "t1")))
    values, affine = volume
    inputs = {"flair": nib.Nifti1Image(values, affine), "t1": nib.Nifti1Image(values[::-1].copy(), affine)}
    one = detector.detect(inputs)
    other = detector.detect(dict(reversed(inputs.items())))
    assert np.array_equal(_data(one.probability), _data(other.probability))


@pytest.mark.parametrize("option", [{"skull": "off"}, {"strip": True}, {"bias": "on"}, {"resample": True}])
def test_options_of_reading_are_refused_where_they_have_no_effect(detector, volume, option):
    prepared = detector.prepare(volume[0], affine=volume[1])
    for read in (prepared, prepared.volume):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: without effect"):
            detector.detect(read, **option)


def test_slices_that_were_cut_for_other_weights_are_refused(detector, volume):
    other = Detector(tiny_system(sequences=("t1",)))
    prepared = other.prepare({"t1": volume[0]}, affine=volume[1])
    with pytest.raises(ValueError, match="prepared for weights of other sequences"):
        detector.detect(prepared)


@pytest.mark.parametrize("option", [{"strip": "no"}, {"resample": 3}, {"strip": 1}])
def test_a_flag_of_reading_is_true_or_false(detector, rng, option):
    values, affine = head(rng)
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*; allowed are true and false"):
        detector.detect({"flair": values}, affine=affine, **option)


@pytest.mark.parametrize("option", [{"overwrite": "no"}, {"overlay": 1}, {"dicom_seg": "off"}])
def test_a_flag_of_saving_is_true_or_false(detector, volume, tmp_path, option):
    detection = detector.detect(volume[0], affine=volume[1], samples=1, steps=1)
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*; allowed are true and false"):
        detection.save(tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "one", ["x_FLAIR.nii.gz", Path("x_FLAIR.nii.gz"), {"flair": "x.nii"}, None, np.zeros((2, 2, 2))], ids=str
)
def test_one_volume_is_not_taken_for_many(detector, one):
    """A path is a series of letters, and "/" is a folder that would be searched."""
    with pytest.raises(ValueError, match="volumes is .*; give several"):
        next(detector.detect_all(one))


@pytest.mark.parametrize("weights", [None, 3, b"flair-image-labels"])
def test_weights_are_a_name_or_a_path(weights):
    with pytest.raises(WeightsError, match="give a name or a path"):
        Detector.load(weights)
