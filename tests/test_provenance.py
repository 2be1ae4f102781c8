"""What a result says of how it was made, and of how far to trust it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

import ddmd
from ddmd.data.phantom import phantom
from ddmd.inference.detector import Detector
from ddmd.inference.image_noise import noise_share
from ddmd.io.results import sidecar_path
from ddmd.models import checkpoint
from tests.volumes import head, tiny_system, write


def test_every_json_says_what_made_the_result(rng, tmp_path):
    weights = tmp_path / "tiny.safetensors"
    checkpoint.save(tiny_system(), weights)
    values, affine = head(rng)
    folder = tmp_path / "home" / "jane.doe"
    folder.mkdir(parents=True)
    path = write(folder / "p1_flair.nii.gz", values, affine)
    detection = Detector.load(weights, "cpu", "float32").detect(path, threshold=np.float32(0.25), seed=3)
    assert detection.provenance["Seconds"] > 0
    paths = detection.save(tmp_path / "out")
    for file in (sidecar_path(paths["mask"]), sidecar_path(paths["uncertainty"]), paths["result"]):
        said = json.loads(file.read_text())
        assert said["Version"] == ddmd.__version__
        assert said["Weights"] == "tiny"
        assert said["WeightsSha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert (said["Device"], said["Precision"]) == ("cpu", "float32")
        assert (said["Threshold"], said["Sampling"]["seed"]) == (0.25, 3)
        assert "Seconds" not in said  # the same input and seed give the same bytes
        assert said["Sources"] == {"flair": "p1_flair.nii.gz"}
        assert said["Score"] == pytest.approx(detection.score)
        brain_ml = (values != 0).sum() * 4 * 4 * 6 / 1000
        assert said["BrainMl"] == pytest.approx(brain_ml, rel=0.1)
        assert said["Quality"]["FieldOfViewMm"] == [160.0, 192.0, 72.0]
        assert "small field of view" in said["Quality"]["Flags"]
    for file in (tmp_path / "out").iterdir():
        assert b"jane.doe" not in file.read_bytes()


def test_few_slices_and_the_skull_are_flagged(rng):
    detector = Detector(tiny_system())
    values, affine = head(rng, (40, 48, 10), (4.0, 4.0, 11.0))
    quality = detector.detect({"flair": values}, affine=affine).provenance["Quality"]
    assert 4 <= quality["Slices"] <= 10
    assert "few slices" in quality["Flags"]
    assert "small field of view" not in quality["Flags"]
    assert quality["Skull"] is False


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_the_noise_of_an_image_is_measured(rng, share):
    """On tissue of known spread; the noise adds to the spread that it is a share of."""
    x, y, z = np.mgrid[:90, :100, :20]
    brain = (x - 45) ** 2 / 40**2 + (y - 50) ** 2 / 45**2 < 1
    tissue = 100 + 20 * np.sin(x / 9) + 20 * np.cos(y / 11) + 0.5 * z
    spread = np.subtract(*np.percentile(tissue[brain], (75, 25))) / 1.349
    noisy = tissue + rng.normal(0, share * spread, tissue.shape)
    expected = share * spread / (np.subtract(*np.percentile(noisy[brain], (75, 25))) / 1.349)
    outside = np.where(brain, noisy, rng.uniform(0, 1000, noisy.shape))
    assert noise_share(noisy, brain) == pytest.approx(expected, rel=0.05)
    assert noise_share(outside * 7 - 3, brain) == pytest.approx(expected, rel=0.05), (
        "of the brain, in any unit"
    )
    assert noise_share(noisy, np.zeros_like(brain)) == noise_share(np.ones_like(noisy), brain) == 0


def test_a_noisy_image_is_flagged(rng):
    made = phantom(seed=3, spacing_mm=3.0, sequences=("flair",)).images["flair"]
    values = np.asarray(made.dataobj, np.float32)
    brain = values > 0
    noise = rng.normal(0, 1.2 * values[brain].std(), values.shape) * brain
    detector = Detector(tiny_system())
    for added, flagged in ((0.0, False), (noise, True)):
        image = np.maximum(values + added, 0.01 * brain).astype(np.float32)
        quality = detector.detect({"flair": image}, affine=made.affine).provenance["Quality"]
        assert ("noise" in quality["Flags"]) is flagged, quality


def test_labels_are_the_rows_of_the_table(rng, tmp_path):
    import nibabel as nib

    values, affine = head(rng)
    detection = Detector(tiny_system()).detect({"flair": values}, affine=affine)
    paths = detection.save(tmp_path)
    labels, mask = (np.asanyarray(nib.load(paths[key]).dataobj) for key in ("labels", "mask"))
    assert np.array_equal(labels > 0, mask > 0)
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    assert len(detection.lesions) == labels.max() > 0
    for number, lesion in enumerate(detection.lesions, 1):
        assert (labels == number).sum() * voxel_ml == pytest.approx(lesion.volume_ml)
        centre = affine[:3, :3] @ np.argwhere(labels == number).mean(0) + affine[:3, 3]
        assert centre == pytest.approx(lesion.centre_mm, abs=1e-3)
