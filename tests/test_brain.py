"""Where the brain is and whether the skull is on, also in disguise."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from benchmarks.brain_estimate import sweep
from ddmd.io.brain import estimate_brain
from ddmd.io.volume import Volume, VolumeError
from tests.volumes import write

SKULL_ON = ("brainix-unregistered", "ms-isbi01", "ms-isbi02", "ms-isbi03")
STRIPPED = ("brats-gli-00027", "brats2013-pat0003", "brats2021-00006", "healthy-kirby113", "ms-p14-visit1",
            "ms-patient07", "wmh-01")  # fmt: skip
SPACING = (3.0, 3.0, 4.0)


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def made_head(rng, skull):
    """A brain (X, Y, Z) of two tissues, with or without dark skull and bright scalp around it; and its mask."""
    shape = (72, 84, 44)
    grid = np.meshgrid(*[(np.arange(n) - n / 2) * mm for n, mm in zip(shape, SPACING, strict=True)],
                       indexing="ij")  # fmt: skip
    radius = np.sqrt(sum((g / r) ** 2 for g, r in zip(grid, (62.0, 76.0, 58.0), strict=True)))
    brain = radius < 1
    cortex = np.sin(grid[0] / 5) * np.sin(grid[1] / 6) * np.sin(grid[2] / 6) > 0.1
    values = np.where(brain, 100 + 20 * cortex + 6 * rng.standard_normal(shape), 0.0)
    values[(radius > 0.93) & brain] *= 0.5  # fluid and partial volume at the surface
    if skull:
        values = np.where((radius >= 1) & (radius < 1.12), 12 + 4 * rng.standard_normal(shape), values)
        values = np.where((radius >= 1.12) & (radius < 1.22), 150 + 15 * rng.standard_normal(shape), values)
        values = values + np.abs(1.5 * rng.standard_normal(shape))
    return values.astype(np.float32), brain


def disguises(values, brain, spacing, rng):
    """(name, values, brain) of one volume whose background is changed in every common way."""
    level = float(np.median(values[~brain][::31]))
    scale = float(np.percentile(values[brain], 99)) - level
    z = (values - values[brain].mean()) / values[brain].std()
    for constant in (0.0, -5.0, 7.0):
        yield f"z-scored, background {constant}", np.where(brain, z, constant), brain
    yield "z-scored, noise of 1e-6", np.where(brain, z, rng.normal(0, 1e-6, z.shape)), brain
    for share in (1e-6, 1e-3, 1e-2):
        noise = rng.normal(0, share * scale, z.shape)
        yield f"noise of {share}", np.where(brain, values, level + noise), brain
    halves = np.where(rng.random(z.shape) < 0.5, 0.0, 1e-7)
    yield "half 0, half 1e-7", np.where(brain, values - level, halves), brain
    yield "cubic spline", ndimage.shift(values, (0.3, 0.3, 0.0), order=3, mode="nearest"), brain
    yield "smoothed", ndimage.gaussian_filter(values, 1 / np.asarray(spacing)), brain
    for constant in (level, level - 1000.0, level + scale):
        slab = ((0, 0), (0, 0), (5, 5))
        yield f"slab of {constant:.0f}", np.pad(values, slab, constant_values=constant), np.pad(brain, slab)
    yield "pad all round", np.pad(values, 6, constant_values=level - 1.0), np.pad(brain, 6)
    yield "rounded", np.rint((values - level) * (1000 / scale)), brain
    yield "negated", -values, brain
    low, high = np.argwhere(brain).min(0), np.argwhere(brain).max(0) + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    yield "cropped to the brain", values[box], brain[box]


def test_a_stripped_brain_is_found_in_every_disguise(rng):
    values, brain = made_head(rng, skull=False)
    for name, disguised, truth in disguises(values, brain, SPACING, rng):
        estimate = estimate_brain(disguised.astype(np.float32), SPACING)
        assert not estimate.skull_on, name
        assert estimate.confidence > 0.6, name
        assert estimate.source == "background"
        assert dice(estimate.mask, truth) > 0.9, name


@pytest.mark.parametrize("change", [lambda v: v, lambda v: -v, lambda v: 3 * v - 900, lambda v: np.rint(v)])
def test_a_skull_is_seen_whatever_the_sign_and_scale(rng, change):
    values, brain = made_head(rng, skull=True)
    estimate = estimate_brain(change(values).astype(np.float32), SPACING)
    assert estimate.skull_on
    assert estimate.confidence > 0.9
    assert estimate.source == "extracted"
    assert dice(estimate.mask, brain) > 0.9


def test_a_slab_of_a_head_has_its_skull_on(rng):
    values, _ = made_head(rng, skull=True)
    assert estimate_brain(values[:, :, 20:24], SPACING).skull_on


def test_an_exact_background_leaves_an_exact_brain(rng):
    values, brain = made_head(rng, skull=False)
    for background in (0.0, -3.25, 500.0):
        shifted = np.where(brain, values, background).astype(np.float32)
        assert np.array_equal(estimate_brain(shifted, SPACING).mask, brain)


def test_the_user_may_say_it(rng):
    stripped, brain = made_head(rng, skull=False)
    off, on = (estimate_brain(stripped, SPACING, skull=said) for said in ("off", "on"))
    assert (off.skull_on, off.confidence) == (False, 1.0)
    assert (on.skull_on, on.confidence) == (True, 1.0)
    assert on.mask.sum() < off.mask.sum()
    head, _ = made_head(rng, skull=True)
    assert estimate_brain(head, SPACING, skull="off").mask.sum() > 1.5 * brain.sum()
    with pytest.raises(ValueError, match="skull is 'maybe'; allowed are auto, on, off"):
        estimate_brain(stripped, SPACING, skull="maybe")


def test_a_volume_says_which_it_is_and_how_sure(rng):
    affine = np.diag([*SPACING, 1.0])
    for skull in (False, True):
        values, _ = made_head(rng, skull)
        volume = Volume.from_array({"flair": values}, affine)
        assert volume.skull == skull
        assert 0.5 <= volume.skull_confidence <= 1.0
        assert any("skull seems to be on" in note and "% sure" in note for note in volume.notes) == skull
    said = Volume.from_array({"flair": values}, affine, skull="off")
    assert not said.skull
    assert said.skull_confidence == 1.0


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("L", "P", "S"), ("P", "I", "R")])
def test_a_given_brain_mask_takes_the_skull_away(rng, tmp_path, codes):
    values, brain = made_head(rng, skull=True)
    native = nib.Nifti1Image(values, np.diag([*SPACING, 1.0]))
    mask = nib.Nifti1Image(brain.astype(np.uint8), native.affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    native, mask = native.as_reoriented(turn), mask.as_reoriented(turn)
    path = tmp_path / "mask.nii.gz"
    nib.save(mask, path)
    for given in (path, mask, np.asarray(mask.dataobj), np.asarray(mask.dataobj) > 0):
        volume = Volume.read({"flair": native}, brain=given)
        assert np.array_equal(volume.brain, brain)
        assert not volume.skull
        assert (volume.normalised("flair")[~brain] == -4).all()


def test_a_brain_mask_that_does_not_fit_is_refused(rng, tmp_path):
    values, brain = made_head(rng, skull=True)
    affine = np.diag([*SPACING, 1.0])
    moved = affine.copy()
    moved[:3, 3] += 40.0
    other = write(tmp_path / "moved.nii.gz", brain.astype(np.uint8), moved)
    empty = write(tmp_path / "empty.nii.gz", np.zeros(brain.shape, np.uint8), affine)
    for mask, message in (
        (other, "different grids"), (empty, "the brain mask is empty"), (brain[:-1], "different grids"),
    ):  # fmt: skip
        with pytest.raises(VolumeError, match=message):
            Volume.from_array({"flair": values}, affine, brain=mask)


@pytest.mark.parametrize("name", SKULL_ON + STRIPPED)
@pytest.mark.parametrize("first", ["as is", "z-scored", "negated"])
def test_real_volumes_in_disguise(shared_data, seed, name, first):
    chosen = [
        f"{first}{second}"
        for second in np.random.default_rng(seed).choice(
            (", unchanged", ", noise 1e-3", ", cubic spline", ", smoothed", ", resampled, cubic", ", slab of +1",
             ", middle slices"), 2, replace=False,
        )
    ]  # fmt: skip
    if first == "z-scored":
        chosen = [c.replace("scored,", "scored on 0," if name in STRIPPED else "scored,") for c in chosen]
    for wanted in chosen:
        rows = list(sweep(shared_data, 2, [name], wanted, seed))
        assert rows, wanted
        for row in rows:
            assert row.right, (row.disguise, row.estimate.skull_on, row.kept, row.dice)


@pytest.mark.parametrize(("name", "least"), [("ms-isbi01", 0.88), ("ms-isbi02", 0.9), ("ms-isbi03", 0.92)])
def test_the_brain_of_a_real_head_is_extracted(shared_data, name, least):
    (row,) = sweep(shared_data, 1, [name], "as is, unchanged")
    assert row.estimate.source == "extracted"
    assert row.dice > least
    assert row.kept > 0.9


def test_a_bright_lesion_at_the_surface_stays_in_the_brain(rng):
    values, brain = made_head(rng, skull=True)
    x, y, z = np.meshgrid(*[np.arange(n) for n in brain.shape], indexing="ij")
    lesion = brain & (((x - 53) * 3) ** 2 + ((y - 42) * 3) ** 2 + ((z - 24) * 4) ** 2 < 15**2)
    estimate = estimate_brain(np.where(lesion, 260, values).astype(np.float32), SPACING)
    assert estimate.skull_on
    assert (estimate.mask & lesion).sum() > 0.7 * lesion.sum()
