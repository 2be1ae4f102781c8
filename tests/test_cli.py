"""The shell: exit codes, what is printed, what is written, what is refused before any work."""

import json
import subprocess
import sys

import nibabel as nib
import pytest
from typer.testing import CliRunner

from ddmd.cli import app
from ddmd.models import checkpoint
from tests.volumes import head, tiny_system, write

runner = CliRunner()


@pytest.fixture
def tiny(tmp_path) -> str:
    path = tmp_path / "tiny.safetensors"
    checkpoint.save(tiny_system(), path)
    return str(path)


@pytest.fixture
def flair(tmp_path, rng) -> str:
    return write(tmp_path / "p1_flair.nii.gz", *head(rng))


def _run(*args):
    result = runner.invoke(app, [str(a) for a in args])
    return result.exit_code, " ".join(result.output.split())


def test_one_volume_is_detected_and_everything_named(tiny, flair, tmp_path):
    code, text = _run(
        "detect", flair, "-o", tmp_path / "out", "--weights", tiny, "--samples", 2, "--steps", 1
    )
    assert code == 0, text
    for name in (
        "lesion_mask.nii.gz",
        "probseg",
        "uncertainty",
        "inter_discrepancy",
        "_overlay.png",
        "_lesions.tsv",
    ):
        assert name in text
    assert "score" in text
    assert nib.load(tmp_path / "out" / "p1_desc-lesion_mask.nii.gz").shape == (40, 48, 12)
    code, text = _run("detect", flair, "-o", tmp_path / "out", "--weights", tiny)
    assert code == 2
    assert "--overwrite" in text
    code, text = _run("detect", flair, "-o", tmp_path / "out", "--weights", tiny, "--overwrite", "--quiet")
    assert (code, text) == (0, "")


def test_a_folder_goes_on_after_a_bad_volume(tiny, tmp_path, rng):
    for name in ("a", "b", "c"):
        (tmp_path / "in" / name).mkdir(parents=True)
        write(tmp_path / "in" / name / "flair.nii.gz", *head(rng))
    (tmp_path / "in" / "b" / "flair.nii.gz").write_bytes(b"not an image at all")
    code, text = _run("detect", tmp_path / "in", "-o", tmp_path / "out", "--weights", tiny, "--steps", 1)
    assert code == 1
    assert "b: " in text
    assert "not a NIfTI file" in text
    assert "1 of 3 volumes failed" in text
    written = sorted(p.name.split("_")[0] for p in (tmp_path / "out").glob("*_mask.nii.gz"))
    assert written == ["a", "c"]
    assert not list((tmp_path / "out").glob(".partial*"))


def test_sequences_on_other_grids_are_refused_then_resampled(tiny, tmp_path, rng):
    values, affine = head(rng)
    write(tmp_path / "flair.nii.gz", values, affine)
    write(
        tmp_path / "t1.nii.gz",
        values[::2].copy(),
        affine @ [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    )
    args = (
        "detect",
        tmp_path / "flair.nii.gz",
        tmp_path / "t1.nii.gz",
        "-o",
        tmp_path / "out",
        "--weights",
        tiny,
    )
    code, text = _run(*args)
    assert code == 1
    assert "different grids" in text
    assert "--resample" in text
    assert _run(*args, "--resample")[0] == 0


@pytest.mark.parametrize(("extra", "message"), [
    (["--threshold", "2"], "--threshold is 2.0"), (["--steps", "0"], "steps is 0"), (["--samples", "0"], "samples is 0"),
    (["--sampler", "magic"], "sampler is 'magic'"), (["--device", "tpu"], "device is 'tpu'"),
    (["--sequence", "pd"], "--sequence is 'pd'"), (["--weights", "nothing"], "no such weights"),
])  # fmt: skip
def test_bad_usage_exits_with_two_and_writes_nothing(tiny, flair, tmp_path, extra, message):
    args = [
        "detect",
        flair,
        "-o",
        tmp_path / "out",
        *([] if "--weights" in extra else ["--weights", tiny]),
        *extra,
    ]
    code, text = _run(*args)
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_refused_before_the_work(tiny, flair, tmp_path):
    (tmp_path / "file").write_text("")
    code, text = _run("detect", flair, "-o", tmp_path / "file", "--weights", tiny)
    assert code == 2
    assert "is a file" in text
    assert _run("detect", tmp_path / "nothing.nii", "-o", tmp_path / "out", "--weights", tiny)[0] == 2
    assert _run("detect", flair)[0] == 2


def test_info_names_every_op_and_its_backend():
    from ddmd.ops import OPS

    code, text = _run("info")
    assert code == 0
    assert all(op in text for op in OPS)
    assert "torch" in text


def test_importing_is_light_and_touches_no_gpu():
    script = (
        "import sys, ddmd; ddmd.detect; ddmd.Detector; import torch, json;"
        "heavy = [m for m in ('matplotlib', 'monai', 'typer', 'nilearn', 'accelerate', 'sklearn', 'triton.compiler')"
        " if m in sys.modules]; print(json.dumps([heavy, torch.cuda.is_initialized()]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False]
