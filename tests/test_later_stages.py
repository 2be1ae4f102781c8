"""Later stages of the denoiser: what they leave out, what they train, stops between them."""

import dataclasses
import json
import os
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from ddmd.models import checkpoint
from ddmd.training import loop, train
from ddmd.training.config import DataEntry, TrainConfig, read_config, validate
from ddmd.training.export import export_checkpoints
from ddmd.training.loop import train_step
from ddmd.training.run_folder import config_text
from tests.training_setup import tiny_config, worst_difference
from tests.volumes import write_slices

pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")

RECIPE = """
[[data]]
root = "set"

[painter]
faint = 0.5

[denoiser_stage]
steps = 10
learning_rate = 2e-3
share_normal = 0.2

[[later_stages]]
steps = 4
rounds = [0.0]
share_normal = 0.3

[later_stages.painter]
band_mm = [2.0, 9.0]

[[later_stages]]
learning_rate = 1e-3

[later_stages.painter]
small_mm = [2.0, 3.0]
"""


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    """Stages with a round in the middle, at the beginning, and with two; the third has a painter of its own."""
    config = tiny_config(tmp_path, rng)
    second = dataclasses.replace(config.denoiser_stage, steps=2, rounds=(0.0,), learning_rate=1e-3)
    painter = dataclasses.replace(config.painter, kinds=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    third = dataclasses.replace(second, steps=4, rounds=(0.0, 0.5), painter=painter, share_painted=0.9)
    return dataclasses.replace(config, later_stages=(second, third))


def test_a_later_stage_has_what_it_leaves_out_from_the_stage_before(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    config = read_config(path)
    first, second, third = config.denoiser_stages
    assert (second.steps, second.learning_rate, second.share_normal) == (4, 2e-3, 0.3)
    assert (third.steps, third.learning_rate, third.share_normal) == (4, 1e-3, 0.3)
    painters = [config.for_stage(number).painter for number in range(3)]
    assert [painter.small_mm for painter in painters] == [(1.6, 5.0), (1.6, 5.0), (2.0, 3.0)]
    assert [painter.band_mm for painter in painters] == [(1.5, 14.0), (2.0, 9.0), (2.0, 9.0)]
    assert [painter.faint for painter in painters] == [0.5, 0.5, 0.5]
    assert config.for_stage(1).denoiser_stage == dataclasses.replace(second, painter=None)
    assert not config.for_stage(1).later_stages
    assert config.stage_names == ["autoencoders_a", "autoencoders_b", "denoiser", "denoiser_2", "denoiser_3"]
    assert validate(json.loads(config_text(config)), "as a run writes it") == config
    assert first.steps == 10


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("steps = 4", "steps = 0", "steps is 0 in later stage 1; allowed is at least 1"),
        ("steps = 4", "steps = 'x'", "later_stages 0 steps is 'x'"),
        ("steps = 4", "stops = 4", "later_stages 0 stops not known"),
        ("steps = 4", "steps = 4\nuse_inter = false", "in later stage 1 are not those of the first stage"),
        ("rounds = [0.0]", "rounds = [0.5]", r"rounds is \[0.5\] in later stage 1; the first must be 0.0"),
        ("rounds = [0.0]", "rounds = []", r"rounds is \[\] in later stage 1; the first must be 0.0"),
        ("rounds = [0.0]\n", "", r"rounds is \[0.3, .*\] in later stage 1; the first must be 0.0"),
        ("steps = 10", "steps = 10\nrounds = []\nfollow_edges = true", "there are no rounds of image-level"),
        ("steps = 10", "steps = 10\npainter = {}", r"give it as \[painter\]"),
        ("[[data]]", "system = 'anomaly'\n[[data]]", "anomaly detection has none"),
        ("[[data]]", "later_stages = 3\n[[data]]", "later_stages is 3"),
        ("[[data]]", "later_stages = [3]\n[[data]]", "later_stages 0 is 3"),
        ("band_mm", "tiny_mm", "painter tiny_mm not known"),
    ],
)
def test_mistakes_in_later_stages_are_named(tmp_path, old, new, problem):
    path = tmp_path / "recipe.toml"
    text = RECIPE.replace(old, new, 1)
    path.write_text(text.split("[[later_stages]]")[0] if "later_stages = " in new else text)
    with pytest.raises(ValueError, match=problem) as raised:
        read_config(path)
    assert "\n" not in str(raised.value)


