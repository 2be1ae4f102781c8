"""A cohort on Ray: the results of one machine, when an actor is killed, when a case kills its actor, on a cluster."""

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from ddmd.cohort.pipeline import CaseError, detect_cohort, plan_cohort
from ddmd.cohort.ray_engine import RayError
from ddmd.inference.detection import Detection
from ddmd.models import checkpoint
from tests.volumes import head, tiny_system, write

ray = pytest.importorskip("ray", reason="ray is not installed; it comes with ddmd[ray]")
OPTIONS = {"samples": 2, "steps": 1, "overlay": False}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Rounding depends on the number of threads: one here, one in each actor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture
def weights(tmp_path):
    checkpoint.save(tiny_system(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def cohort(tmp_path, rng):
    """Twelve small heads, one of them broken."""
    for i in range(12):
        (tmp_path / f"in/p{i:02}").mkdir(parents=True)
        write(tmp_path / f"in/p{i:02}/flair.nii.gz", *head(rng))
    (tmp_path / "in/p05/flair.nii.gz").write_bytes(b"no image")
    return tmp_path / "in"


def table(path):
    with path.open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file, delimiter="\t")
        ]


def assert_same_results(one, other):
    for name in ("cohort.tsv", "failures.tsv"):
        assert table(one / name) == table(other / name)
    maps = sorted(path.name for path in one.glob("*.nii.gz"))
    assert maps
    assert maps == sorted(path.name for path in other.glob("*.nii.gz"))
    for name in maps:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def assert_only_this_machine():
    """The processes of Ray listen at the loopback address alone, and none is the dashboard's server."""
    me, listening = psutil.Process(), []
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            assert "dashboard.py" not in " ".join(process.cmdline()).split("/")
            listening += [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_an_actor_killed_in_the_middle_changes_nothing(weights, cohort, tmp_path):
    results = detect_cohort(cohort, tmp_path / "alone", weights=weights, device="cpu", **OPTIONS)
    alone = {case.name: result for case, result in results}
    run = plan_cohort(
        cohort, tmp_path / "out", weights=weights, engine="ray", device="cpu,cpu", tables=True,
        keep_detections=True, **OPTIONS,
    )  # fmt: skip
    killed, seen = None, {}
    for task, outcome in run.outcomes():
        assert task.case.name not in seen, "each case once"
        seen[task.case.name] = outcome
        # with both at work where they are, and in the middle at the latest: the second may be slow to start
        if killed is None and (len(run.engine.process_ids()) == 2 or len(seen) == 6):
            assert len(seen) <= 6, "in the middle"
            killed = run.engine.process_ids()[0]
            assert_only_this_machine()
            os.kill(killed, signal.SIGKILL)
    assert killed is not None
    assert set(seen) == {f"p{i:02}" for i in range(12)}
    assert_same_results(tmp_path / "alone", tmp_path / "out")
    for name, result in alone.items():
        if isinstance(result, Detection):
            given = seen[name].detection
            assert np.array_equal(
                np.asarray(given.probability.dataobj), np.asarray(result.probability.dataobj)
            )
            assert np.array_equal(given.mask.affine, result.mask.affine)
            assert given.lesions == result.lesions
    assert not ray.is_initialized(), "what was started here ends here"
    assert json.loads((tmp_path / "out/run.json").read_text())["Device"].startswith("ray, 2 x")


class EndsTheProcess:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_case_that_ends_its_process_is_a_failure_of_its_own(weights, cohort, tmp_path):
    run = plan_cohort(
        cohort, tmp_path / "out", weights=weights, engine="ray", device="cpu,cpu", tables=True, **OPTIONS
    )
    run.tasks = [
        dataclasses.replace(task, extra={"x": EndsTheProcess()}) if task.case.name == "p02" else task
        for task in run.tasks
    ]
    outcomes = {task.case.name: outcome for task, outcome in run.outcomes()}
    failures = {name: outcome.failure.error for name, outcome in outcomes.items() if outcome.failure}
    assert failures == {"p02": "LostWorkerError", "p05": "VolumeError"}
    assert len(outcomes) == 12


def test_a_cluster_is_joined_and_stays(weights, cohort, tmp_path, monkeypatch):
    with pytest.raises(RayError, match="allowed|with Ray it is"):
        detect_cohort(cohort, tmp_path / "x", weights=weights, engine="ray", device="tpu", **OPTIONS)
    assert not ray.is_initialized()
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    before = len(ray._private.state.jobs())
    environment = {**os.environ, "RAY_ADDRESS": context.address_info["gcs_address"]}
    command = [
        sys.executable,
        "-m",
        "ddmd",
        "detect",
        str(cohort),
        "-o",
        str(tmp_path / "out"),
        "--engine",
        "ray",
    ]
    command += ["--weights", str(weights), "--samples", "2", "--steps", "1", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 2, "the failure, and how many there are"
    assert "1 of 12 volumes failed" in done.stderr
    names = [json.loads(line).get("Name") for line in done.stdout.splitlines()]
    assert len([name for name in names if name]) == 11
    assert len(ray._private.state.jobs()) == before + 1, "it was a job of this cluster"
    assert ray.is_initialized()
    list(detect_cohort(cohort, tmp_path / "alone", weights=weights, device="cpu", samples=2, steps=1))
    assert_same_results(tmp_path / "alone", tmp_path / "out")
    again = {"weights": weights, "engine": "ray", "device": "cpu", "samples": 2, "steps": 1}
    resumed = list(detect_cohort(cohort, tmp_path / "out", skip_existing=True, **again))
    assert [(case.name, type(result)) for case, result in resumed] == [("p05", CaseError)]
    assert ray.is_initialized(), "a cluster that was there stays"


def test_without_ray_one_line_says_what_to_install(weights, cohort, tmp_path):
    script = "import sys\nsys.modules['ray'] = None\nsys.argv = ['ddmd', *sys.argv[1:]]\nfrom ddmd.cli import main\nmain()"
    command = [
        sys.executable,
        "-c",
        script,
        "detect",
        str(cohort),
        "-o",
        str(tmp_path / "out"),
        "--engine",
        "ray",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "ddmd[ray]" in line
