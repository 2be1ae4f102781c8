"""What detection in many cases promises: the results of one by one, failures by case, resuming, bounded memory."""

import csv
import gc
import json
import weakref

import numpy as np
import pytest

from ddmd.cohort.discovery import find_cases
from ddmd.cohort.pipeline import CaseError, detect_cohort, part_of
from ddmd.inference.detection import Detection, OutputError
from ddmd.inference.detector import Detector
from ddmd.models import checkpoint
from tests.volumes import head, tiny_system, write

OPTIONS = {"samples": 2, "steps": 1, "overlay": False}


@pytest.fixture
def detector(tmp_path) -> Detector:
    path = tmp_path / "tiny.safetensors"
    checkpoint.save(tiny_system(), path)
    return Detector.load(path, "cpu")


@pytest.fixture
def cohort(tmp_path, rng):
    """Five small heads in BIDS with sessions, and a broken one between them."""
    for i in range(6):
        folder = tmp_path / f"bids/sub-{i}/ses-1/anat"
        folder.mkdir(parents=True)
        write(folder / f"sub-{i}_ses-1_FLAIR.nii.gz", *head(rng))
    (tmp_path / "bids/sub-3/ses-1/anat/sub-3_ses-1_FLAIR.nii.gz").write_bytes(b"no image at all")
    return tmp_path / "bids"


def table(path):
    return list(csv.DictReader(path.open(), delimiter="\t"))


def without_seconds(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table(path)]


def test_results_are_those_of_one_by_one_and_a_failure_stays_with_its_case(detector, cohort, tmp_path):
    out = tmp_path / "out"
    results = {case.name: result for case, result in detect_cohort(cohort, out, weights=detector, **OPTIONS)}
    assert list(results) == [f"sub-{i}_ses-1" for i in range(6)]
    for case in find_cases(cohort):
        result = results[case.name]
        if case.name == "sub-3_ses-1":
            assert isinstance(result, CaseError)
            continue
        alone = detector.detect(case.volume(("flair",)), samples=2, steps=1)
        assert isinstance(result, Detection)
        for key in ("mask", "probability", "uncertainty"):
            values = [np.asarray(getattr(d, key).dataobj) for d in (result, alone)]
            assert np.array_equal(*values)
    (failure,) = table(out / "failures.tsv")
    assert (failure["case"], failure["file"]) == ("sub-3_ses-1", "sub-3_ses-1_FLAIR.nii.gz")
    assert failure["error"] == "VolumeError"
    assert "not a NIfTI file" in failure["reason"]
    rows = table(out / "cohort.tsv")
    assert [row["case"] for row in rows] == [name for name in results if name != "sub-3_ses-1"]
    assert [float(row["score"]) for row in rows] == [
        r.score for r in results.values() if isinstance(r, Detection)
    ]
    run = json.loads((out / "run.json").read_text())
    assert (run["Cases"], run["Done"], run["Failed"]) == (6, 5, 1)
    assert run["WeightsSha256"] == detector.weights_sha256


def test_a_cohort_that_was_cut_off_goes_on_and_ends_with_the_same_tables(detector, cohort, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    for _ in detect_cohort(cohort, undisturbed, weights=detector, **OPTIONS):
        pass
    cut_off = detect_cohort(cohort, out, weights=detector, workers=1, **OPTIONS)
    for _ in range(2):
        next(cut_off)
    cut_off.close()
    finished = {p: p.stat().st_mtime_ns for p in out.glob("*_result.json")}
    assert 2 <= len(finished) < 5
    damaged = next(p for p in out.glob("sub-1*probseg.nii.gz"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    again = [c.name for c, _ in detect_cohort(cohort, out, weights=detector, skip_existing=True, **OPTIONS)]
    assert "sub-1_ses-1" in again
    assert len(again) == 6 - len(finished) + 1
    kept = [p for p in finished if "sub-1" not in p.name]
    assert all(p.stat().st_mtime_ns == finished[p] for p in kept)
    for name in ("cohort.tsv", "failures.tsv"):
        assert without_seconds(out / name) == without_seconds(undisturbed / name)
    assert not list(out.glob(".partial*"))


def test_results_of_other_options_are_neither_skipped_nor_replaced_unasked(detector, cohort, tmp_path):
    out = tmp_path / "out"
    list(detect_cohort(cohort, out, weights=detector, **OPTIONS))
    for changed in ({"seed": 1}, {"threshold": 0.123}, {"overlay": True}, {"reading": {"resample": True}}):
        with pytest.raises(OutputError, match="earlier results"):
            detect_cohort(cohort, out, weights=detector, skip_existing=True, **(OPTIONS | changed))
    with pytest.raises(OutputError, match="earlier results"):
        detect_cohort(cohort, out, weights=detector, **OPTIONS)
    done = [r for _, r in detect_cohort(cohort, out, weights=detector, overwrite=True, **OPTIONS)]
    assert sum(isinstance(r, Detection) for r in done) == 5


def test_parts_hold_every_case_once_and_have_tables_of_their_own(detector, cohort, tmp_path):
    for i in (1, 2, 3, 4):
        for _ in detect_cohort(cohort, tmp_path / "out", weights=detector, part=(i, 4), **OPTIONS):
            pass
    rows = [row for i in (1, 2, 3, 4) for row in table(tmp_path / f"out/cohort_part-{i}-of-4.tsv")]
    assert sorted(row["case"] for row in rows) == [f"sub-{i}_ses-1" for i in (0, 1, 2, 4, 5)]
    for part in ((0, 4), (5, 4), (1, 0)):
        with pytest.raises(ValueError, match="counted from 1"):
            part_of(find_cases(cohort), part)


@pytest.mark.parametrize("where", ["prepare", "detect"])
@pytest.mark.parametrize(
    "error", [MemoryError("no room"), RuntimeError("device-side\nassert"), KeyError("x")]
)
def test_any_exception_is_the_failure_of_its_case(detector, cohort, tmp_path, monkeypatch, where, error):
    plain = getattr(Detector, where)
    calls = []

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return plain(self, *args, **options)

    monkeypatch.setattr(Detector, where, failing)
    results = [r for _, r in detect_cohort(cohort, tmp_path / "out", weights=detector, **OPTIONS)]
    failures = [r for r in results if isinstance(r, CaseError)]
    assert {f.error for f in failures} == {"VolumeError", type(error).__name__}
    assert all(f.reason.isprintable() for f in failures)
    assert len(table(tmp_path / "out/failures.tsv")) == 2
    assert len(table(tmp_path / "out/cohort.tsv")) == 4


def test_memory_holds_a_few_cases_whatever_the_cohort(detector, tmp_path, rng, monkeypatch):
    for i in range(12):
        (tmp_path / f"in/p{i:02}").mkdir(parents=True)
        write(tmp_path / f"in/p{i:02}/flair.nii.gz", *head(rng))
    alive: weakref.WeakSet = weakref.WeakSet()
    plain, most = Detector.prepare, []

    def counted(self, *args, **options):
        prepared = plain(self, *args, **options)
        alive.add(prepared.volume)
        gc.collect()
        most.append(len(alive))
        return prepared

    monkeypatch.setattr(type(detector), "prepare", counted)
    monkeypatch.setattr("ddmd.io.volume.Volume.__hash__", object.__hash__, raising=False)
    for _ in detect_cohort(tmp_path / "in", tmp_path / "out", weights=detector, workers=1, **OPTIONS):
        pass
    assert len(most) == 12
    assert max(most) <= 4  # 2 * workers + 2
