"""Training end to end on a few small slices: tracks, resuming, determinism, processes, losses."""

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import ddmd.training
from ddmd.cohort.cases import Case
from ddmd.diffusion.schedule import Schedule
from ddmd.evaluation.case_metrics import THRESHOLDS
from ddmd.models import checkpoint
from ddmd.models.autoencoder import AutoencoderConfig, AutoencoderEnsemble
from ddmd.models.checkpoint import WeightsError
from ddmd.models.denoiser import Condition, ConditionNet, Denoiser, DenoiserConfig
from ddmd.models.discrepancy import heterogeneous_loss, homogeneous_loss
from ddmd.training import loop, train
from ddmd.training.augmentation import Augmentation
from ddmd.training.batch_maker import NEGATIVE_WEIGHT, BatchMaker
from ddmd.training.config import AutoencoderStage, DataEntry, DenoiserStage, TrainConfig, read_config
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.export import export_checkpoints
from ddmd.training.loop import DivergedError, Plan, Stage, learning_rate, train_step
from ddmd.training.prepared_case import PreparedCase
from ddmd.training.run import LOCK, _locked
from ddmd.training.stages import BAG, AutoencoderLosses, DenoiserLosses, soft_dice
from ddmd.training.threshold import TOLERANCE, choose, dice_by_kind, lowest
from ddmd.training.weight_average import average
from tests.volumes import write_slices

STILL = Augmentation(
    **{field.name: 0.0 for field in dataclasses.fields(Augmentation) if field.type == "float"}
)


def batch_maker(prepared, config, stage="lesions", **options) -> BatchMaker:
    """Batches whose slices are neither moved nor altered, unless `options` say so."""
    made = DeviceSlices(prepared, torch.device("cpu"), config.mm)
    return BatchMaker(
        made, config, stage, {"set": 1.0}, **{"augmentation_config": STILL, "stripped": 0.0, **options}
    )


pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    return TrainConfig(
        data=(DataEntry(str(write_slices(tmp_path / "set", rng, 4, garbage_masks=True))),),
        name="tiny", size=64, test=0.25, validation=0.0,
        autoencoder=AutoencoderConfig(members=2, width=4, code=2),
        denoiser=DenoiserConfig(widths=(8, 8, 8, 8), noise_width=8, mirrored=True),
        autoencoder_stage=AutoencoderStage(steps=3, batch=4),
        denoiser_stage=DenoiserStage(steps=4, batch=2, rounds=(0.5,)),
    )  # fmt: skip


