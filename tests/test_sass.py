"""Machine code for sm_80, sm_90 and sm_100, made without a GPU: wide loads, no spills, no creeping growth."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sass import BASELINE, GROWTH, compiler

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, int]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sass"], env=env, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def test_every_kernel_compiles_for_each_architecture(facts):
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert sum(name.endswith(architecture) for name in facts) >= 36


def test_a_group_in_registers_is_read_by_as_many_loads_as_it_has_vectors(facts):
    """One load of 128 bits for each 16 bytes of x, and again for each of a residual: nothing is read twice."""
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for kind, size in (("f32", 4), ("bf16", 2)):
            plain = facts[f"group_norm_resident_{kind} {architecture}"]
            assert plain["loads_128"] == plain["kept"] * size // 16
            residual = facts[f"group_norm_resident_{kind}_residual {architecture}"]
            assert residual["loads_128"] == 2 * plain["loads_128"]


def test_a_16_bit_value_takes_a_dozen_instructions(facts):
    """The special functions are two instructions each; the library's would be thirty."""
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert facts[f"group_norm_silu_bf16 {architecture}"]["instructions"] < 14 * 8192 // (8 * 32)


def test_no_kernel_uses_local_memory(facts):
    assert {name: f["local"] for name, f in facts.items() if f["local"]} == {}


def test_streaming_kernels_load_128_bits(facts):
    assert [name for name, f in facts.items() if f["vector"] and not f["loads_128"]] == []


def test_no_kernel_grows_beyond_its_baseline(facts):
    held = json.loads(BASELINE.read_text())
    if held["triton"] != compiler():
        pytest.skip(reason=f"the baseline is of Triton {held['triton']}, and this is {compiler()}")
    baseline = held["instructions"]
    grown = {
        name: f"{baseline[name]} -> {f['instructions']} instructions"
        for name, f in facts.items()
        if name in baseline and f["instructions"] > GROWTH * baseline[name]
    }
    assert grown == {}
    assert set(facts) <= set(baseline), "python -m tests.sass --write adds new kernels to the baseline"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_cuda_sources_are_among_them(facts):
    assert {"ensemble_vector_f32 sm_90", "ensemble_vector_bf16 sm_80", "merge sm_80"} <= set(facts)
