"""Which files are read and with which values, what is refused before memory is taken, and what leaves a header."""

import bz2
import gc
import gzip
import os
import struct
import sys
import tracemalloc
import types
import zlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Extension

from ddmd.io import compression, nifti
from ddmd.io.geometry import MAX_FIELD_OF_VIEW_MM, MAX_VOXEL_MM, MIN_VOXEL_MM
from ddmd.io.volume import Volume, VolumeError
from tests.volumes import head, write


def _refused(message, *args, **kwargs):
    with pytest.raises(VolumeError, match=message) as caught:
        Volume.read(*args, **kwargs)
    said = str(caught.value)
    assert "\n" not in said
    for part in {str(a) for a in args if isinstance(a, str | os.PathLike)}:
        assert said.count(str(part)) == 1, f"the path is named once: {said}"


def _image(values, affine, unit="mm", **codes):
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units(unit)
    for kind, code in codes.items():
        getattr(image, f"set_{kind}")(affine, code)
    return image


# --- units and sizes


@pytest.mark.parametrize(
    ("unit", "per_mm"), [("mm", 1.0), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1.0)]
)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_units_are_converted_and_maps_come_back_in_the_inputs_own(tmp_path, rng, unit, per_mm, kind):
    values, affine = head(rng)
    own = affine.copy()
    own[:3] *= per_mm
    image = kind(values, own)
    image.header.set_xyzt_units(unit)
    image.set_qform(own, 1)
    nib.save(image, tmp_path / "x_flair.nii.gz")
    volume = Volume.read(tmp_path / "x_flair.nii.gz")
    plain = Volume.from_array({"flair": values}, affine)
    np.testing.assert_allclose(volume.affine, affine, rtol=1e-6)
    np.testing.assert_allclose(volume.spacing, (4, 4, 6), rtol=1e-6)
    assert np.array_equal(volume.brain, plain.brain)
    nib.save(volume.to_native(values), tmp_path / "map.nii.gz")
    given_, back = nib.load(tmp_path / "x_flair.nii.gz"), nib.load(tmp_path / "map.nii.gz")
    assert type(back) is kind
    assert np.array_equal(back.affine, given_.affine)
    assert back.header.get_xyzt_units()[0] == unit
    assert np.array_equal(back.header["pixdim"][:4], given_.header["pixdim"][:4])
    assert np.array_equal(back.get_fdata(), values)


@pytest.mark.parametrize(("spacing", "unit", "message"), [
    ((60, 60, 60), "mm", r"voxels of 60 mm along axis 0 \(unit of the header: mm\); a brain MRI has 0.1 to 12 mm"),
    ((1, 1, 0.05), "mm", r"voxels of 0.05 mm along axis 2"),
    ((4, 4, 6), "meter", r"voxels of 4000 mm along axis 0 \(unit of the header: metre\)"),
    ((4, 4, 6), "micron", r"voxels of 0.004 mm along axis 0 \(unit of the header: micron\)"),
    ((0.2, 0.2, 0.6), "mm", r"field of view of 10.6 mm along its longest axis .* at least 40 mm"),
    ((4, 12, 6), "mm", r"field of view of 636 mm along axis 1 \(unit of the header: mm\); a brain MRI has at most 600 mm"),
])  # fmt: skip
def test_what_no_head_measures_is_refused_before_voxels_are_read(
    tmp_path, rng, spacing, unit, message, monkeypatch
):
    values, _ = head(rng, (40, 53, 12))
    nib.save(_image(values, np.diag([*spacing, 1.0]), unit), tmp_path / "x_flair.nii.gz")
    monkeypatch.setattr(nifti.FileVoxels, "read", lambda self: pytest.fail("voxels were read"))
    _refused("x_flair.nii.gz: .*" + message, tmp_path / "x_flair.nii.gz")
    if unit == "mm":
        with pytest.raises(VolumeError, match=message):
            Volume.from_array({"flair": values}, np.diag([*spacing, 1.0]))


