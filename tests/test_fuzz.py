"""The fuzzing job finds what it is to find, and the library's readers of volumes stand a short run of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddmd.io.volume import VolumeError
from tests.fuzz import __main__ as fuzz
from tests.fuzz.mutants import Mutant


def _spoilt_result(folder):
    assert np.isfinite(np.nan)


def _raise(error):
    def use(folder):
        raise error

    return use


@pytest.mark.parametrize(("use", "outcome"), [
    (lambda folder: None, "success"),
    (_raise(VolumeError("x.nii: refused; do that")), "refused"),
    (_raise(VolumeError("two\nlines")), "fault"),
    (_raise(VolumeError("")), "fault"),
    (_raise(VolumeError("x.nii: there is not enough memory to read it")), "fault"),
    (_raise(ValueError("of somebody else")), "fault"),
    (_raise(TypeError("anything")), "fault"),
    (_spoilt_result, "fault"),
])  # fmt: skip
def test_only_success_or_one_line_of_ours_is_no_fault(tmp_path, use, outcome):
    assert fuzz.outcome_of(Mutant({}, "", use), tmp_path)[0] == outcome


@pytest.mark.parametrize(("use", "said"), [
    (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    (lambda folder: time.sleep(60), "SIGALRM"),
    (lambda folder: np.ones(3 << 28).sum(), "MemoryError"),
    (lambda folder: os._exit(3), "exit 3"),
])  # fmt: skip
def test_deaths_hangs_and_hunger_are_faults_and_the_run_goes_on(monkeypatch, use, said):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    bad = Mutant({"x": b"bytes"}, "planted", use)
    good = Mutant({}, "", lambda folder: None)
    monkeypatch.setattr(
        fuzz, "mutant_of", lambda seed, number, kinds: ("planted", bad if number == 2 else good)
    )
    seen = list(fuzz.reports(0, 0, [], 0.0, 5))
    assert [r["number"] for r in seen] == [0, 1, 2, 3, 4]
    assert [r["outcome"] for r in seen] == ["success", "success", "fault", "success", "success"]
    assert said in seen[2]["said"]


def test_a_seed_and_a_number_are_a_mutant():
    for number in range(30):
        (kind, one), (_, other) = (fuzz.mutant_of(5, number, list(fuzz.KINDS)) for _ in range(2))
        assert (kind, one.files, one.what) == (kind, other.files, other.what)
    assert {fuzz.mutant_of(5, n, list(fuzz.KINDS))[0] for n in range(30)} == set(fuzz.KINDS)


def test_damaged_volumes_end_in_success_or_one_line():
    seed = int(os.environ.get("DDMD_TEST_SEED") or 1)  # make fuzz SEED=N looks further
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--kind", "volumes", "--seconds", "5", "--mutants", "100", "--seed", str(seed)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"seed {seed}, 0 faults" in run.stdout
