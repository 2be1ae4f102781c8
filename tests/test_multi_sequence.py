"""Systems that take any subset of their sequences: in detection, in training, and begun from one of FLAIR alone."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ddmd.cli import app
from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.pipeline import detect_cohort
from ddmd.data.phantom import phantom
from ddmd.inference.detector import Detector
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume, VolumeError
from ddmd.models import checkpoint
from ddmd.models.autoencoder import AutoencoderConfig, AutoencoderEnsemble
from ddmd.models.checkpoint import WeightsError
from ddmd.models.denoiser import DenoiserConfig
from ddmd.models.discrepancy import discrepancies
from ddmd.ops import discrepancy_maps
from ddmd.training.augmentation import Augmentation
from ddmd.training.batch_maker import BatchMaker
from ddmd.training.config import AutoencoderStage, DataEntry, DenoiserStage, TrainConfig
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.initial_weights import with_presence
from ddmd.training.intensity_scale import LOW
from ddmd.training.lesion_parameters import KINDS, LARGE, MIDDLING, PainterConfig
from ddmd.training.prepared_case import PreparedCase
from ddmd.training.run import train
from tests.volumes import tiny_system

ALL = ("flair", "t1", "t1ce", "t2")
STILL = Augmentation(**{f.name: 0.0 for f in dataclasses.fields(Augmentation) if f.type == "float"})


@pytest.fixture(scope="module")
def images() -> dict[str, nib.Nifti1Image]:
    """A coarse phantom in all four sequences."""
    return phantom(seed=4, spacing_mm=4.0, sequences=ALL).images


@pytest.fixture
def system() -> checkpoint.System:
    """A system of four sequences, whose new inputs have an effect."""
    made = with_presence(tiny_system(), ALL)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(made.condition.stem.weight.shape, generator=generator)
    made.condition.stem.weight.data.add_(0.05 * noise)
    return made


def probability(detection) -> np.ndarray:
    return np.asarray(detection.probability.dataobj)


# --------------------------------------------------------------------------- detection


def test_widened_to_more_sequences_a_system_does_with_its_own_what_it_did(images):
    flair = checkpoint.load("flair-image-labels", precision="float32")
    given = {"flair": images["flair"]}
    before = Detector(flair).detect(given, samples=2)
    after = Detector(with_presence(flair, ("t1", "flair", "t2"))).detect(given, samples=2)
    assert probability(before).max() > 0.5
    for name in ("probability", "uncertainty", "inter_discrepancy", "intra_discrepancy"):
        one, other = (np.asarray(getattr(found, name).dataobj) for found in (before, after))
        assert other == pytest.approx(one, abs=1e-5), name
    assert any("without t1, t2" in note for note in after.notes)


def test_only_a_system_of_one_of_the_sequences_is_widened():
    with pytest.raises(WeightsError, match="takes flair; allowed is one of t1, t2 alone"):
        with_presence(tiny_system(), ("t1", "t2"))
    with pytest.raises(WeightsError, match="takes flair, t1"):
        with_presence(tiny_system(sequences=("flair", "t1")), ALL)


def test_any_subset_is_detected_in_and_every_sequence_has_a_say(system, images):
    detector, found = Detector(system), {}
    for given in (ALL, ("flair",), ("t2", "t1"), ("t1ce",)):
        detection = detector.detect({s: images[s] for s in given})
        found[given] = probability(detection)
        assert np.isfinite(found[given]).all()
        assert 0 <= found[given].min() < found[given].max() <= 1
        absent = [s for s in ALL if s not in given]
        assert [note for note in detection.notes if "without" in note] == (
            [f"image: without {', '.join(absent)}, which the weights take where they are there"]
            if absent
            else []
        )
        assert sorted(detection.provenance["Sources"]) == sorted(given)
    everything = list(found.values())
    assert all(np.abs(one - everything[0]).max() > 1e-3 for one in everything[1:])
    shuffled = detector.detect({s: images[s] for s in reversed(ALL)})
    assert probability(shuffled) == pytest.approx(found[ALL], abs=1e-6)


def test_absent_sequences_do_not_count_in_x_and_y(rng):
    ensembles = [AutoencoderEnsemble(AutoencoderConfig(1, 2, 4, 2)).requires_grad_(False) for _ in range(2)]
    b = torch.from_numpy(rng.normal(size=(3, 4, 32, 32)).astype(np.float32))
    present = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    inter, intra = discrepancies(*ensembles, b, present)
    for z, there in enumerate(present > 0):
        alone = [ensemble(b[z, there][:, None]).transpose(1, 2) for ensemble in ensembles]  # (K, 1, C, H, W)
        expected = discrepancy_maps(*(recon.contiguous() for recon in alone))
        for value, wanted in zip((inter, intra), expected, strict=True):
            assert value[z : z + 1] == pytest.approx(wanted.numpy(), abs=1e-5)


def test_slices_say_what_is_there(images):
    volume = Volume.read({"t2": images["t2"]}, optional=ALL)
    cut = extract(volume, ALL, SliceGrid(mm=4.0))
    assert cut.present.tolist() == [0, 0, 0, 1]
    assert (cut.image[:, :3] == LOW).all()
    assert (cut.image[:, 3] > LOW).any()
    planes = cut.planes(1, mirrored=True, presence=True)
    config = DenoiserConfig(sequences=4, mirrored=True, presence=True)
    assert planes.shape[1] == config.inputs - 2
    assert torch.equal(planes[:, config.middle_planes], cut.image)
    assert torch.equal(planes[:, config.mirror_planes], cut.image.flip(-1))
    assert (planes[:, config.presence_planes].amax((0, 2, 3)) == cut.present).all()
    assert (planes[:, config.presence_planes].amin((0, 2, 3)) == cut.present).all()


def test_a_volume_with_none_of_the_sequences_is_refused(system, images):
    few = dataclasses.replace(system.description, sequences=("flair", "t1", "t1ce", "pd"))
    detector = Detector(dataclasses.replace(system, description=few))
    with pytest.raises(VolumeError, match="the weights take flair, t1, t1ce, pd and the input has t2"):
        detector.detect({"t2": images["t2"]})


def test_a_volume_without_a_sequence_that_the_weights_need_is_refused(images):
    volume = Volume.read({"flair": images["flair"]})
    with pytest.raises(
        VolumeError, match="the weights need flair, t1, and the volume has flair; read it with t1"
    ):
        Detector(tiny_system(sequences=("flair", "t1"))).prepare(volume)


def test_sequences_on_other_grids_are_refused_and_resampled_if_asked(system, images):
    moved = nib.Nifti1Image(images["t1"].get_fdata()[:, :, 1:], images["t1"].affine)
    given = {"flair": images["flair"], "t1": moved}
    with pytest.raises(VolumeError, match="different grids"):
        Detector(system).detect(given)
    assert probability(Detector(system).detect(given, resample=True)).max() > 0


def test_a_folder_gives_all_the_sequences_of_each_case(system, images, tmp_path):
    for case, given in {"a": ALL, "b": ("t1", "flair"), "c": ("t2",)}.items():
        (tmp_path / "data" / case).mkdir(parents=True)
        for sequence in given:
            nib.save(images[sequence], tmp_path / "data" / case / f"{sequence}.nii.gz")
    checkpoint.save(system, tmp_path / "system.safetensors", torch.float32)
    weights = tmp_path / "system.safetensors"
    results = list(detect_cohort([tmp_path / "data"], tmp_path / "out", weights=weights))
    sources = {case.name: sorted(found.provenance["Sources"]) for case, found in results}
    assert sources == {"a": sorted(ALL), "b": ["flair", "t1"], "c": ["t2"]}
    aside = find_cases(tmp_path / "data", optional=("t1ce",))
    assert [case.name for case in aside] == ["a"]


@pytest.mark.parametrize("series", [("flair", "t1"), ("t1",)])
def test_all_series_of_a_dicom_study_are_taken(tmp_path, series):
    pytest.importorskip("pydicom", reason="the extra ddmd[dicom] is not installed")
    from tests.dicom_series import FLAIR, PLANES, T1, write_series

    for number, (name, tags) in enumerate((("flair", FLAIR), ("t1", T1)), 1):
        if name in series:
            write_series(tmp_path / name, PLANES["axial"], tags, number=number, study="1.2.3.4")
    (case,) = find_cases(tmp_path, optional=ALL, annotations=False)
    assert sorted(case.files) == sorted(series)
    for volume in (Volume.read(tmp_path, optional=ALL), case.volume((), ALL)):
        assert list(volume.images) == list(series)


def test_each_dicom_study_is_a_case_whichever_optional_sequence_it_has(tmp_path):
    pytest.importorskip("pydicom", reason="the extra ddmd[dicom] is not installed")
    from tests.dicom_series import FLAIR, PLANES, T1, write_series

    write_series(tmp_path / "a", PLANES["axial"], FLAIR, study="1.2.3.4")
    write_series(tmp_path / "b", PLANES["axial"], T1, study="1.2.3.5")
    cases = find_cases(tmp_path, optional=ALL, annotations=False)
    assert sorted(list(case.files) for case in cases) == [["flair"], ["t1"]]


def test_networks_that_do_not_fit_the_sequences_are_refused():
    autoencoder, denoiser = AutoencoderConfig(4), DenoiserConfig(4, presence=True)
    data = (DataEntry("set"),)
    with pytest.raises(ValueError, match="autoencoder.sequences is 4; allowed is 1, with denoiser.presence"):
        TrainConfig(data=data, sequences=ALL, autoencoder=autoencoder, denoiser=denoiser)
    with pytest.raises(ValueError, match="denoiser.sequences is 1; allowed is 4"):
        TrainConfig(data=data, sequences=ALL)
    with pytest.raises(ValueError, match="share_complete and share_first_alone are 0.7 and 0.4"):
        DenoiserStage(share_complete=0.7, share_first_alone=0.4)


# --------------------------------------------------------------------------- training


def prepared(rng, present=(True,) * 4, size: int = 96, slices: int = 3) -> PreparedCase:
    """Normal slices, a disc of tissue in all sequences that are there; the label of every slice is 0."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    brain = np.repeat((np.hypot(y, x) < 42)[None], slices, 0)
    image = np.where(brain[:, None], rng.normal(0, 0.1, (slices, 4, size, size)), LOW)
    image[:, ~np.array(present)] = LOW
    name = f"case-{''.join('01'[p] for p in present)}"
    return PreparedCase(
        Case(name, name, "set", {}), image.astype(np.float16), brain, brain, np.zeros(slices, np.int8), 1, 1.0,
        present=np.array(present), fluid_dark=(0, 1, 2),
    )  # fmt: skip