@settings(max_examples=30, deadline=None)
@given(size=st.floats(0.02, 30), count=st.integers(2, 900))
def test_sizes_are_taken_within_the_bounds_that_are_documented(size, count):
    inside = MIN_VOXEL_MM <= size <= MAX_VOXEL_MM and count * size <= MAX_FIELD_OF_VIEW_MM
    try:
        nifti.affine_of(nib.Nifti1Image(np.zeros((count, 2, 2), np.uint8), np.diag([size, 1, 1, 1])), "x")
    except VolumeError:
        assert not inside
    else:
        assert inside


def test_an_unknown_unit_code_is_said_and_not_an_error(rng):
    image = _image(*head(rng))
    image.header["xyzt_units"] = 7 + 8
    volume = Volume.read({"flair": image})
    assert "unit of length, 7" in volume.notes[0]
    assert int(volume.native.header["xyzt_units"]) == 7


# --- forms


@pytest.mark.parametrize("shear", [0.02, 0.05, 0.3])
def test_a_sheared_sform_holds_beside_a_qform(tmp_path, rng, shear):
    values, affine = head(rng)
    sheared = np.eye(4)
    sheared[1, 2] = shear
    nib.save(_image(values, sheared @ affine, sform=2, qform=1), tmp_path / "x_flair.nii.gz")
    volume = Volume.read(tmp_path / "x_flair.nii.gz")
    np.testing.assert_allclose(volume.affine, sheared @ affine, rtol=1e-6)


def test_advice_on_forms_that_disagree_works(tmp_path, rng):
    values, affine = head(rng)
    moved = affine.copy()
    moved[:3, 3] += 30
    image = _image(values, affine, sform=1)
    image.set_qform(moved, 1)
    nib.save(image, tmp_path / "x_flair.nii.gz")
    _refused(r"disagree by up to 52.0 mm; .*set_qform\(None, 0\) keeps the sform, image.set_sform\(None, 0\)",
             tmp_path / "x_flair.nii.gz")  # fmt: skip
    for forget, held in (("set_qform", affine), ("set_sform", moved)):
        mended = nib.load(tmp_path / "x_flair.nii.gz")
        getattr(mended, forget)(None, 0)
        nib.save(mended, tmp_path / f"{forget}_flair.nii.gz")
        np.testing.assert_allclose(Volume.read(tmp_path / f"{forget}_flair.nii.gz").affine, held, rtol=1e-6)


def test_no_form_is_read_with_a_note(tmp_path, rng):
    values, affine = head(rng)
    image = _image(values, affine, sform=0, qform=0)
    nib.save(image, tmp_path / "x_flair.nii.gz")
    volume = Volume.read(tmp_path / "x_flair.nii.gz")
    assert "neither an sform nor a qform" in volume.notes[0]
    back = volume.to_native(values)
    assert (int(back.header["sform_code"]), int(back.header["qform_code"])) == (0, 0)
    assert np.array_equal(back.affine, nib.load(tmp_path / "x_flair.nii.gz").affine)


def test_nothing_but_geometry_leaves_a_header(tmp_path, rng):
    values, affine = head(rng)
    image = _image(values, affine, "mm", qform=1)
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[field] = b"DOE^JANE"
    image.header["toffset"], image.header["slice_duration"], image.header["intent_p1"] = 4711, 0.5, 47.11
    image.header["pixdim"][4:], image.header["cal_max"] = 47.11, 4711
    image.header.extensions.append(Nifti1Extension(6, b"DOE^JANE"))
    nib.save(image, tmp_path / "x_flair.nii")
    volume = Volume.read(tmp_path / "x_flair.nii")
    nib.save(volume.to_native(values, np.uint8), tmp_path / "map.nii")
    assert b"DOE" in (tmp_path / "x_flair.nii").read_bytes()
    assert b"DOE" not in (tmp_path / "map.nii").read_bytes()
    header = nib.load(tmp_path / "map.nii").header
    ours = nib.Nifti1Image(np.zeros(values.shape, np.uint8), affine)
    ours.set_qform(affine, 1)
    ours.header.set_xyzt_units("mm")
    nib.save(ours, tmp_path / "plain.nii")
    plain = nib.load(tmp_path / "plain.nii").header
    assert {f for f in plain.keys() if header[f].tobytes() != plain[f].tobytes()} == set()  # noqa: SIM118
    assert volume.native.header["descrip"].tobytes().strip(b"\0") == b""


