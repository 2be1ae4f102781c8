"""What detection in many cases promises: the results of one by one, failures by case, resuming, bounded memory."""

import csv
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from ddmd.cli import app
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


def without_time(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table(path)]


def invoke(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.output


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


@pytest.mark.parametrize(
    "asked", [{"draws": True}, {"maps": ("mask", "draws")}, {"quality": "draws"}], ids=str
)
def test_drawn_masks_of_a_cohort_are_those_of_the_quality_draws(cohort, tmp_path, asked):
    """Also with weights whose own sampling stops early, and where a result of the posterior mean is there."""
    system = tiny_system()
    fast = system.description.sampling | {"stop": 0.98}
    path = tmp_path / "fast.safetensors"
    checkpoint.save(replace(system, description=replace(system.description, sampling=fast)), path)
    case, options = find_cases(cohort)[0], OPTIONS | {"weights": path, "device": "cpu"}
    folder = next(iter(case.files.values()))[0].parent
    list(detect_cohort(folder, tmp_path / "out", **options))
    ((_, result),) = detect_cohort(
        folder, tmp_path / "out", skip_existing=True, overwrite=True, **options, **asked
    )
    alone = Detector.load(path, "cpu").detect(case.volume(("flair",)), samples=2, steps=1, draws=True)
    assert result.provenance["Sampling"] == alone.provenance["Sampling"]
    assert result.volume_interval_ml == alone.volume_interval_ml
    assert list(detect_cohort(folder, tmp_path / "out", **options, **asked)) == [], "done before"
    if asked != {"quality": "draws"}:
        with pytest.raises(ValueError, match='draws and quality "fast" exclude each other'):
            list(detect_cohort(folder, tmp_path / "out", **options, **asked, quality="fast"))


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
        assert without_time(out / name) == without_time(undisturbed / name)
    assert not list(out.glob(".partial*"))


def test_results_of_other_options_are_neither_skipped_nor_replaced_unasked(detector, cohort, tmp_path):
    out = tmp_path / "out"
    list(detect_cohort(cohort, out, weights=detector, **OPTIONS))
    for changed in ({"seed": 1}, {"threshold": 0.123}, {"overlay": True}, {"reading": {"resample": True}}):
        with pytest.raises(OutputError, match="earlier results"):
            detect_cohort(cohort, out, weights=detector, skip_existing=True, **(OPTIONS | changed))
    again = [r for _, r in detect_cohort(cohort, out, weights=detector, **OPTIONS)]
    assert [type(r) for r in again] == [CaseError], "what is done is kept, what failed is tried again"
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
    calls = itertools.count(1)

    def failing(self, *args, **options):
        if next(calls) == 2:
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


def test_a_changed_input_is_done_again_and_others_are_not(detector, cohort, tmp_path, rng):
    out = tmp_path / "out"
    list(detect_cohort(cohort, out, weights=detector, **OPTIONS))
    changed = cohort / "sub-1/ses-1/anat/sub-1_ses-1_FLAIR.nii.gz"
    times = changed.stat()
    write(changed, *head(rng))
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))  # the content counts, not the time
    (cohort / "sub-3/ses-1/anat/sub-3_ses-1_FLAIR.nii.gz").write_bytes(
        (cohort / "sub-4/ses-1/anat/sub-4_ses-1_FLAIR.nii.gz").read_bytes()
    )
    again = detect_cohort(cohort, out, weights=detector, skip_existing=True, **OPTIONS)
    assert [case.name for case, _ in again] == ["sub-1_ses-1", "sub-3_ses-1"]
    assert len(table(out / "cohort.tsv")) == 6
    assert not table(out / "failures.tsv"), "what was mended is no failure any more"
    summary = json.loads((out / "sub-1_ses-1_result.json").read_text())
    assert len(summary["InputSha256"]) == 64
    assert str(tmp_path) not in (out / "sub-1_ses-1_result.json").read_text()