def config_of(size: int = 96, **stage) -> TrainConfig:
    shares = dict(share_normal=0.0, share_painted=1.0, share_painted_beside=0.0, share_masked=0.0)
    return TrainConfig(
        data=(DataEntry("set"),), sequences=ALL, size=size,
        denoiser=DenoiserConfig(4, widths=(8, 8, 8, 8), noise_width=8, mirrored=True, presence=True),
        denoiser_stage=DenoiserStage(**{**shares, "hard_from": 1.0, "batch": 8, **stage}),
    )  # fmt: skip


def maker(cases, config, stage="lesions", painter=None) -> BatchMaker:
    slices = DeviceSlices(cases, torch.device("cpu"), config.mm)
    painter = painter or PainterConfig(displacement=0.0, dark=0.0, faint=0.0)
    return BatchMaker(
        slices, config, stage, {"set": 1.0}, augmentation_config=STILL, painter_config=painter, stripped=0.0
    )


def only(*kinds: int, **changed) -> PainterConfig:
    shares = tuple(float(kind in kinds) for kind in range(len(KINDS)))
    return PainterConfig(kinds=shares, displacement=0.0, faint=0.0, dark=0.0, rim=0.0, texture=0.0, **changed)


def test_sequences_are_dropped_at_random_and_presence_tells_which(rng):
    config = config_of(share_complete=0.3, share_first_alone=0.3)
    batch = maker([prepared(rng)], config).samples(0, 400)
    layout = config.denoiser
    present = batch["planes"][:, layout.presence_planes, 0, 0]
    shown = (batch["planes"][:, layout.middle_planes] > LOW).flatten(2).any(2)
    assert torch.equal(present > 0, shown)
    assert (present.sum(1) >= 1).all()
    complete = float((present.sum(1) == 4).float().mean())
    first = float(((present.sum(1) == 1) & (present[:, 0] > 0)).float().mean())
    # of the remaining 40 %: each with a chance of one half, and one at least
    assert complete == pytest.approx(0.3 + 0.4 / 16, abs=0.09)
    assert first == pytest.approx(0.3 + 0.4 * (1 / 16 + 1 / 64), abs=0.09)
    assert (present.mean(0) > 0.3).all()


