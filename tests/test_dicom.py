# ruff: noqa: E402 - imports follow the check for the packages
"""DICOM in and DICOM Segmentation out: the lesion stays where the patient has it, and what is not right is refused."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

for _package in ("pydicom", "highdicom", "dcm2niix"):
    pytest.importorskip(_package, reason=f"the extra 'dicom' is not installed ({_package})")

import pydicom
from PIL import Image
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from scipy.spatial import KDTree

import ddmd
from ddmd.cli import app
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.errors import DatasetError
from ddmd.inference import detector
from ddmd.inference.detection import Detection, OutputError
from ddmd.inference.detector import Detector
from ddmd.io.dicom import find_series
from ddmd.io.dicom_headers import sequence_of_timing, without_patient
from ddmd.io.sequences import OTHER
from ddmd.io.volume import Volume, VolumeError

from .dicom_series import FLAIR, PATIENT, PLANES, T1, grid, in_block, oblique, write_series
from .volumes import tiny_system

WORLD = np.array([-1.0, -1.0, 1.0])  # LPS to RAS


@pytest.fixture(params=["axial", "sagittal", "coronal", "oblique"])
def plane(request, rng):
    return oblique(rng) if request.param == "oblique" else PLANES[request.param]


@pytest.fixture
def axial(tmp_path):
    """A folder with one axial FLAIR, and its files."""
    return tmp_path / "scan", write_series(tmp_path / "scan", PLANES["axial"])


def known_detection(folder) -> Detection:
    """A detection in a folder whose mask is the bright block, and whose probability is known, too."""
    detection = Detector(tiny_system()).detect(folder, samples=2, steps=1)
    values = np.asanyarray(detection.image.dataobj)
    mask = (values > 900).astype(np.uint8)
    probability = (np.clip(values, 0, 1000) / 1000).astype(np.float32)
    return dataclasses.replace(
        detection,
        mask=nib.Nifti1Image(mask, detection.mask.affine, detection.mask.header),
        probability=nib.Nifti1Image(probability, detection.mask.affine),
    )


def seg_points(path) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, 3) mm LPS of all pixels of a Segmentation by its own tags alone, and their values (n,)."""
    seg = pydicom.dcmread(path)
    shared = seg.SharedFunctionalGroupsSequence[0]
    spacing = [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
    turned = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    row, column = np.meshgrid(np.arange(seg.Rows), np.arange(seg.Columns), indexing="ij")
    points = [
        np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        + column[..., None] * spacing[1] * turned[:3]
        + row[..., None] * spacing[0] * turned[3:]
        for group in seg.PerFrameFunctionalGroupsSequence
    ]
    return np.reshape(points, (-1, 3)), frames.ravel()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_lesion_lies_at_one_place_in_dicom_and_in_nifti(plane, reverse, tmp_path):
    write_series(tmp_path / "scan", plane, reverse=reverse)
    detection = known_detection(tmp_path / "scan")
    inside = np.argwhere(np.asanyarray(detection.mask.dataobj))
    world = nib.affines.apply_affine(detection.mask.affine, inside)
    _, points = grid(plane, 7.0, 8.0)
    expected = points[in_block(points)]
    assert len(world) == len(expected) > 20
    distances, nearest = KDTree(expected * WORLD).query(world)
    assert distances.max() < 0.02
    assert len(set(nearest.tolist())) == len(expected), "each voxel has a place of its own"
    paths = detection.save_dicom_seg(tmp_path / "out")
    places, values = seg_points(paths["mask"])
    marked = places[values > 0]
    assert len(marked) == len(expected)
    assert in_block(marked, slack=0.02).all()
    assert marked[:, 0].min() > 0 > marked[:, 1].max(), "the patient's left is +x and the front is -y in LPS"


def test_a_probability_comes_back_at_every_pixel(plane, tmp_path):
    write_series(tmp_path / "scan", plane)
    detection = known_detection(tmp_path / "scan")
    path = detection.save_dicom_seg(tmp_path / "out")["probability"]
    places, values = seg_points(path)
    seg = pydicom.dcmread(path)
    assert (seg.SegmentationType, seg.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    voxels = nib.affines.apply_affine(np.linalg.inv(detection.mask.affine), places * WORLD)
    np.testing.assert_allclose(voxels, np.rint(voxels), atol=0.02)
    expected = np.asanyarray(detection.probability.dataobj)[tuple(np.rint(voxels).astype(int).T)]
    np.testing.assert_allclose(values / seg.MaximumFractionalValue, expected, atol=0.51 / 255)


def test_a_segmentation_refers_to_its_images_and_names_their_patient(axial, tmp_path):
    folder, files = axial
    sources = {(d := pydicom.dcmread(f)).SOPInstanceUID: d for f in files}
    source = next(iter(sources.values()))
    for path in known_detection(folder).save_dicom_seg(tmp_path / "out").values():
        seg = pydicom.dcmread(path)
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"):
            assert seg[keyword].value == source[keyword].value
        assert seg.Modality == "SEG"
        assert seg.SeriesInstanceUID != source.SeriesInstanceUID
        for group in seg.PerFrameFunctionalGroupsSequence:
            reference = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            np.testing.assert_allclose(
                np.array(group.PlanePositionSequence[0].ImagePositionPatient, float),
                np.array(sources[reference].ImagePositionPatient, float), atol=0.01,
            )  # fmt: skip


def test_highdicom_reads_a_segmentation_as_the_same_volume(axial, tmp_path):
    import highdicom

    detection = known_detection(axial[0])
    seg = highdicom.seg.segread(detection.save_dicom_seg(tmp_path / "out")["mask"])
    volume = seg.get_volume(combine_segments=True)
    indices = np.argwhere(volume.array > 0)
    world = nib.affines.apply_affine(volume.affine, indices)
    assert in_block(world, slack=0.02).all()
    assert len(world) == np.asanyarray(detection.mask.dataobj).sum()


def test_an_empty_mask_is_a_segmentation_too(axial, tmp_path):
    detection = known_detection(axial[0])
    empty = nib.Nifti1Image(np.zeros(detection.mask.shape, np.uint8), detection.mask.affine)
    path = dataclasses.replace(detection, mask=empty).save_dicom_seg(tmp_path / "out")["mask"]
    _, values = seg_points(path)
    assert len(values) > 0
    assert not values.any()


def test_a_thin_oblique_grid_keeps_its_slices(tmp_path, rng):
    plane, spacing, step = oblique(rng), float(rng.uniform(4, 6)), float(rng.uniform(5, 9))
    write_series(tmp_path / "scan", plane, spacing=spacing, step=step)
    volume = Volume.read(tmp_path / "scan", require=("flair",))
    world = nib.affines.apply_affine(volume.affine, np.argwhere(volume.images["flair"] > 900))
    _, points = grid(plane, spacing, step)
    expected = points[in_block(points)] * WORLD
    distances, nearest = KDTree(expected).query(world)
    assert distances.max() < 0.02
    assert len(world) == len(expected) == len(set(nearest.tolist()))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless]
)
def test_every_transfer_syntax_gives_the_same_voxels_or_is_refused(syntax, axial, tmp_path):
    folder, files = axial
    plain = Volume.read(folder, require=("flair",))
    other = tmp_path / "other"
    other.mkdir()
    for path in files:
        image = pydicom.dcmread(path)
        if syntax is JPEG2000Lossless:  # pydicom has no encoder of its own
            content = io.BytesIO()
            Image.fromarray(image.pixel_array.astype(np.uint16)).save(content, "JPEG2000", irreversible=False)
            image.PixelData = pydicom.encaps.encapsulate([content.getvalue()])
            image.PixelRepresentation = 0
        elif syntax.is_encapsulated:
            image.compress(syntax, generate_instance_uid=False)
        elif syntax is ExplicitVRBigEndian:
            image.PixelData = np.frombuffer(image.PixelData, "<i2").astype(">i2").tobytes()
        image.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(
            other / path.name, image, implicit_vr=syntax.is_implicit_VR, enforce_file_format=True,
            little_endian=syntax.is_little_endian,
        )  # fmt: skip
    again = Volume.read(other, require=("flair",))
    np.testing.assert_array_equal(again.images["flair"], plain.images["flair"])
    np.testing.assert_allclose(again.affine, plain.affine, atol=1e-4)