def test_image_track_trains_without_opening_a_mask_and_its_weights_load(config, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        path = train(config, tmp_path / "run")
    assert "round 1 of pseudo-masks at step 2" in caplog.text
    system = checkpoint.load(path)
    assert system.description.training["labels"] == "image"
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert sorted(split.values()).count("test") == 1
    assert (tmp_path / "run" / "events").is_dir()


def test_pixel_track_opens_the_masks(config, tmp_path):
    from ddmd.cohort.errors import DatasetError

    with pytest.raises(DatasetError, match="not a readable PNG"):
        train(dataclasses.replace(config, labels="pixel"), tmp_path / "run")


@pytest.mark.parametrize("system", ["anomaly", "supervised"])
def test_the_systems_beside_train_and_detect(config, tmp_path, rng, system):
    from ddmd.inference.detector import Detector
    from tests.volumes import head

    stage = dataclasses.replace(config.denoiser_stage, use_inter=False, use_intra=False)
    path = train(dataclasses.replace(config, system=system, denoiser_stage=stage), tmp_path / "run")
    held = {key.split(".")[0] for key in load_file(path)}
    assert held == set(checkpoint.PARTS[system])
    made = {p.name.split(".")[0] for p in (tmp_path / "run").glob("*.checkpoint.safetensors")}
    assert made == ({"autoencoders_a"} if system == "anomaly" else {"denoiser"})
    values, affine = head(rng)
    found = Detector.load(path, "cpu").detect(values, affine=affine)
    probability = np.asarray(found.probability.dataobj)
    assert 0 <= probability.min() < probability.max() <= 1
    assert not np.asarray(found.uncertainty.dataobj).any()


def test_a_run_begins_from_given_weights(config, tmp_path):
    first = train(config, tmp_path / "first")
    none = dataclasses.replace(config.autoencoder_stage, steps=0)
    again = dataclasses.replace(config, start=str(first), autoencoder_stage=none)
    stage = dataclasses.replace(config.denoiser_stage, steps=0, rounds=())
    unchanged = train(dataclasses.replace(again, denoiser_stage=stage), tmp_path / "unchanged")
    a, b, c = (load_file(p) for p in (first, unchanged, train(again, tmp_path / "more")))
    assert all(torch.equal(a[k], b[k]) for k in a)
    changed = {k.split(".")[0] for k in a if not torch.equal(a[k], c[k])}
    assert changed == {"condition", "denoiser"}
    assert (tmp_path / "more" / "pseudo_masks_1.npz").exists()
    first.rename(tmp_path / "moved.safetensors")  # a run goes on without the file that it began from
    c = load_file(train(again, tmp_path / "more"))
    assert {k.split(".")[0] for k in a if not torch.equal(a[k], c[k])} == changed
    again = dataclasses.replace(again, start=str(tmp_path / "moved.safetensors"))
    with pytest.raises(ValueError, match="mm is 2.0; with start = .* allowed is 1.0"):
        train(dataclasses.replace(again, mm=2.0), tmp_path / "other")
    with pytest.raises(ValueError, match="steps is 0 in AutoencoderStage; allowed is at least 1"):
        dataclasses.replace(again, start=None)


def test_what_a_run_cannot_begin_from_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(WeightsError, match="no such weights"):
        train(dataclasses.replace(config, start="nowhere.safetensors"), tmp_path / "run")
    anomaly = train(dataclasses.replace(config, system="anomaly"), tmp_path / "anomaly")
    none = dataclasses.replace(config.autoencoder_stage, steps=0)
    again = dataclasses.replace(config, start=str(anomaly), autoencoder_stage=none)
    with pytest.raises(ValueError, match="has no autoencoders_b"):
        train(again, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]
    with pytest.raises(
        ValueError, match="until is 'autoencoders'; allowed are .* autoencoders_a, .* denoiser"
    ):
        train(config, tmp_path / "other", until="autoencoders")


def test_choosing_a_threshold_changes_nothing_else(config, tmp_path):
    data = (DataEntry(str(write_slices(tmp_path / "masked", np.random.default_rng(1), 4))),)
    config = dataclasses.replace(config, data=data, validation=0.25, test=0.25)
    path = train(config, tmp_path / "run")
    before = load_file(path)
    threshold = choose(tmp_path / "run", path)
    after, description = load_file(path), checkpoint.describe(path)
    assert all(torch.equal(before[k], after[k]) for k in before | after)
    assert description.threshold == threshold
    assert description.threshold_chosen.endswith("on 1 validation patients")
    assert description.sampling.items() <= dataclasses.asdict(config.sampling).items()
    choose(tmp_path / "run", path, steps=2)
    assert checkpoint.describe(path).sampling == description.sampling | {"steps": 2}
    choose(tmp_path / "run", path, peak=0.9)
    assert checkpoint.describe(path).min_peak == 0.9 != description.min_peak
    with pytest.raises(ValueError, match="split.json: cannot be read"):
        choose(tmp_path / "nowhere", path)


def test_of_thresholds_with_nearly_equal_dice_the_lowest_is_taken():
    curve = np.where(THRESHOLDS < 0.6, 0.3, 0.5)
    curve[9] += 0.2
    assert lowest(curve) == pytest.approx(THRESHOLDS[9])
    for short, expected in ((0.9 * TOLERANCE, 4), (1.1 * TOLERANCE, 9)):
        curve[4] = curve[9] - short
        assert lowest(curve) == pytest.approx(THRESHOLDS[expected])


def test_shares_that_no_slice_can_fill_are_refused(config, rng):
    only = dataclasses.replace(
        config.denoiser_stage,
        share_normal=0.0,
        share_painted=0.0,
        share_painted_beside=0.0,
        share_masked=0.7,
        share_transplanted=0.3,
    )
    case = Case("a", "a", "set", {})
    image = rng.normal(size=(1, 1, 16, 16)).astype(np.float16)
    brain = np.ones((1, 16, 16), bool)
    prepared = [PreparedCase(case, image, brain, brain, np.array([0]), 1, 1.0)]
    with pytest.raises(ValueError, match="no slice is there for any share"):
        batch_maker(prepared, dataclasses.replace(config, denoiser_stage=only, size=16)).samples(0, 1)


def test_the_mean_of_two_systems_lies_between_them(tmp_path):
    first, second = (checkpoint.load("flair-image-labels", precision="float32") for _ in range(2))
    for value in second.condition.state_dict().values():
        value.add_(1.0)
    paths = [tmp_path / name for name in ("first", "second", "mean")]
    for system, path in zip((first, second), paths, strict=False):
        checkpoint.save(system, path, torch.float32)
    command = [
        sys.executable,
        "-m",
        "ddmd.training.weight_average",
        *paths[:2],
        "--share",
        "0.25",
        "-o",
        paths[2],
    ]
    subprocess.run(command, check=True)
    mean = checkpoint.load(paths[2], precision="float32")
    for part, added in (("condition", 0.25), ("autoencoders_b", 0.0)):
        held = mean.parts()[part].state_dict()
        for key, value in first.parts()[part].state_dict().items():
            torch.testing.assert_close(held[key], value + added, rtol=1e-3, atol=1e-3)
    assert (mean.description.threshold, mean.description.threshold_chosen) == (0.5, "one half")
    assert mean.description.training["share"] == 0.25
    with pytest.raises(ValueError, match="share is 1.5; allowed are 0 to 1"):
        average(first, second, 1.5)
    other = dataclasses.replace(first.description, discrepancy_scale=1.0)
    with pytest.raises(WeightsError, match="discrepancy_scale is 4.0 in the first and 1.0 in the second"):
        average(first, dataclasses.replace(second, description=other), 0.5)
    other = dataclasses.replace(first.description, training={"labels": "pixel"})
    with pytest.raises(WeightsError, match="labels is image in the first and pixel in the second"):
        average(first, dataclasses.replace(second, description=other), 0.5)


def test_a_run_whose_patients_changed_is_refused(config, tmp_path, rng):
    train(config, tmp_path / "run", until="autoencoders_a")
    shutil.rmtree(tmp_path / "set")
    write_slices(tmp_path / "set", rng, 5, garbage_masks=True)
    with pytest.raises(ValueError, match="its patients are not those of the data now"):
        train(config, tmp_path / "run")


def test_pixel_track_takes_labels_from_the_masks(tmp_path, rng):
    from ddmd.cohort.discovery import find_cases
    from ddmd.training.prepared_case import load_cases

    root = write_slices(tmp_path / "set", rng, 1)
    case = dataclasses.replace(find_cases(root)[0], slice_labels=None)
    config = TrainConfig(data=(DataEntry(str(root)),))
    (without_masks,), (with_masks,) = (
        load_cases([case], config, read_masks=False),
        load_cases([case], config, read_masks=True),
    )
    assert (without_masks.label == -1).all()
    assert without_masks.mask is None
    assert (with_masks.label == with_masks.mask.any(axis=(1, 2))).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_and_losses_stay_float32_whatever_convolutions_compute_in(
    config, tmp_path, monkeypatch, precision
):
    seen = set()
    conv = torch.nn.functional.conv2d

    def watched(x, weight, *args):
        out = conv(x, weight, *args)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda self, x, w, b: watched(x, w, b, self.stride, self.padding, self.dilation, self.groups))  # fmt: skip
    train(dataclasses.replace(config, precision=precision), tmp_path / "run")
    assert seen == {checkpoint.PRECISIONS[precision]}
    held = load_file(tmp_path / "run" / "denoiser.checkpoint.safetensors")
    assert {v.dtype for k, v in held.items() if k.startswith(("model.", "ema."))} == {torch.float32}