def test_what_a_patient_lacks_never_comes_back(rng):
    cases = [prepared(rng, (False, True, False, True))]
    batch = maker(cases, config_of(share_complete=0.3, share_first_alone=0.4)).samples(0, 60)
    present = batch["planes"][:, config_of().denoiser.presence_planes, 0, 0]
    assert not present[:, [0, 2]].any()
    assert (present.sum(1) >= 1).all()
    planes = batch["planes"][:, :12].unflatten(1, (3, 4))
    assert (planes[:, :, [0, 2]] == LOW).all()


@pytest.mark.parametrize("kind", [LARGE, MIDDLING], ids=["large", "middling"])
def test_lesions_are_bright_on_flair_and_t2_and_dark_on_t1(rng, kind):
    config = config_of(share_complete=1.0, share_first_alone=0.0)
    painter = only(kind, core=0.0, enhancing=(0.0, 0.0, 0.0), contrast=(0.8, 1.5))
    batch = maker([prepared(rng)], config, painter=painter).samples(0, 24)
    gains = []
    for planes, mask in zip(batch["planes"][:, config.denoiser.middle_planes], batch["mask"], strict=True):
        if mask.sum() > 30:
            gains.append(planes[:, mask[0] > 0].mean(1))
    flair, t1, t1ce, t2 = torch.stack(gains).T
    assert len(gains) >= 10
    assert (flair > 0.2).all()
    assert (t2 > 0.1).all()
    assert (t1 < 0).all()
    assert (t1ce < 0).all()


