"""The made-up brain: exact mask, contrast of each sequence, decided by its seed."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from ddmd.cohort.discovery import find_cases
from ddmd.data.phantom import SEQUENCES, Lesion, phantom, write
from ddmd.io.volume import Volume

pytest.importorskip("nilearn", reason="the extra ddmd[phantom] is not installed")

DEEP = Lesion((-27.0, -22.0, 28.0), 13.0)  # in the white matter of one side


def values(image):
    return np.asanyarray(image.dataobj)


@pytest.fixture(scope="module")
def one():
    return phantom(seed=5, spacing_mm=3.0, lesions=[DEEP])


def test_the_seed_decides_everything():
    made, again, other = (phantom(seed=s, spacing_mm=5.0) for s in (5, 5, 6))
    assert made.lesions == again.lesions
    assert made.lesions != other.lesions
    for sequence in SEQUENCES:
        assert np.array_equal(values(made.images[sequence]), values(again.images[sequence]))
        assert not np.array_equal(values(made.images[sequence]), values(other.images[sequence]))


def test_all_images_share_one_grid_and_the_background_is_zero(one):
    brain = values(one.brain) > 0
    for image in (*one.images.values(), one.lesion, one.brain):
        assert image.shape == one.brain.shape
        assert np.array_equal(image.affine, one.brain.affine)
        assert image.header["sform_code"] == image.header["qform_code"] == 4  # MNI
    for image in one.images.values():
        assert values(image).dtype == np.float32
        assert not values(image)[~brain].any()
        assert (values(image)[brain] > 0).mean() > 0.999
    assert values(one.lesion).dtype == values(one.brain).dtype == np.uint8
    assert 1800 < brain.sum() * 27 / 1000 < 2000  # ml


@pytest.mark.parametrize("spacing", [3.0, (2.0, 2.0, 6.0), (4.0, 3.0, 5.0)])
def test_a_voxel_is_where_the_affine_says_at_any_spacing(spacing):
    made = phantom(seed=1, spacing_mm=spacing, lesions=[DEEP], sequences=("flair",))
    assert np.allclose(made.lesion.header.get_zooms(), spacing)
    places = nib.affines.apply_affine(made.lesion.affine, np.argwhere(values(made.lesion)))
    assert np.linalg.norm(places.mean(0) - DEEP.centre_mm) < 0.4 * DEEP.radius_mm
    brain = nib.affines.apply_affine(made.brain.affine, np.argwhere(values(made.brain)))
    assert np.abs(brain.mean(0) - (0, -21, 10)).max() < 4  # where the MNI brain is


def test_a_lesion_has_the_volume_of_its_ball(rng):
    for radius in (6.0, 10.0, 14.0):
        made = phantom(seed=int(rng.integers(1000)), spacing_mm=2.0, lesions=[Lesion(DEEP.centre_mm, radius)],
                       sequences=())  # fmt: skip
        assert values(made.lesion).sum() * 8 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02, abs=16)


def test_the_mask_holds_the_lesion_and_nothing_else():
    """Without noise, what differs from the brain without contrast is the mask and half an edge around it."""
    options = {"seed": 3, "spacing_mm": 2.0, "sequences": ("flair",), "noise": 0.0, "bias": 0.0}
    seen, unseen = (
        phantom(lesions=[Lesion(DEEP.centre_mm, 12.0, contrast)], **options) for contrast in (1.0, 0.0)
    )
    mask = values(seen.lesion) > 0
    assert np.array_equal(mask, values(unseen.lesion) > 0)
    change = values(seen.images["flair"]) - values(unseen.images["flair"])
    depth = 2.0 * ndimage.distance_transform_edt(~mask)
    assert not change[depth > 3].any()  # half an edge, and a voxel
    assert (change[mask] > 0).all()
    inner = change[mask].mean()
    assert np.mean(change[mask] > 0.4 * inner) > 0.95
    assert np.mean(change[(depth > 0) & (depth <= 3)] < 0.6 * inner) > 0.95


def test_tissues_and_lesion_have_the_contrast_of_their_sequence():
    made = phantom(seed=2, spacing_mm=2.0, lesions=[DEEP], bias=0.0)
    from nilearn import datasets, image

    target = made.brain
    grey, white = (
        values(image.resample_to_img(load(resolution=1), target, force_resample=True, copy_header=True))
        for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    lesion, brain = values(made.lesion) > 0, values(made.brain) > 0
    where = {
        "fluid": brain & ~lesion & (grey + white < 0.05),
        "grey": brain & ~lesion & (grey > 0.95),
        "white": brain & ~lesion & (white > 0.95),
        "lesion": lesion,
    }
    assert all(region.sum() > 50 for region in where.values())
    for sequence, rising in {
        "t1": ("fluid", "lesion", "grey", "white"),
        "t2": ("white", "grey", "lesion", "fluid"),
        "flair": ("fluid", "white", "grey", "lesion"),
    }.items():
        level = {k: float(np.median(values(made.images[sequence])[v])) for k, v in where.items()}
        assert sorted(level, key=level.__getitem__) == list(rising), (sequence, level)
        if sequence == "flair":
            assert 1.5 < level["lesion"] / level["white"] < 1.8
    depth = 2.0 * ndimage.distance_transform_edt(lesion)
    contrast = values(made.images["t1ce"])
    rim, core = contrast[(depth > 1) & (depth <= 4)].mean(), contrast[depth > 7].mean()
    assert rim > 1.15 * np.median(contrast[where["white"]]) > core  # the rim enhances, the core does not


def test_tissue_is_textured_and_noise_and_bias_do_what_they_say():
    def white(**options):
        made = phantom(seed=4, spacing_mm=3.0, lesions=0, sequences=("flair",), **options)
        return values(made.images["flair"])[values(made.brain) > 0]

    plain = white(noise=0.0, bias=0.0)
    noisy = white(noise=0.1, bias=0.0)
    assert len(np.unique(plain)) > 0.9 * len(plain)
    assert np.std(noisy - plain) == pytest.approx(60, rel=0.15)  # of white matter's 600
    ratio = np.log(white(noise=0.0, bias=0.3) / plain)
    assert np.abs(ratio).max() == pytest.approx(0.3, abs=1e-3)


def test_contrast_scales_how_a_lesion_stands_out():
    level = []
    for contrast in (0.0, 0.5, 1.0, 1.5):
        made = phantom(seed=7, spacing_mm=3.0, lesions=[Lesion(DEEP.centre_mm, 12.0, contrast)])
        level.append(values(made.images["flair"])[values(made.lesion) > 0].mean())
    assert np.all(np.diff(level) > 50)


def test_healthy_when_asked():
    made = phantom(seed=1, spacing_mm=5.0, lesions=0)
    assert made.lesions == ()
    assert not values(made.lesion).any()
    assert values(made.images["flair"]).any()


def test_random_lesions_lie_apart_inside_the_brain(rng):
    made = phantom(seed=int(rng.integers(2**31)), spacing_mm=3.0, lesions=4, sequences=())
    mask, brain = values(made.lesion) > 0, values(made.brain) > 0
    assert len(made.lesions) == 4
    assert not (mask & ~brain).any()
    expected = sum(4 / 3 * np.pi * lesion.radius_mm**3 for lesion in made.lesions)
    assert 0.75 * expected < mask.sum() * 27 < 1.1 * expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": ("pd",)}, "sequences holds pd; allowed are t1"),
        ({"spacing_mm": 0.1}, r"spacing_mm is 0\.1; allowed are 1 to 8"),
        ({"lesions": -1}, "lesions is -1"),
        ({"noise": -0.1}, r"noise is -0\.1"),
        ({"bias": float("nan")}, "bias is nan"),
        ({"lesions": [Lesion((500.0, 0.0, 0.0), 5.0)]}, "outside the brain"),
        ({"lesions": [Lesion((90.0, 90.0, 90.0), 5.0)]}, "outside the brain"),
        ({"lesions": [Lesion(DEEP.centre_mm, 0.0)]}, r"radius_mm is 0\.0"),
        ({"lesions": [Lesion(DEEP.centre_mm, 500.0)]}, "is smaller"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        phantom(**{"spacing_mm": 5.0, **options})


def test_plain_files_read_back(one, tmp_path):
    paths = write(one, tmp_path, "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths.values())
    assert paths["lesion"].name == "p_lesion.nii.gz"
    for name, image in {**one.images, "lesion": one.lesion}.items():
        assert np.array_equal(values(nib.load(paths[name])), values(image))
        assert np.array_equal(nib.load(paths[name]).affine, image.affine)
    volume = Volume.read({s: paths[s] for s in SEQUENCES})
    assert set(volume.images) == set(SEQUENCES)


@pytest.mark.parametrize(
    ("style", "flair"), [("brats", "p-1/p-1-t2f.nii.gz"), ("bids", "sub-p1/anat/sub-p1_FLAIR.nii.gz")]
)
def test_data_set_layouts_are_found_again_with_their_masks(one, tmp_path, style, flair):
    paths = write(one, tmp_path, "p-1", style=style)
    assert paths["flair"] == tmp_path / flair
    (case,) = find_cases(tmp_path)
    assert {s: p[0] for s, p in case.files.items()} == {s: paths[s] for s in SEQUENCES}
    assert np.array_equal(case.lesion(), values(one.lesion) > 0)


def test_an_unknown_style_and_a_nameless_subject_are_refused(one, tmp_path):
    with pytest.raises(ValueError, match="style is 'dicom'; allowed are plain, brats, bids"):
        write(one, tmp_path, style="dicom")
    with pytest.raises(ValueError, match="a BIDS subject has letters or digits"):
        write(one, tmp_path, "---", style="bids")
    assert not list(tmp_path.iterdir())


def test_it_needs_no_network():
    """The tissue maps come inside nilearn."""
    code = """
import socket
def refuse(*a, **k): raise OSError("the phantom asked for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from ddmd.data.phantom import phantom
assert phantom(spacing_mm=8.0).lesion.get_fdata().any()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