# --- formats


def _saved_as(path, image):
    """The image in the format and compression of the name, written without the library."""
    nib.save(image, path.parent / "plain.nii")
    raw = (path.parent / "plain.nii").read_bytes()
    if path.name.endswith(".bz2"):
        path.write_bytes(bz2.compress(raw))
    elif path.name.endswith((".mgz", ".mgh")):
        nib.save(nib.MGHImage(np.asarray(image.dataobj), image.affine), path)
    elif ".hdr" in path.name or ".img" in path.name:
        nib.save(nib.Nifti1Pair(np.asarray(image.dataobj), image.affine), path)
    else:
        nib.save(image, path)


@pytest.mark.parametrize("extension", [
    "nii", "nii.gz", "NII.GZ", "nii.bz2", "hdr", "img", "hdr.gz", "img.gz", "mgz", "mgh",
])  # fmt: skip
def test_every_format_gives_the_same_volume_and_comes_back_as_nifti(tmp_path, rng, extension):
    values, affine = head(rng)
    path = tmp_path / f"x_flair.{extension.lower()}"
    _saved_as(path, nib.Nifti1Image(values, affine))
    if extension.isupper():
        path = path.rename(tmp_path / f"x_flair.{extension}")
    volume = Volume.read(path)
    assert volume.name == "x_flair"
    assert np.array_equal(volume.images["flair"], values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    back = volume.to_native(values)
    assert isinstance(back, nib.Nifti1Image)
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    if extension.startswith("mg"):
        assert np.array_equal(Volume.read({"flair": nib.load(path)}).images["flair"], values)


def test_a_pair_is_found_whatever_each_half_is_compressed_by(tmp_path, rng):
    values, affine = head(rng)
    nib.save(nib.Nifti1Pair(values, affine), tmp_path / "x_flair.hdr")
    voxels = (tmp_path / "x_flair.img").read_bytes()
    (tmp_path / "x_flair.img").unlink()
    _refused(r"x_flair.hdr: its voxels, x_flair.img, is not beside it", tmp_path / "x_flair.hdr")
    (tmp_path / "x_flair.img.bz2").write_bytes(bz2.compress(voxels))
    for name in ("x_flair.hdr", "x_flair.img.bz2"):
        assert np.array_equal(Volume.read(tmp_path / name).images["flair"], values)


def test_zstd_is_read_where_there_is_a_module_and_refused_with_advice_otherwise(tmp_path, rng, monkeypatch):
    values, affine = head(rng)
    raw = nib.Nifti1Image(values, affine).to_bytes()
    path = tmp_path / "x_flair.nii.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + raw)
    for name in compression._ZSTD_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    _refused("compressed by zstd.*zstd -d", path)

    class ZstdFile:
        def __init__(self, file):
            self.file = file
            assert file.read(4) == b"\x28\xb5\x2f\xfd"

        def read(self, size):
            return self.file.read(size)

    monkeypatch.setitem(sys.modules, "pyzstd", types.SimpleNamespace(ZstdFile=ZstdFile))
    assert np.array_equal(Volume.read(path).images["flair"], values)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.dcm", b"\0" * 400, "a DICOM file; .*dcm2niix"),
    ("x.nii", b"\0" * 128 + b"DICM" + b"\0" * 400, "a DICOM file; .*dcm2niix"),
    ("x.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer.*git lfs pull"),
    ("x.nii.gz", b"/annex/objects/MD5E-s1--00.nii.gz\n", "a git-annex pointer.*git annex get"),
    ("x.nrrd", b"NRRD0004\ntype: short\n" * 30, "an NRRD file.*convert"),
    ("x.nii", b"\x5c\x01\0\0" + b"\0" * 400, "an Analyze file or"),
    ("x.nii", b"PK\x03\x04" + b"\0" * 400, "a ZIP archive; unpack it"),
    ("x.txt", b"hello" * 200, "not a NIfTI file"),
    ("x.mgz", b"hello" * 200, "not an MGH file"),
    ("x.nii.bz2", b"BZh91AY&SY" + b"\0" * 90, "damaged or truncated"),
    ("x.nii.gz", b"\x1f\x8b\x08\0" + b"\0" * 90, "the gz is damaged or truncated"),
])  # fmt: skip
def test_files_of_other_kinds_are_named_with_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    _refused(f"{name}: .*{message}", tmp_path / name, require=("flair",))
    if "DICOM" not in message:
        with pytest.raises(VolumeError) as caught:
            Volume.read(tmp_path / name)
        assert "dcm2niix" not in str(caught.value)


