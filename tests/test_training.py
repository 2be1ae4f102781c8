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

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddmd.cohort.discovery import find_cases
from ddmd.cohort.tables import label_slices
from ddmd.models import checkpoint
from ddmd.models.checkpoint import WeightsError
from ddmd.training import loop, train
from ddmd.training.config import DataEntry, TrainConfig
from ddmd.training.loop import DivergedError, Plan, Stage, train_step
from ddmd.training.run import TrainingWarning, cases_of, split_of
from ddmd.training.run_folder import LOCK, locked
from tests.training_setup import as_if_stopped, tiny_config, worst_difference
from tests.volumes import head, write, write_slices

pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    return tiny_config(tmp_path, rng)


def test_runs_of_several_seeds_may_keep_the_same_patients_aside(tmp_path, rng):
    data = (DataEntry(str(write_slices(tmp_path / "many", rng, 12))),)
    config = TrainConfig(data=data, validation=0.25, test=0.25)
    cases = cases_of(config)

    def split(**changes):
        return split_of(dataclasses.replace(config, **changes), cases)

    assert set(split().values()) == {"train", "validation", "test"}
    assert len({tuple(split(seed=seed).items()) for seed in range(5)}) > 1
    assert all(split(seed=seed, split_seed=3) == split(seed=3) for seed in range(5))


def test_image_track_trains_without_opening_a_mask_and_its_weights_load(config, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        path = train(config, tmp_path / "run")
    assert "round 1 of pseudo-masks at step 2" in caplog.text
    system = checkpoint.load(path)
    assert system.description.training["labels"] == "image"
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert sorted(split.values()).count("test") == 1
    assert (tmp_path / "run" / "events").is_dir()


def test_a_table_of_labels_trains_volumes_without_opening_the_masks_beside_them(config, rng, tmp_path):
    """As the shipped recipe takes volumes: labelled once from the masks, which are unreadable when training begins."""
    for number in range(4):
        folder = tmp_path / "volumes" / f"p{number}"
        folder.mkdir(parents=True)
        values, affine = head(rng, (64, 64, 6))
        lesion = np.zeros(values.shape, np.uint8)
        lesion[30:34, 30:34, 2:4] = 1
        for name, array in (("flair", values), ("lesion", lesion)):
            nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    label_slices(find_cases(tmp_path / "volumes"), tmp_path / "labelled")
    for mask in (tmp_path / "volumes").rglob("lesion.nii.gz"):
        mask.write_bytes(b"nobody may open this")
    data = (DataEntry(str(tmp_path / "labelled"), "table"),)
    config = dataclasses.replace(config, data=data)
    assert checkpoint.describe(train(config, tmp_path / "run")).training["labels"] == "image"
    masked = dataclasses.replace(config, data=(DataEntry(str(tmp_path / "volumes")),), labels="pixel")
    with pytest.raises(ValueError, match="lesion"):
        train(masked, tmp_path / "pixel")


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


def test_a_stopped_run_goes_on_to_the_same_weights(config, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
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
    described = json.loads((tmp_path / "cut" / "config.json").read_text())
    del described["painter"]  # as if it had been begun before there was such an entry
    (tmp_path / "cut" / "config.json").write_text(json.dumps(described))
    resumed = load_file(train(config, tmp_path / "cut"))
    assert (tmp_path / "cut" / "pseudo_masks_1.npz").stat().st_mtime_ns == kept, (
        "pseudo-masks were made again"
    )
    assert worst_difference(whole, resumed) == 0
    assert signal.getsignal(signal.SIGTERM) == handler
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


def contents(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "bert", "architectures": []}',
        '{"name": "x", "data": 3, "denoiser_stage": {}}',
        "[]",
        "{",
        "",
    ],
)
def test_overwriting_leaves_a_folder_alone_that_is_not_of_a_run(config, tmp_path, text):
    out = tmp_path / "model"
    (out / "events").mkdir(parents=True)
    for name in ("events/diary", "split.json", "start.safetensors", "bert.safetensors", LOCK):
        (out / name).touch()
    (out / "config.json").write_text(text)
    before = contents(out)
    with pytest.raises(ValueError, match="config.json: not the configuration of a run"):
        train(config, out, overwrite=True)
    assert contents(out) == before


