"""The face: one volume in, maps on its grid out; promises about batches, seeds, axes and memory."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from ddmd.diffusion.schedule import Schedule
from ddmd.inference import ensemble
from ddmd.inference.detector import Detector
from ddmd.inference.ensemble import Maps
from ddmd.inference.postprocess import LesionCriteria, find_lesions
from ddmd.inference.session import Sampling, SamplingConfig
from ddmd.models import checkpoint
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
        told = dataclasses.replace(system.description, through_plane_mm=mm)
        sigmas[mm] = Detector(dataclasses.replace(system, description=told))
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
    draw = Sampling.draw

    def counted(self, condition, index, sample):
        drawn = draw(self, condition, index, sample)
        import gc

        alive.append(
            sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == drawn.shape)
        )
        return drawn

    monkeypatch.setattr(Sampling, "draw", counted)
    found = _detect(detector, volume, samples=64, steps=1, batch=100)
    assert len(alive) == 64
    assert alive[-1] <= alive[2], f"{alive[2]} numbers alive after 3 samples, {alive[-1]} after 64"
    assert np.isfinite(_data(found.uncertainty)).all()


def test_streamed_moments_are_those_of_all_samples_at_once(detector, volume, monkeypatch):
    drawn = []
    draw = Sampling.draw
    monkeypatch.setattr(
        Sampling, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1]
    )  # fmt: skip
    from ddmd.inference.slices import SliceGrid, extract
    from ddmd.io.volume import Volume

    cut = extract(Volume.from_array({"flair": volume[0]}, volume[1]), ("flair",), SliceGrid(4.0, 16))
    maps = ensemble.detect_slices(detector.system, cut, SamplingConfig(samples=7, steps=2, batch=100))
    samples = torch.stack(drawn)
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


def test_options_out_of_range_are_refused_by_name(detector, volume):
    for options, message in (
        ({"samples": 0}, "samples is 0; allowed is at least 1"), ({"steps": 1001}, "steps is 1001; allowed are 1 to"),
        ({"sampler": "euler"}, "sampler is 'euler'; allowed are ddim"), ({"threshold": 1.0}, "threshold is 1.0"),
        ({"seed": 2**70}, "seed is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _detect(detector, volume, **options)
    with pytest.raises(ValueError, match="device is 'tpu'"):
        Detector.load("flair-image-labels", "tpu")


def test_saved_weights_load_as_they_were(tmp_path, volume):
    system = tiny_system()
    checkpoint.save(system, tmp_path / "tiny.safetensors", torch.float32)
    loaded = Detector.load(tmp_path / "tiny.safetensors", "cpu", "float32")
    for name, part in system.parts().items():
        assert all(
            torch.equal(v, loaded.system.parts()[name].state_dict()[k]) for k, v in part.state_dict().items()
        )
    one, other = _detect(Detector(system), volume), _detect(loaded, volume)
    difference = np.abs(_data(one.probability) - _data(other.probability)).max()
    assert difference < 1e-5, "more than another layout of the weights rounds"


def test_weights_that_cannot_be_used_are_refused(tmp_path):
    from safetensors.torch import save_file

    refused = checkpoint.WeightsError
    with pytest.raises(refused, match="no such weights"):
        checkpoint.load("ddmd-heavy")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickled.pt")
    with pytest.raises(refused, match=r"pickled.pt: not a safetensors file .* never loaded"):
        checkpoint.load(tmp_path / "pickled.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(refused, match="bare.safetensors: lacks its description"):
        checkpoint.load(tmp_path / "bare.safetensors")
    checkpoint.save(tiny_system(), tmp_path / "tiny.safetensors")
    description = json.dumps(json.loads(_metadata(tmp_path / "tiny.safetensors")["ddmd"]))
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors", {"ddmd": description})
    with pytest.raises(refused, match="other.safetensors: of another architecture"):
        checkpoint.load(tmp_path / "other.safetensors")
    newer = json.dumps({**json.loads(description), "format": 99})
    save_file({"a": torch.ones(2)}, tmp_path / "newer.safetensors", {"ddmd": newer})
    with pytest.raises(refused, match="format 99 is newer"):
        checkpoint.load(tmp_path / "newer.safetensors")


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_two_sequences_are_taken_in_the_weights_order(volume):
    detector = Detector(tiny_system(sequences=("flair", "t1")))
    values, affine = volume
    inputs = {"flair": nib.Nifti1Image(values, affine), "t1": nib.Nifti1Image(values[::-1].copy(), affine)}
    one = detector.detect(inputs)
    other = detector.detect(dict(reversed(inputs.items())))
    assert np.array_equal(_data(one.probability), _data(other.probability))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedule_and_tables(kind):
    schedule = Schedule(kind=kind)
    alpha_bar = schedule.alpha_bar()
    assert bool((alpha_bar[1:] < alpha_bar[:-1]).all())
    for n in (1, 2, 7, 50, 1000):
        times = schedule.timesteps(n)
        assert times[0] == 999
        assert bool((times[1:] < times[:-1]).all())
        for sampler in ("ddim", "ddpm", "dpm++2m"):
            table = schedule.sampler(n, sampler)
            assert torch.isfinite(table).all()
            assert torch.allclose(table[-1, [2, 3, 5, 6]], torch.tensor([1.0, 0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_all_predictions_denoise_alike(prediction):
    """The true x_0 in any parametrisation brings every sampler to x_0."""
    from ddmd import ops

    schedule = Schedule(prediction=prediction)
    x0 = torch.where(torch.rand(2, 1, 8, 8) > 0.5, 1.0, -1.0)
    at = (torch.tensor(5), torch.arange(2), torch.arange(2))
    for sampler in ("ddim", "ddpm", "dpm++2m"):
        table, times = schedule.sampler(10, sampler), schedule.timesteps(10)
        x = ops.noise(x0, times[:1].repeat(2), schedule.noising_table(), torch.tensor(-1), *at)
        memory = torch.zeros_like(x)
        for i, t in enumerate(times):
            a, s = schedule.alpha_bar()[t].sqrt(), (1 - schedule.alpha_bar()[t]).sqrt()
            epsilon = (x.double() - a * x0) / s
            output = {"epsilon": epsilon, "sample": x0.double(), "v": a * epsilon - s * x0}[prediction]
            ops.denoise_step(x, output.float(), table, torch.tensor(i), *at, memory)
        assert (x - x0).abs().max() < 1e-3


def test_samplers_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from ddmd import ops

    n, x = 10, torch.randn(2, 1, 8, 8)
    common = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    schedule = Schedule(kind="linear", prediction="epsilon")
    at = (torch.tensor(5), torch.arange(2), torch.arange(2))
    table = schedule.sampler(n, "ddim")
    theirs = diffusers.DDIMScheduler(
        **common, clip_sample=True, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    theirs.set_timesteps(n)
    assert torch.equal(theirs.timesteps, schedule.timesteps(n))
    ours, other = x.clone(), x.clone()
    for i, t in enumerate(theirs.timesteps):
        output = torch.sin(other * 3 + i)
        other = theirs.step(output, t, other, eta=0.0, use_clipped_model_output=True).prev_sample
        ops.denoise_step(ours, output, table, torch.tensor(i), *at)
        assert (ours - other).abs().max() < 1e-3


@pytest.mark.parametrize(("amx", "avx512", "wanted"), [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32),
])  # fmt: skip
def test_precision_is_what_the_processor_multiplies(monkeypatch, amx, avx512, wanted):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert checkpoint.pick_dtype("auto", torch.device("cpu")) is wanted
    assert checkpoint.pick_dtype("float32", torch.device("cpu")) is torch.float32
    with pytest.raises(ValueError, match="precision is 'half'; allowed are auto, float32, bfloat16"):
        checkpoint.pick_dtype("half", torch.device("cpu"))
