"""What can be read, what is refused and how it is said, and the way back to the input's grid."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddmd.inference.slices import SliceGrid, extract, to_grid
from ddmd.io.nifti import sequence_of
from ddmd.io.volume import Volume, VolumeError
from tests.volumes import head, write


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3), seed=st.integers(0, 99))
def test_any_orientation_reads_the_same_and_maps_come_back_on_it(order, flips, seed):
    rng = np.random.default_rng(seed)
    values, affine = head(rng, (20, 24, 8))
    moves = np.array([[order.index(i), -1 if flips[i] else 1] for i in range(3)])
    turned = nib.Nifti1Image(values, affine).as_reoriented(moves)
    one, other = Volume.read({"flair": values}, affine=affine), Volume.read({"flair": turned})
    assert np.array_equal(one.images["flair"], other.images["flair"])
    assert np.array_equal(one.brain, other.brain)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-9)
    back = other.to_native(values, np.float32)
    assert np.array_equal(np.asanyarray(back.dataobj), np.asanyarray(turned.dataobj))
    assert np.array_equal(back.affine, turned.affine)
    assert (back.header["sform_code"], back.header["qform_code"]) == (
        turned.header["sform_code"], turned.header["qform_code"]
    )  # fmt: skip


def test_all_ways_to_give_a_volume_are_the_same(tmp_path, rng):
    values, affine = head(rng)
    path = write(tmp_path / "sub-1_FLAIR.nii.gz", values, affine)
    given = [
        Volume.read(path), Volume.read([path]), Volume.read({"flair": path}), Volume.read(path, sequences="flair"),
        Volume.read(nib.load(path), require=("flair",)), Volume.read(values, affine=affine, sequences="flair"),
        Volume.from_array({"flair": values}, affine),
    ]  # fmt: skip
    for volume in given:
        assert np.array_equal(volume.images["flair"], values)
        assert not volume.skull


def test_normalisation_is_robust_and_leaves_air_at_its_floor(rng):
    values, affine = head(rng)
    volume = Volume.from_array({"flair": values}, affine)
    z = volume.normalised("flair")
    assert abs(np.median(z[volume.brain])) < 1e-3
    assert np.all(z[~volume.brain] == -4.0)
    assert z.max() <= 6.0
    scaled = Volume.from_array({"flair": values * 7}, affine).normalised("flair")
    np.testing.assert_allclose(scaled, z, atol=1e-3)
    moved = (values, values * 7 + (values != 0) * 50)  # a multiplicative field depends on where zero is
    plain, offset = (Volume.from_array({"flair": v}, affine, bias="off").normalised("flair") for v in moved)
    np.testing.assert_allclose(offset, plain, atol=1e-3)


def test_constant_background_need_not_be_zero(rng):
    values, affine = head(rng)
    shifted = np.where(values == 0, -3.25, values).astype(np.float32)
    one, other = (Volume.from_array({"flair": v}, affine) for v in (values, shifted))
    assert np.array_equal(one.brain, other.brain)


def test_slices_go_to_the_models_grid_and_back(rng):
    values, affine = head(rng, (40, 48, 12), (2.0, 3.0, 5.0))
    volume = Volume.from_array({"flair": values}, affine)
    cut = extract(volume, ("flair",), SliceGrid(mm=1.5, multiple=16))
    assert cut.image.shape[2] % 16 == 0
    assert cut.image.shape[3] % 16 == 0
    smooth = np.add.outer(np.add.outer(np.linspace(0, 1, 40), np.linspace(0, 2, 48)), np.linspace(0, 1, 12))
    part = cut.to_canonical(to_grid(smooth.astype(np.float32), cut))
    back = cut.place(part[0].numpy())
    assert np.abs((back - smooth)[volume.brain]).max() < 0.06
    assert np.all(back[:, :, ~volume.brain.any(axis=(0, 1))] == 0)


def _refused(message, *args, **kwargs):
    with pytest.raises(VolumeError, match=message):
        Volume.read(*args, **kwargs)


def test_files_that_are_not_a_volume_are_refused_by_name(tmp_path, rng):
    values, affine = head(rng)
    _refused("nothing.nii: no such file", tmp_path / "nothing.nii")
    _refused("is a folder", tmp_path)
    for name, content, message in (
        ("empty.nii", b"", "empty.nii: the file is empty"),
        ("text.nii.gz", b"hello, this is no image", "text.nii.gz: not a NIfTI file"),
        ("text.nii", b"x" * 500, "text.nii: not a NIfTI file"),
    ):
        (tmp_path / name).write_bytes(content)
        _refused(message, tmp_path / name)
    good = write(tmp_path / "good_flair.nii.gz", values, affine)
    whole = (tmp_path / "good_flair.nii.gz").read_bytes()
    (tmp_path / "cut_flair.nii.gz").write_bytes(whole[: len(whole) // 2])
    _refused(r"cut_flair.nii.gz: .*(truncated|damaged)", tmp_path / "cut_flair.nii.gz")
    raw = bytearray(gzip.decompress(whole))
    (tmp_path / "short_flair.nii").write_bytes(raw[:-1000])
    _refused("short_flair.nii: the header claims", tmp_path / "short_flair.nii")
    struct.pack_into("<8h", raw, 40, 3, 30000, 30000, 30000, 1, 1, 1, 1)
    (tmp_path / "huge_flair.nii").write_bytes(raw)
    _refused(r"huge_flair.nii: shape \(30000, 30000, 30000\) is absurd", tmp_path / "huge_flair.nii")
    assert Volume.read(good).name == "good_flair"


@pytest.mark.parametrize(("change", "message"), [
    (lambda v: np.stack([v, v], 3), r"shape .* is a series of volumes; give one 3-D volume"),
    (lambda v: v[:, :, 0], "is not a volume"),
    (lambda v: v * 0, "the volume is all zero"),
    (lambda v: v * 0 + 3, r"the volume is constant \(3\)"),
    (lambda v: v * np.float32("nan"), "no voxel is a number"),
    (lambda v: np.where((v > 100) & (v < 103), np.float32("nan"), v), "voxels inside the brain are NaN or Inf"),
    (lambda v: np.where((v > 100) & (v < 103), np.float32("inf"), v), "voxels inside the brain are NaN or Inf"),
    (lambda v: v.astype(np.complex64), "voxels are complex64"),
])  # fmt: skip
def test_volumes_without_an_image_in_them_are_refused(tmp_path, rng, change, message):
    values, affine = head(rng)
    _refused("bad_flair.nii.gz: .*" + message, write(tmp_path / "bad_flair.nii.gz", change(values), affine))


def test_nan_outside_the_brain_is_tolerated_and_said(rng):
    values, affine = head(rng)
    values[0, 0, :] = np.nan
    volume = Volume.from_array({"flair": values}, affine)
    assert np.isfinite(volume.images["flair"]).all()
    assert "12 NaN or Inf voxels outside the brain" in volume.notes[0]


def test_affines_that_place_nothing_are_refused(tmp_path, rng):
    values, affine = head(rng)
    flat = affine.copy()
    flat[2, 2] = 0
    _refused("the affine is singular", values, affine=flat, sequences="flair")
    _refused("not a finite 4x4", values, affine=affine * np.nan, sequences="flair")
    _refused("an array needs its affine", values, sequences="flair")
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, 1)
    other = affine.copy()
    other[0, 3] += 30
    image.set_qform(other, 1)
    nib.save(image, tmp_path / "two_flair.nii.gz")
    _refused("two_flair.nii.gz: sform and qform disagree by up to 30.0 mm", tmp_path / "two_flair.nii.gz")


def test_what_is_no_number_is_refused_after_resampling_too(tmp_path, rng):
    values, affine = head(rng)
    finer = affine @ np.diag([1.0, 1.0, 0.5, 1.0])
    doubled = np.repeat(values, 2, axis=2)
    hole = doubled.copy()
    hole[tuple(n // 2 for n in hole.shape)] = np.nan  # inside the brain
    t1 = write(tmp_path / "a_flair.nii.gz", values, affine)
    whole, broken = (
        write(tmp_path / f"{name}_t1.nii.gz", image, finer)
        for name, image in (("whole", doubled), ("broken", hole))
    )
    volume = Volume.read({"flair": t1, "t1": whole}, require=("flair", "t1"), resample=True)
    assert np.isfinite(volume.images["t1"]).all()
    _refused(
        "inside the brain are NaN or Inf", {"flair": t1, "t1": broken}, require=("flair", "t1"), resample=True
    )


def test_sequences_on_different_grids_are_named_and_resampled_when_asked(tmp_path, rng):
    values, affine = head(rng)
    coarse = affine.copy()
    coarse[:3, :2] *= 2
    paths = {
        "flair": write(tmp_path / "a_flair.nii.gz", values, affine),
        "t1": write(tmp_path / "a_t1.nii.gz", np.ascontiguousarray(values[::2, ::2]), coarse),
    }
    _refused(r"a_t1.nii.gz and .*a_flair.nii.gz are on different grids: shape \(20, 24, 12\) against .* --resample",
             paths, require=("flair", "t1"))  # fmt: skip
    volume = Volume.read(paths, require=("flair", "t1"), resample=True)
    assert volume.images["t1"].shape == values.shape
    assert "does not register" in volume.notes[0]
    assert np.corrcoef(volume.images["t1"][volume.brain], values[volume.brain])[0, 1] > 0.7


def test_missing_and_duplicate_sequences_are_named(tmp_path, rng):
    values, affine = head(rng)
    one, two = (write(tmp_path / n, values, affine) for n in ("x_flair.nii.gz", "y_flair.nii.gz"))
    _refused("x_flair.nii.gz and .*y_flair.nii.gz both claim to be flair", [one, two])
    _refused("the weights need t1, flair and the input lacks t1", one, require=("t1", "flair"))
    _refused("sequence not recognised from the name", write(tmp_path / "scan.nii.gz", values, affine))
    assert "taken as flair" in Volume.read(tmp_path / "scan.nii.gz", require=("flair",)).notes[0]


def test_real_volumes_read_as_stripped_or_not(shared_data):
    for folder in sorted((shared_data / "volumes").iterdir()):
        path = next(p for p in sorted(folder.glob("*.nii.gz")) if sequence_of(p) == "flair")
        volume = Volume.read(path, require=("flair",))
        assert volume.skull == ("brainix" in folder.name or "isbi" in folder.name), folder.name
        ml = volume.brain.sum() * np.prod(volume.spacing) / 1000
        assert 900 < ml < 2200, f"{folder.name}: {ml:.0f} ml"
        assert any("skull" in note for note in volume.notes) == volume.skull


def test_unregistered_sequences_are_refused_with_the_difference(shared_data):
    folder = shared_data / "volumes" / "brainix-unregistered"
    paths = {s: folder / f"{s}.nii.gz" for s in ("flair", "t1", "t2")}
    _refused("different grids: .*--resample", paths, require=("flair", "t1"))


@pytest.mark.parametrize("labels", [1, 2, 4])
def test_a_mask_or_label_map_is_not_taken_for_an_image(rng, labels):
    values, affine = head(rng)
    edges = np.quantile(values[values > 0], np.linspace(0, 1, labels + 1)[1:-1])
    masks = np.where(values > 0, 1 + np.digitize(values, edges), 0)
    assert len(np.unique(masks)) == labels + 1
    for kind in (np.uint8, np.float32):
        _refused("mask or a label map", {"flair": masks.astype(kind)}, affine=affine)


def test_a_complex_affine_is_refused(rng):
    values, affine = head(rng)
    _refused("not a finite 4x4 matrix", {"flair": values}, affine=affine.astype(complex))


@pytest.mark.parametrize(
    "disguise",
    [
        lambda v: v.astype(np.float16),
        lambda v: v.astype(">f8"),
        lambda v: v.astype(np.longdouble),
        lambda v: np.asfortranarray(v),
        lambda v: v[::-1].copy()[::-1],
        lambda v: np.ma.masked_array(v),
        lambda v: np.broadcast_to(v[..., None], (*v.shape, 1))[..., 0],
    ],
    ids=["float16", "big endian", "long double", "Fortran", "negative strides", "masked", "read-only"],
)
def test_any_array_of_the_same_numbers_is_the_same_volume(rng, disguise):
    values, affine = head(rng)
    values = np.round(values)  # which float16 holds
    with np.errstate(all="raise"):  # the caller's own setting
        plain, other = (Volume.from_array({"flair": v}, affine) for v in (values, disguise(values)))
        assert np.array_equal(plain.brain, other.brain)
        assert np.array_equal(plain.normalised("flair"), other.normalised("flair"))