def test_overwriting_with_skip_existing_does_what_differs(detector, cohort, tmp_path):
    out = tmp_path / "out"
    list(detect_cohort(cohort / "sub-0", out, weights=detector, **OPTIONS))
    list(detect_cohort(cohort / "sub-1", out, weights=detector, **{**OPTIONS, "seed": 1}))
    both = {"skip_existing": True, "overwrite": True, "weights": detector}
    again = detect_cohort([cohort / "sub-0", cohort / "sub-1"], out, **both, **OPTIONS)
    assert [case.name for case, _ in again] == ["sub-1_ses-1"]


def test_several_devices_give_the_same_results(detector, cohort, tmp_path):
    path = tmp_path / "tiny.safetensors"
    for name, device in (("one", "cpu"), ("two", "cpu,cpu"), ("all", "all")):
        results = detect_cohort(cohort, tmp_path / name, weights=path, device=device, **OPTIONS)
        assert [case.name for case, _ in results] == [f"sub-{i}_ses-1" for i in range(6)]
    for name in ("two", "all"):
        assert without_time(tmp_path / name / "cohort.tsv") == without_time(tmp_path / "one/cohort.tsv")
        for file in (tmp_path / "one").glob("*.nii.gz"):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "two/run.json").read_text())["Device"] == "cpu,cpu"
    with pytest.raises(ValueError, match="allowed are"):
        detect_cohort(cohort, tmp_path / "x", weights=path, device="cpu,tpu", **OPTIONS)


def test_two_devices_compute_at_once(detector, cohort, tmp_path, monkeypatch):
    """Each of the first two cases waits in its computation until the other one is there."""
    both = threading.Barrier(2, timeout=60)
    plain, seen = Detector.maps, set()

    def meeting(self, *args, **options):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            both.wait()  # broken where the other one does not come: this case then fails
        return plain(self, *args, **options)

    monkeypatch.setattr(Detector, "maps", meeting)
    two = detect_cohort(
        cohort, tmp_path / "out", weights=tmp_path / "tiny.safetensors", device="cpu,cpu", **OPTIONS
    )
    assert sum(isinstance(result, Detection) for _, result in two) == 5, "the sixth cannot be read"
    assert len(seen) == 2


def run_shell(*args, **kwargs):
    command = [sys.executable, "-m", "ddmd", *map(os.fspath, map(str, args))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs
    )