def test_a_flair_is_found_by_its_tags_among_series_of_several_kinds(tmp_path):
    root, study = tmp_path / "export", pydicom.uid.generate_uid()
    write_series(root / "a" / "1", PLANES["axial"], T1, number=1, study=study)
    # its name lies: a T1 FLAIR has a short echo and inversion time
    decoy = {**FLAIR, "SeriesDescription": "FLAIR", "InversionTime": 860.0, "EchoTime": 9.0}
    write_series(root / "a" / "2", PLANES["axial"], decoy, number=2, study=study)
    named_t2 = {**FLAIR, "SeriesDescription": "T2 special", "ProtocolName": "T2"}
    write_series(root / "b", PLANES["sagittal"], named_t2, number=3, study=study, names="X{}")
    (root / "README").write_text("not DICOM")
    volume = Volume.read(root, require=("flair",))
    assert volume.sources == {"flair": f"{root / 'b'}/series 3"}
    assert volume.dicom is not None
    assert volume.dicom.headers[0].number == 3
    assert any("series 1 (t1), series 2 (t1)" in note for note in volume.notes)


@pytest.mark.parametrize(
    ("label", "times", "recovery", "expected"),
    [
        (None, (2500.0, 120.0, 9000.0), True, "flair"),
        ("t2", (1800.0, 390.0, 5000.0), True, "flair"),
        ("flair", (None, 120.0, 9000.0), False, "flair"),
        ("flair", (None, 3.0, 8.0), False, "t1"),
        ("flair", (180.0, 60.0, 5000.0), True, OTHER),
        ("flair", (2000.0, 8.0, 3000.0), True, "t1"),
        (OTHER, (2500.0, 120.0, 9000.0), True, OTHER),
        (None, (None, 100.0, 4000.0), False, "t2"),
        (None, (None, None, None), False, None),
        ("t1", (900.0, 3.0, 2000.0), True, "t1"),
    ],
)
def test_the_timing_says_the_sequence_where_it_can(label, times, recovery, expected):
    inversion, echo, repetition = times
    said, _ = sequence_of_timing(
        label, inversion_ms=inversion, echo_ms=echo, repetition_ms=repetition, inversion_recovery=recovery
    )
    assert said == expected