def test_links_without_content_say_how_to_get_it(tmp_path):
    annex = tmp_path / "a_flair.nii.gz"
    annex.symlink_to("../.git/annex/objects/f8/9G/MD5E-s1--00.nii.gz/MD5E-s1--00.nii.gz")
    _refused(r"git-annex link without its content; run: git annex get a_flair", annex)
    (tmp_path / "b_flair.nii.gz").symlink_to("gone.nii.gz")
    _refused("b_flair.nii.gz: a link to gone.nii.gz, which is not there", tmp_path / "b_flair.nii.gz")
    os.mkfifo(tmp_path / "c_flair.nii")
    _refused("c_flair.nii: is no regular file", tmp_path / "c_flair.nii")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    _refused("loop.nii", tmp_path / "loop.nii")
    _refused("cannot be opened", str(tmp_path / ("x" * 300)))
    with pytest.raises(VolumeError, match="cannot be opened"):
        Volume.read("a\0b.nii")


@pytest.mark.parametrize(
    "nothing", [{}, [], (), None, 3, b"x.nii", "", {"flair": None}, {3: "x.nii"}, [[]], object()]
)
def test_what_is_no_image_is_refused(nothing):
    with pytest.raises(VolumeError):
        Volume.read(nothing, require=("flair",))


def test_names_of_other_modalities_are_refused_unless_the_caller_knows_better(tmp_path, rng):
    path = write(tmp_path / "sub-1_T2starw.nii.gz", *head(rng))
    _refused("its name says that it is none of t1, t1ce, t2, flair", path, require=("flair",))
    assert "flair" in Volume.read(path, sequences="FLAIR").images


# --- values


def _volume_of(raw, affine, slope=1.0, inter=0.0):
    """A volume whose file has these stored values and this scaling."""
    image = nib.Nifti1Image(raw, affine)
    image.header.set_slope_inter(slope, inter)
    return Volume.read({"flair": nib.Nifti1Image.from_bytes(_bytes(raw, affine, slope, inter))})


