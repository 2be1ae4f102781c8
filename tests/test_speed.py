"""Figures of speed: the tables, the goals, and training steps of two checkouts."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import end_to_end, figures, goals, speed_tables, training, training_steps
from benchmarks.made_up_cases import write_cases
from benchmarks.result_file import ResultFile
from benchmarks.table import RESULTS
from ddmd.cohort.discovery import find_cases
from ddmd.inference.detector import Detector
from ddmd.training import loop
from ddmd.training.config import validate
from tests.volumes import head, tiny_system, write


def _write(path: Path, **values: object) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


# --------------------------------------------------------------------------- tables


def test_tables_of_the_page_are_those_of_the_newest_results() -> None:
    text = speed_tables.PAGE.read_text(encoding="utf-8")
    assert speed_tables.page(text) == text, "python -m benchmarks.speed_tables"


def test_the_base_of_the_goals_is_what_was_measured_of_it(tmp_path: Path) -> None:
    """What the files of the base on the H200 say rounds to the base that the table shows."""
    for path in RESULTS.glob("*nvidia-h200-2026-11-26.json"):
        shutil.copy(path, tmp_path)
    seen = goals.seen(tmp_path, "cuda")
    assert len(seen) >= 7
    bases = {goal.key: goal.base for goal in goals.goals()}
    for key, value in seen.items():
        assert value == pytest.approx(bases[key], rel=0.08), key


def test_what_was_not_measured_is_said_and_not_guessed(tmp_path: Path) -> None:
    table = goals.table(tmp_path)
    rows = [line for line in table.splitlines() if line.startswith(("| GPU", "| CPU"))]
    assert len(rows) == len(goals.goals())
    assert all(row.endswith("| not measured |  |") for row in rows)


@pytest.mark.parametrize(("unit", "value", "reached"), [("ms", 15, True), ("ms", 15.1, False), ("x", 15, True),
                                                        ("x", 14.9, False), ("", 16, True), ("MiB", 16, False)])  # fmt: skip
def test_a_goal_is_reached_from_the_right_side(unit: str, value: float, reached: bool) -> None:
    assert goals.Goal("key", "cpu", "figure", unit, None, 15).reached(value) is reached


def test_the_newest_file_counts_and_of_one_day_the_one_that_says_its_commit(tmp_path: Path) -> None:
    volume = {"kind": "volume", "device": "cpu"}
    _write(tmp_path / "volume-z-2026-01-02.json", **volume)
    _write(tmp_path / "volume-a-2026-01-02.json", **volume, commit="abcdefg")
    _write(tmp_path / "volume-b-2026-01-01.json", **volume, commit="abcdefg")
    _write(tmp_path / "volume-c-2026-01-03.json", kind="volume", device="cuda")
    found = figures.newest(tmp_path, "volume", "cpu")
    assert found is not None
    assert found.path.name == "volume-a-2026-01-02.json"
    assert figures.described(found) == "volume-a, abcdefg, 2026-01-02"
    assert figures.newest(tmp_path, "training", "cpu") is None


def test_the_best_rival_is_a_library_and_the_slowest_are_compared_with_ours_of_their_own_rounds(
    tmp_path: Path,
) -> None:
    comparisons = {
        "32 slices, N = 1": {
            "rounds": [
                {"ours": [1.0, 2.0], "MONAI, float32": [3.0, 4.0], "ours, DDMD_BACKEND=reference": [0.5, 0.5]}
            ]
        },
        "32 slices, N = 1, the slowest": {
            "rounds": [{"ours": [2.0, 2.0], "diffusers, compiled": [5.0, 9.0]}]
        },
        "131 slices, N = 1": {"rounds": [{"ours": [1.0, 1.0], "MONAI, float32": [7.0, 7.0]}]},
        "32 slices, N = 10": {"rounds": []},
    }
    for device, best in (("cuda", 2.5), ("cpu", 2.0)):
        path = tmp_path / f"volume-{device}-2026-01-01.json"
        result = figures.read(_write(path, kind="volume", device=device, comparisons=comparisons))
        assert figures.best_rival(result, 1) == pytest.approx(best)
        assert figures.best_rival(result, 1, whole=True) == pytest.approx(7.0)
        assert figures.best_rival(result, 10) is None


# --------------------------------------------------------------------------- training


def _checkout(folder: Path, old: bool, seconds: float) -> Path:
    """A package that trains as 0.1 did, or as today: each step takes some CPU seconds, and so does its batch."""
    package = folder / "ddmd" / "training"
    package.mkdir(parents=True)
    burn = f"begun = time.process_time()\n    while time.process_time() < begun + {seconds}: pass\n"
    (folder / "ddmd" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "config.py").write_text(
        "import json, pathlib\n"
        "def read_run(folder): return json.loads((pathlib.Path(folder) / 'config.json').read_text())\n"
    )
    if old:
        (package / "loop.py").write_text(
            "import time\nclass Stage:\n  def __init__(self, plan): self.plan = plan\n  def _one(self, model, optimizer, batch):\n    "
            + burn
        )
        call = "loop.Stage(plan)._one(None, None, None)"
    else:
        (package / "loop.py").write_text(
            "import time\ndef train_step(model, optimizer, batch, stage):\n    " + burn
        )
        call = "loop.train_step(None, None, None, types.SimpleNamespace(plan=plan))"
    recipe = package / ("light-4.toml" if old else "recipes/flair-image-labels.toml")
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text("[autoencoder_stage]\nsteps = 0\n[denoiser_stage]\nsteps = 1900\n")
    (package / "run.py").write_text(
        "import time, types\nfrom ddmd.training import loop\n"
        "def train(config, run):\n"
        f"  assert ('workers' in config) is {old}\n"
        "  for name in ('autoencoder_stage', 'denoiser_stage'):\n"
        "    plan = types.SimpleNamespace(name=name)\n"
        "    for step in range(config[name]['steps']):\n"
        f"      begun = time.process_time()\n      while time.process_time() < begun + {seconds}: pass\n"
        f"      {call}\n"
    )
    return folder


def test_training_steps_of_two_checkouts_are_measured_in_turn_with_their_batches(tmp_path: Path) -> None:
    base, now = (
        _checkout(tmp_path / "base", old=True, seconds=0.03),
        _checkout(tmp_path / "now", old=False, seconds=0.01),
    )
    settings = {
        "data": str(tmp_path / "data"),
        "start": "weights",
        "batch": 16,
        "steps": 5,
        "warm": 1,
        "threads": 1,
    }
    path = training.compare(base, now, settings, rounds=2, output=tmp_path)
    rounds = json.loads(path.read_text())["rounds"]
    assert len(rounds) == 2
    medians = training.medians(rounds)
    assert set(medians) == {"autoencoder_stage", "denoiser_stage"}
    for of_stage in medians.values():
        assert of_stage["base_cpu_s"] == pytest.approx(0.06, rel=0.4)
        assert of_stage["now_cpu_s"] == pytest.approx(0.02, rel=0.4)
        assert of_stage["cpu_s_ratio"] == pytest.approx(3.0, rel=0.4)


def test_a_checkout_whose_training_fails_has_no_figure(tmp_path: Path) -> None:
    settings = {"data": "data", "start": "weights", "batch": 16, "steps": 2, "warm": 1, "threads": 1}
    (tmp_path / "ddmd").mkdir()
    with pytest.raises(RuntimeError, match="training ended with 1"):
        training.run(tmp_path, settings)


def test_steps_of_today_are_found_where_the_benchmark_looks() -> None:
    """Every step goes through `loop.train_step`, by its name in the module, with the stage as fourth argument."""
    assert list(inspect.signature(loop.train_step).parameters)[:4] == ["model", "optimizer", "batch", "stage"]
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(inspect.getsource(loop.Stage.run).lstrip()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert calls.count("train_step") == 1


def test_todays_recipe_is_measured_on_any_data(tmp_path: Path) -> None:
    settings = {"data": str(tmp_path), "start": "weights", "batch": 4, "steps": 3, "warm": 2}
    values = training_steps.configuration(Path(loop.__file__).parent, settings)
    config = validate(values, "the benchmark")
    assert (config.autoencoder_stage.steps, config.denoiser_stage.steps, config.denoiser_stage.batch) == (
        5,
        5,
        4,
    )
    assert not config.later_stages
    assert [entry.root for entry in config.data] == [str(tmp_path)]


def test_made_up_cases_are_a_data_set_with_labels(tmp_path: Path) -> None:
    cases = find_cases(write_cases(tmp_path / "made-up", count=2))
    assert len(cases) == 2
    for case in cases:
        labels = case.labels()
        assert 0 < (labels == 1).sum() < len(labels)
        volume = case.volume(("flair",))
        values = volume.images["flair"]
        assert values[:, :, labels == 1].max() > values[:, :, labels == 0].max()


# --------------------------------------------------------------------------- whole detections


def test_a_measurement_that_was_stopped_measures_only_what_is_not_there(tmp_path, rng, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Each result is in the file as soon as it is known; what is there is not measured again."""
    path = tmp_path / "case_flair.nii.gz"
    write(path, *head(rng, (40, 48, 6)))
    monkeypatch.setattr(end_to_end, "volume_file", lambda folder: path)
    monkeypatch.setattr(end_to_end, "COMPUTED", ((2, 1),))
    names = ["ours", "ours, DDMD_BACKEND=reference"]
    target = tmp_path / "volume-cpu-2026-01-01.json"

    def measurement(end: float) -> end_to_end.Measurement:
        detector = Detector(tiny_system())
        return end_to_end.Measurement(
            detector, "tiny", ResultFile(target, {"kind": "volume", "device": "cpu"}), 1, end
        )

    over = measurement(end=0.0)
    over.compare(["2"], [1], names)
    over.scaling()
    assert "comparisons" not in over.results
    assert "scaling" not in over.results
    first = measurement(end=float("inf"))
    first.compare(["2"], [1], names)
    first.parts()
    stored = json.loads(target.read_text())
    assert list(stored["comparisons"]["2 slices, N = 1"]["rounds"][0]) == names
    assert (
        set(stored["parts"])
        == set(stored["parts_cpu"])
        >= {"read", "prepare", "write", "whole, file to files"}
    )
    whole = stored["parts"].pop("whole, file to files")
    assert sum(stored["parts"].values()) == pytest.approx(whole, rel=0.05)
    before = target.read_text()
    second = measurement(end=float("inf"))
    second.compare(["2"], [1], names)
    second.parts()
    assert target.read_text() == before
    second.computation()
    seconds = json.loads(target.read_text())["computation"]
    assert [name.partition(", ")[2] for name in seconds] == ["S = 2, N = 1"]