def worst_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def test_a_stopped_run_goes_on_to_the_same_weights(config, tmp_path, monkeypatch):
    whole = load_file(train(config, tmp_path / "whole"))

    def stopping(model, optimizer, batch, stage):
        if stage.plan.name == "denoiser" and stage.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(model, optimizer, batch, stage)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3 of denoiser"):
            train(config, tmp_path / "cut")
    kept = (tmp_path / "cut" / "pseudo_masks_1.npz").stat().st_mtime_ns
    resumed = load_file(train(config, tmp_path / "cut"))
    assert (tmp_path / "cut" / "pseudo_masks_1.npz").stat().st_mtime_ns == kept, (
        "pseudo-masks were made again"
    )
    assert worst_difference(whole, resumed) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    other = dataclasses.replace(config, seed=1, name="other")
    with pytest.raises(ValueError, match="another configuration; pass --overwrite"):
        train(other, tmp_path / "cut")
    (tmp_path / "cut" / "notes.txt").write_text("mine")
    anew = load_file(train(other, tmp_path / "cut", overwrite=True))
    assert worst_difference(anew, load_file(train(other, tmp_path / "fresh"))) == 0, (
        "nothing of the old run is left"
    )
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        "notes.txt", *(path.name for path in (tmp_path / "fresh").iterdir())
    }  # fmt: skip


class Batches:
    """The same batch at every step."""

    def __init__(self, batch):
        self.batch = batch

    def make(self, step, rank, processes):
        return self.batch