def _bytes(raw, affine, slope, inter, order="<"):
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(raw.dtype.newbyteorder(order))
    header.set_data_shape(raw.shape)
    header.set_sform(affine, 1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, inter, 352
    return header.binaryblock + b"\0" * 4 + raw.astype(raw.dtype.newbyteorder(order)).tobytes(order="F")


def _file(tmp_path, raw, affine, slope=1.0, inter=0.0, order="<"):
    path = tmp_path / "x_flair.nii"
    path.write_bytes(_bytes(raw, affine, slope, inter, order))
    return path


@pytest.mark.parametrize(("change", "scaling"), [
    (lambda v: v.astype(np.float64) + 1e9, (1, 0)),
    (lambda v: v.astype(np.float64) * 1e-3 - 1e9, (1, 0)),
    (lambda v: v.astype(np.float64) * 1e298, (1, 0)),
    (lambda v: v.astype(np.float64) * 1e-300, (1, 0)),
    (lambda v: v.astype(np.float64) * 1e-320, (1, 0)),
    (lambda v: v.astype(np.float32) * np.float32(2e34), (1, 0)),
    (lambda v: v.astype(np.float32) * np.float32(1e-42), (1, 0)),
    (lambda v: v.astype(np.int32) + 2_000_000_000, (1, 0)),
    (lambda v: v.astype(np.int64) + 2**60, (1, 0)),
    (lambda v: v.astype(np.uint64) + np.uint64(2**63), (1, 0)),
    (lambda v: v.astype(np.int16), (1e30, 0)),
    (lambda v: v.astype(np.int16), (1, 1e9)),
    (lambda v: v.astype(np.int16), (1e-3, 1e20)),
    (lambda v: v.astype(np.int16), (1e-35, 0)),
    (lambda v: v.astype(np.float64) * 1e250, (3e37, 0)),
    (lambda v: v.astype(np.int16), (float("nan"), 0)),
])  # fmt: skip
def test_contrast_survives_offsets_and_magnitudes(tmp_path, rng, change, scaling):
    values, affine = head(rng)
    values = np.round(values * 20)
    expected = Volume.from_array({"flair": values}, affine).normalised("flair")
    volume = Volume.read(_file(tmp_path, change(values), affine, *scaling))
    z = volume.normalised("flair")
    assert np.isfinite(volume.images["flair"]).all()
    assert np.mean(np.abs(z - expected) > 0.02) < 0.002
    in_memory = Volume.from_array({"flair": change(values)}, affine)
    assert np.mean(np.abs(in_memory.normalised("flair") - expected) > 0.02) < 0.002


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]),
    order=st.sampled_from("<>"), slope=st.sampled_from([1.0, 0.0, 0.25, 3.7]), inter=st.sampled_from([0.0, -5.0]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_voxels_are_slope_times_stored_plus_intercept(tmp_path, dtype, order, slope, inter, seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 100, (5, 6, 7)).astype(dtype)
    path = _file(tmp_path, raw, np.eye(4), slope, inter, order)
    image = nifti.open_image(path)
    read = nifti.voxels(image, "x")
    expected = raw.astype(np.float64) * (np.float32(slope) or 1.0) + (inter if slope else 0.0)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected.astype(np.float32))
    np.testing.assert_allclose(np.asarray(nib.load(path).dataobj), read, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(image.dataobj), expected)


@pytest.mark.parametrize(("slope", "inter"), [(np.inf, 0), (1, np.nan), (-np.inf, 0), (2, np.inf)])
def test_scaling_that_is_no_number_is_refused(tmp_path, rng, slope, inter):
    values, affine = head(rng)
    _refused(
        "scl_slope is .* and scl_inter is", _file(tmp_path, values.astype(np.int16), affine, slope, inter)
    )


# --- one read, bounded, of a file that may change


def _count_inflated(monkeypatch):
    counted = []
    plain = compression._decompressed

    def counting(file, head_, path):
        stream = plain(file, head_, path)

        class Counting:
            def read(self, size):
                data = stream.read(size)
                counted.append(len(data))
                return data

        return Counting()

    monkeypatch.setattr(compression, "_decompressed", counting)
    return counted


def test_a_file_is_inflated_once(tmp_path, rng, monkeypatch):
    path = write(tmp_path / "x_flair.nii.gz", *head(rng))
    size = len(gzip.decompress((tmp_path / "x_flair.nii.gz").read_bytes()))
    counted = _count_inflated(monkeypatch)
    Volume.read(path)
    assert sum(counted) == size + nifti.HEADER_BYTES


