"""Figures by hand and against scikit-learn, cases that fail, and the files of a report."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from ddmd.cli import app
from ddmd.cohort.discovery import find_cases
from ddmd.evaluation.case_metrics import THRESHOLDS, case_metrics
from ddmd.evaluation.evaluate import EvaluationError, evaluate
from ddmd.evaluation.metrics import (
    Histogram,
    calibration_bins,
    calibration_error,
    confusion,
    dice_scores,
    lesion_wise,
    rejection_curve,
)
from ddmd.evaluation.report import html
from ddmd.evaluation.summary import Failure, summarise
from ddmd.inference.postprocess import LesionCriteria
from ddmd.io.text import without_folders
from ddmd.io.volume import Volume
from ddmd.models import checkpoint
from tests.volumes import head, tiny_system, write

pytest.importorskip("monai", reason="the extra ddmd[evaluate] is not installed")

PROVENANCE = {"weights": "w", "threshold": 0.5}


@pytest.fixture
def scene(rng):
    values, affine = head(rng)
    volume = Volume.from_array({"flair": values}, affine)
    truth = values > 180
    probability = (
        np.clip(truth * 0.6 + rng.random(values.shape) * 0.5, 0, 1).astype(np.float32) * volume.brain
    )
    return volume, probability, (probability * (1 - probability)).astype(np.float32), truth


@pytest.fixture
def data(tmp_path, rng):
    """Three volumes with masks, and the weights of a small system."""
    values, affine = head(rng)
    for name in ("a", "b", "c"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        write(folder / "flair.nii.gz", values, affine)
        write(folder / "lesion.nii.gz", (values > 180).astype(np.uint8), affine)
    checkpoint.save(tiny_system(), tmp_path / "tiny.safetensors")
    return tmp_path


def run(data, **options):
    return evaluate(data / "data", weights=str(data / "tiny.safetensors"), device="cpu", **options)


def dice(mask, truth):
    return 2.0 * (mask & truth).sum() / (mask.sum() + truth.sum())


def test_dice_by_hand():
    assert dice_scores(np.array([[1, 1, 2, 9], [5, 0, 0, 1], [0, 0, 0, 7]])).tolist() == [2 / 5, 1, 0]


def test_histograms_give_the_curves_of_the_voxels(rng):
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = rng.random(5000) < 0.1
    score = np.clip(truth * 0.3 + rng.random(5000) * 0.7, 0, 1)
    counts = Histogram.count(score, truth, 0.0, 1.0)
    assert counts.average_precision() == pytest.approx(average_precision_score(truth, score), abs=5e-3)
    assert counts.auroc() == pytest.approx(roc_auc_score(truth, score), abs=2e-3)
    threshold = 250 / 500
    assert counts.dice_curve()[250] == pytest.approx(dice(score >= threshold, truth), abs=1e-3)


def test_calibration_is_that_of_scikit_learn(rng):
    from sklearn.calibration import calibration_curve

    probability = rng.random(4000)
    event = rng.random(4000) < probability**2
    bins = calibration_bins(probability, event)
    shares, means = calibration_curve(event, probability, n_bins=10)
    assert bins[:, 1] / bins[:, 0] == pytest.approx(means)
    assert bins[:, 2] / bins[:, 0] == pytest.approx(shares)
    wanted = np.average(np.abs(shares - means), weights=np.histogram(probability, 10, (0, 1))[0])
    assert calibration_error(bins) == pytest.approx(wanted)


def test_lesions_are_counted_by_hand():
    truth, mask = np.zeros((2, 12, 3, 3), bool)
    truth[0, 0, 0] = truth[4:6, 1, 1] = truth[9, 2, 2] = True
    mask[5, 1, 1] = mask[7, 0, 0] = True
    assert lesion_wise(mask, truth) == {"lesions": 3, "lesion_recall": 1 / 3, "false_positives": 1}


def test_the_least_certain_voxels_are_left_out_first(rng):
    mask, truth = rng.random(1000) < 0.5, rng.random(1000) < 0.5
    uncertainty = (mask != truth) + 0.1 * rng.random(1000)  # every error is less certain than any right voxel
    wrong = int((mask != truth).sum())
    curve = rejection_curve(mask, truth, uncertainty, (0.0, 0.2, wrong / 1000))
    assert curve[0].tolist() == confusion(mask, truth, np.ones(1000, bool))[:3].tolist()
    assert curve[1, 1:].sum() == wrong - 200
    assert curve[2].tolist() == [int((mask & truth).sum()), 0, 0]


def test_one_case_and_the_pool(scene):
    volume, probability, uncertainty, truth = scene
    case = case_metrics("p", "p", volume, probability, uncertainty, truth, LesionCriteria(0.55))
    mask = probability >= 0.55
    wanted = [dice(probability >= float(threshold), truth) for threshold in THRESHOLDS]
    assert dice_scores(case.by_threshold) == pytest.approx(wanted)
    assert case.by_threshold.sum(1) == pytest.approx(case.confusion.sum())
    assert case.row["dice"] == pytest.approx(dice(mask, truth))
    assert case.row["recall"] == pytest.approx((mask & truth).sum() / truth.sum())
    voxel_ml = 0.096
    assert case.row["detected_ml"] == pytest.approx(mask.sum() * voxel_ml)
    assert case.row["false_positive_ml"] == pytest.approx((mask & ~truth).sum() * voxel_ml)
    inside = volume.brain | truth
    assert case.row["accuracy_of_empty_mask"] == pytest.approx(1 - truth[inside].mean())
    assert case.row["dice_oracle"] == pytest.approx(max(*wanted, case.row["dice"]))
    report = summarise([case, case, case], PROVENANCE)
    assert report.pooled["dice"] == pytest.approx(case.row["dice"])
    assert report.intervals["dice"] == pytest.approx((case.row["dice"],) * 3)
    assert 0 <= report.pooled["calibration_error"] <= 1
    assert report.curves["dice_by_rejected_share"][0] == pytest.approx(case.row["dice"])


def test_uncertainty_stands_beside_p_times_one_minus_p(scene):
    from sklearn.metrics import roc_auc_score

    volume, probability, _, truth = scene
    wrong = (probability >= 0.4) != truth
    variance = np.where(wrong, 0.2, 0.01).astype(np.float32)
    row = case_metrics("p", "p", volume, probability, variance, truth, LesionCriteria(0.4)).row
    inside = volume.brain | truth
    bernoulli = (probability * (1 - probability))[inside]
    assert row["uncertainty_auroc"] == pytest.approx(1.0)
    assert row["bernoulli_auroc"] == pytest.approx(roc_auc_score(wrong[inside], bernoulli), abs=0.02)


def test_the_score_is_that_of_a_detection(data, rng):
    """One definition: what an evaluation ranks volumes by is what a detection reports."""
    import ddmd

    report = run(data)
    detection = ddmd.detect(
        data / "data/a/flair.nii.gz", weights=str(data / "tiny.safetensors"), device="cpu"
    )
    assert report.patients[0]["score"] == pytest.approx(detection.score, rel=1e-6)


def test_the_score_ranks_volumes_with_lesions_above_healthy_ones(scene):
    volume, probability, uncertainty, truth = scene
    criteria = LesionCriteria(0.55)
    ill = case_metrics("ill", "ill", volume, probability, uncertainty, truth, criteria)
    well = case_metrics("well", "well", volume, probability * 0.1, uncertainty, truth & False, criteria)
    report = summarise([ill, well], PROVENANCE)
    assert report.pooled["score_auroc"] == 1.0
    assert report.pooled["score_brier"] == pytest.approx(
        ((1 - ill.row["score"]) ** 2 + well.row["score"] ** 2) / 2
    )
    assert np.isnan(summarise([ill], PROVENANCE).pooled["score_auroc"])


def test_intervals_are_the_same_for_the_same_seed_and_hold_the_mean(scene):
    volume, probability, uncertainty, truth = scene
    cases = [
        case_metrics(str(t), str(t), volume, probability, uncertainty, truth, LesionCriteria(t))
        for t in (0.3, 0.5, 0.6, 0.8)
    ]
    one, again = (summarise(cases, PROVENANCE, seed=3) for _ in range(2))
    assert one.intervals == again.intervals
    mean, low, high = one.intervals["dice"]
    assert low < mean < high


def test_intervals_are_over_patients_not_scans(scene):
    volume, probability, uncertainty, truth = scene
    scans = [
        case_metrics(str(t), "one", volume, probability, uncertainty, truth, LesionCriteria(t))
        for t in (0.3, 0.5, 0.6)
    ]
    other = case_metrics("x", "two", volume, probability, uncertainty, truth, LesionCriteria(0.8))
    report = summarise([*scans, other], PROVENANCE)
    mean = np.mean([np.mean([s.row["dice"] for s in scans]), other.row["dice"]])
    assert report.intervals["dice"][0] == pytest.approx(mean)


def test_small_variances_are_ranked_alike_in_every_case(scene):
    volume, probability, _, truth = scene
    wrong = (probability >= 0.4) != truth
    variance = np.where(wrong, 1e-6, 1e-8).astype(np.float32)  # small, and yet it knows
    for scale in (1.0, 100.0):
        case = case_metrics("p", "p", volume, probability, variance * scale, truth, LesionCriteria(0.4))
        assert case.uncertainty.auroc() == pytest.approx(1.0)


def test_the_single_threshold_is_chosen_on_other_patients(scene):
    volume, probability, uncertainty, truth = scene
    case = case_metrics("p", "p", volume, probability, uncertainty, truth, LesionCriteria(0.55))
    report = summarise([case], PROVENANCE, baseline_bin=case.baseline.best_bin())
    assert report.pooled["baseline_dice"] == pytest.approx(report.pooled["baseline_dice_oracle"])
    worse = summarise([case], PROVENANCE, baseline_bin=0)
    assert worse.pooled["baseline_dice"] < report.pooled["baseline_dice"]


def test_a_case_without_lesion_has_no_dice_but_millilitres(scene):
    volume, probability, uncertainty, truth = scene
    empty = truth & False
    row = case_metrics("h", "h", volume, probability * ~truth, uncertainty, empty, LesionCriteria(0.45)).row
    assert row["false_positive_ml"] == row["detected_ml"] > 0
    assert row["dice"] == 0
    assert np.isnan(row["dice_oracle"])
    row = case_metrics("h", "h", volume, probability * 0, uncertainty, empty, LesionCriteria(0.5)).row
    assert np.isnan(row["dice"])
    assert row["score"] < 0.5


def test_an_evaluation_writes_its_files(data):
    split = data / "split.json"
    split.write_text(json.dumps({"a": "train", "b": "test", "c": "train"}))
    report = run(data, out=data / "out", split=split)
    assert [row["patient"] for row in report.patients] == ["b"]
    assert {p.name for p in (data / "out").iterdir()} == {"metrics.json", "report.html", "per_patient.csv"}
    written = json.loads((data / "out" / "metrics.json").read_text())
    assert written["pooled"]["dice"] == pytest.approx(report.pooled["dice"])
    page = (data / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4, "curves, and the worst, median and best case"
    (row,) = csv.DictReader((data / "out" / "per_patient.csv").open())
    assert float(row["dice"]) == pytest.approx(report.patients[0]["dice"])
    assert "Dice" in report.table().columns[0]._cells
    with pytest.raises(EvaluationError, match=r"earlier evaluation \(metrics.json\); pass --overwrite"):
        run(data, out=data / "out", split=split)
    split.write_text(json.dumps({"a": "train"}))
    with pytest.raises(EvaluationError, match="no case with a mask in part test"):
        run(data, split=split)


def test_a_case_that_fails_is_a_row_and_the_others_go_on(data, monkeypatch):
    folder = data / "data"
    (folder / "a" / "flair.nii.gz").write_bytes(b"junk")
    mask = nib.load(folder / "b" / "lesion.nii.gz")
    moved = mask.affine.copy()
    moved[0, 3] += 40  # millimetres: of the same shape, and nowhere near the image
    write(folder / "b" / "lesion.nii.gz", np.asarray(mask.dataobj), moved)
    report = run(data, out=data / "out")
    assert [row["patient"] for row in report.patients] == ["c"]
    assert [failure.case for failure in report.failures] == ["a", "b"]
    rows = list(csv.DictReader((data / "out" / "failures.csv").open()))
    assert [row["case"] for row in rows] == ["a", "b"]
    assert all(row["error"].endswith("Error") and row["message"] for row in rows)
    for path in (data / "out").iterdir():
        assert str(data) not in path.read_text(), f"{path.name} names a folder of this machine"
    assert "Cases that failed" in (data / "out" / "report.html").read_text()
    from ddmd.evaluation import evaluate as module

    def out_of_memory(*_):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(module, "evaluate_case", out_of_memory)
    report = run(data, out=data / "out", overwrite=True)
    assert {failure.error for failure in report.failures} == {"MemoryError"}
    assert report.patients == []
    assert "No case could be evaluated" in (data / "out" / "report.html").read_text()
    assert json.loads((data / "out" / "metrics.json").read_text())["pooled"] == {}
    monkeypatch.undo()
    (folder / "a" / "flair.nii.gz").write_bytes((folder / "c" / "flair.nii.gz").read_bytes())
    (folder / "b" / "lesion.nii.gz").write_bytes((folder / "c" / "lesion.nii.gz").read_bytes())
    assert run(data, out=data / "out", overwrite=True).failures == ()
    assert not (data / "out" / "failures.csv").exists(), "failures of an earlier evaluation are gone"


def test_a_case_known_to_be_healthy_counts_with_an_empty_mask(data):
    (data / "data" / "b" / "lesion.nii.gz").unlink()
    (data / "data" / "participants.tsv").write_text("participant_id\thas_lesion\na\t1\nb\t0\nc\tn/a\n")
    report = run(data)
    rows = {row["patient"]: row for row in report.patients}
    assert rows["b"]["lesion_ml"] == 0
    assert rows["b"]["false_positive_ml"] == rows["b"]["detected_ml"]
    assert np.isfinite(report.pooled["score_auroc"])


HOSTILE = [
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "$x^$",
    "+x",
    "@sum",
    "-x",
    "a\nb",
    "p\udce9ter",
]


def test_hostile_names_stay_text(scene, tmp_path):
    from ddmd.evaluation.report import write_report

    volume, probability, uncertainty, truth = scene
    cases = [
        replace(case_metrics(n, n, volume, probability, uncertainty, truth, LesionCriteria(t)))
        for n, t in zip(HOSTILE, np.linspace(0.3, 0.9, len(HOSTILE)), strict=True)
    ]
    failures = [Failure(name, f"/home/ada/{name}.nii", "ValueError", f"/home/ada/{name}") for name in HOSTILE]
    report = summarise(cases, PROVENANCE | {"weights": "<b>"}, failures=failures)
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "could not be drawn" not in page
    for name in ("per_patient.csv", "failures.csv"):
        rows = list(csv.reader((tmp_path / name).open(errors="surrogateescape")))
        assert len(rows) == 1 + len(HOSTILE)
        starts = {row[0][0] for row in rows[1:]}
        assert not starts & set("=+-@"), f"{name} has a cell that a spreadsheet computes"
    assert "/home" not in "".join(p.read_text(errors="surrogateescape") for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("/home/ada/x y/f.nii: bad", "x y/f.nii: bad"),
        ("'/data/p1/f.nii.gz' and '/data/p2/f.nii.gz' differ", "'f.nii.gz' and 'f.nii.gz' differ"),
        (r"C:\Users\ada\f.nii: bad", "f.nii: bad"),
        ("n/a, 1/2 and 3 / 4 stay", "n/a, 1/2 and 3 / 4 stay"),
    ],
)
def test_messages_keep_base_names_only(message, wanted):
    assert without_folders(message) == wanted


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "tkagg", "nonsense"])
def test_a_report_needs_no_display_and_no_matplotlibrc(tmp_path, backend):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\naxes.grid: True\n")
    script = (
        "from ddmd.evaluation.report import _png\n"
        "draw = lambda figure: figure.subplots().set(xlabel='share (%)')\n"
        "assert _png(2, 2, draw).startswith('<img'), _png(2, 2, draw)\n"
    )
    environment = os.environ | {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    environment.pop("DISPLAY", None)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_a_picture_that_cannot_be_drawn_costs_the_picture_alone(scene):
    volume, probability, uncertainty, truth = scene
    case = case_metrics("p", "p", volume, probability, uncertainty, truth, LesionCriteria(0.55))
    broken = replace(case, picture={"image": np.zeros(3), "mask": np.ones(3), "truth": np.ones(3)})
    page = html(summarise([broken], PROVENANCE))
    assert page.count("could not be drawn: TypeError") == 3
    assert page.count("data:image/png;base64") == 1


def test_a_report_names_the_extra_that_is_missing(data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'ddmd\[evaluate\]'"):
        run(data)


def test_cases_are_found_in_the_layout_that_is_named(data):
    assert len(find_cases(data / "data", "volumes")) == len(run(data, layout="volumes").patients) == 3


def test_the_command_exits_with_1_where_a_case_failed(data):
    from typer.testing import CliRunner

    from ddmd.cli import app

    arguments = ["evaluate", str(data / "data"), "--weights", str(data / "tiny.safetensors"), "--device", "cpu",
                 "-o", str(data / "out")]  # fmt: skip
    assert CliRunner().invoke(app, arguments).exit_code == 0
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    (data / "data" / "b" / "flair.nii.gz").write_bytes(b"[/b] junk")
    failed = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert failed.exit_code == 1
    assert "b: VolumeError" in failed.output
    assert (data / "out" / "report.html").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"part": "validation"}, {"part": "tset"}, {"threshold": 2.0}, {"threshold": "0.5"}, {"overwrite": "no"},
        {"quality": "best"}, {"layout": "zip"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_wrong_are_refused_before_the_work(data, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"\b{name} "):
        run(data, **wrong)


def test_whom_a_split_and_the_data_do_not_share_is_said(data):
    (data / "split.json").write_text(json.dumps({"a": "test", "gone": "test", "elsewhere": "train"}))
    report = run(data, split=data / "split.json")
    assert len(report.patients) == 1
    notes = report.provenance["notes"]
    assert "left aside: patients who are in no part of the split: 2 (b, c)" in notes
    assert "patients of the split's test part who have no mask here: 1 (gone)" in notes


def test_cases_without_a_mask_are_named(data):
    (data / "data/b/lesion.nii.gz").unlink()
    arguments = [
        "evaluate",
        str(data / "data"),
        "-o",
        str(data / "out"),
        "--weights",
        str(data / "tiny.safetensors"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--samples", "1", "--steps", "1"])
    assert result.exit_code == 0, result.output
    note = "left aside: cases without a mask: 1 (b)"
    assert note in result.output
    assert note in json.loads((data / "out/metrics.json").read_text())["provenance"]["notes"]
