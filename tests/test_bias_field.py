"""The bias field: found, taken away, and lesions left as they are."""

import numpy as np
import pytest

from ddmd.io.bias_field import bias_field
from ddmd.io.volume import Volume


@pytest.fixture
def scene(rng):
    """z-scores of a noisy ball of brain with a large bright lesion, the brain, the lesion and a slow drift."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (48, 56, 40)], indexing="ij")
    brain = x**2 + y**2 + z**2 < 0.9
    lesion = (x - 0.4) ** 2 + y**2 + (z - 0.1) ** 2 < 0.08
    drift = 1.5 * x - 0.8 * y * z + 0.6 * x**2
    return (rng.normal(0, 0.6, brain.shape) + 3.0 * lesion).astype(np.float32), brain, lesion, drift


def test_a_slow_drift_is_found_beside_a_large_lesion(scene):
    tissue, brain, lesion, drift = scene
    field = bias_field((tissue + drift).astype(np.float32), brain)
    off = (field - drift)[brain]
    assert (off - off.mean()).std() < 0.15 * drift[brain].std()
    left = (tissue + drift - field)[lesion].mean() - (tissue + drift - field)[brain & ~lesion].mean()
    assert left == pytest.approx(3.0, abs=0.3), "the lesion stands out as before"


def test_an_image_without_a_drift_is_left_alone(scene):
    tissue, brain, _, _ = scene
    assert not bias_field(tissue, brain).any()


def test_a_speck_of_brain_has_no_field(rng):
    z, brain = rng.normal(size=(9, 9, 9)).astype(np.float32), np.zeros((9, 9, 9), bool)
    brain[3:6, 3:6, 3:6] = True
    assert not bias_field(z, brain).any()


def test_a_stripped_volume_is_normalised_as_if_it_had_no_drift(scene):
    tissue, brain, lesion, drift = scene
    raw = 200 + 30 * tissue
    images = [np.where(brain, v, 0).astype(np.float32) for v in (raw, raw * np.exp(0.15 * drift))]
    plain, drifted = (Volume.from_array({"flair": v}, np.eye(4)).normalised("flair") for v in images)
    inside = brain & ~lesion
    assert np.corrcoef(plain[inside], drifted[inside])[0, 1] > 0.9
    assert (drifted[~brain] == -4).all()
