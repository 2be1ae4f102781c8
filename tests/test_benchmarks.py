"""The benchmarks themselves: what they refuse, the tables they make, and rivals that do the same work."""

import hashlib
import json
import platform

import numpy as np
import pytest
import torch

from benchmarks import calibrate_draws, cards, shell, table, timing
from benchmarks.result_file import ResultFile
from ddmd.cohort.discovery import find_cases
from ddmd.inference.detector import Detector
from ddmd.inference.session import SamplingConfig
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from ddmd.models import checkpoint
from tests.volumes import head, tiny_system, write


def test_rivals_are_run_in_turn():
    order: list[str] = []
    rivals = {name: lambda name=name: order.append(name) for name in "abc"}
    assert timing.alternate(rivals, "cpu", 4).keys() == rivals.keys()
    assert order[-12:] == list("abc") * 4


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_figure_of_a_wrong_op_is_refused(wrong):
    timing.agree(torch.ones(3), torch.ones(3), 1e-6)
    with pytest.raises(RuntimeError, match="off by"):
        timing.agree(torch.tensor([1.0, wrong]), torch.ones(2), 1e-3)


def test_results_name_the_processor_and_not_the_host():
    name = timing.machine()
    assert name
    assert all(c.isalnum() or c == "-" for c in name)
    assert platform.node().lower() not in name.split("-")


def test_tables_come_from_the_files_of_a_folder(tmp_path, capsys):
    info = {"op": "noise", "shape": "(2, 3)", "backend": "C++", "share_of_copy": 0.5,
            "medians": {"ours": 0.001, "eager": 0.004}}  # fmt: skip
    (tmp_path / "cpu.json").write_text(json.dumps({"benchmarks": [{"extra_info": info}]}))
    volume = {
        "parts": {"read": 1.0},
        "rivals": {"MONAI": 2.5},
        "scaling": {"S = 1": 3.0},
        "missing": {"other": "why"},
    }
    (tmp_path / "volume-cpu.json").write_text(json.dumps(volume))
    (tmp_path / "evaluation-w-d.json").write_text("{}")
    for name, text in (("others", '{"a": [1]}'), ("list", "[1, 2]"), ("broken", "{"), ("volumes", '{"rows": []}'),
                       ("theirs", '{"benchmarks": [{"name": "x", "extra_info": {}}]}')):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(text)
    table.main([str(tmp_path)])
    printed = capsys.readouterr().out
    for expected in ("| noise | (2, 3) | C++ | 1.00 | 4.0x | not run | not run | 50 % |", "| MONAI | 2.50x |",
                     "| S = 1 | 3.000 |  |", "| other | not run: why |"):  # fmt: skip
        assert expected in printed
    assert printed.count("###") == 2


def test_the_tables_shown_have_the_gpus_figures(capsys):
    table.main()
    printed = capsys.readouterr().out
    assert "### nvidia-h200-2026-11-26" in printed
    assert "### volume-nvidia-h200-2026-11-26" in printed


def test_tables_of_an_evaluation_leave_out_what_is_not_there():
    row = {"patient": "p", "lesion_ml": 2.0, "detected_ml": 1.0, "dice": 0.25, "dice_oracle": 0.5,
           "baseline_dice_oracle": None}  # fmt: skip
    pooled = {"dice": 0.5, "uncertainty_auroc": 0.75, "bernoulli_auroc": 0.5, "decision_auroc": 0.875,
              "dice_without_5_percent": 0.625, "auprc": None}  # fmt: skip
    evaluation = {
        "pooled": pooled, "intervals": {"dice": [0.4, 0.3, 0.6], "hd95_mm": [None, None, None]},
        "patients": [row], "without_mask": [{"patient": "q", "detected_ml": 1.25}],
    }  # fmt: skip
    lines = cards.figures(evaluation).splitlines()
    assert "| Dice | 0.500 | 0.400 [0.300, 0.600] |" in lines
    assert not any(word in line for line in lines for word in ("recall", "HD95", "AUPRC"))
    text = cards.volumes(evaluation)
    assert "| p | 2.0 | 1.0 | 0.250 | 0.500 |  |" in text
    assert "False-positive volume of healthy controls: q: 1.2 ml." in text
    assert (
        "AUROC, on the 1 volumes with lesions: 0.750; p(1 - p) 0.500, decision uncertainty 0.875. Pooled"
        in text
    )