def test_a_folder_without_flair_names_what_is_there(tmp_path):
    write_series(tmp_path / "x", PLANES["axial"], T1, number=4)
    write_series(tmp_path / "y", PLANES["axial"], {**T1, "SeriesDescription": "localizer"}, number=1)
    for attempt in (
        lambda: Volume.read(tmp_path, require=("flair",)),
        lambda: find_cases(tmp_path, require=("flair",), annotations=False),
    ):
        with pytest.raises((VolumeError, DatasetError), match="no FLAIR series in it; found: ") as caught:
            attempt()
        assert "series 4 't1_mprage' (t1, 21 images)" in str(caught.value)
        assert "series 1 'localizer'" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_slice_is_refused(axial, rng):
    folder, files = axial
    files[int(rng.integers(2, len(files) - 2))].unlink()
    with pytest.raises(
        VolumeError, match=r"series 5: a slice is missing: slices are 8.00 mm apart, and 16.00 mm"
    ):
        Volume.read(folder, require=("flair",))


def test_duplicates_are_left_aside_and_contradictions_refused(axial):
    folder, files = axial
    plain = Volume.read(folder, require=("flair",)).images["flair"]
    shutil.copy(files[7], folder / "copy")
    again = pydicom.dcmread(files[9])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    again.save_as(folder / "sent-again")
    volume = Volume.read(folder, require=("flair",))
    np.testing.assert_array_equal(volume.images["flair"], plain)
    assert any("2 files of series 5 that hold a slice again (IM0010, copy)" in n or "2 files" in n
               for n in volume.notes)  # fmt: skip
    again.PixelData = np.roll(np.frombuffer(again.PixelData, "<i2"), 5).tobytes()
    again.save_as(folder / "sent-again")
    with pytest.raises(VolumeError, match="are different images at one place"):
        Volume.read(folder, require=("flair",))