def test_gliomas_enhance_in_a_ring_on_t1ce_alone(rng):
    config = config_of(share_complete=1.0, share_first_alone=0.0)
    rings, case = {}, prepared(rng)
    for enhancing in (0.0, 1.0):
        painter = only(
            LARGE, core=0.0, enhancing=(enhancing,) * 3, enhancement=(1.5, 2.0), contrast=(0.8, 1.0),
            large_mm=(20.0, 25.0),
        )  # fmt: skip
        rings[enhancing] = maker([case], config, painter=painter).samples(0, 12)
    middle = config.denoiser.middle_planes
    without, with_ring = (rings[share]["planes"][:, middle] for share in (0.0, 1.0))
    mask = rings[1.0]["mask"][:, 0] > 0
    assert torch.equal(mask, rings[0.0]["mask"][:, 0] > 0)
    brighter = (with_ring - without)[:, 2] > 0.5
    near = torch.nn.functional.max_pool2d(mask.float(), 7, 1, 3) > 0  # soft edges reach beyond the mask
    assert not (brighter & ~near).any()
    large = mask.sum((1, 2)) > 400
    share = (brighter.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1))[large]
    assert large.sum() >= 5
    assert float(share.median()) > 0.02
    assert float(share.max()) < 0.7
    assert torch.equal(with_ring[:, [0, 1, 3]], without[:, [0, 1, 3]])


