"""Every example runs as it stands, and what it says is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ddmd

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def _run(name: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_here():
    tested = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert names
    assert all(f'"{name}"' in tested for name in names)


def test_training_on_own_data_gives_weights_that_detect(tmp_path):
    pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")
    said = _run("train_on_own_data.py", tmp_path, "own")
    assert "after 20 steps" in said
    description = ddmd.Detector.load(tmp_path / "own" / "run" / "mine.safetensors", "cpu").description
    assert description.training["labels"] == "image"
    assert description.training["patients"] == 3
    assert list((tmp_path / "own" / "results").glob("*_mask.nii.gz"))


def test_a_kernel_of_ones_own_agrees_with_its_definition(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    said = _run("add_a_kernel.py", tmp_path)
    assert float(said.split()[-1]) < 1e-6, said


def test_the_notebook_finds_the_lesions_of_the_phantom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "detect_and_look.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert float(re.search(r"Dice ([\d.]+)", text)[1]) > 0.7, text
    assert any("image/png" in output.get("data", {}) for output in outputs), "the picture"
    assert len(list((tmp_path / "out").iterdir())) > 10