def test_nothing_is_overwritten_before_the_new_run_is_known_to_be_possible(config, tmp_path):
    out = tmp_path / "run"
    weights = train(config, out)
    other = shutil.copy(weights, tmp_path / "other.safetensors")
    (tmp_path / "link.safetensors").symlink_to(weights)
    (out / "link.safetensors").symlink_to(other)
    before = contents(out)
    patients = tuple(json.loads((out / "split.json").read_text()))
    unusable = {
        "no such weights": {"start": "nowhere.safetensors"},
        "in the folder .* that is overwritten": {"start": str(weights)},
        "link.* in the folder": {"start": str(tmp_path / "link.safetensors")},
        "run/link.* in the folder": {"start": str(out / "link.safetensors")},
        "nowhere": {"data": (DataEntry(str(tmp_path / "nowhere")),)},
        "no patient is left": {"holdout": patients},
        "not a readable PNG": {"labels": "pixel"},
    }
    for message, changed in unusable.items():
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **changed), out, overwrite=True)
        assert contents(out) == before, message
    with pytest.raises(ValueError, match="until is 'nothing'"):
        train(config, out, until="nothing", overwrite=True)
    assert contents(out) == before
    (out / "start.safetensors").write_bytes(b"of the earlier run")
    train(dataclasses.replace(config, start=str(other)), out, "autoencoders_a", overwrite=True)
    assert (out / "start.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()


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


def test_two_runs_in_one_folder_the_second_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        locked(tmp_path / "run", True),
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


def test_patients_who_are_to_be_kept_out_and_are_nowhere_are_named(config, tmp_path):
    """Under a misspelt name a test patient would be trained on without a word."""
    wrong = dataclasses.replace(config, holdout=("p1", "P2"), validation_patients=("p3", "nobody"))
    with pytest.warns(TrainingWarning) as warned:
        train(wrong, tmp_path / "run", until="autoencoders_a")
    assert [str(w.message).split(";")[0] for w in warned if w.category is TrainingWarning] == [
        "holdout names patients whom no data set has: P2",
        "validation_patients names patients whom no data set has: nobody",
    ]


def test_what_a_data_set_leaves_aside_is_logged(tmp_path, rng, caplog):
    for name in ("a/flair.nii.gz", "b/t2.nii.gz", "a/swi.nii.gz"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "set" / name, *head(rng))
    with caplog.at_level(logging.INFO, "ddmd.training"):
        cases = cases_of(TrainConfig(data=(DataEntry(str(tmp_path / "set"), name="mine"),)))
    assert [case.name for case in cases] == ["a"]
    assert "mine: left aside: 1 cases without the sequences of the configuration" in caplog.text
    assert "swi.nii.gz" in caplog.text


@pytest.mark.parametrize(
    "given", [("one/data", None, "two/data", None), ("a", "x", "b", "x"), ("a/x", None, "b", "x")]
)
def test_data_sets_have_names_of_their_own(given):
    """By its name a data set is split and weighted: of two with one, the second's settings would hold for both."""
    entries = (DataEntry(given[0], name=given[1], split=False), DataEntry(given[2], name=given[3]))
    with pytest.raises(ValueError, match="give each a name of its own"):
        TrainConfig(data=entries)


@pytest.mark.parametrize("wrong", ["no", 0, None])
def test_a_run_is_not_removed_by_what_is_no_flag(config, tmp_path, wrong):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("precious")
    with pytest.raises(ValueError, match="overwrite is .*; allowed are true and false"):
        train(config, tmp_path / "run", overwrite=wrong)
    assert (tmp_path / "run/config.json").read_text() == "precious"