@pytest.mark.parametrize("without_zlib_ng", [False, True])
def test_inflating_gives_the_bytes_of_zlib(tmp_path, rng, monkeypatch, without_zlib_ng):
    if without_zlib_ng:
        monkeypatch.setitem(sys.modules, "zlib_ng", None)
    values = rng.integers(-3000, 3000, (30, 40, 50)).astype(np.int16)
    path = write(tmp_path / "x.nii.gz", values, np.eye(4))
    held = gzip.decompress((tmp_path / "x.nii.gz").read_bytes())[352:]
    assert nifti.open_image(path).dataobj.get_unscaled().tobytes(order="F") == held
    whole = (tmp_path / "x.nii.gz").read_bytes()
    damaged = bytearray(whole)
    damaged[-5] ^= 1  # of the checksum
    for content in (damaged, whole[:-4], whole[: len(whole) // 2]):
        (tmp_path / "x.nii.gz").write_bytes(content)
        with pytest.raises(VolumeError, match="x.nii.gz: the gz is damaged or truncated"):
            nifti.voxels(nifti.open_image(path), path)


def test_a_bomb_is_read_no_further_than_its_header_says(tmp_path, rng, monkeypatch):
    values, affine = head(rng)
    packer = zlib.compressobj(9, wbits=31)
    raw = nib.Nifti1Image(values, affine).to_bytes()
    parts = [packer.compress(raw)] + [packer.compress(bytes(1 << 24)) for _ in range(40)] + [packer.flush()]
    (tmp_path / "x_flair.nii.gz").write_bytes(b"".join(parts))
    counted = _count_inflated(monkeypatch)
    volume = Volume.read(tmp_path / "x_flair.nii.gz")
    assert sum(counted) <= len(raw) + compression.SURPLUS + nifti.HEADER_BYTES
    assert "holds more bytes than its header says" in volume.notes[0]


@pytest.mark.parametrize(("shape", "code", "bits"), [((1024, 1024, 1024), 4, 16), ((512, 512, 512), 1536, 128),
                                                     ((500, 500, 500), 64, 64), ((32767, 1, 1), 2, 8)])  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True])
