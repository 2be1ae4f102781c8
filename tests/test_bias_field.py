"""The bias field: found by its evidence, divided out, and lesions and flat images left as they are."""

import importlib.util

import numpy as np
import pytest

from ddmd.inference.lesion_contrast import BrightImage
from ddmd.io.bias_field import correct_bias, estimate_bias_field
from ddmd.io.volume import Volume

SPACING = (3.0, 3.0, 3.5)


@pytest.fixture
def scene(rng):
    """Noisy ball of two tissues with a large bright lesion: signal, brain, lesion, and a smooth log field."""
    shape = (48, 56, 40)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    brain = x**2 + y**2 + z**2 < 0.9
    lesion = (x - 0.4) ** 2 + y**2 + (z - 0.1) ** 2 < 0.06
    cortex = np.sin(14 * x) * np.sin(12 * y) * np.sin(13 * z) > 0.2
    signal = 300 * (1 + 0.12 * cortex + 0.6 * lesion + 0.04 * rng.standard_normal(shape))
    log_field = rng.uniform(0.1, 0.25) * x - rng.uniform(0.05, 0.15) * y * z + rng.uniform(0.05, 0.15) * x**2
    return (signal * brain).astype(np.float32), brain, lesion, log_field


def centred(values, inside):
    return values[inside] - values[inside].mean()


