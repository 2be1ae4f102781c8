"""The script that checks everything on a GPU, with stand-ins: its limits, its order, and what it keeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

GPU_CHECK = Path(__file__).parents[1] / "benchmarks" / "gpu_check.sh"


def _part_limits():
    text = GPU_CHECK.read_text(encoding="utf-8")
    return {
        name: int(limit) for name, limit in re.findall(r"^(?:if ! | *)part ([\w-]+) (\d+) ", text, flags=re.M)
    }


def test_the_parts_of_the_gpu_check_fit_into_nine_minutes():
    limits = _part_limits()
    assert {
        "build",
        "tests",
        "ops",
        "rivals",
        "volume",
        "training",
        "memcheck-ops",
        "racecheck-ops",
    } <= limits.keys()
    assert sum(limits.values()) < 540
    assert list(limits)[:2] == ["build", "info"]


@pytest.fixture
def stand_in_check(tmp_path):
    """The script in a folder of its own, with a Python that makes no environment and runs no part, but says what it ran."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(GPU_CHECK, tmp_path / "benchmarks")
    (tmp_path / "bin").mkdir()
    environment = tmp_path / "build" / "gpu-venv" / "bin"
    inner = (
        "#!/usr/bin/env bash\n"
        'echo "$*" >> "$RAN"\n'
        'for word in $HANG; do [[ "$*" == *"$word"* ]] && sleep 60; done\n'
        'for word in $BREAK; do [[ "$*" == *"$word"* ]] && exit 3; done\n'
        "echo done\n"
    )
    outer = f'#!/usr/bin/env bash\nif [ "$2" = venv ]; then mkdir -p "{environment}"; cp "{tmp_path}/bin/inner" "{environment}/python"; fi\n'
    programs = {
        "inner": inner,
        "python3": outer,
        "cmake": "#!/usr/bin/env bash\n",
        "compute-sanitizer": "#!/usr/bin/env bash\n",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**variables):
        ran = tmp_path / "ran"
        ran.write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "benchmarks/gpu_check.sh", "wheels", str(tmp_path / "out")],
            cwd=tmp_path, env={**os.environ, "PATH": path, "RAN": str(ran), "HANG": "", "BREAK": "", **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done, ran.read_text()

    return run


def test_a_part_of_the_gpu_check_that_breaks_loses_no_other(stand_in_check):
    done, ran = stand_in_check(BREAK="tests/test_gpu.py")
    assert done.returncode == 1
    assert "FAILED tests (exit 3" in done.stdout
    for module in (
        "benchmarks.end_to_end",
        "benchmarks/test_ops.py",
        "benchmarks.training",
        "benchmarks.goals",
    ):
        assert module in ran
    assert "core" in done.stdout.splitlines()[-1], "build/gpu/ddmd_test is not there, and that is said"


def test_a_part_of_the_gpu_check_that_hangs_ends_with_the_time_there_is(stand_in_check):
    """Nothing runs on past the total, and what no time was left for counts as failed."""
    begun = time.monotonic()
    done, ran = stand_in_check(HANG="tests/test_gpu.py", TOTAL="9")
    assert time.monotonic() - begun < 40
    assert "FAILED tests (exit 124" in done.stdout
    assert re.search(r"stopped at its limit of [1-9] s", done.stdout)
    assert "FAILED rivals: left out, 9 s are over" in done.stdout
    assert "benchmarks.goals" in ran, "the table is made of what there is"
    assert done.returncode == 1


def test_ops_that_were_measured_before_a_limit_are_written(tmp_path):
    (tmp_path / "conftest.py").write_bytes((GPU_CHECK.parent / "conftest.py").read_bytes())
    (tmp_path / "test_ops.py").write_text(
        "import time\n"
        "def test_quick(benchmark): benchmark.pedantic(lambda: None, rounds=1)\n"
        "def test_endless(): open('begun', 'w').close(); time.sleep(120)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--benchmark-json=out.json",
        "test_ops.py",
    ]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, env=outside)
    deadline = time.monotonic() + 100
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    assert process.wait(60) != 0
    names = [one["name"] for one in json.loads((tmp_path / "out.json").read_text())["benchmarks"]]
    assert names == ["test_quick"]