def test_absurd_headers_take_no_memory(tmp_path, rng, shape, code, bits, compressed):
    raw = bytearray(nib.Nifti1Image(*head(rng)).to_bytes())
    struct.pack_into("<8h", raw, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<2h", raw, 70, code, bits)
    path = tmp_path / f"x_flair.nii{'.gz' if compressed else ''}"
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    tracemalloc.start()
    _refused("absurd|truncated or its header is wrong|field of view", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize("offset", [-352.0, 1e30, float("nan"), float("inf"), 3.0e8])
def test_voxels_that_begin_nowhere_are_refused(tmp_path, rng, offset):
    raw = bytearray(nib.Nifti1Image(*head(rng)).to_bytes())
    struct.pack_into("<f", raw, 108, offset)
    (tmp_path / "x_flair.nii").write_bytes(raw)
    _refused("x_flair.nii: ", tmp_path / "x_flair.nii")


@pytest.mark.parametrize("opened_by", ["ddmd", "nibabel", "memmap"])
def test_no_memory_map_outlives_its_file(tmp_path, rng, opened_by):
    values, affine = head(rng)
    path = write(tmp_path / "x_flair.nii", values, affine)
    if opened_by == "memmap":
        mapped = np.memmap(path, np.float32, "r", 352, values.shape, "F")
        source, options = mapped, {"affine": affine, "sequences": "flair"}
    else:
        source, options = (nib.load(path) if opened_by == "nibabel" else path), {"sequences": "flair"}
    volume = Volume.read(source, **options)
    os.truncate(path, 4096)
    assert np.array_equal(volume.images["flair"], values)  # a signal, if it lay on the file
    if opened_by != "memmap":
        assert np.isfinite(volume.normalised("flair")).all()
    with pytest.raises(VolumeError, match="truncated"):
        Volume.read(source, **options)


@pytest.mark.parametrize("change", ["rewritten", "truncated", "replaced", "removed"])
def test_a_file_that_changes_between_header_and_voxels_is_refused(tmp_path, rng, change):
    values, affine = head(rng)
    path = tmp_path / "x_flair.nii"
    write(path, values, affine)
    image = nifti.open_image(path)
    raw = path.read_bytes()
    if change == "rewritten":
        path.write_bytes(raw[:352] + bytes(len(raw) - 352))
        os.utime(path, ns=(1, 1))
    elif change == "truncated":
        os.truncate(path, 4096)
    elif change == "replaced":
        write(tmp_path / "other.nii", values, affine)
        os.replace(tmp_path / "other.nii", path)
    else:
        path.unlink()
    with pytest.raises(
        VolumeError, match="no such file" if change == "removed" else "changed while it was read"
    ):
        nifti.voxels(image, str(path))


def test_a_file_cut_while_it_is_read_gives_one_error(tmp_path, rng, monkeypatch):
    values, affine = head(rng)
    path = write(tmp_path / "x_flair.nii", values, affine)
    image = nifti.open_image(path)
    monkeypatch.setattr(compression, "CHUNK", 4096)
    plain, calls = compression._decompressed, []

    def cutting(file, head_, where):
        stream = plain(file, head_, where)

        class Cutting:
            def read(self, size):
                calls.append(size)
                if len(calls) == 3:
                    os.truncate(path, 6000)
                return stream.read(size)

        return Cutting()

    monkeypatch.setattr(compression, "_decompressed", cutting)
    with pytest.raises(VolumeError, match="changed while it was read"):
        nifti.voxels(image, path)


def test_a_freesurfer_file_is_read_without_a_note(tmp_path, rng):
    values, affine = head(rng)
    nib.save(nib.MGHImage(values, affine), tmp_path / "a_flair.mgz")  # which ends with a footer
    volume = Volume.read(tmp_path / "a_flair.mgz")
    assert volume.notes == ()
    assert np.array_equal(volume.images["flair"], values)


@pytest.mark.filterwarnings("error")
def test_a_damaged_file_is_closed(tmp_path, rng):
    values, affine = head(rng)
    path = tmp_path / "a_flair.nii.gz"
    write(path, values, affine)
    path.write_bytes(path.read_bytes() + b"garbage")
    gc.collect()  # what other tests left open
    before = len(os.listdir("/proc/self/fd"))
    _refused("the gz is damaged", path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_members_of_a_gz_file_are_one_file(tmp_path, rng):
    values, affine = head(rng)
    raw = nib.Nifti1Image(values, affine).to_bytes()
    cut = sorted(int(n) for n in rng.integers(1, len(raw), 5))
    members = [raw[a:b] for a, b in zip([0, *cut], [*cut, len(raw)], strict=True)]
    path = tmp_path / "a_flair.nii.gz"
    path.write_bytes(b"".join(map(gzip.compress, members)) + bytes(512))  # padded, as tar does
    assert np.array_equal(Volume.read(path).images["flair"], values)


@pytest.mark.parametrize("form", ["nifti1", "nifti2"])
def test_voxels_that_begin_inside_the_header_are_refused(tmp_path, rng, form):
    values, affine = head(rng)
    kind, place, code = (nib.Nifti1Image, 108, "<f") if form == "nifti1" else (nib.Nifti2Image, 168, "<q")
    content = bytearray(kind(values, affine).to_bytes())
    struct.pack_into(code, content, place, 0)
    path = tmp_path / "x_FLAIR.nii"
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="voxels begin at byte 0, inside the header"):
        Volume.read(path)


@pytest.mark.parametrize("qform_code", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_voxel_size_of_zero_is_not_taken_for_a_millimetre(tmp_path, rng, axis, qform_code):
    values, affine = head(rng)
    image = nib.Nifti1Image(values, affine)
    image.set_sform(None, 0)
    image.set_qform(affine, qform_code)
    content = bytearray(image.to_bytes())
    struct.pack_into("<f", content, 80 + 4 * axis, 0.0)
    path = tmp_path / "x_FLAIR.nii"
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"voxel sizes .*0\.0.* in the header, which has no sform"):
        Volume.read(path)
