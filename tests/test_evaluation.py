"""Figures by hand, against scikit-learn on the voxels themselves, and the files of a report."""

import json

import numpy as np
import pytest

from ddmd.evaluation.evaluate import EvaluationError, evaluate, summarise
from ddmd.evaluation.metrics import THRESHOLDS, Counts, case_metrics, dice_scores
from ddmd.inference.postprocess import LesionCriteria
from ddmd.io.volume import Volume
from tests.volumes import head, tiny_system, write

pytest.importorskip("monai", reason="the extra ddmd[evaluate] is not installed")


@pytest.fixture
def scene(rng):
    values, affine = head(rng)
    volume = Volume.from_array({"flair": values}, affine)
    truth = values > 180
    probability = (
        np.clip(truth * 0.6 + rng.random(values.shape) * 0.5, 0, 1).astype(np.float32) * volume.brain
    )
    return volume, probability, (probability * (1 - probability)).astype(np.float32), truth


def dice(found, truth):
    return 2.0 * (found & truth).sum() / (found.sum() + truth.sum())


def test_dice_by_hand():
    assert dice_scores(np.array([[1, 1, 2, 9], [5, 0, 0, 1], [0, 0, 0, 7]])).tolist() == [2 / 5, 1, 0]


def test_binned_curves_are_those_of_the_voxels(rng):
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = rng.random(5000) < 0.1
    score = np.clip(truth * 0.3 + rng.random(5000) * 0.7, 0, 1)
    counts = Counts.of(score, truth, 0.0, 1.0)
    assert counts.auprc() == pytest.approx(average_precision_score(truth, score), abs=5e-3)
    assert counts.auroc() == pytest.approx(roc_auc_score(truth, score), abs=2e-3)
    threshold = 250 / 500
    assert counts.dice_curve()[250] == pytest.approx(dice(score >= threshold, truth), abs=1e-3)


def test_one_patient_and_the_pool(scene):
    volume, probability, uncertainty, truth = scene
    patient = case_metrics("p", "p", volume, probability, uncertainty, truth, LesionCriteria(0.55))
    found = probability >= 0.55
    wanted = [dice(probability >= threshold, truth) for threshold in THRESHOLDS]
    assert dice_scores(patient.by_threshold) == pytest.approx(wanted)
    assert patient.by_threshold.sum(1) == pytest.approx(patient.confusion.sum())
    assert patient.row["dice"] == pytest.approx(dice(found, truth))
    assert patient.row["recall"] == pytest.approx((found & truth).sum() / truth.sum())
    inside = volume.brain | truth
    assert patient.row["accuracy_of_empty_mask"] == pytest.approx(1 - truth[inside].mean())
    assert patient.row["dice_oracle"] == pytest.approx(max(*wanted, patient.row["dice"]))
    report = summarise([patient, patient, patient], {"weights": "w", "threshold": 0.55})
    assert report.pooled["dice"] == pytest.approx(patient.row["dice"])
    assert report.intervals["dice"] == pytest.approx((patient.row["dice"],) * 3)
    assert 0 <= report.pooled["calibration_error"] <= 1
    assert report.curves["dice_by_left_out"][0] == pytest.approx(patient.row["dice"])


def test_intervals_are_the_same_for_the_same_seed_and_hold_the_mean(scene):
    volume, probability, uncertainty, truth = scene
    patients = [
        case_metrics(str(t), str(t), volume, probability, uncertainty, truth, LesionCriteria(t))
        for t in (0.3, 0.5, 0.6, 0.8)
    ]
    one, again = (summarise(patients, {"weights": "w", "threshold": 0.5}, seed=3) for _ in range(2))
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
    report = summarise([*scans, other], {"weights": "w", "threshold": 0.5})
    mean = np.mean([np.mean([s.row["dice"] for s in scans]), other.row["dice"]])
    assert report.intervals["dice"][0] == pytest.approx(mean)


def test_small_variances_are_ranked_alike_in_every_patient(scene):
    volume, probability, _, truth = scene
    wrong = (probability >= 0.4) != truth
    variance = np.where(wrong, 1e-6, 1e-8).astype(np.float32)  # small, and yet it knows
    for scale in (1.0, 100.0):
        patient = case_metrics("p", "p", volume, probability, variance * scale, truth, LesionCriteria(0.4))
        assert patient.uncertainty.auroc() == pytest.approx(1.0)


def test_the_single_threshold_is_chosen_on_other_patients(scene):
    volume, probability, uncertainty, truth = scene
    patient = case_metrics("p", "p", volume, probability, uncertainty, truth, LesionCriteria(0.55))
    best = patient.baseline.best()
    report = summarise([patient], {"weights": "w", "threshold": 0.55}, baseline_bin=best)
    assert report.pooled["baseline_dice"] == pytest.approx(report.pooled["baseline_dice_oracle"])
    worse = summarise([patient], {"weights": "w", "threshold": 0.55}, baseline_bin=0)
    assert worse.pooled["baseline_dice"] < report.pooled["baseline_dice"]


def test_a_patient_without_lesion_has_no_dice_but_millilitres(scene):
    volume, probability, uncertainty, truth = scene
    row = case_metrics(
        "healthy", "h", volume, probability * ~truth, uncertainty, truth & False, LesionCriteria(0.45)
    ).row
    assert row["found_ml"] > 0
    assert row["dice"] == 0
    assert np.isnan(row["dice_oracle"])
    assert np.isnan(
        case_metrics("h", "h", volume, probability * 0, uncertainty, truth & False, LesionCriteria(0.5)).row[
            "dice"
        ]
    )


def test_evaluation_writes_its_three_files(tmp_path, rng):
    from ddmd.models import checkpoint

    values, affine = head(rng)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        write(tmp_path / "data" / name / "flair.nii.gz", values, affine)
        write(tmp_path / "data" / name / "lesion.nii.gz", (values > 180).astype(np.uint8), affine)
    checkpoint.save(tiny_system(), tmp_path / "tiny.safetensors")
    (tmp_path / "split.json").write_text(json.dumps({"a": "train", "b": "test"}))
    report = evaluate(
        tmp_path / "data", weights=str(tmp_path / "tiny.safetensors"), out=tmp_path / "out", device="cpu",
        split=tmp_path / "split.json",
    )  # fmt: skip
    assert [row["patient"] for row in report.patients] == ["b"]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["pooled"]["dice"] == pytest.approx(report.pooled["dice"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert (tmp_path / "out" / "per_patient.csv").read_text().startswith("patient,dice")
    assert "dice" in str(report.table().columns[0]._cells)
    (tmp_path / "split.json").write_text(json.dumps({"a": "train", "b": "train"}))
    with pytest.raises(EvaluationError, match="no case with a mask in part test"):
        evaluate(tmp_path / "data", weights=str(tmp_path / "tiny.safetensors"), split=tmp_path / "split.json")