@pytest.mark.parametrize("background", [0.0, -700.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_multiplicative_field_is_found_beside_a_large_lesion(scene, background, sign):
    signal, brain, lesion, log_field = scene
    image = (sign * signal * np.exp(log_field) + background).astype(np.float32)
    corrected, field = correct_bias(image, brain, SPACING, background)
    assert field is not None
    assert field.clear
    assert not field.additive
    error = centred(field.log_field - log_field, brain)
    assert error.std() < 0.2 * centred(log_field, brain).std()
    contrast = [
        (v[lesion].mean() - background) / (v[brain & ~lesion].mean() - background)
        for v in (sign * signal + background, corrected)
    ]
    assert contrast[1] == pytest.approx(contrast[0], abs=0.05), "the lesion stands out as before"


def test_a_flat_image_is_returned_itself(scene):
    signal, brain, _, _ = scene
    corrected, field = correct_bias(signal, brain, SPACING, 0.0)
    assert corrected is signal
    assert field is None


def test_a_second_correction_does_nothing(scene):
    signal, brain, _, log_field = scene
    corrected, first = correct_bias((signal * np.exp(log_field)).astype(np.float32), brain, SPACING, 0.0)
    _, second = correct_bias(corrected, brain, SPACING, 0.0)
    assert first is not None
    assert second is None


def test_where_zero_is_arbitrary_the_field_is_additive(scene):
    signal, brain, _, log_field = scene
    drifted = signal * np.exp(log_field)
    z_scores = np.where(brain, (drifted - drifted[brain].mean()) / drifted[brain].std(), 0).astype(np.float32)
    corrected, field = correct_bias(z_scores, brain, SPACING, 0.0, "on")
    assert field is not None
    assert field.additive
    before, after = (abs(np.corrcoef(v[brain], log_field[brain])[0, 1]) for v in (z_scores, corrected))
    assert after < 0.3 * before


def test_off_changes_nothing_and_a_speck_has_no_field(scene, rng):
    signal, brain, _, log_field = scene
    image = (signal * np.exp(log_field)).astype(np.float32)
    assert correct_bias(image, brain, SPACING, 0.0, "off")[0] is image
    speck = np.zeros((9, 9, 9), bool)
    speck[3:6, 3:6, 3:6] = True
    assert estimate_bias_field(rng.normal(100, 1, speck.shape), speck, (1, 1, 1), 0.0) is None


def test_choices_are_refused_by_name(scene):
    signal, brain, _, _ = scene
    with pytest.raises(ValueError, match="bias is 'strong'; allowed are auto, off, on, n4"):
        correct_bias(signal, brain, SPACING, 0.0, "strong")
    with pytest.raises(ValueError, match="bias is 'strong'"):
        Volume.from_array({"flair": signal}, np.diag([*SPACING, 1.0]), bias="strong")


@pytest.mark.skipif(importlib.util.find_spec("SimpleITK") is not None, reason="SimpleITK is installed")
def test_n4_names_the_extra_where_it_is_missing(scene):
    signal, brain, _, _ = scene
    with pytest.raises(ImportError, match=r"pip install 'ddmd\[n4\]'"):
        correct_bias(signal, brain, SPACING, 0.0, "n4")


def test_n4_flattens_a_field(scene):
    pytest.importorskip("SimpleITK", reason="the extra ddmd[n4] is not installed")
    signal, brain, lesion, log_field = scene
    image = (signal * np.exp(log_field)).astype(np.float32)
    corrected, _ = correct_bias(image, brain, SPACING, 0.0, "n4")
    tissue = brain & ~lesion
    assert np.log(corrected[tissue]).std() < 0.8 * np.log(image[tissue]).std()


def test_a_volume_is_normalised_as_if_it_had_no_field(scene):
    signal, brain, lesion, log_field = scene
    affine = np.diag([*SPACING, 1.0])
    plain, drifted = (
        Volume.from_array({"flair": v.astype(np.float32)}, affine).normalised("flair")
        for v in (signal, signal * np.exp(log_field))
    )
    inside = brain & ~lesion
    assert np.corrcoef(plain[inside], drifted[inside])[0, 1] > 0.95
    assert (drifted[~brain] == -4).all()


def test_the_contrast_of_lesions_is_taken_without_the_field(scene):
    signal, _brain, _lesion, log_field = scene
    drifted = (signal * np.exp(log_field)).astype(np.float32)
    volume = Volume.from_array({"flair": drifted}, np.diag([*SPACING, 1.0]), bias="on")
    bright = BrightImage.of(volume)
    assert bright.values is volume.bias_corrected("flair"), "computed once"
    assert not np.array_equal(bright.values, volume.images["flair"])


REAL = [
    "brats2013-pat0003", "brats2013-pat0004", "brats2013-pat0005", "brats2013-pat0006", "brats2021-00006",
    "healthy-kirby113", "ms-p14-visit1", "ms-p14-visit3", "ms-p18", "ms-patient07", "ms-patient26",
    "wmh-01", "wmh-02", "wmh-03",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_corrected_real_volume_is_left_alone(shared_data, name):
    """All of these were corrected before they were published; a lesion is no field."""
    volume = Volume.read({"flair": shared_data / "volumes" / name / "flair.nii.gz"})
    values = volume.images["flair"]
    corrected, field = correct_bias(values, volume.brain, volume.spacing, volume.zero_signal("flair"))
    assert field is None
    assert corrected is values


@pytest.mark.parametrize("spacing", [2.0, 4.0])
def test_the_field_of_a_phantom_is_clear(seed, spacing):
    pytest.importorskip("nilearn", reason="the extra ddmd[phantom] is not installed")
    from ddmd.data.phantom import phantom

    # of a few fields the first that is not almost flat: what is that weak need not be seen
    for own_seed in range(seed, seed + 10):
        options = {"seed": own_seed, "spacing_mm": spacing, "sequences": ("flair",), "noise": 0.0}
        drifted, plain = (phantom(bias=bias, **options).images["flair"] for bias in (0.3, 0.0))
        with_field, without = (Volume.read({"flair": made}) for made in (drifted, plain))
        both = with_field.brain & (np.asarray(plain.dataobj) > 0)
        truth = np.log(np.asarray(drifted.dataobj)[both] / np.asarray(plain.dataobj)[both])
        if truth.std() > 0.055:
            break
    else:
        pytest.fail("ten fields that are almost flat")
    field, none = (
        correct_bias(volume.images["flair"], volume.brain, volume.spacing, 0.0)[1]
        for volume in (with_field, without)
    )
    assert none is None
    assert field is not None
    assert (field.log_field[both] - truth).std() < 0.35 * truth.std()


@pytest.mark.parametrize("share", [0.2, 0.3])
def test_modes_that_share_a_bin_are_no_evidence_of_a_field(share):
    """A fit through most modes leaves at least what each lost as the middle of its bin; 15 times that was seen."""
    signal = np.full((60, 72, 54), 100.0, np.float32)
    signal[-int(share * 60) :] *= 1.04
    signal[0, 0, 0] = 50.0
    field = estimate_bias_field(signal, np.ones(signal.shape, bool), (2.0, 2.0, 2.0), 0.0)
    assert not field.clear