def test_a_case_that_the_split_does_not_list_is_in_no_part(tmp_path, monkeypatch, rng):
    from benchmarks import evaluations

    for patient in ("p1", "p2", "p3"):
        write(tmp_path / f"{patient}_flair.nii.gz", *head(rng))
    names = [case.name for case in find_cases(tmp_path)]
    split = {
        case.patient: part for case, part in zip(find_cases(tmp_path), ("test", "validation"), strict=False)
    }
    monkeypatch.setattr(evaluations.Detector, "load", lambda name: Detector(tiny_system()))

    def found(split, part):
        return [row["patient"] for row in evaluations.without_mask(tmp_path, "tiny", split, part)]

    assert len(names) == 3
    assert found(split, "test") == names[:1]
    assert found(split, "validation") == names[1:2]
    assert found(None, "test") == names


def test_pictures_are_drawn_from_the_newest_results(tmp_path, capsys):
    from benchmarks import pictures

    row = {"sweep": "N", "sampler": "ddim", "steps": 5, "samples": 5, "dice": 0.7, "uncertainty_auroc": 0.9}
    quality = {"rows": [row, row | {"steps": 10}, row | {"sweep": "S", "samples": 2}]}
    (tmp_path / "quality-b-2026-01-01.json").write_text(json.dumps(quality))
    (tmp_path / "quality-a-2026-01-02.json").write_text(json.dumps(quality))
    scaling = {
        "32 slices, S = 5, N = 5": 3.0,
        "S = 1": 1.0,
        "N = 10": 5.0,
        "8 slices": 1.0,
        "batch = 4": 3.1,
        "1 thread": 5.0,
    }
    volume = {"parts": {"read": 1.0, "whole, file to files": 4.0}, "scaling": scaling}
    (tmp_path / "volume-x-2026-01-01.json").write_text(json.dumps(volume))
    pictures.main([str(tmp_path), str(tmp_path)])
    assert "from quality-a-2026-01-02.json" in capsys.readouterr().out
    lines = [ax.lines[0].get_xdata().tolist() for ax in pictures.scaling(volume).axes[1:]]
    assert lines == [[1, 5], [5, 10], [8, 32], [4]]
    two_clocks = {name: {"wall_s": seconds, "cpu_s": 0.0} for name, seconds in scaling.items()}
    axes = pictures.scaling(volume | {"scaling": two_clocks}).axes[1:]
    assert axes[0].lines[0].get_ydata().tolist() == [1.0, 3.0]
    for name in ("quality.png", "volume.png", "painter.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_ablation_changes_one_part_at_a_time_and_shares_what_is_the_same(tmp_path):
    from dataclasses import replace

    from benchmarks import ablation
    from ddmd.training.config import read_config

    whole = read_config("benchmarks/ablation.toml")
    variants = ablation.variants(whole)
    assert variants.pop("whole") == whole
    assert all(variant != whole for variant in variants.values())
    assert len({str(variant) for variant in variants.values()}) == len(variants)
    lender = tmp_path / "whole"
    lender.mkdir()
    (lender / "autoencoders_a.checkpoint.safetensors").write_text("trained")
    borrowers = {"without X", "without Y", "without X and Y", "without pseudo-masks", "without the mirror image",
                 "without bags", "without teacher uncertainty", "without symmetric mirrors", "without diffusion", "anomaly detection"}  # fmt: skip
    for name, variant in variants.items():
        ablation.borrow_autoencoders(variant, whole, tmp_path / name, lender)
        assert (tmp_path / name).exists() == (name in borrowers), name
    row = {"system": "whole", "dice": 0.5}
    (tmp_path / "whole" / "figures.json").write_text(json.dumps([row]))
    assert ablation.measure("whole", replace(whole, seed=1), tmp_path / "whole") == [row], "trained again"


def _few_slices(rng):
    values, affine = head(rng, (40, 48, 6))
    return extract(Volume.from_array({"flair": values}, affine), ("flair",), SliceGrid(4.0, 16))


def test_rivals_take_the_same_steps_with_the_same_network(rng, monkeypatch):
    """From the same noise they find what ours finds; one that does other work has no figure."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("monai", reason="MONAI is not installed")
    from benchmarks import comparison, rivals

    config = SamplingConfig(samples=2, steps=4)
    names = rivals.chosen_names(without=["compiled"])
    slices, contest = _few_slices(rng), rivals.Rivals(tiny_system())
    stored = comparison.compare(contest, slices, config, names, 2)
    assert stored["missing"] == {}
    assert list(stored["rounds"][0]) == names
    assert {name.split(",")[0] for name in names} == {"ours", "diffusers", "MONAI"}
    figures = comparison.medians(stored)
    assert figures["ours"]["cpu_ratio"] == 1.0
    assert all(of_name["wall_s"] > 0 for of_name in figures.values())
    monkeypatch.setattr(rivals, "_drive", lambda *_: lambda network, x: torch.full_like(x, -1.0))
    stored = comparison.compare(contest, slices, config, names, 1)
    assert all("differ from ours by 1.000 of their sum" in why for why in stored["missing"].values())
    assert {name.split(",")[0] for name in stored["missing"]} == {"diffusers", "MONAI"}
    assert "MONAI, float32, condition kept" not in stored["rounds"][0]


def test_a_comparison_that_was_stopped_goes_on(rng):
    """What was measured is kept round by round; no round begins after the end."""
    from benchmarks import comparison, rivals

    contest, slices, config = rivals.Rivals(tiny_system()), _few_slices(rng), SamplingConfig(samples=1)
    names, kept = rivals.chosen_names(["reference"]), []

    def keep(stored):
        kept.append(json.loads(json.dumps(stored)))
        if len(stored["rounds"]) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison.compare(contest, slices, config, names, 3, keep=keep)
    stopped = kept[-1]
    assert len(stopped["rounds"]) == 2
    whole = comparison.compare(contest, slices, config, names, 3, json.loads(json.dumps(stopped)))
    assert whole["rounds"][:2] == stopped["rounds"]
    assert len(whole["rounds"]) == 3
    assert comparison.compare(contest, slices, config, names, 9, whole, end=0.0)["rounds"] == whole["rounds"]


@pytest.mark.parametrize("samples", [1, 3])
def test_rivals_bring_back_the_four_maps_that_ours_do(rng, samples):
    """All sides start from slices on the CPU and end with probability, uncertainty, X and Y there."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from benchmarks import rivals
    from ddmd.inference.session import detect_slices

    slices, contest = _few_slices(rng), rivals.Rivals(tiny_system())
    config = rivals.compared(SamplingConfig(samples=samples, steps=2, batch=4))
    expected = detect_slices(contest.system, slices, config)
    check, run = contest.work("diffusers, float32, condition kept", slices, config)
    maps, measured = check(), run()
    for name in ("probability", "uncertainty", "inter", "intra"):
        ours, theirs = getattr(expected, name), getattr(maps, name)
        assert theirs.device.type == "cpu"
        assert torch.allclose(theirs, ours, atol=0.02), name
        assert getattr(measured, name).shape == ours.shape


def test_rivals_draw_as_many_samples_in_one_batch_as_ours(rng, monkeypatch):
    """Launching sample after sample is not held against them."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from benchmarks import rivals

    rows, plain = [], rivals._drive

    def drive(*arguments):
        inner = plain(*arguments)
        return lambda network, x: rows.append(len(x)) or inner(network, x)

    monkeypatch.setattr(rivals, "_drive", drive)
    monkeypatch.setattr(rivals, "CPU_ROWS", 8)
    slices = _few_slices(rng)
    config = rivals.compared(SamplingConfig(samples=5, steps=2, batch=4))
    rivals.Rivals(tiny_system()).work("diffusers, float32, condition kept", slices, config)[0]()
    sizes = [min(4, len(slices) - first) for first in range(0, len(slices), 4)]
    assert rows == [size * s for size in sizes for s in _groups(5, max(1, 8 // size))]


def _groups(count, size):
    return [min(size, count - first) for first in range(0, count, size)]


def test_the_reference_backend_is_measured_by_a_session_of_its_own(rng, monkeypatch):
    """A session that captured a graph before would replay our kernels."""
    from benchmarks import rivals
    from ddmd.ops import registry

    backends = []

    class Recorder:
        def __init__(self, *_):
            self.seen = []
            backends.append(self.seen)

        def run(self, *_):
            self.seen.append(registry.serving("denoise_step", "cpu")[0])
            return self

        cpu = run

    monkeypatch.setattr(rivals, "Session", Recorder)
    contest = rivals.Rivals(tiny_system())
    for name in (rivals.OURS, rivals.REFERENCE):
        for run in contest.work(name, None, None):
            run()
    assert len(backends) == 2
    assert "reference" not in backends[0]
    assert set(backends[1]) == {"reference"}


def test_a_cohort_is_measured_by_the_wall_clock_of_the_command(tmp_path, monkeypatch):
    """Seconds of the whole process; volumes a minute from what more volumes cost, without the start."""
    from benchmarks import end_to_end

    sources = []

    def run(checkout, source, output, threads, options=()):
        sources.append(source)
        volumes = len(list(source.rglob("*.nii.gz"))) if source.is_dir() else 1
        return shell.Cost(wall_s=5.0 + 2.0 * volumes, cpu_s=1.0, peak_mib=100.0)

    monkeypatch.setattr(end_to_end.shell, "run", run)
    volume = tmp_path / "case_flair.nii.gz"
    volume.write_bytes(b"volume")
    result = end_to_end.from_shell("w", "cpu", volume, tmp_path, 3)
    assert sources == [volume, tmp_path / "cohort"]
    assert result["one volume"]["wall_s"] == 7.0
    assert result["a folder of 3 volumes"]["wall_s"] == 11.0
    assert result["volumes a minute, beyond the first"] == pytest.approx(30.0)


def test_two_checkouts_are_run_in_turn_with_their_own_package(tmp_path, monkeypatch):
    """Each process finds its own `ddmd`, wherever it is started; medians of both, and the lowest Dice."""
    ran = []

    def package(name, seconds, mask):
        (tmp_path / name / "ddmd").mkdir(parents=True)
        (tmp_path / name / "ddmd" / "__init__.py").touch()
        (tmp_path / name / "ddmd" / "__main__.py").write_text(
            "import pathlib, sys, time, nibabel, numpy\n"
            f"begun = time.process_time()\nwhile time.process_time() < begun + {seconds}: pass\n"
            "folder = pathlib.Path(sys.argv[sys.argv.index('-o') + 1]); folder.mkdir()\n"
            f"nibabel.save(nibabel.Nifti1Image(numpy.uint8({mask}), numpy.eye(4)), folder / 'a_mask.nii.gz')\n"
        )
        return tmp_path / name

    plain = shell.run
    monkeypatch.setattr(
        shell, "run", lambda checkout, *args: ran.append(checkout.name) or plain(checkout, *args)
    )
    monkeypatch.chdir(shell.ROOT)
    base = package("base", 1.0, [[[1, 1, 0]]])
    now, volumes = package("now", 0.0, [[[1, 0, 0]]]), tmp_path / "volumes"
    volumes.mkdir()
    path = shell.compare(base, now, [volumes], rounds=1, threads=1, output=tmp_path)
    assert shell.compare(base, now, [volumes], rounds=2, threads=1, output=tmp_path) == path
    assert ran == ["base", "now", "base", "now"], "the first round was kept, and the second added"
    pairs = json.loads(path.read_text())["pairs"]
    figures = shell.medians(pairs)
    assert [pair["input"] for pair in pairs] == ["volumes", "volumes"]
    assert 0.5 < figures["base_cpu_s"] - figures["now_cpu_s"] < 2.0
    assert figures["dice"] == pytest.approx(2 / 3, abs=1e-4)


def test_results_are_kept_when_a_run_is_stopped_and_never_mixed_with_those_of_other_settings(tmp_path):
    path = tmp_path / "results.json"
    for threads, value, kept in ((1, 0.5, None), (1, 0.25, 0.5), (2, 1.0, None)):
        results = ResultFile(path, {"threads": threads, "sizes": (1, 2)})
        assert results.get("read") == kept
        results.put("read", value)
        assert json.loads(path.read_text()) == {"threads": threads, "sizes": [1, 2], "read": value}
    path.write_text("{")
    assert "read" not in ResultFile(path, {"threads": 2})


def test_tables_in_the_texts_are_those_of_the_last_evaluations():
    texts = cards.texts()
    assert {path.name for path in texts} == {
        "README.md",
        "quality.md",
        "flair-image-labels.md",
        "flair-pixel-labels.md",
    }
    for path, text in texts.items():
        assert path.read_text() == text, f"{path} is behind; python -m benchmarks.cards"
    dice = cards.newest("flair-pixel-labels")["lgg"]["pooled"]["dice"]
    assert all(
        f"{dice:.3f}" in text
        for path, text in texts.items()
        if path.name in ("quality.md", "flair-pixel-labels.md")
    )
    of_kind = [
        row["dice"]
        for row in cards.newest("flair-image-labels")["volumes"]["patients"]
        if row["patient"].startswith("brats")
    ]
    assert len(of_kind) > 1
    mean = f"| {len(of_kind)} | {np.mean(of_kind):.2f} ({min(of_kind):.2f} to {max(of_kind):.2f}) |"
    assert all(mean in text for path, text in texts.items() if path.name in ("README.md", "quality.md"))


def test_goals_and_ranked_errors_are_those_of_the_evaluations(monkeypatch):
    """Two test volumes of a kind and one validation volume, with figures written out."""

    def row(name, dice, variance, bernoulli, decision):
        return {"patient": name, "dice": dice, "uncertainty_auroc": variance, "bernoulli_auroc": bernoulli,
                "decision_auroc": decision}  # fmt: skip

    def evaluations(name):
        better = 0.1 if name == "flair-pixel-labels" else 0.0
        tested = [row("brats-1", 0.5, 0.7, 0.8, 0.9), row("brats-2", 0.9 - 5 * better, 0.9, 0.8, 0.7)]
        return {
            "lgg": {"pooled": {"dice": 0.6 + 2 * better}, "patients": [], "without_mask": []},
            "lgg-validation": {"pooled": {"dice": 0.7}, "patients": [], "without_mask": []},
            "volumes": {"patients": tested, "without_mask": [{"patient": "well", "detected_ml": 1.5}]},
            "volumes-validation": {"patients": [row("wmh-1", 0.4, 0.9, 0.8, 0.7)], "without_mask": []},
        }

    monkeypatch.setattr(cards, "newest", evaluations)
    goals = cards.goals().splitlines()
    for line in (
        "| TCGA-LGG slices, pooled Dice | 0.70 | 0.600 | 0.700 |",
        "| the same as a share of `flair-pixel-labels` | 0.90 | 0.750 | |",
        "| glioma volumes, Dice | 0.86 | 0.70 (0.50 to 0.90) | no patient |",
        "| white matter hyperintensities, Dice | 0.60 | no patient | 0.40 |",
        "| marked in the healthy control (ml) | below 1 | 1.5 | |",
        "| volumes where `flair-pixel-labels` has a lower Dice than `flair-image-labels` | none | brats-2 | none |",
        "| kinds where the variance ranks errors better than p(1 - p) | all | 0 of 1 | 1 of 1 |",
        "| kinds where the decision uncertainty ranks errors better than p(1 - p) | all | 0 of 1 | 0 of 1 |",
    ):
        assert line in goals
    assert "| Glioma, volumes, test | 2 | 0.800 | 0.800 | 0.800 | 0.800 | 0.800 | 0.800 |" in cards.errors()
    assert "| White matter hyperintensities, validation | 1 | 0.900 | 0.800 | 0.700 |" in cards.errors()


@pytest.mark.parametrize("name", checkpoint.available())
def test_evaluations_are_of_the_weights_that_ship(name):
    checksum = hashlib.sha256(checkpoint.find(name).read_bytes()).hexdigest()
    assert {one["weights_sha256"] for one in cards.newest(name).values()} == {checksum}
    for kind in ("leave-one-out", "draws"):
        for path in sorted(cards.RESULTS.glob(f"{kind}-{name}-*.json"))[-1:]:
            assert json.loads(path.read_text())["weights_sha256"] == checksum
    with pytest.raises(ValueError, match="no evaluation of nothing on lgg"):
        cards.newest("nothing")


def test_candidates_for_draws_are_all_combinations_and_none_twice():
    start = SamplingConfig(samples=16, steps=10, eta=0.0)
    options = {"sampler": ("ddim", "dpm++2m"), "eta": (0.0, 1.0), "steps": (5, 10), "rater_mean": (-1.0,)}
    made = calibrate_draws.candidates(start, options)
    assert {(one.sampler, one.eta, one.steps) for one in made} == {
        ("ddim", 0.0, 5), ("ddim", 0.0, 10), ("ddim", 1.0, 5), ("ddim", 1.0, 10), ("dpm++2m", 0.0, 5), ("dpm++2m", 0.0, 10),
    }  # fmt: skip
    assert len(made) == 6
    assert {(one.samples, one.rater_mean) for one in made} == {(16, -1.0)}
    shifts = calibrate_draws.candidates(start, {"rater_mean": (-1.0, 0.0), "rater_sd": (0.5, 2.0)})
    assert [(one.rater_mean, one.rater_sd) for one in shifts] == [
        (-1.0, 0.5),
        (-1.0, 2.0),
        (0.0, 0.5),
        (0.0, 2.0),
    ]
    assert len({calibrate_draws.described(one) for one in made}) == 6
