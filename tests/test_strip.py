"""Skull stripping: the brain is found where the skull is on, and nothing else changes."""

from __future__ import annotations

import importlib.util
import socket

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from typer.testing import CliRunner

from ddmd.cli import app
from ddmd.data.phantom import phantom
from ddmd.inference.detector import Detector
from ddmd.io.strip import strip_skull
from ddmd.io.volume import Volume, VolumeError

from .volumes import tiny_system

needs_deepbet = pytest.mark.skipif(
    importlib.util.find_spec("deepbet") is None, reason="the extra 'strip' is not installed"
)
SPACING = 4.0


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


@pytest.fixture(scope="module")
def head():
    """A T1 and a FLAIR of a head with skull and scalp, their affine, and the brain in it."""
    made = phantom(seed=3, spacing_mm=SPACING, lesions=1, sequences=("t1", "flair"), bias=0.0)
    wide = [np.pad(np.asanyarray(i.dataobj), 8) for i in (*made.images.values(), made.brain)]
    brain = wide[2] > 0
    affine = made.brain.affine.copy()
    affine[:3, 3] -= 8 * affine[:3, :3].sum(1)
    depth = ndimage.distance_transform_edt(~ndimage.binary_closing(brain, iterations=2), sampling=SPACING)
    noise = np.random.default_rng(3).rayleigh(15.0, brain.shape)
    images = {}
    for name, values in zip(made.images, wide, strict=False):
        scalp = np.where((depth > 10) & (depth <= 20), 500.0, 0.0)
        images[name] = np.where(brain, values, scalp + noise).astype(np.float32)
    return images, affine, brain


@needs_deepbet
def test_the_brain_is_found_in_a_head(head):
    images, affine, brain = head
    rough = Volume.from_array({"flair": images["flair"]}, affine)
    volume = Volume.from_array({"flair": images["flair"]}, affine, strip=True)
    assert rough.skull
    assert not volume.skull
    assert dice(volume.brain, brain) > 0.9
    assert volume.notes == ("array (flair): skull stripped by deepbet",)
    assert (volume.normalised("flair")[~volume.brain] == -4).all()


def test_the_t1_is_looked_at_where_there_is_one(head, monkeypatch):
    images, affine, brain = head
    asked = []

    def record(values, inside_head, label):
        asked.append(values)
        return brain

    monkeypatch.setattr("ddmd.io.strip.strip_skull", record)
    volume = Volume.from_array({"flair": images["flair"], "t1": images["t1"]}, affine, strip=True)
    (values,) = asked
    np.testing.assert_array_equal(values, images["t1"])
    np.testing.assert_array_equal(volume.brain, brain)


@needs_deepbet
def test_any_orientation_gives_the_same_brain(head, tmp_path):
    images, affine, brain = head
    turned = nib.Nifti1Image(images["t1"], affine).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nib.save(turned, tmp_path / "x_t1.nii.gz")
    volume = Volume.read(tmp_path / "x_t1.nii.gz", strip=True)
    assert dice(volume.brain, brain) > 0.9


@pytest.mark.parametrize("options", [{}, {"skull": "off"}, {"brain": True}])
def test_what_is_stripped_stays_as_it_is_and_a_note_says_so(head, options, monkeypatch):
    images, affine, brain = head

    def never(*args):
        raise AssertionError("deepbet was asked")

    monkeypatch.setattr("ddmd.io.strip.strip_skull", never)
    values = images["flair"] if options else np.where(brain, images["flair"], 0)
    options = {"brain": brain.astype(np.uint8)} if "brain" in options else options
    plain = Volume.from_array({"flair": values}, affine, **options)
    asked = Volume.from_array({"flair": values}, affine, strip=True, **options)
    np.testing.assert_array_equal(asked.brain, plain.brain)
    assert next(n for n in asked.notes if n not in plain.notes).startswith("array (flair): not stripped: ")


@needs_deepbet
def test_nothing_is_downloaded_and_torch_stays_as_it_was(head, monkeypatch):
    images, affine, brain = head

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)

    def state():
        return (
            torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device(),
            torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.initial_seed(), torch.get_rng_state().sum().item(),
        )  # fmt: skip

    before = state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            volume = Volume.from_array({"t1": images["t1"]}, affine, strip=True)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert state() == before
    assert dice(volume.brain, brain) > 0.9


@needs_deepbet
def test_what_holds_no_brain_is_refused(monkeypatch):
    inside = np.ones((40, 48, 40), bool)
    with pytest.raises(VolumeError, match=r"x: deepbet finds no brain; .*--brain"):
        strip_skull(np.zeros(inside.shape, np.float32), inside, "x")
    speck = np.zeros(inside.shape, bool)
    speck[20, 20, :30] = True
    monkeypatch.setattr("ddmd.io.strip._brain", lambda values: speck)
    with pytest.raises(VolumeError, match=r"x: deepbet finds a brain of 0% of the inside of the head"):
        strip_skull(np.zeros(inside.shape, np.float32), inside, "x")


def test_without_the_extra_one_line_says_what_to_install(head, tmp_path, monkeypatch):
    images, affine, _ = head
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "deepbet" else find(name, *a)
    )
    monkeypatch.setitem(__import__("sys").modules, "deepbet", None)
    with pytest.raises(VolumeError, match=r"needs deepbet; pip install 'ddmd\[strip\]'$"):
        Volume.from_array({"flair": images["flair"]}, affine, strip=True)
    nib.save(nib.Nifti1Image(images["flair"], affine), tmp_path / "a_flair.nii.gz")
    result = CliRunner().invoke(
        app, ["detect", str(tmp_path / "a_flair.nii.gz"), "-o", str(tmp_path / "o"), "--strip"]
    )
    assert result.exit_code == 2
    assert "pip install 'ddmd[strip]'" in result.output
    assert len(result.output.strip().splitlines()) == 1


@needs_deepbet
def test_the_command_line_strips_or_takes_a_mask(head, tmp_path, monkeypatch):
    images, affine, brain = head
    monkeypatch.setattr(Detector, "load", classmethod(lambda cls, *a, **k: Detector(tiny_system())))
    nib.save(nib.Nifti1Image(images["flair"], affine), tmp_path / "a_flair.nii.gz")
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), affine), tmp_path / "mask.nii.gz")
    for option in (["--strip"], ["--brain", str(tmp_path / "mask.nii.gz")]):
        out = tmp_path / option[0]
        result = CliRunner().invoke(
            app, ["detect", str(tmp_path / "a_flair.nii.gz"), "-o", str(out), *option]
        )
        assert result.exit_code == 0, result.output
        (path,) = out.glob("*_desc-lesion_probseg.nii.gz")
        marked = np.asanyarray(nib.load(path).dataobj) > 0
        assert marked.any()
        assert (marked & ndimage.binary_dilation(brain)).sum() > 0.97 * marked.sum()
        assert str(tmp_path) not in "".join(p.read_text() for p in out.glob("*.json"))


@needs_deepbet
def test_a_flair_with_skull_agrees_with_its_brain_mask(shared_data):
    folder = shared_data / "volumes" / "ms-isbi02"
    volume = Volume.read(folder / "flair.nii.gz", require=("flair",), strip=True)
    given = Volume.read(folder / "flair.nii.gz", require=("flair",), brain=folder / "brain.nii.gz")
    assert dice(volume.brain, given.brain) > 0.93