def test_a_gradient_that_is_not_finite_changes_no_weight_stops_the_run_and_saves_the_batch(tmp_path):
    class Broken(torch.nn.Linear):
        def forward(self, batch):
            return {"loss": super().forward(batch["x"]).sum() * batch["factor"]}

    from accelerate import Accelerator

    stage = Stage(Broken(2, 1), Plan("broken", 3, 1, 1e-3), tmp_path, Accelerator())
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    batch = {"x": torch.ones(1, 2), "factor": torch.tensor(float("nan"))}
    with pytest.raises(DivergedError, match="broken: the loss is not finite at step 0; the batch is in"):
        stage.run(Batches(batch), 3, lambda *_: None)
    assert torch.equal(load_file(tmp_path / "broken.diverged.safetensors")["x"], torch.ones(1, 2))
    assert worst_difference(before, stage.model.state_dict()) == 0
    assert not (tmp_path / "broken.checkpoint.safetensors").exists()


PROCESSES = """
import sys, logging
from pathlib import Path
from ddmd.training import loop, train
from ddmd.training.augmentation import Augmentation
from ddmd.training.device_slices import DeviceSlices
print(train(sys.argv[1], sys.argv[2]))
"""


def test_two_processes_learn_what_one_does(tmp_path, rng):
    """The real stages: auto-encoders on pairs of the global batch, painted and masked slices, noise, a round."""
    root = write_slices(tmp_path / "set", rng, 4, garbage_masks=True)
    (tmp_path / "run.toml").write_text(f"""
name = "tiny"
size = 64
test = 0.25
validation = 0.0
precision = "float32"
[[data]]
root = "{root}"
[autoencoder]
members = 2
width = 4
code = 2
[denoiser]
widths = [8, 8, 8, 8]
noise_width = 8
mirrored = true
[autoencoder_stage]
steps = 4
batch = 4
[denoiser_stage]
steps = 6
batch = 4
rounds = [0.5]
hard_from = 0.0
share_transplanted = 0.1
""")
    (tmp_path / "script.py").write_text(PROCESSES)
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
                   "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(tmp_path / "script.py"),
                   str(tmp_path / "run.toml"), str(tmp_path / str(processes))]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("autoencoders_a", "autoencoders_b", "denoiser"):
        one, two = (load_file(tmp_path / n / f"{name}.checkpoint.safetensors") for n in "12")
        one, two = (
            torch.cat([v.flatten() for k, v in sorted(w.items()) if k.startswith("model.")])
            for w in (one, two)
        )
        apart = float((one - two).norm() / one.norm())
        print(name, apart)
        assert apart < 1e-5, name
    listed = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in "12"]
    assert listed[0] == listed[1]
    events = [list((tmp_path / n / "events").iterdir()) for n in "12"]
    assert [len(e) for e in events] == [1, 1], "one process writes"


def test_transplanted_lesions_come_with_their_mask_and_its_weight(rng):
    """Two heads of other sizes: the donor's lesion lands at the same place from the middle of the brain."""
    prepared = []
    for name, at, level in (("donor", 30, 1.0), ("host", 40, 0.0)):
        brain = np.zeros((3, 80, 80), bool)
        brain[:, at - 20 : at + 20, at - 20 : at + 20] = True
        image = np.where(brain, level, -2.0)[:, None].astype(np.float16)
        case = Case(name, name, "set", {})
        label = np.full(3, int(level), np.int8)
        prepared.append(PreparedCase(case, image, brain, brain, label, offset=1, offset_mm=1.0))
    mask = np.zeros((3, 80, 80), np.float16)
    mask[:, 25:35, 25:35] = 1
    prepared[0].mask, prepared[0].weight = mask, np.where(mask, 0.5, 1.0).astype(np.float16)
    stage = DenoiserStage(
        share_normal=0.0,
        share_painted=0.0,
        share_painted_beside=0.0,
        share_masked=0.0,
        share_transplanted=1.0,
    )
    config = TrainConfig(data=(DataEntry("set"),), size=80, denoiser_stage=stage)
    batch = batch_maker(prepared, config).samples(0, 10)
    for planes, marked, weight in zip(batch["planes"], batch["mask"], batch["weight"], strict=True):
        inside = marked[0].numpy() > 0
        assert np.array_equal(inside, np.roll(mask[1] > 0, (10, 10), (0, 1)))
        assert planes[1].numpy()[inside] == pytest.approx(1.0, abs=1e-5)
        assert weight[0].numpy()[inside] == pytest.approx(0.5)