def test_transplanted_lesions_show_on_the_sequences_of_both(rng):
    host, donor = prepared(rng, (True, True, False, False)), prepared(rng, (True, False, True, False))
    donor.label[:] = 1
    donor.image[:, [0, 2], 40:56, 40:56] = 2.0
    donor.mask = np.zeros(donor.brain.shape, np.float16)
    donor.mask[:, 40:56, 40:56] = 1.0
    donor.weight = np.ones_like(donor.mask)
    config = config_of(share_painted=0.0, share_transplanted=1.0, share_complete=1.0, share_first_alone=0.0)
    batch = maker([host, donor], config).samples(0, 12)
    present = batch["planes"][:, config.denoiser.presence_planes, 0, 0]
    assert (present == torch.tensor([1.0, 0, 0, 0])).all()
    assert batch["mask"].flatten(1).any(1).all()
    flair = batch["planes"][:, config.denoiser.middle_planes][:, :1]
    assert float(flair[batch["mask"] > 0].median()) == pytest.approx(2.0, abs=0.05)


def test_autoencoders_get_one_sequence_at_a_time(rng):
    cases = [prepared(rng), prepared(rng, (True, False, False, True))]
    for number, level in enumerate((0.0, 0.5, 1.0, 1.5)):
        for case in cases:
            case.image[:, number][case.brain] = level if case.there[number] else LOW
    config = dataclasses.replace(config_of(), autoencoder_stage=AutoencoderStage(batch=8))
    batch = maker(cases, config, "mixed").samples(0, 200)
    assert batch["planes"].shape[1] == 1
    level = batch["planes"][:, 0, 48, 48]
    assert level == pytest.approx((batch["sequence"] * 0.5).numpy(), abs=1e-2)
    counts = torch.bincount(batch["sequence"], minlength=4) / 200
    assert counts == pytest.approx(np.array([3 / 8, 1 / 8, 1 / 8, 3 / 8]), abs=0.11)


@pytest.mark.parametrize("start", [False, True])
def test_a_run_on_several_sequences_trains_and_detects(rng, tmp_path, images, start):
    pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")
    data = tmp_path / "data"
    for case, given in {"a": ALL, "b": ("flair",), "c": ("t1", "flair"), "d": ("t2",)}.items():
        (data / case).mkdir(parents=True)
        for sequence in given:
            nib.save(images[sequence], data / case / f"{sequence}.nii.gz")
        shape = images["flair"].shape
        label = np.zeros(shape, np.uint8)
        label[shape[0] // 2, shape[1] // 2, shape[2] // 2] = 1
        nib.save(nib.Nifti1Image(label, images["flair"].affine), data / case / "lesion.nii.gz")
    from ddmd.cohort.tables import label_slices

    label_slices(find_cases(data), tmp_path / "labelled")
    config = TrainConfig(
        data=(DataEntry(str(tmp_path / "labelled"), "table", split=False),), name="several", sequences=ALL, mm=4.0,
        size=48, autoencoder=AutoencoderConfig(1, 2, 4, 2),
        denoiser=DenoiserConfig(4, 1, (8, 8, 8, 8), 8, mirrored=True, presence=True),
        autoencoder_stage=AutoencoderStage(steps=2, batch=4), denoiser_stage=DenoiserStage(steps=3, batch=4, rounds=(0.4,)),
    )  # fmt: skip
    if start:
        checkpoint.save(tiny_system(), tmp_path / "start.safetensors", torch.float32)
        config = dataclasses.replace(config, start=str(tmp_path / "start.safetensors"))
    path = train(config, tmp_path / "run")
    description = checkpoint.describe(path)
    assert description.sequences == ALL == description.optional_sequences
    assert description.required_sequences == ()
    detector = Detector.load(path, "cpu")
    for given in (ALL, ("flair",), ("t2",)):
        assert np.isfinite(probability(detector.detect({s: images[s] for s in given}, samples=2))).all()


def test_info_says_that_any_of_the_sequences_will_do(system, tmp_path, monkeypatch):
    checkpoint.save(system, tmp_path / "several.safetensors")
    monkeypatch.setattr(checkpoint, "available", lambda: (str(tmp_path / "several.safetensors"),))
    text = CliRunner().invoke(app, ["info"]).stdout
    assert f"takes any of {', '.join(ALL)};" in " ".join(text.split())
    checkpoint.save(tiny_system(), tmp_path / "several.safetensors")
    assert "takes flair;" in " ".join(CliRunner().invoke(app, ["info"]).stdout.split())
