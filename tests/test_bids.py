"""The BIDS App: arguments as BIDS Apps take them, derivatives that the validator accepts, cohorts that are killed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from ddmd.cli import app
from ddmd.cli.bids import bids_app_arguments
from ddmd.cohort.bids import BidsRun
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.errors import DatasetError
from ddmd.data.phantom import phantom
from ddmd.io.results import BIDS_NAMES, PLAIN_NAMES, result_paths
from ddmd.models import checkpoint
from tests.volumes import tiny_system

IMAGES = int(os.environ.get("DDMD_COHORT", "20"))  # of the cohort that is killed
FAST = ("--samples", "2", "--steps", "1", "--device", "cpu")


@cache
def small_phantom():
    made = phantom(seed=1, spacing_mm=8.0)
    return np.asanyarray(made.images["flair"].dataobj), made.images["flair"].affine


def add_image(root: Path, name: str, rng) -> Path:
    """An image at its BIDS place: the phantom, 8 mm, its intensities changed."""
    values, affine = small_phantom()
    folders = [part for part in name.split("_")[:2] if part.startswith(("sub-", "ses-"))]
    folder = root.joinpath(*folders, "anat")
    folder.mkdir(parents=True, exist_ok=True)
    changed = (values * rng.uniform(0.5, 2.0)).astype(np.float32)
    nib.save(nib.Nifti1Image(changed, affine), folder / f"{name}.nii.gz")
    return folder / f"{name}.nii.gz"


def raw_data_set(root: Path) -> Path:
    root.mkdir()
    description = {
        "Name": "made up",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "DatasetDOI": "doi:10.1/x",
    }
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("Phantoms, for a test.\n")
    return root


@pytest.fixture
def tiny(tmp_path) -> str:
    checkpoint.save(tiny_system(), tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


@pytest.fixture
def raw(tmp_path, rng) -> Path:
    """Sessions, runs, acquisitions and neither; a T1w beside."""
    root = raw_data_set(tmp_path / "raw data")
    for name in (
        "sub-01_ses-1_FLAIR", "sub-01_ses-1_T1w", "sub-01_ses-2_FLAIR", "sub-02_run-1_FLAIR", "sub-02_run-2_FLAIR",
        "sub-02_acq-a_FLAIR", "sub-A3_FLAIR",
    ):  # fmt: skip
        add_image(root, name, rng)
    return root


CASES = ["sub-01_ses-1", "sub-01_ses-2", "sub-02_acq-a", "sub-02_run-1", "sub-02_run-2", "sub-A3"]


def invoke(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.output


def table(path):
    with path.open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file, delimiter="\t")
        ]


def validator_errors(folder: Path, *options: str) -> list[str]:
    """Errors of the BIDS validator, as "CODE place"."""
    command = shutil.which(
        "bids-validator-deno", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if command is None:
        pytest.skip("bids-validator-deno is not installed; it comes with ddmd[test]")
    done = subprocess.run(
        [command, str(folder), "--format", "json", *options], capture_output=True, text=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [f"{i['code']} {i.get('location')}" for i in issues if i["severity"] == "error"]


def test_arguments_of_bids_apps_become_those_of_the_command():
    def rewritten(text):
        return bids_app_arguments(text.split(), {"detect", "bids"})

    label, session = "--participant-label", "--session-label"
    plain = ["bids", "in", "out", "participant"]
    assert rewritten("in out participant") == plain
    assert rewritten("in out group -q") == ["bids", "in", "out", "group", "-q"]
    for form in ("--participant-label 01 02 -q", "--participant_label 01 02 -q"):
        assert rewritten(f"in out participant {form}") == [*plain, label, "01", label, "02", "-q"]
    assert rewritten("in out participant --participant_label=01 --session_label 1 2") == [
        *plain, label, "01", session, "1", session, "2",
    ]  # fmt: skip
    assert rewritten("bids in out participant --session-label 1 2") == [*plain, session, "1", session, "2"]
    assert rewritten("in out participant --participant-label") == [*plain, label]
    for other in ("detect in participant -o out", "--help", "detect in -o participant", "", "in out"):
        assert rewritten(other) == other.split()


def test_derivatives_pass_the_validator(raw, tiny, tmp_path):
    assert validator_errors(raw) == []
    for out in (tmp_path / "out", raw / "derivatives" / "ddmd"):
        code, text = invoke(raw, out, "participant", "--weights", tiny, *FAST, "-q")
        assert code == 0, text
        assert invoke(raw, out, "group")[0] == 0
        assert validator_errors(out) == []
    assert validator_errors(raw, "--recursive") == []
    stray = out / "sub-01/ses-1/anat/sub-01_ses-1_desc-lesion_uncertainty.nii.gz"
    shutil.copy(out / "sub-01/ses-1/anat/sub-01_ses-1_space-orig_label-L_mask.nii.gz", stray)
    assert any(stray.name in error for error in validator_errors(out)), "the validator looks at names"


def test_results_lie_where_bids_wants_them_and_name_their_sources(raw, tiny, tmp_path):
    out = tmp_path / "out"
    code, text = invoke(raw, out, "participant", "--weights", tiny, *FAST)
    assert code == 0, text
    assert [row["case"] for row in table(out / "cohort.tsv")] == CASES
    assert {row["patient"] for row in table(out / "cohort.tsv")} == {"sub-01", "sub-02", "sub-A3"}
    described = json.loads((out / "dataset_description.json").read_text())
    assert described["GeneratedBy"][0]["Name"] == "ddmd"
    assert described["SourceDatasets"][0]["DOI"] == "doi:10.1/x"
    linked = out / described["DatasetLinks"]["raw"]
    for case in CASES:
        folder = out.joinpath(*[part for part in case.split("_")[:2] if part[:4] in ("sub-", "ses-")], "anat")
        paths = result_paths(case, folder, BIDS_NAMES)
        assert all(
            path.is_file() == (what != "draws" and not what.endswith("_seg")) for what, path in paths.items()
        )
        sidecar = json.loads((folder / f"{case}_space-orig_label-L_mask.json").read_text())
        (uri,) = sidecar["Sources"]
        assert uri.startswith("bids:raw:sub-")
        assert (linked / uri.removeprefix("bids:raw:")).samefile(next(raw.rglob(f"{case}_FLAIR.nii.gz")))
        labels = np.asanyarray(nib.load(paths["labels"]).dataobj)
        with paths["labels"].with_name(f"{case}_space-orig_desc-lesions_dseg.tsv").open() as file:
            names = list(csv.DictReader(file, delimiter="\t"))
        assert [int(row["index"]) for row in names] == list(range(labels.max() + 1))
    text = "".join(p.read_text() for p in out.rglob("*.json"))
    assert str(tmp_path) not in text, "no path of this machine"


def test_labels_choose_and_the_group_level_joins(raw, tiny, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    broken = raw / "sub-02/anat/sub-02_run-2_FLAIR.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    options = ("--weights", tiny, *FAST, "-q")
    assert invoke(raw, whole, "participant", *options)[0] == 1
    assert invoke(raw, out, "participant", "--participant_label", "01", "sub-A3", *options)[0] == 0
    assert sorted(p.name for p in out.glob("sub-*")) == ["sub-01", "sub-A3"]
    assert invoke("bids", raw, out, "participant", "--participant-label", "sub-02", *options)[0] == 1
    assert not (out / "cohort.tsv").exists(), "runs over labels have tables of their own"
    assert invoke(raw, out, "group")[0] == 0
    for name in ("cohort.tsv", "failures.tsv"):
        assert table(out / name) == table(whole / name)
        assert len(table(out / name)) == (5 if name == "cohort.tsv" else 1)
    for level in ("participant", "group"):
        assert "sub-01" in {row["patient"] for row in table(whole / "cohort.tsv")}, level
    one = tmp_path / "one"
    assert invoke(raw, one, "participant", "--session-label", "2", *options)[0] == 0
    assert [p.name for p in one.rglob("*_result.json")] == ["sub-01_ses-2_result.json"]
    for wrong in (("--participant-label", "99"), ("--session-label", "ses-9")):
        code, text = invoke(raw, tmp_path / "none", "participant", *wrong, *options)
        assert code == 1
        assert wrong[1].removeprefix("ses-") in text
        assert "there are" in text
        assert not (tmp_path / "none").exists()


def test_each_level_writes_the_page_where_it_is_asked_for(raw, tiny, tmp_path):
    out = tmp_path / "out"
    code, text = invoke(raw, out, "participant", "--weights", tiny, *FAST, "--maps", "mask", "--report")
    assert code == 0, text
    assert f"report: {out / 'report.html'}" in text.replace("\n", "")
    (out / "report.html").unlink()
    assert invoke(raw, out, "group", "-q", "--report") == (0, "")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(case in page for case in CASES)
    assert validator_errors(out) == []


def test_drawn_masks_are_derivatives_the_validator_accepts(raw, tiny, tmp_path):
    out = tmp_path / "out"
    options = ("--participant-label", "A3", "--draws", "-q")
    code, text = invoke(raw, out, "participant", "--weights", tiny, *FAST, *options)
    assert code == 0, text
    assert result_paths("sub-A3", out / "sub-A3" / "anat", BIDS_NAMES)["draws"].is_file()
    assert validator_errors(out) == []


def test_wrong_uses_are_refused_before_anything_is_written(raw, tiny, tmp_path):
    files = sorted(raw.rglob("*"))
    code, text = invoke(raw, raw, "participant", "--weights", tiny)
    assert (code, "is the data set itself" in text) == (2, True)
    other = raw_data_set(tmp_path / "other")
    code, text = invoke(raw, other, "participant", "--weights", tiny)
    assert (code, "is another data set" in text) == (2, True)
    assert invoke("bids", raw, tmp_path / "out", "session")[0] == 2
    assert invoke(tmp_path / "nothing", tmp_path / "out", "participant")[0] == 2
    assert invoke(raw, tmp_path / "out", "group")[0] == 1
    assert invoke(raw, tmp_path / "out", "participant", "--participant-label")[0] == 2
    assert not (tmp_path / "out").exists()
    assert sorted(raw.rglob("*")) == files
    with pytest.raises(DatasetError, match="no image of participant x"):
        BidsRun(raw, tmp_path, ("x",)).select(find_cases(raw, "bids"))


def test_other_input_keeps_simple_names(tiny, tmp_path, rng):
    values, affine = small_phantom()
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "p1_flair.nii.gz")
    assert (
        invoke("detect", tmp_path / "p1_flair.nii.gz", "-o", tmp_path / "out", "--weights", tiny, *FAST)[0]
        == 0
    )
    paths = result_paths("p1", tmp_path / "out", PLAIN_NAMES)
    assert all(
        path.is_file() == (what != "draws" and not what.endswith("_seg")) for what, path in paths.items()
    )


def cohort_with_sessions(root: Path, rng, images: int) -> Path:
    """Two sessions a participant, three images broken in three ways."""
    raw_data_set(root)
    paths = [add_image(root, f"sub-{i // 2:02}_ses-{i % 2 + 1}_FLAIR", rng) for i in range(images)]
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    paths[images // 2].write_bytes(b"not an image")
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 20), np.float32), np.diag([8.0, 8, 8, 1])), paths[-1])
    return root


def kill_when(out: Path, results: int, process: subprocess.Popen) -> None:
    """Kill a process, and those it started, when so many results are there."""
    until = time.monotonic() + 240
    while len(list(out.rglob("*_result.json"))) < results:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("engine", ["threads", "ray"])
def test_a_cohort_killed_twice_ends_with_the_tables_of_an_undisturbed_one(
    tiny, tmp_path, rng, engine, monkeypatch
):
    """DDMD_COHORT=40 makes it a cohort of 40."""
    if engine == "ray":
        pytest.importorskip("ray", reason="ray is not installed; it comes with ddmd[ray]")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # rounding depends on the number of threads
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = cohort_with_sessions(tmp_path / "raw", rng, IMAGES)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    options = ("--weights", tiny, *FAST, "-q")
    whole = [sys.executable, "-m", "ddmd", str(root), str(undisturbed), "participant", *options]
    assert subprocess.run(whole, capture_output=True, check=False).returncode == 1
    assert len(table(undisturbed / "cohort.tsv")) == IMAGES - 3
    assert len(table(undisturbed / "failures.tsv")) == 3
    command = [sys.executable, "-m", "ddmd", str(root), str(out), "participant", *options, "--skip-existing"]
    command += ["--engine", engine, *(["--device", "cpu,cpu"] if engine == "ray" else [])]
    for results in (IMAGES // 4, IMAGES // 2):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        kill_when(out, results, process)
        assert len(list(out.rglob("*_result.json"))) < IMAGES - 3, "killed in the middle"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 4, "each failure once, and how many there are"
    assert f"3 of {IMAGES}" in done.stderr
    for name in ("cohort.tsv", "failures.tsv"):
        assert table(out / name) == table(undisturbed / name)
    for path in undisturbed.rglob("*.nii.gz"):
        again = out / path.relative_to(undisturbed)
        assert (
            nib.load(again).dataobj.get_unscaled().tobytes()
            == nib.load(path).dataobj.get_unscaled().tobytes()
        )
        assert again.read_bytes() == path.read_bytes(), (
            f"{path.name}: equal voxels, another compressed stream"
        )
    assert not list(out.rglob(".partial*"))
    assert not list(out.rglob(".*.lock"))
    assert not list(out.rglob(".*.journal"))
    assert validator_errors(out) == []


def test_a_result_that_was_damaged_is_a_failure_of_the_group_until_it_is_mended(raw, tiny, tmp_path):
    out = tmp_path / "out"
    options = ("--participant-label", "A3", "--weights", tiny, *FAST, "--maps", "mask", "-q")
    assert invoke(raw, out, "participant", *options)[0] == 0
    (mask,) = out.rglob("*_mask.nii.gz")
    whole = mask.read_bytes()
    for _ in range(2):  # what the group wrote before does not count
        mask.write_bytes(whole[:-20])
        assert invoke(raw, out, "group", "-q")[0] == 0
        assert table(out / "cohort.tsv") == []
        (row,) = table(out / "failures.tsv")
        assert (row["case"], row["file"], row["error"]) == (
            "sub-A3",
            "sub-A3_result.json",
            "IncompleteResult",
        )
        mask.write_bytes(whole)
        assert invoke(raw, out, "group", "-q")[0] == 0
        assert [r["case"] for r in table(out / "cohort.tsv")] == ["sub-A3"]
        assert table(out / "failures.tsv") == []
    (out / "failures_sub-x.tsv").write_bytes(b"case\tfile\n\xff\xfe\tx\n")
    code, text = invoke(raw, out, "group")
    assert code == 1
    assert "failures_sub-x.tsv: cannot be read as a table" in text