def test_a_damaged_file_beside_the_slices_is_named_and_one_among_them_refused(axial, rng):
    folder, files = axial
    (folder / "broken.dcm").write_bytes(rng.bytes(5000))
    (folder / "cut").write_bytes(files[3].read_bytes()[:200])
    volume = Volume.read(folder, require=("flair",))
    assert any("broken.dcm" in note for note in volume.notes)
    middle = files[len(files) // 2]
    whole = middle.read_bytes()
    middle.write_bytes(whole[: len(whole) - 300])
    with pytest.raises(VolumeError, match=rf"{middle.name}: .*copy it again"):
        Volume.read(folder, require=("flair",))
    middle.write_bytes(rng.bytes(len(whole)))
    with pytest.raises(VolumeError, match="a slice is missing"):
        Volume.read(folder, require=("flair",))


def test_several_patients_are_several_cases_and_no_single_volume(tmp_path):
    root = tmp_path / "export"
    names = ("Doeringer^Zarathustra", "Roe^Hildegard")
    for k, name in enumerate(names):
        write_series(root / name, PLANES["axial"], patient={"PatientName": name, "PatientID": f"HOSP-{k}"})
    with pytest.raises(VolumeError, match="FLAIR series of 2 patients"):
        Volume.read(root, require=("flair",))
    cases = find_cases(root, require=("flair",), annotations=False)
    assert [case.name for case in cases] == ["patient-1_series-5", "patient-2_series-5"]
    assert len({case.patient for case in cases}) == 2
    assert cases[0].volume(("flair",)).name == "patient-1_series-5"
    apart = find_cases([root / name for name in names], require=("flair",), annotations=False)
    assert len({case.name for case in apart}) == 2
    assert not any(
        word in case.name.lower() for case in apart for word in ("doeringer", "roe", "hilde", "zara")
    )


def test_a_multi_frame_file_is_a_volume_of_its_own(plane, tmp_path, rng):
    from highdicom.legacy import LegacyConvertedEnhancedMRImage

    files = write_series(tmp_path / "single", plane, {**FLAIR, "ProtocolName": "flair"})
    sources = [pydicom.dcmread(files[k]) for k in rng.permutation(len(files))]
    uid = pydicom.uid.generate_uid
    made = LegacyConvertedEnhancedMRImage(sources, uid(), 5, uid(), 1)
    (tmp_path / "multi").mkdir()
    made.save_as(tmp_path / "multi" / "E1", enforce_file_format=True)
    single = Volume.read(tmp_path / "single", require=("flair",))
    volume = Volume.read({"flair": tmp_path / "multi"}, require=("flair",))
    np.testing.assert_array_equal(volume.images["flair"], single.images["flair"])
    np.testing.assert_allclose(volume.affine, single.affine, atol=1e-3)
    places, values = seg_points(
        known_detection({"flair": tmp_path / "multi"}).save_dicom_seg(tmp_path / "out")["mask"]
    )
    assert (values > 0).sum() > 20
    assert in_block(places[values > 0], slack=0.02).all()


def test_files_named_one_by_one_are_a_series_and_results_beside_them_are_none(axial, tmp_path, monkeypatch):
    folder, files = axial
    monkeypatch.setattr(Detector, "load", classmethod(lambda cls, *a, **k: Detector(tiny_system())))
    (case,) = find_cases(files, require=("flair",), annotations=False)
    assert case.name == "scan_series-5"
    for _ in range(2):  # the second run finds results and segmentations of the first in its input
        result = CliRunner().invoke(app, ["detect", str(folder), "-o", str(folder / "out"), "--overwrite"])
        assert result.exit_code == 0, result.output
    assert len(list((folder / "out").glob("*_result.json"))) == 1


def test_files_without_preamble_are_read(axial, tmp_path):
    folder, files = axial
    plain = Volume.read(folder, require=("flair",))
    for path in files:
        image = pydicom.dcmread(path)
        image.file_meta, image.preamble = pydicom.dataset.FileMetaDataset(), None
        pydicom.dcmwrite(path, image, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    again = Volume.read(folder, require=("flair",))
    np.testing.assert_array_equal(again.images["flair"], plain.images["flair"])


def test_evaluation_says_that_it_takes_no_dicom(axial):
    folder, files = axial
    files[0].rename(folder / "first.dcm")
    with pytest.raises(DatasetError, match="DICOM, which only `ddmd detect` takes"):
        find_cases(folder, require=("flair",))


def test_a_name_with_accents_goes_from_the_folders_name(tmp_path):
    patient = {"PatientName": "Müller^Zoë", "PatientID": "x-77", "PatientBirthDate": "19700131",
               "SpecificCharacterSet": "ISO_IR 192"}  # fmt: skip
    write_series(tmp_path / "Muller_zoe\u0308_1970-01-31_brain", PLANES["axial"], patient=patient)
    (case,) = find_cases(tmp_path, require=("flair",), annotations=False)
    assert case.name == "patient-1_brain_series-5"


def test_an_original_comes_before_its_reformatted_copy(tmp_path):
    study = pydicom.uid.generate_uid()
    write_series(tmp_path / "a", PLANES["axial"], {**FLAIR, "ImageType": ["DERIVED", "SECONDARY", "MPR"]}, number=9,
                 study=study, step=4.0)  # fmt: skip
    write_series(tmp_path / "b", PLANES["axial"], number=2, study=study)
    assert find_series(tmp_path).series[0].headers[0].number == 2
    (case,) = find_cases(tmp_path, require=("flair",), annotations=False)
    assert case.name == "b_series-2"
    assert Volume.read(tmp_path, require=("flair",)).name == "b_series-2"


def patient_words_in(path: Path) -> list[str]:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    text = (path.name.encode() + content).lower()
    words = ("zarathustra", "doeringer", "hosp-0815", "19610412", "acc4711", "20260102")
    return [word for word in words if word.encode() in text]


def test_the_command_line_writes_segmentations_beside_maps_that_name_no_patient(tmp_path):
    root = tmp_path / "DOERINGER_Zarathustra"
    files = write_series(root, PLANES["axial"], names="Doeringer-{:03d}.dcm")
    shutil.copy(files[0], root / "Doeringer-again.dcm")
    before = {path: path.read_bytes() for path in root.rglob("*")}
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["detect", str(root), "-o", str(out), "--samples", "1", "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in root.rglob("*")} == before
    segs = sorted(path.name for path in out.glob("*.dcm"))
    assert segs == [f"patient-1_series-5_{s}.dcm" for s in ("desc-lesion_mask", "desc-lesion_probseg")]
    written = sorted(path for path in out.iterdir() if path.suffix != ".dcm")
    assert len(written) > 8
    for path in written:
        assert patient_words_in(path) == [], path
    summary = json.loads((out / "patient-1_series-5_result.json").read_text())
    assert set(segs) < set(summary["Files"])
    assert patient_words_in(out / segs[0]) != []
    options = ["-o", str(out), "--samples", "1", "--steps", "1", "--skip-existing"]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.dcm")}
    again = CliRunner().invoke(app, ["detect", str(root), *options])
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.dcm")} == stamps


def test_a_cohort_writes_segmentations_unless_told_not_to(axial, tmp_path):
    detection = known_detection(axial[0])
    assert not [k for k in detection.save(tmp_path / "a", dicom_seg=False) if k.endswith("_seg")]
    paths = detection.save(tmp_path / "b", maps=["mask"])
    assert {k for k in paths if k.endswith("_seg")} == {"mask_seg"}
    with pytest.raises(OutputError, match="overwrite"):
        detection.save(tmp_path / "b", maps=["mask"])


def test_conversion_leaves_nothing_behind(axial, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    Volume.read(axial[0], require=("flair",))
    axial[1][3].write_bytes(axial[1][3].read_bytes()[:-100])
    with pytest.raises(VolumeError):
        Volume.read(axial[0], require=("flair",))
    assert os.listdir(tmp_path / "tmp") == []


def test_a_changed_or_missing_source_makes_no_segmentation(axial, tmp_path):
    folder, files = axial
    detection = known_detection(folder)
    shutil.copy(files[0], files[1])
    with pytest.raises(VolumeError, match="is another image"):
        detection.save_dicom_seg(tmp_path / "out")
    files[1].unlink()
    with pytest.raises(VolumeError, match="cannot be read"):
        detection.save_dicom_seg(tmp_path / "out")
    plain = dataclasses.replace(detection, dicom=None)
    with pytest.raises(OutputError, match="the input was no DICOM"):
        plain.save_dicom_seg(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_extra_one_line_says_what_to_install(axial, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pydicom" else find(name, *a)
    )
    with pytest.raises(VolumeError, match=r"DICOM, which needs pydicom; pip install 'ddmd\[dicom\]'$"):
        Volume.read(axial[0], require=("flair",))
    result = CliRunner().invoke(app, ["detect", str(axial[0]), "-o", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert "pip install 'ddmd[dicom]'" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_single_series_is_what_the_caller_says(tmp_path):
    write_series(tmp_path / "scan", PLANES["axial"], {**T1, "SeriesDescription": "unclear"})
    volume = Volume.read({"flair": tmp_path / "scan"}, require=("flair",))
    assert volume.dicom is not None
    (case,) = find_cases(tmp_path / "scan", require=("flair",), sequence="flair", annotations=False)
    assert case.volume(("flair",)).images.keys() == {"flair"}
    assert Volume.read(tmp_path / "scan", sequences="flair", require=("flair",)).images.keys() == {"flair"}


def test_nifti_files_come_before_dicom_files_in_one_folder(axial, tmp_path):
    folder, _ = axial
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), folder / "a_flair.nii.gz")
    (folder / "x.dcm").write_bytes(axial[1][0].read_bytes())
    found = find_cases(folder, require=("flair",), annotations=False)
    assert [case.name for case in found] == ["scan"] or len(found) == 1
    assert any("DICOM" in note for note in found.notes)


def test_words_that_name_the_patient_go():
    assert without_patient("Anna_Li_scan", {"anna", "li"}) == "patient_scan"
    assert without_patient("flair_lime", {"li"}) == "flair_lime"
    assert PATIENT["PatientID"] not in without_patient(
        f"x{PATIENT['PatientID']}y", {PATIENT["PatientID"].lower()}
    )


def test_the_guides_commands_and_code_run(axial, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "howto" / "dicom.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Detector, "load", classmethod(lambda cls, *a, **k: Detector(tiny_system())))
    monkeypatch.setattr(detector, "_loaded", detector._loaded.__wrapped__)  # which would keep the tiny system
    for name in ("DICOM_DIR", "SERIES_DIR"):
        (tmp_path / name).symlink_to(axial[0])
    commands = re.findall(r"^ {4,}ddmd (.*)$", page, re.M)
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(app, [*command.split(), "--overwrite"])
        assert result.exit_code == 0, result.output
        shutil.move("out", f"out-{len(os.listdir())}")
    for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(compile(code, "dicom.md", "exec"), {})
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"DICOM_DIR_series-5_{name}.dcm" for name in ("desc-lesion_mask", "desc-lesion_probseg")
    }


def test_detect_takes_a_folder(axial):
    detection = ddmd.detect(str(axial[0]), samples=1, steps=1)
    assert detection.name == "scan_series-5"
    assert detection.dicom is not None
    assert detection.provenance["Sources"] == {"flair": "series 5"}


def test_segmentations_that_an_earlier_run_left_out_are_missed(axial, tmp_path):
    from ddmd.cohort.pipeline import detect_cohort
    from ddmd.models import checkpoint

    checkpoint.save(tiny_system(), tmp_path / "tiny.safetensors")
    options = {
        "weights": Detector.load(tmp_path / "tiny.safetensors", "cpu"),
        "samples": 1,
        "steps": 1,
        "overlay": False,
    }
    out = tmp_path / "out"
    assert len(list(detect_cohort(axial[0], out, dicom_seg=False, **options))) == 1
    assert not list(out.glob("*.dcm"))
    assert not list(detect_cohort(axial[0], out, dicom_seg=False, **options))
    with pytest.raises(OutputError, match="holds earlier results"):
        detect_cohort(axial[0], out, **options)
    assert len(list(detect_cohort(axial[0], out, overwrite=True, skip_existing=True, **options))) == 1
    assert len(list(out.glob("*.dcm"))) == 2
    assert not list(detect_cohort(axial[0], out, **options))