def test_a_positive_slice_is_a_bag_once_there_are_pseudo_masks(config, rng):
    """Also one without a mask of its own, of which nothing but that is known."""
    image = rng.normal(size=(2, 1, 16, 16)).astype(np.float16)
    brain = np.ones((2, 16, 16), bool)
    only = dataclasses.replace(
        config.denoiser_stage, share_normal=0.1, share_painted=0.0, share_painted_beside=0.0, share_masked=0.9
    )
    config = dataclasses.replace(config, denoiser_stage=only, size=16)
    prepared = [
        PreparedCase(Case(name, name, "set", {}), image, brain, brain, np.array([0, 1]), 1, 1.0)
        for name in "ab"
    ]
    assert not batch_maker(prepared, config).samples(0, 40)["bag"].any(), "before the first round"
    prepared[0].mask = np.zeros((2, 16, 16), np.float16)
    prepared[0].mask[1, 4:8, 4:8] = 1
    prepared[0].weight = np.ones((2, 16, 16), np.float16)
    batch = batch_maker(prepared, config).samples(0, 40)
    bags = batch["bag"] > 0
    assert 20 < bags.sum() < 40
    assert (batch["label"][bags] == 1).all()
    assert {round(float(w.min()), 6) for w in batch["weight"][bags]} == {1.0, NEGATIVE_WEIGHT}


