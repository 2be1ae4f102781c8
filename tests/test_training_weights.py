"""What becomes of trained weights: thresholds, means of two systems, and weights of an unfinished run."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddmd.evaluation.case_metrics import THRESHOLDS, counts_by_threshold
from ddmd.inference.detector import Detector
from ddmd.models import checkpoint
from ddmd.models.checkpoint import WeightsError
from ddmd.training import threshold, train
from ddmd.training.config import DataEntry, TrainConfig
from ddmd.training.export import export_checkpoints
from ddmd.training.run import cases_of
from ddmd.training.threshold import (
    TOLERANCE,
    Chosen,
    Setting,
    choose_settings,
    dice_by_kind,
    leave_one_out,
    pick_settings,
)
from ddmd.training.weight_average import average
from tests.training_setup import tiny_config, worst_difference
from tests.volumes import tiny_system, write_slices

pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    return tiny_config(tmp_path, rng)


def test_choosing_a_threshold_changes_nothing_else(config, tmp_path, monkeypatch):
    data = (DataEntry(str(write_slices(tmp_path / "masked", np.random.default_rng(1), 4))),)
    config = dataclasses.replace(config, data=data, validation=0.25, test=0.25)
    path = train(config, tmp_path / "run")
    before = load_file(path)
    (setting, choice), *tried = choose_settings(tmp_path / "run", path)
    after, description = load_file(path), checkpoint.describe(path)
    assert all(torch.equal(before[k], after[k]) for k in before | after)
    assert description.threshold == choice.threshold
    assert setting == (description.min_peak, description.min_relative_contrast, description.outline_share)
    assert tried == [(setting, choice)], "one setting, those of the weights"
    assert f"({choice.mean:.3f};" in description.threshold_chosen
    assert description.threshold_chosen.endswith("on 1 cases of validation patients")
    assert description.sampling.items() <= dataclasses.asdict(config.sampling).items()
    choose_settings(tmp_path / "run", path, steps=2)
    assert checkpoint.describe(path).sampling == description.sampling | {"steps": 2}
    good, bad = (np.tile([hits, 5, 10, 0], (len(THRESHOLDS), 1)) for hits in (20, 0))
    monkeypatch.setattr(threshold, "count_case", lambda *_: [bad, good])
    (setting, choice), *tried = choose_settings(
        tmp_path / "run", path, peaks=[1.0, 0.0], contrasts=[0.4], outlines=[0.7]
    )
    assert [one for one, _ in tried] == [(1.0, 0.4, 0.7), (0.0, 0.4, 0.7)]
    assert [one.number for _, one in tried] == [0, 1]
    assert [one.mean for _, one in tried] == pytest.approx([0.0, 40 / 55])
    assert (setting, choice) == tried[1]
    changed = checkpoint.describe(path)
    assert (changed.min_peak, changed.min_relative_contrast, changed.outline_share) == setting
    assert changed.threshold == choice.threshold
    with pytest.raises(ValueError, match="min_peak is 2"):
        choose_settings(tmp_path / "run", path, peaks=[0.9, 2.0])
    with pytest.raises(ValueError, match="split.json: cannot be read"):
        choose_settings(tmp_path / "nowhere", path)


def test_every_setting_is_counted_with_its_own_criteria_and_with_the_image(config, tmp_path, monkeypatch):
    data = (DataEntry(str(write_slices(tmp_path / "masked", np.random.default_rng(1), 4))),)
    config = dataclasses.replace(config, data=data)
    detector = Detector(tiny_system())
    seen = []

    def recorded(probability, truth, inside, spacing, criteria, image):
        seen.append((criteria, image))
        return counts_by_threshold(probability, truth, inside, spacing, criteria, image)

    monkeypatch.setattr(threshold, "counts_by_threshold", recorded)
    case = cases_of(config)[0]
    settings = [Setting(0.3, 0.0, 1.0), Setting(0.0, 0.6, 0.5)]
    counts = threshold.count_case(detector, case, detector.sampling_config(), settings)
    assert [(one.min_peak, one.min_relative_contrast, one.outline_share) for one, _ in seen] == settings
    assert all(image.values.shape == case.lesion().shape for _, image in seen)
    assert all(count.sum(1).tolist() == [count[0].sum()] * len(THRESHOLDS) for count in counts)


def test_patients_that_are_left_out_are_those_of_validation(config, tmp_path):
    data = (DataEntry(str(write_slices(tmp_path / "masked", np.random.default_rng(1), 6)), name="set"),)
    path = train(dataclasses.replace(config, data=data, validation=0.34, test=0.17), tmp_path / "run")
    out = tmp_path / "leave_one_out.json"
    choose_settings(tmp_path / "run", path, training=["set"], leave_one_out_path=out)
    result = json.loads(out.read_text())
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert set(result["patients"]) == {name for name, part in split.items() if part == "validation"}
    assert len(result["patients"]) == 2
    assert all(0 <= row["dice"] <= 1 for row in result["patients"].values())
    assert result["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), (
        "of the file as it is now"
    )
    with pytest.raises(ValueError, match="no such folder"):
        choose_settings(tmp_path / "run", path, leave_one_out_path=tmp_path / "none" / "x.json")
    kinds = tmp_path / "run" / "kinds.json"
    kinds.write_text(json.dumps(dict.fromkeys(split, "of one kind")))
    choose_settings(tmp_path / "run", path)
    assert "best of each: of one kind" in checkpoint.describe(path).threshold_chosen
    kinds.write_text(json.dumps({"nobody": "other", min(split): "other"}))
    with pytest.raises(ValueError, match=r"kinds\.json: not among the patients of this run's data: nobody"):
        choose_settings(tmp_path / "run", path)


@pytest.mark.parametrize(("pick", "other"), [("lowest", 4), ("highest", 14)])
def test_of_thresholds_with_nearly_equal_dice_the_lowest_or_highest_is_taken(pick, other):
    curve = np.full((1, len(THRESHOLDS)), 0.3)
    curve[0, 9] = 0.5
    assert pick_settings(curve, pick).threshold == pytest.approx(THRESHOLDS[9])
    for short, expected in ((0.9 * TOLERANCE, other), (1.1 * TOLERANCE, 9)):
        curve[0, other] = curve[0, 9] - short
        assert pick_settings(curve, pick).threshold == pytest.approx(THRESHOLDS[expected])


def test_of_several_settings_the_best_for_the_threshold_is_taken():
    curves = np.full((3, len(THRESHOLDS)), 0.3)
    curves[0, 9], curves[1, 12], curves[2, 12] = 0.5, 0.497, 0.496
    assert pick_settings(curves, "lowest") == Chosen(0, pytest.approx(THRESHOLDS[9]), 0.5)
    assert pick_settings(curves, "highest") == Chosen(1, pytest.approx(THRESHOLDS[12]), 0.497)


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


def test_a_patient_that_is_left_out_has_no_say_in_its_threshold():
    """Three patients, each found as a whole at one threshold alone; the second is seen twice."""
    best = {"a": 3, "b": 10, "c": 10}
    patients = ["a", "b", "b", "c"]

    def counts(patient):
        hits = np.where(np.arange(len(THRESHOLDS)) == best[patient], 100, 20)
        return np.stack([hits, 0 * hits, 100 - hits, 0 * hits], axis=1)

    kinds, settings = ["ms", "ms", "ms", "wmh"], [Setting(0.9, 0.0, 1.0), Setting(0.8, 0.5, 0.7)]
    useless = [np.tile([[0, 9, 100, 0]], (len(THRESHOLDS), 1))] * 4
    both = [useless, [counts(patient) for patient in patients]]
    found = leave_one_out(both, settings, kinds, patients)
    assert all({**row, **settings[1]._asdict()} == row for row in found.values())
    assert {p: row["threshold"] for p, row in found.items()} == pytest.approx(
        {"a": THRESHOLDS[10], "b": THRESHOLDS[3], "c": THRESHOLDS[10]}
    )
    assert {p: row["dice"] for p, row in found.items()} == pytest.approx(
        {"a": 1 / 3, "b": 1 / 3, "c": 1.0}, abs=1e-3
    )
    assert leave_one_out([[counts("a")]], settings[:1], ["ms"], ["a"]) == {}
    upper = leave_one_out(both, settings, kinds, patients, "highest")
    assert upper["b"]["threshold"] == pytest.approx(THRESHOLDS[10]), "3 and 10 are equal to the others"


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


def test_weights_of_an_unfinished_run_are_the_averages_of_its_checkpoints(config, tmp_path):
    out = tmp_path / "run"
    finished = load_file(train(config, out))
    assert export_checkpoints(out, tmp_path / "again.safetensors") == 4
    assert worst_difference(finished, load_file(tmp_path / "again.safetensors")) == 0
    (out / "denoiser.checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint of condition, denoiser yet"):
        export_checkpoints(out, tmp_path / "again.safetensors")
