"""Later stages of the denoiser: what they leave out, what they train, stops between them."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from ddmd.models import checkpoint
from ddmd.training import train
from ddmd.training.config import TrainConfig, read_config, validate
from ddmd.training.export import export_checkpoints
from ddmd.training.run_folder import config_text
from tests.training_setup import tiny_config, worst_difference

pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")

RECIPE = """
[[data]]
root = "set"

[denoiser_stage]
steps = 10
learning_rate = 2e-3
share_normal = 0.2

[[later_stages]]
steps = 4
share_normal = 0.3

[[later_stages]]
learning_rate = 1e-3

[later_stages.painter]
small_mm = [2.0, 3.0]
"""


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    """A stage with a round in its middle, one that begins with a round, one with a painter and a late round."""
    config = tiny_config(tmp_path, rng)
    second = dataclasses.replace(config.denoiser_stage, steps=2, rounds=(0.0,), learning_rate=1e-3)
    painter = dataclasses.replace(config.painter, kinds=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    third = dataclasses.replace(second, steps=4, rounds=(0.5,), painter=painter, share_painted=0.9)
    return dataclasses.replace(config, later_stages=(second, third))


def test_a_later_stage_has_what_it_leaves_out_from_the_stage_before(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    config = read_config(path)
    first, second, third = config.denoiser_stages
    assert (second.steps, second.learning_rate, second.share_normal) == (4, 2e-3, 0.3)
    assert (third.steps, third.learning_rate, third.share_normal) == (4, 1e-3, 0.3)
    assert [config.of_stage(i).painter.small_mm for i in range(3)] == [(1.6, 5.0), (1.6, 5.0), (2.0, 3.0)]
    assert config.of_stage(1).denoiser_stage == second
    assert not config.of_stage(1).later_stages
    assert config.stage_names == ["autoencoders_a", "autoencoders_b", "denoiser", "denoiser_2", "denoiser_3"]
    assert validate(json.loads(config_text(config)), "as a run writes it") == config
    assert first.steps == 10


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("steps = 4", "steps = 0", "steps is 0 in later_stages; allowed is at least 1"),
        ("steps = 4", "steps = 'x'", "later_stages 0 steps is 'x'"),
        ("steps = 4", "stops = 4", "later_stages 0 stops not known"),
        ("steps = 4", "use_inter = false", "use_inter and use_intra differ in later_stages"),
        ("steps = 4", "rounds = []\nfollow_edges = true", "follow_edges"),
        ("[[data]]", "system = 'anomaly'\n[[data]]", "later_stages are of the denoiser"),
        ("[[data]]", "later_stages = 3\n[[data]]", "later_stages"),
        ("[[data]]", "later_stages = [3]\n[[data]]", "later_stages 0"),
        ("small_mm", "tiny_mm", "painter tiny_mm not known"),
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
        alone = config.of_stage(number)
        if path is not None:
            none = dataclasses.replace(alone.autoencoder_stage, steps=0)
            alone = dataclasses.replace(alone, start=str(path), autoencoder_stage=none)
        before, path = path, train(alone, tmp_path / f"part {number}")
        assert before is None or worst_difference(load_file(before), load_file(path)) > 0
    assert worst_difference(whole, load_file(path)) == 0


def test_a_run_stopped_between_and_within_later_stages_goes_on_to_the_same_weights(config, tmp_path):
    whole = load_file(train(config, tmp_path / "whole"))
    masks = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "whole").glob("pseudo_masks_*")}
    assert sorted(masks) == ["pseudo_masks_1.npz", "pseudo_masks_2_1.npz", "pseudo_masks_3_1.npz"]
    for until in ("autoencoders_b", "denoiser", "denoiser_2"):
        assert train(config, tmp_path / "cut", until=until) == tmp_path / "cut"
    assert not (tmp_path / "cut" / "denoiser_3.checkpoint.safetensors").exists()
    assert export_checkpoints(tmp_path / "cut", tmp_path / "halfway.safetensors") == 2
    assert worst_difference(whole, load_file(train(config, tmp_path / "cut"))) == 0
    assert export_checkpoints(tmp_path / "cut", tmp_path / "end.safetensors") == 4
    assert worst_difference(whole, load_file(tmp_path / "end.safetensors")) == 0
    with pytest.raises(ValueError, match="until is 'denoiser_4'; allowed are .* denoiser_3"):
        train(config, tmp_path / "cut", until="denoiser_4")
    other = dataclasses.replace(config, later_stages=config.later_stages[:1])
    with pytest.raises(ValueError, match="another configuration"):
        train(other, tmp_path / "cut")
    train(other, tmp_path / "cut", overwrite=True)
    assert not (tmp_path / "cut" / "denoiser_3.checkpoint.safetensors").exists()


def test_until_its_first_round_a_later_stage_uses_the_last_pseudo_masks(config, tmp_path, monkeypatch):
    from ddmd.training import run

    used = []

    def watched(cases, path):
        used.append(path.name)
        return load(cases, path)

    load = run.load_pseudo_masks
    monkeypatch.setattr(run, "load_pseudo_masks", watched)
    train(config, tmp_path / "run")
    assert used == [
        "pseudo_masks_1.npz",
        "pseudo_masks_2_1.npz",
        "pseudo_masks_2_1.npz",
        "pseudo_masks_3_1.npz",
    ]
    used.clear()
    (tmp_path / "run" / "denoiser_3.checkpoint.safetensors").unlink()
    train(config, tmp_path / "run")  # as after a stop between the stages
    assert used == ["pseudo_masks_2_1.npz", "pseudo_masks_3_1.npz"]