def test_later_stages_train_as_runs_of_their_own_would(config, tmp_path, monkeypatch):
    """To the bit, where the files in between are of full precision; each of those runs starts with a round."""
    monkeypatch.setattr("ddmd.training.run.checkpoint.save", partial(checkpoint.save, dtype=torch.float32))
    config = dataclasses.replace(
        config, later_stages=tuple(dataclasses.replace(s, rounds=(0.0,)) for s in config.later_stages)
    )
    whole = load_file(train(config, tmp_path / "whole"))
    path = None
    for number in range(3):
        alone = config.for_stage(number)
        if path is not None:
            none = dataclasses.replace(alone.autoencoder_stage, steps=0)
            alone = dataclasses.replace(alone, start=str(path), autoencoder_stage=none)
        before, path = path, train(alone, tmp_path / f"part {number}")
        assert before is None or worst_difference(load_file(before), load_file(path)) > 0
    assert worst_difference(whole, load_file(path)) == 0


def test_stops_between_and_within_later_stages_change_nothing(config, tmp_path, monkeypatch):
    whole = load_file(train(config, tmp_path / "whole"))
    masks = ["pseudo_masks_1.npz", "pseudo_masks_2_1.npz", "pseudo_masks_3_1.npz", "pseudo_masks_3_2.npz"]
    assert sorted(path.name for path in (tmp_path / "whole").glob("pseudo_masks_*")) == masks
    cut = tmp_path / "cut"
    for until in ("autoencoders_b", "denoiser", "denoiser_2"):
        assert train(config, cut, until=until) == cut
    assert not (cut / "denoiser_3.checkpoint.safetensors").exists()
    assert export_checkpoints(cut, tmp_path / "halfway.safetensors") == 2

    def stopping(model, optimizer, batch, stage):
        if stage.plan.name == "denoiser_3":
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(model, optimizer, batch, stage)

    for step in (1, 2, 3):  # before, at and after the second round
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", stopping)
            with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step} of denoiser_3"):
                train(config, cut)
    made = [(cut / name).stat().st_mtime_ns for name in masks]
    assert worst_difference(whole, load_file(train(config, cut))) == 0
    assert [(cut / name).stat().st_mtime_ns for name in masks] == made, "pseudo-masks were made again"
    assert export_checkpoints(cut, tmp_path / "end.safetensors") == 4
    assert worst_difference(whole, load_file(tmp_path / "end.safetensors")) == 0


def test_a_folder_of_other_later_stages_is_refused_or_overwritten(config, tmp_path):
    out = tmp_path / "run"
    train(config, out)
    with pytest.raises(ValueError, match="until is 'denoiser_4'; allowed are .* denoiser_3"):
        train(config, out, until="denoiser_4")
    fewer = dataclasses.replace(config, later_stages=config.later_stages[:1])
    with pytest.raises(ValueError, match="another configuration"):
        train(fewer, out)
    train(fewer, out, overwrite=True)
    assert not (out / "denoiser_3.checkpoint.safetensors").exists()
    assert not (out / "pseudo_masks_3_1.npz").exists()


@pytest.mark.parametrize(
    "changed", [{"labels": "pixel"}, {"system": "supervised"}], ids=["pixel", "supervised"]
)
def test_later_stages_of_other_systems_train_on(tmp_path, rng, changed):
    config = tiny_config(tmp_path, rng)
    root = write_slices(tmp_path / "readable", rng, 4)
    config = dataclasses.replace(config, data=(DataEntry(str(root)),), **changed)
    later = dataclasses.replace(config.denoiser_stage, rounds=(0.0,), ema=0.0)
    config = dataclasses.replace(config, later_stages=(later,))
    weights = load_file(train(config, tmp_path / "run"))
    first = tmp_path / "first.safetensors"
    second = tmp_path / "second.safetensors"
    export_checkpoints(tmp_path / "run", second)
    assert worst_difference(weights, load_file(second)) == 0  # without an average, the weights themselves
    (tmp_path / "run" / "denoiser_2.checkpoint.safetensors").unlink()
    export_checkpoints(tmp_path / "run", first)
    changed_parts = {
        key.split(".")[0] for key, a in load_file(first).items() if not torch.equal(a, weights[key])
    }
    assert changed_parts == ({"condition"} if config.system == "supervised" else {"condition", "denoiser"})