def kill_after(process, out, results, how=signal.SIGKILL):
    """Kill a process as soon as so many results are there."""
    until = time.monotonic() + 120
    while len(list(out.rglob("*_result.json"))) < results:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(how)
    return process.communicate(timeout=60)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_the_command_goes_on_after_a_kill_with_the_same_tables(detector, cohort, tmp_path, how, rng):
    for i in range(6, 12):
        folder = cohort / f"sub-{i:02}/anat"
        folder.mkdir(parents=True)
        write(folder / f"sub-{i:02}_FLAIR.nii.gz", *head(rng))
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    list(detect_cohort(cohort, undisturbed, weights=detector, samples=2, steps=1))
    command = ("detect", cohort, "-o", out, "--weights", tmp_path / "tiny.safetensors", "--samples", 2)
    command = (*command, "--steps", 1, "--device", "cpu", "--log", tmp_path / "log.txt")
    process = run_shell(*command)
    kill_after(process, out, 3, how)
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*_result.json")}
    assert 3 <= len(before) < 11
    if how == signal.SIGTERM:
        assert not [p for p in out.iterdir() if p.name.startswith(".")]
    code, text = invoke(*command, "--skip-existing")
    assert code == 1, text  # the broken case
    assert text.count("done before") >= len(before) - 1  # one may have been killed as it got its name
    for name in ("cohort.tsv", "failures.tsv"):
        assert without_time(out / name) == without_time(undisturbed / name)
    for file in undisturbed.glob("*.nii.gz"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    log = (tmp_path / "log.txt").read_text()
    assert "sub-3_ses-1: VolumeError" in log
    assert "11 of 12 cases have a result, 1 failed" in log


def test_the_command_writes_json_tables_of_a_part_and_chosen_maps(detector, cohort, tmp_path):
    command = [
        "detect",
        cohort,
        "-o",
        tmp_path / "out",
        "--weights",
        tmp_path / "tiny.safetensors",
        "--steps",
        "1",
    ]
    result = CliRunner().invoke(app, [*map(str, command), "--part", "1/2", "--json", "--maps", "mask"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["Name"] for line in lines] == ["sub-0_ses-1", "sub-2_ses-1", "sub-4_ses-1"]
    for line in lines:
        assert set(line["Files"]) == {"mask", "lesions", "overlay", "result"}
        low, high = line["LesionMlInterval"]
        assert 0 <= low <= line["LesionMl"] * 1.001 <= high * 1.002
    assert [row["case"] for row in table(tmp_path / "out/cohort_part-1-of-2.tsv")] == [
        x["Name"] for x in lines
    ]
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        code, text = invoke(*command, "--part", wrong)
        assert code == 2
        assert "--part" in text


def test_a_single_volume_writes_no_tables(detector, cohort, tmp_path):
    command = ["detect", cohort / "sub-0", "-o", tmp_path / "out", "--weights", tmp_path / "tiny.safetensors"]
    assert invoke(*command, "--steps", 1)[0] == 0
    assert not list((tmp_path / "out").glob("cohort*"))


GROWTH = """
import os, sys, resource
from ddmd.cohort.pipeline import detect_cohort
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
seen = []
for _ in detect_cohort(sys.argv[1], sys.argv[2], weights=sys.argv[3], device="cpu", samples=2, steps=1):
    seen.append(resident())
print(*(round(mb, 1) for mb in seen))
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="only Linux says how much memory is in use"
)
def test_memory_of_a_cohort_of_sixty_is_flat(detector, tmp_path, rng):
    """Resident memory after sixty cases is that after twenty, but for less than a tenth of what forty cases hold."""
    values, affine = head(rng, (80, 96, 24), (2.0, 2.0, 6.0))
    for i in range(60):
        (tmp_path / f"in/p{i:02}").mkdir(parents=True)
        write(
            tmp_path / f"in/p{i:02}/flair.nii.gz", (values * rng.uniform(0.5, 2)).astype(np.float32), affine
        )
    arguments = [tmp_path / "in", tmp_path / "out", tmp_path / "tiny.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    resident = [float(word) for word in done.stdout.split()]
    assert len(resident) == 60
    case_mb = values.size * 4 * 6 / 2**20  # a volume and five maps, the least that a case holds
    print(resident[19], resident[59], case_mb)
    assert max(resident[40:]) - max(resident[:20]) < 40 * case_mb / 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"overwrite": "no"}, {"skip_existing": 1}, {"overlay": "yes"}, {"workers": 2.5}, {"workers": "2"}, {"part": (1,)},
        {"part": ("1", "2")}, {"part": 3}, {"reading": {"skul": "off"}},
        {"skull": "maybe"}, {"bias": 3}, {"strip": "no"}, {"brain": "nofile"}, {"brain": np.ones((2, 2, 2))},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_wrong_are_refused_before_the_work(detector, cohort, tmp_path, wrong):
    name = next(iter(wrong))
    if name in ("skull", "bias", "strip", "brain"):
        wrong = {"reading": wrong}
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*"):
        detect_cohort(cohort, tmp_path / "out", weights=detector, **{**OPTIONS, **wrong})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [[], ["--skip-existing"], ["--overwrite"], ["--skip-existing", "--overwrite"]]
)
def test_the_result_of_another_case_is_never_replaced(detector, tmp_path, rng, flags):
    """Names that differ in signs alone have files of the same names, where the cases come one by one."""
    checkpoint.save(tiny_system(), tmp_path / "tiny.safetensors")
    options = [
        "-o",
        tmp_path / "out",
        "--weights",
        tmp_path / "tiny.safetensors",
        "--samples",
        1,
        "--steps",
        1,
    ]
    one, other = tmp_path / "p 1_FLAIR.nii.gz", tmp_path / "p-1_FLAIR.nii.gz"
    for path in (one, other):
        write(path, *head(rng))
    assert invoke("detect", one, *options)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, said = invoke("detect", other, *options, *flags)
    assert code == 2
    assert "of another case, p 1" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