def test_a_bag_wants_a_lesion_somewhere():
    """Of the slice's most probable pixels alone, and only where it is a bag."""
    sizes = DenoiserConfig(widths=(8, 8, 8, 8), noise_width=8)
    ensembles = [AutoencoderEnsemble(AutoencoderConfig(members=2, width=4, code=2)) for _ in range(2)]
    losses = DenoiserLosses(*ensembles, ConditionNet(sizes), Denoiser(sizes), Schedule(), DenoiserStage())
    evidence = torch.full((2, 1, 32, 32), -9.0)
    evidence[:, :, :6, : BAG // 6] = torch.linspace(0.0, 4.0, BAG).view(6, -1)  # 2 in the mean
    losses.condition.forward = lambda planes: Condition(torch.zeros(2, 8, 8, 8), evidence)
    zeros = torch.zeros(2, 1, 32, 32)
    batch = {
        "planes": torch.randn(2, 3, 32, 32),
        "mask": zeros,
        "weight": zeros,
        "bag": torch.tensor([1.0, 0.0]),
        "t": torch.tensor([3, 700]),
        "index": torch.tensor([0, 1]),
    }
    named = losses(batch)
    assert float(named["bag"]) == pytest.approx(
        DenoiserStage().bag_weight * np.log1p(np.exp(-2.0)) / 2, rel=1e-5
    )
    del batch["bag"]
    assert "bag" not in losses(batch)


@pytest.mark.parametrize("diffusion", [True, False])
def test_every_trained_parameter_gets_a_gradient(diffusion):
    """DistributedDataParallel waits for each that requires one."""
    sizes = DenoiserConfig(widths=(8, 8, 8, 8), noise_width=8)
    ensembles = [AutoencoderEnsemble(AutoencoderConfig(members=2, width=4, code=2)) for _ in range(2)]
    losses = DenoiserLosses(
        *ensembles, ConditionNet(sizes), Denoiser(sizes), Schedule(), DenoiserStage(), diffusion=diffusion
    )
    mask = (torch.rand(2, 1, 32, 32) > 0.5).float()
    batch = {"planes": torch.randn(2, 3, 32, 32), "mask": mask, "weight": torch.ones_like(mask)}
    batch |= {"t": torch.tensor([3, 700]), "index": torch.tensor([0, 1])}
    sum(losses(batch).values()).backward()
    assert [n for n, p in losses.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    "path", sorted((Path(ddmd.training.__file__).parent / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_configurations_read_and_hold_the_same_patients_out(path):
    config = read_config(path)
    assert config.labels == ("image" if path.stem in ("flair-image-labels", "anomaly") else "pixel")
    left_out = {"brats2013-pat0005", "brats2013-pat0006", "ms-patient26", "healthy-kirby113"}
    assert left_out <= set(config.holdout)
    assert (config.seed, config.validation, config.test) == (0, 0.1, 0.2), "the split of the runs before"


GOOD = """
name = "tiny"
labels = "image"
seed = 0
size = 64
checkpoint_minutes = 0.1
[[data]]
root = "data/lgg"
name = "lgg"
[autoencoder]
width = 8
[autoencoder_stage]
steps = 12
batch = 4
[denoiser]
noise_width = 16
mirrored = true
[denoiser_stage]
steps = 20
batch = 6
rounds = [0.3, 0.6]
share_normal = 0.12
"""
MISTAKES = {  # what is replaced, by what, and the entry that the message names
    "name leaves the folder": ('"tiny"', '"../../escaped"', "name"),
    "name is a path": ('"tiny"', '"/escaped"', "name"),
    "name has a folder": ('"tiny"', '"a/b"', "name"),
    "name has a backslash": ('"tiny"', "'a\\\\b'", "name"),
    "name is hidden": ('"tiny"', '".tiny"', "name"),
    "name has a line": ('"tiny"', '"tiny\\n"', "name"),
    "name is empty": ('"tiny"', '""', "name"),
    "name is a number": ('"tiny"', "3", "name"),
    "labels": ('"image"', '"voxel"', "labels"),
    "steps is text": ("steps = 12", "steps = 'x'", "steps"),
    "steps is a fraction": ("steps = 12", "steps = 1.5", "steps"),
    "steps is true": ("steps = 12", "steps = true", "steps"),
    "steps is 0": ("steps = 12", "steps = 0", "steps is 0 in AutoencoderStage"),
    "batch is 0": ("batch = 4", "batch = 0", "batch"),
    "batch is negative": ("batch = 4", "batch = -1", "batch"),
    "batch is huge": ("batch = 4", "batch = 1000000000", "batch"),
    "size is text": ("size = 64", "size = 'x'", "size"),
    "size is 0": ("size = 64", "size = 0", "size"),
    "size is 72": ("size = 64", "size = 72", "size is 72; allowed are multiples of 16"),
    "seed is negative": ("seed = 0", "seed = -1", "seed"),
    "data is a table": ("[[data]]", "[data]", "data"),
    "data is a number": ('[[data]]\nroot = "data/lgg"\nname = "lgg"', "data = 3", "data"),
    "width is 0": ("width = 8", "width = 0", r"\[autoencoder\] width is 0"),
    "width is huge": ("width = 8", "width = 1000000", r"\[autoencoder\] width is 1000000"),
    "noise_width is 0": ("noise_width = 16", "noise_width = 0", "noise_width"),
    "widths are 3": ("noise_width = 16", "widths = [8, 8, 8]", "widths"),
    "rounds is a number": ("[0.3, 0.6]", "0.3", "rounds"),
    "rounds is text": ("[0.3, 0.6]", "['x']", "rounds"),
    "rounds is nan": ("[0.3, 0.6]", "[nan]", "rounds"),
    "rounds fall": ("[0.3, 0.6]", "[0.6, 0.3]", "rounds"),
    "a share is negative": ("share_normal = 0.12", "share_normal = -1.0", "share_normal"),
    "a share is nan": ("share_normal = 0.12", "share_normal = nan", "share_normal"),
    "all shares are 0": ("share_normal = 0.12", "share_normal = 0.0\nshare_painted = 0.0\nshare_painted_beside = 0.0\nshare_masked = 0.0", "share"),
    "root is a number": ('root = "data/lgg"', "root = 3", "root"),
    "weight is nan": ('name = "lgg"', "weight = nan", "weight"),
    "weight is 0": ('name = "lgg"', "weight = 0.0", "weight"),
    "an entry is not known": ("seed = 0", "seed = 0\nspeed = 3", "speed not known"),
    "an entry of a section is not known": ("width = 8", "width = 8\nspeed = 3", "speed not known"),
    "a section is a number": ("[autoencoder]\nwidth = 8", "", None),
    "validation is 2": ("seed = 0", "validation = 2.0", "validation"),
    "nobody is left": ("seed = 0", "validation = 0.5\ntest = 0.5", "validation and test"),
    "holdout is text": ("seed = 0", "holdout = 'x'", "holdout"),
    "sequences is text": ("seed = 0", "sequences = 'flair'", "sequences"),
    "mm is 0": ("seed = 0", "mm = 0.0", "mm"),
    "precision": ("seed = 0", "precision = 'x'", "precision"),
    "checkpoint_minutes is text": ("checkpoint_minutes = 0.1", "checkpoint_minutes = 'x'", "checkpoint_minutes"),
    "learning_rate is nan": ("batch = 4", "learning_rate = nan", "learning_rate"),
    "learning_rate is huge": ("batch = 4", "learning_rate = 1e30", "learning_rate"),
    "samples is 0": ("[autoencoder]", "[sampling]\nsamples = 0\n[autoencoder]", "samples"),
    "sampler": ("[autoencoder]", "[sampling]\nsampler = 'x'\n[autoencoder]", "sampler"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_configuration_are_named_in_one_line(tmp_path, old, new, named):
    path = tmp_path / "bad.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    if named is None:
        read_config(path)
        return
    with pytest.raises(ValueError, match=named) as raised:
        read_config(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"= 3", b"\0", b"\xff\xfe", b"a = " + b"[" * 5000, None, b""], ids=range(6)
)
def test_what_is_no_toml_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match="not TOML|data") as raised:
        read_config(path)
    assert str(raised.value).startswith(str(path))


def test_entries_of_0_1_keep_working_with_a_warning(tmp_path):
    path = tmp_path / "old.toml"
    old = "normal = 0.1\npainted = 0.2\ncarved = 0.3\nover = 0.4\nmasked = 0.5\nbag = 0.0\ndoubt = false"
    path.write_text(("workers = 0\n" + GOOD).replace("share_normal = 0.12", old))
    with pytest.warns(FutureWarning, match="carved is now share_transplanted"):
        stage = read_config(path).denoiser_stage
    assert (stage.share_normal, stage.share_painted, stage.share_transplanted) == (0.1, 0.2, 0.3)
    assert (stage.share_painted_beside, stage.share_masked) == (0.4, 0.5)
    assert (stage.bag_weight, stage.teacher_uncertainty) == (0.0, False)


def test_damaged_files_of_a_run_are_named_with_what_to_delete(config, tmp_path):
    out = tmp_path / "run"
    weights = load_file(train(config, out))
    denoiser = out / "denoiser.checkpoint.safetensors"
    trained = denoiser.read_bytes()
    for name in (
        "autoencoders_b.checkpoint.safetensors", "denoiser.checkpoint.safetensors", "pseudo_masks_1.npz",
        "split.json", "config.json",
    ):  # fmt: skip
        whole = (out / name).read_bytes()
        damages = [whole[: len(whole) // 2], b""]
        if name.startswith("denoiser"):
            tensors, state = loop.load_checkpoint(out / name)
            next(v for k, v in tensors.items() if k.startswith("model.")).view(-1)[0] = float("nan")
            loop._save(out / name, tensors, state)
            damages.append((out / name).read_bytes())
        for damaged in damages:
            (out / name).write_bytes(damaged)
            if name.startswith("pseudo"):  # read only where the stage goes on
                as_if_stopped(denoiser, 2)
            with pytest.raises(ValueError, match=f"{name}.*delete") as raised:
                train(config, out)
            assert "\n" not in str(raised.value)
        (out / name).write_bytes(whole)
        denoiser.write_bytes(trained)
    assert worst_difference(weights, load_file(train(config, out))) == 0


def as_if_stopped(path, step):
    """As if the run had been stopped at a step."""
    tensors, _ = loop.load_checkpoint(path)
    loop._save(path, tensors, {"step": step})


def test_weights_of_an_unfinished_run_are_the_averages_of_its_checkpoints(config, tmp_path):
    out = tmp_path / "run"
    finished = load_file(train(config, out))
    assert export_checkpoints(out, tmp_path / "again.safetensors") == 4
    assert worst_difference(finished, load_file(tmp_path / "again.safetensors")) == 0
    (out / "denoiser.checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint of condition, denoiser yet"):
        export_checkpoints(out, tmp_path / "again.safetensors")


def test_every_kind_counts_alike_in_the_choice_of_a_threshold(rng):
    """Nine patients of one kind do not outvote one of another; within a kind, pooled and mean Dice count alike."""
    counts = [rng.integers(0, 1000, (len(THRESHOLDS), 4)) for _ in range(10)]
    curves = dice_by_kind(counts, ["glioma"] * 9 + ["ms"])

    def dice(count):
        return 2 * count[:, 0] / (2 * count[:, 0] + count[:, 1] + count[:, 2])

    assert list(curves) == ["glioma", "ms"]
    assert curves["ms"] == pytest.approx(dice(counts[9]))
    pooled, mean = dice(np.sum(counts[:9], axis=0)), np.mean([dice(c) for c in counts[:9]], axis=0)
    assert curves["glioma"] == pytest.approx((pooled + mean) / 2)


WAITS = {  # what a GPU's host would wait for: values and shapes that depend on data, copies to the host
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::bincount",
    "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::is_nonzero", "aten::equal",
    "aten::nonzero_numpy", "aten::histc", "aten::allclose",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the device, and indexing by bool tensors, whose result's shape depends on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in WAITS | {f"{n}.default" for n in WAITS}, name
        if name.startswith(("aten::index.Tensor", "aten::index_put")):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, f"{name} by a bool tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["normal", "mixed", "lesions"])
def test_a_step_never_waits_for_the_device(config, tmp_path, rng, name):
    """Batch, losses, backward, clipping, optimiser and average; every kind of sample is among them."""
    from accelerate import Accelerator

    stage = dataclasses.replace(
        config.denoiser_stage, batch=24, hard_from=0.0, share_normal=0.2, share_painted=0.2,
        share_transplanted=0.2, share_painted_beside=0.2, share_masked=0.2,
    )  # fmt: skip
    config = dataclasses.replace(config, denoiser_stage=stage)
    image = rng.normal(size=(6, 1, 64, 64)).astype(np.float16)
    brain = np.ones((6, 64, 64), bool)
    mask = np.zeros((6, 64, 64), np.float16)
    mask[3:, 20:40, 20:40] = 1
    case = PreparedCase(
        Case("a", "a", "set", {}), image, brain, brain, np.array([0, 0, 0, 1, 1, 1], np.int8), 1, 4.0,
        mask, np.ones_like(mask),
    )  # fmt: skip
    batches = batch_maker(
        [case], config, name, augmentation_config=Augmentation(blur=0.5, coarse=0.5, ringing=0.5)
    )
    ensembles = [AutoencoderEnsemble(config.autoencoder) for _ in range(2)]
    if name == "lesions":
        for ensemble in ensembles:
            ensemble.requires_grad_(False)
        networks = ConditionNet(config.denoiser), Denoiser(config.denoiser)
        losses = DenoiserLosses(*ensembles, *networks, Schedule(), stage)
    else:
        losses = AutoencoderLosses(ensembles[0], config.autoencoder_stage, mixed=name == "mixed")
    trained = Stage(losses, Plan("x", 5, 24, 1e-3, 0.9), tmp_path, Accelerator())
    model = trained.accelerator.prepare(trained.model)
    train_step(model, trained.optimizer, batches.make(0), trained)  # the optimiser makes its state
    with NoWaiting():
        train_step(model, trained.optimizer, batches.make(1), trained)


def test_the_check_for_waiting_finds_what_waits():
    x = torch.ones(3)
    for wait in (lambda: float(x.sum()), lambda: x[x > 0], lambda: bool((x > 0).all()), lambda: x.nonzero()):
        with NoWaiting(), pytest.raises(AssertionError):
            wait()


def test_two_runs_in_one_folder_the_second_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        _locked(tmp_path / "run", True),
        pytest.raises(ValueError, match="another process is training in this folder"),
    ):
        train(config, tmp_path / "run")


def test_a_full_disk_gives_one_line_and_the_run_goes_on_later(config, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_file", full)
        with pytest.raises(ValueError, match="No space left on device.*start again"):
            train(config, tmp_path / "run")
    assert not [p for p in (tmp_path / "run").iterdir() if "partial" in p.name]
    assert train(config, tmp_path / "run").exists()


def test_losses_follow_their_formulas():
    z, label = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 1, 0])
    pairs = [(i, j) for i in range(6) for j in range(i) if label[i] == label[j]]
    wanted = sum(((z[i] - z[j]) ** 2).sum() for i, j in pairs) / len(pairs) / 3
    assert torch.isclose(homogeneous_loss(z, label), torch.as_tensor(wanted), rtol=1e-4)
    near, far = torch.randn(8, 3), torch.randn(8, 3) + 50
    labels = torch.tensor([0] * 8 + [1] * 8)
    assert heterogeneous_loss(torch.cat((near, far)), labels) == 0, "apart beyond the bound"
    assert heterogeneous_loss(torch.cat((near, near)), labels) == pytest.approx(2.0, abs=1e-4)
    assert heterogeneous_loss(near, torch.zeros(8, dtype=torch.int64)) == 0, "one label alone has no distance"
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2] = 1
    right = (mask * 2 - 1) * 20
    assert soft_dice(right, mask, torch.ones_like(mask)) == pytest.approx(0, abs=1e-3)
    assert soft_dice(-right, mask, torch.ones_like(mask)) == pytest.approx(0.5 * (1 - 1 / 17), abs=1e-3), (
        "half of the slices have a mask; all is wrong but for the 1 that keeps the quotient from 0 / 0"
    )


def test_members_never_mix():
    ensemble = AutoencoderEnsemble(AutoencoderConfig(members=3, width=4, code=2))
    b = torch.randn(2, 3, 32, 32)  # a slice for each of the three members
    whole = ensemble.decode(ensemble.encode(b))
    changed = b.clone()
    changed[:, 1] += 1
    other = ensemble.decode(ensemble.encode(changed))
    assert torch.equal(whole[[0, 2]], other[[0, 2]])
    assert not torch.equal(whole[1], other[1])


def test_learning_rate_rises_then_falls():
    plan = Plan("x", 1000, 1, 1.0)
    confusion_metrics = [learning_rate(step, plan) for step in range(1000)]
    assert confusion_metrics[0] < confusion_metrics[99] > confusion_metrics[500] > confusion_metrics[999] > 0
