"""What finding cases among files and folders promises."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ddmd.cohort.case_names import output_stems, unique_stems
from ddmd.cohort.cases import UNKNOWN, DatasetError
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.file_names import bids_entities
from ddmd.cohort.name_words import without_sequence
from ddmd.io.errors import VolumeError
from ddmd.io.naming import MAX_STEM_BYTES, file_stem

SHAPE = (24, 28, 6)
LPS = np.diag([-4.0, -4.0, 6.0, 1.0])


def write(path: Path, values: np.ndarray, affine: np.ndarray = LPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
    return path


@pytest.fixture
def head(rng):
    """A stripped head (X, Y, Z) and a lesion on slices 2 and 3."""
    x, y, z = np.mgrid[tuple(slice(0, n) for n in SHAPE)]
    inside = ((x - 11.5) / 10) ** 2 + ((y - 13.5) / 11) ** 2 + ((z - 2.5) / 4) ** 2 < 1
    lesion = np.zeros(SHAPE, bool)
    lesion[8:11, 9:12, 2:4] = True
    return np.where(inside, rng.normal(100, 10, SHAPE), 0.0), lesion


def garbage(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image at all")
    return path


def stack(root: Path, patients=("p1", "p2"), count=11) -> None:
    """A `slices` layout; file 10 sorts before 2 by name, and slice 5 of p1 has a lesion."""
    rows = ["file,patient,slice,has_lesion"]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for patient in patients:
        for i in range(1, count + 1):
            plane = np.zeros((32, 40), np.uint8)
            plane[4:28, 6:34] = 100 + np.arange(24)[:, None]
            plane[4, 6 + i] = 250  # near the front and, in columns, towards the right: marks the slice
            name = f"{patient}_{i}.png"
            Image.fromarray(plane).save(root / "images" / name)
            garbage(root / "masks" / name)
            rows.append(f"{name},{patient},{i},{int(patient == 'p1' and i == 5)}")
    (root / "labels.csv").write_text("\n".join(rows))


def test_slices_layout_is_ordered_by_number_and_labelled_without_masks(tmp_path):
    stack(tmp_path)
    first, second = find_cases(tmp_path, name="here")
    assert (first.patient, first.source, first.stack) == ("p1", "here", True)
    assert [p.stem for p in first.files["flair"]] == [f"p1_{i}" for i in range(1, 12)]
    assert first.labels().tolist() == [0] * 4 + [1] + [0] * 6
    assert first.labels().dtype == np.int8
    assert (first.has_lesion, second.has_lesion) == (True, False)


def test_a_stack_is_read_rows_to_the_back_and_columns_to_the_left(tmp_path):
    stack(tmp_path)
    volume = find_cases(tmp_path)[0].volume(("flair",))
    image = volume.images["flair"]
    assert image.shape == (40, 32, 11)
    np.testing.assert_allclose(volume.spacing, (1, 1, 7))
    for z in range(11):  # RAS: column 7 + z is x = 39 - (7 + z), row 4 is y = 31 - 4
        assert np.unravel_index(image[:, :, z].argmax(), (40, 32)) == (32 - z, 27)


def test_an_unreadable_mask_is_named_when_it_is_asked_for(tmp_path):
    stack(tmp_path)
    with pytest.raises(DatasetError, match=r"p1_1\.png.*copy it again"):
        find_cases(tmp_path)[0].lesion()


def test_a_slice_whose_label_is_not_known_stays_unknown(tmp_path):
    stack(tmp_path, ("p2",), 3)
    text = (tmp_path / "labels.csv").read_text().replace("p2,2,0", "p2,2,n/a")
    (tmp_path / "labels.csv").write_text(text)
    (case,) = find_cases(tmp_path)
    assert case.labels().tolist() == [0, -1, 0]
    assert case.has_lesion is None


def test_volumes_layout_reads_the_table_and_keeps_unknown_unknown(tmp_path, head):
    for name in ("a", "b", "c", "d"):
        write(tmp_path / name / "flair.nii.gz", head[0])
        write(tmp_path / name / "brain.nii.gz", head[0] > 0)
        garbage(tmp_path / name / "lesion.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\thas_lesion\na\t1\nb\t0\nc\tn/a\n")
    cases = find_cases(tmp_path)
    assert [c.has_lesion for c in cases] == [True, False, None, None]
    assert [c.labels().tolist() for c in cases] == [[-1] * 6, [0] * 6, [-1] * 6, [-1] * 6]
    assert all(set(c.files) == {"flair"} and c.masks == (tmp_path / c.name / "lesion.nii.gz",) for c in cases)


@pytest.mark.parametrize("wrapper", ["", "MICCAI_BraTS2020_TrainingData", "train/HGG"])
def test_brats_layouts_are_found_below_wrappers(tmp_path, head, wrapper):
    names = {
        "BraTS20_Training_001": ("_flair.nii", "_t1ce.nii", "_seg.nii"),
        "BraTS2021_00002": ("_flair.nii.gz", "_t1ce.nii.gz", "_seg.nii.gz"),
        "BraTS-GLI-00003-000": ("-t2f.nii.gz", "-t1c.nii.gz", "-seg.nii.gz"),
        "BraTS-GLI-00003-001": ("-t2f.nii.gz", "-t1c.nii.gz", "-seg.nii.gz"),
    }
    for name, endings in names.items():
        for ending in endings:
            write(tmp_path / wrapper / name / f"{name}{ending}", head[1] if "seg" in ending else head[0])
    cases = {c.name: c for c in find_cases(tmp_path)}
    assert set(cases) == set(names)
    assert all(set(c.files) == {"flair", "t1ce"} and c.masks for c in cases.values())
    assert cases["BraTS-GLI-00003-000"].patient == cases["BraTS-GLI-00003-001"].patient == "BraTS-GLI-00003"
    assert len(find_cases(tmp_path, "brats")) == 4


def test_scans_of_one_folder_are_one_patient(tmp_path, head):
    for scan in ("2019", "2020"):
        write(tmp_path / "anna" / scan / "flair.nii.gz", head[0])
    cases = find_cases(tmp_path)
    assert [(c.patient, c.name) for c in cases] == [("anna", "anna_2019"), ("anna", "anna_2020")]


@pytest.mark.parametrize(
    "mask",
    ["derivatives/manual/{0}/anat/{1}_label-lesion_mask", "derivatives/{0}/{1}_lesion", "{0}/anat/{1}_roi"],
)
def test_bids_sessions_share_a_patient_and_brain_masks_are_no_lesions(tmp_path, head, mask):
    for session in ("1", "2"):
        folder, stem = f"sub-01/ses-{session}", f"sub-01_ses-{session}"
        write(tmp_path / folder / "anat" / f"{stem}_FLAIR.nii.gz", head[0])
        write(tmp_path / folder / "anat" / f"{stem}_ce-gad_T1w.nii.gz", head[0])
        for other in ("desc-brain_mask", "dseg", "label-GM_mask"):
            garbage(tmp_path / "derivatives/fmriprep" / folder / "anat" / f"{stem}_{other}.nii.gz")
        garbage(tmp_path / (mask.format(folder, stem) + ".nii.gz"))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\thas_lesion\nsub-01\t40\t1\n")
    cases = find_cases(tmp_path)
    assert [(c.patient, c.name) for c in cases] == [("sub-01", "sub-01_ses-1"), ("sub-01", "sub-01_ses-2")]
    for case in cases:
        assert set(case.files) == {"flair", "t1ce"}
        assert case.has_lesion
        assert case.masks is not None
        assert any(word in case.masks[0].name for word in ("lesion", "roi"))


def test_tissue_classes_alone_are_no_lesion_mask(tmp_path, head):
    write(tmp_path / "sub-01/anat/sub-01_FLAIR.nii.gz", head[0])
    garbage(tmp_path / "derivatives/fmriprep/sub-01/anat/sub-01_dseg.nii.gz")
    assert find_cases(tmp_path)[0].masks is None


def test_two_lesion_masks_are_refused_when_one_is_asked_for_unless_one_is_the_consensus(tmp_path, head):
    write(tmp_path / "a" / "flair.nii.gz", head[0])
    raters = tuple(garbage(tmp_path / "a" / f"rater{i}_lesion.nii.gz") for i in (1, 2))
    (case,) = find_cases(tmp_path)
    assert case.rater_masks == raters
    with pytest.raises(DatasetError, match=r"rater1_lesion.*rater2_lesion.*keep one"):
        case.lesion()
    consensus = garbage(tmp_path / "a" / "consensus_mask.nii.gz")
    (case,) = find_cases(tmp_path)
    assert (case.masks, case.rater_masks) == ((consensus,), raters)


@pytest.mark.parametrize("affine", [LPS, np.diag([4.0, 4.0, 6.0, 1.0]), np.diag([4.0, -4.0, -6.0, 1.0])])
def test_lesion_lies_on_the_grid_of_the_volume(tmp_path, head, affine):
    image, lesion = head
    image = np.where(lesion, 1000.0, image)
    write(tmp_path / "a" / "flair.nii.gz", image, affine)
    write(tmp_path / "a" / "seg.nii.gz", lesion * 4, affine)
    (case,) = find_cases(tmp_path)
    assert np.array_equal(case.lesion(), case.volume(("flair",)).images["flair"] == 1000)


def test_the_real_slices_are_found_and_labelled_as_their_masks_say(shared_data):
    cases = find_cases(shared_data / "lgg")
    assert len(cases) == 88
    assert sum(len(c.labels()) for c in cases) == 3126
    for case in cases[::30]:
        lesion = case.lesion()
        assert lesion.shape == case.volume(("flair",)).brain.shape
        assert np.array_equal(lesion.any(axis=(0, 1)), case.labels() == 1)


def test_the_real_volumes_are_found_with_and_without_masks(shared_data):
    cases = {c.name: c for c in find_cases(shared_data / "volumes")}
    assert len(cases) == len(list((shared_data / "volumes").iterdir()))
    assert {n for n, c in cases.items() if c.masks is None} == {
        "BraTS-GLI-00001-000", "brats-gli-00027", "BraTS-MET-00110-000", "healthy-kirby113",
    }  # fmt: skip
    assert set(cases["BraTS-GLI-00001-000"].files) == {"t1", "t1ce", "t2", "flair"}
    assert all("flair" in c.files and (c.masks is None or len(c.masks) == 1) for c in cases.values())
    assert {c.patient for n, c in cases.items() if n.startswith("ms-p14")} == {"ms-p14"}
    for name in ("ms-patient07", "ms-isbi01", "wmh-01", "brainix-unregistered"):
        case = cases[name]
        assert case.lesion().shape == case.volume(("flair",)).brain.shape
        assert set(case.labels()) == {-1}
    case = cases["ms-isbi01"]
    one, other = case.rater_lesions()
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) == pytest.approx(
        0.76, abs=0.01
    )  # README of the data


# Names of files and folders -------------------------------------------------------------------------------------


def tree(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(root: Path, **options) -> dict[str, list[str]]:
    """Name of each case -> names of its files."""
    return {
        c.name: sorted(str(p.relative_to(root)) for paths in c.files.values() for p in paths)
        for c in find_cases(root, **options)
    }


FLAIR_ONLY = {"require": ("flair",), "annotations": False}

LAYOUTS = {
    "sessions": (
        ["sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_FLAIR.nii.gz"],
        ["sub-01_ses-1", "sub-02_ses-1"],
    ),
    "visits": (["p1/baseline/FLAIR.nii.gz", "p2/baseline/FLAIR.nii.gz"], ["p1_baseline", "p2_baseline"]),
    "dates": (["p1/2019-02-01/FLAIR.nii", "p1/2020/FLAIR.nii"], ["p1_2019-02-01", "p1_2020"]),
    "same inner names": (["a/mri/x/flair.nii", "b/mri/x/flair.nii"], ["a_x", "b_x"]),
    "time point called T1": (
        ["P1/T1/P1_T1_FLAIR.nii.gz", "P1/T2/P1_T2_FLAIR.nii.gz", "P2/T1/P2_T1_FLAIR.nii.gz"],
        ["P1_T1", "P1_T2", "P2_T1"],
    ),
    "runs": (
        ["anat/sub-01_T1w.nii.gz", "anat/sub-01_run-1_FLAIR.nii.gz", "anat/sub-01_run-2_FLAIR.nii.gz"],
        ["sub-01_run-1", "sub-01_run-2"],
    ),
    "acquisitions, spaces, echoes": (
        [f"sub-1/anat/sub-1_{e}_FLAIR.nii.gz" for e in ("acq-3d", "acq-ax", "space-T1w", "echo-1")],
        ["sub-1_acq-3d", "sub-1_acq-ax", "sub-1_echo-1", "sub-1_space-T1w"],
    ),
    "one folder": (
        ["P1_T2_FLAIR.nii.gz", "P1_T1.nii.gz", "P2_T2_FLAIR.nii.gz", "P2_T1.nii.gz"], ["P1", "P2"],
    ),
    "words after the sequence": (
        ["t_01_flair_pp.nii", "t_01_t2_pp.nii", "t_02_flair_pp.nii", "t_02_t2_pp.nii"], ["t_01_pp", "t_02_pp"],
    ),
    "stripped beside": (
        ["s1_FLAIR.nii.gz", "s1_FLAIR_bet.nii.gz", "s1_T1.nii.gz", "s1_T1_bet.nii.gz"], ["s1", "s1_bet"],
    ),
    "folders named by sequence": (
        ["p1/FLAIR/1.nii.gz", "p1/T1/2.nii.gz", "p2/FLAIR/p2_flair.nii", "p2/T1/p2_t1.nii"], ["p1", "p2"],
    ),
    "derivatives": (
        ["sub-1/anat/sub-1_FLAIR.nii.gz", "derivatives/x/sub-1/anat/sub-1_space-MNI_FLAIR.nii.gz"], ["sub-1"],
    ),
    "own results": (
        ["p1_flair.nii.gz", "p1_desc-lesion_mask.nii.gz", "p1_desc-lesion_probseg.nii.gz", "p1_desc-lesion_dseg.nii.gz",
         "p1_desc-lesion_uncertainty.nii.gz", "p1_desc-inter_discrepancy.nii.gz"], ["p1"],
    ),
    "other modalities": (
        ["sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/anat/sub-1_T2starw.nii.gz", "sub-1/anat/sub-1_PDw.nii.gz",
         "sub-1/swi/sub-1_swi.nii.gz", "sub-1/fmap/sub-1_magnitude1.nii.gz", "sub-1/dwi/sub-1_dwi.nii.gz",
         "sub-1/func/sub-1_task-flair_bold.nii.gz", "sub-1/fmap/sub-1_acq-flair_epi.nii.gz",
         "sub-1/perf/sub-1_asl.nii.gz", "sub-1/anat/sub-1_part-phase_FLAIR.nii.gz", "sub-1/anat/sub-1_ADC.nii.gz",
         "sub-1/anat/sub-1_desc-preproc_FLAIR.nii.gz", "sub-1/anat/sub-1_mod-FLAIR_defacemask.nii.gz"], ["sub-1"],
    ),
    "masks": (
        ["p1/FLAIR.nii.gz", "p1/ManualSegmentation_1.nii.gz", "p1/wmh.nii.gz", "p1/flair_mask.nii.gz",
         "p1/FLAIR_brain_mask.nii.gz", "p1/lesion_on_flair_grid.nii.gz", "p1/mask_flair.nii.gz", "p1/seg_FLAIR_2.nii",
         "p1/flair_lesion_filled.nii.gz", "p1/rater2.nii.gz", "p1/masks/p1_flair.nii.gz", "p1/brainmask.nii.gz"],
        ["p1"],
    ),
    "hidden": (["a/flair.nii", ".trash/b/flair.nii", "c/._flair.nii", "__MACOSX/d/flair.nii"], ["a"]),
    "many images of one patient": (
        ["p/flair.nii.gz", "p/t1.nii.gz", "p/t1_2.nii.gz", "p/t2_tse.nii.gz", "p/t2.nii.gz", "p/x.nii.gz"], ["p"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_examinations_that_have_a_flair(tmp_path, layout):
    files, names = LAYOUTS[layout]
    cases = find_cases(tree(tmp_path, *files), **FLAIR_ONLY)
    assert sorted(c.name for c in cases) == sorted(names)
    assert all("flair" in c.files for c in cases)
    used = {p for c in cases for paths in c.files.values() for p in paths}
    unused = [f for f in files if tmp_path / f not in used and "derivatives" not in f and layout != "hidden"]
    assert bool(unused) == bool(cases.notes)
    assert all(len(note) < 300 for note in cases.notes)


@pytest.mark.parametrize(("file", "name", "file_name"), [
    ("scan [final]_FLAIR.nii.gz", "p7_scan [final]", "p7_scan-final"), ("scan (2) FLAIR.nii.gz", "scan (2)", "scan-2"),
    ("[p1] FLAIR.nii.gz", "[p1]", "p1"), ("p1 (FLAIR).nii.gz", "p1", "p1"), ("FLAIR [final].nii.gz", "p7_[final]", "p7_final"),
    ("p1 {new}_flair.nii.gz", "p1 {new}", "p1-new"),
])  # fmt: skip
def test_brackets_of_a_name_stay_whole_and_its_files_have_none(head, tmp_path, file, name, file_name):
    path = write(tmp_path / "p7" / file, head[0])
    for given in (path, path.parent, tmp_path):
        (case,) = find_cases(given, annotations=False)
        assert case.name == name
    assert output_stems([name]) == {name: file_name}


def test_a_mask_is_found_beside_an_image_whose_name_has_brackets(head, tmp_path):
    values, lesion = head
    write(tmp_path / "p1 [final]_FLAIR.nii.gz", values)
    mask = write(tmp_path / "p1 [final]_mask.nii.gz", lesion)
    (case,) = find_cases(tmp_path)
    assert case.masks == (mask,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_case_has_one_name_by_file_by_folder_and_by_data_set(tmp_path, layout):
    files, _ = LAYOUTS[layout]
    for case in find_cases(tree(tmp_path, *files), **FLAIR_ONLY):
        if layout == "same inner names":  # two are distinguished by their folders, one alone needs none
            continue
        path = case.files["flair"][0]
        assert [c.name for c in find_cases(path, **FLAIR_ONLY)] == [case.name]
        assert case.name in [c.name for c in find_cases(path.parent, **FLAIR_ONLY)]


def test_the_folder_at_hand_has_its_own_name(tmp_path, monkeypatch):
    tree(tmp_path, "sub-1/anat/sub-1_FLAIR.nii.gz", "p7/flair.nii.gz")
    monkeypatch.chdir(tmp_path / "sub-1/anat")
    assert [c.name for c in find_cases(".")] == ["sub-1"]
    monkeypatch.chdir(tmp_path / "p7")
    assert [c.name for c in find_cases(["."])] == [find_cases("flair.nii.gz")[0].name] == ["p7"]


def test_files_named_one_by_one(tmp_path):
    tree(
        tmp_path,
        "a/FLAIR.nii.gz",
        "b/FLAIR.nii.gz",
        "b/T1.nii.gz",
        "scan.nii.gz",
        "lesion_mask.nii.gz",
        "swi.nii",
    )
    a, b, t1 = (tmp_path / f for f in ("a/FLAIR.nii.gz", "b/FLAIR.nii.gz", "b/T1.nii.gz"))
    assert {c.name: sorted(c.files) for c in find_cases([a, b, t1])} == {"a": ["flair"], "b": ["flair", "t1"]}
    assert {c.name: sorted(c.files) for c in find_cases([a, t1])} == {"a": ["flair", "t1"]}
    assert [c.name for c in find_cases([a, a, tmp_path / "a"])] == ["a"]
    (case,) = find_cases(tmp_path / "scan.nii.gz", require=("flair",))
    assert (case.name, case.files) == ("scan", {UNKNOWN: (tmp_path / "scan.nii.gz",)})
    (case,) = find_cases(t1, require=("flair",), sequence="flair")
    assert case.files == {"flair": (t1,)}
    for refused in ("lesion_mask.nii.gz", "swi.nii"):
        with pytest.raises(DatasetError, match=rf"no case.*{refused}.*--sequence"):
            find_cases(tmp_path / refused, require=("flair",))
    with pytest.raises(DatasetError, match=r"no case with flair.*T1\.nii\.gz"):
        find_cases(t1, require=("flair",))


def test_images_whose_names_say_nothing_are_taken_only_where_no_other_is(tmp_path, head):
    write(tmp_path / "new/p1.nii.gz", head[0])
    nib.save(nib.Nifti1Image(np.stack([head[0]] * 3, -1).astype(np.float32), LPS), tmp_path / "new/p2.nii.gz")
    cases = find_cases(tmp_path, **FLAIR_ONLY)
    assert {c.name: list(c.files) for c in cases} == {"p1": [UNKNOWN]}
    assert any("series of several volumes (p2.nii.gz)" in note for note in cases.notes)
    assert cases[0].volume(("flair",)).name == "p1"
    write(tmp_path / "old/flair.nii.gz", head[0])
    cases = find_cases(tmp_path, **FLAIR_ONLY)
    assert [c.name for c in cases] == ["old"]
    assert any("2 files whose name does not say the sequence" in note for note in cases.notes)


def test_a_lone_t1_is_left_aside_with_a_note_and_kept_where_flair_is_not_needed(tmp_path):
    tree(tmp_path, "sub-1/anat/sub-1_FLAIR.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz")
    cases = find_cases(tmp_path, require=("flair",))
    assert [c.name for c in cases] == ["sub-1"]
    assert cases.notes == ("left aside: 1 file of examinations without flair (sub-2_T1w.nii.gz)",)
    assert [c.name for c in find_cases(tmp_path)] == ["sub-1", "sub-2"]


def test_other_sequences_join_the_flair_whose_name_agrees_best(tmp_path):
    tree(
        tmp_path, "s/sub-1_run-1_FLAIR.nii", "s/sub-1_run-2_FLAIR.nii", "s/sub-1_run-2_T1w.nii", "s/sub-1_T2w.nii",
        "f/a_flair.nii", "f/a_t1.nii", "f/ab_flair.nii", "f/ab_t1.nii", "f/ab_t2.nii",
    )  # fmt: skip
    assert found(tmp_path) == {
        "sub-1_run-1": ["s/sub-1_T2w.nii", "s/sub-1_run-1_FLAIR.nii"],
        "sub-1_run-2": ["s/sub-1_T2w.nii", "s/sub-1_run-2_FLAIR.nii", "s/sub-1_run-2_T1w.nii"],
        "a": ["f/a_flair.nii", "f/a_t1.nii"],
        "ab": ["f/ab_flair.nii", "f/ab_t1.nii", "f/ab_t2.nii"],
    }


def test_patients_in_one_folder_have_their_own_masks(tmp_path):
    tree(
        tmp_path,
        *(f"{p}_{what}.nii.gz" for p in ("p1", "p2", "p12") for what in ("flair", "seg", "brain_mask")),
    )
    assert {c.name: [p.name for p in c.masks or ()] for c in find_cases(tmp_path)} == {
        p: [f"{p}_seg.nii.gz"] for p in ("p1", "p2", "p12")
    }
    tree(
        tmp_path / "two", "images/x1_flair.nii", "images/x2_flair.nii", "masks/x1.nii", "masks/x2_lesion.nii"
    )
    assert {c.name: [p.name for p in c.masks or ()] for c in find_cases(tmp_path / "two")} == {
        "x1": ["x1.nii"], "x2": ["x2_lesion.nii"],
    }  # fmt: skip


PUBLIC = {  # files of public data sets, and for each case its patient, mask and masks of raters
    "ISBI 2015": (
        ["training01/preprocessed/training01_01_flair_pp.nii", "training01/preprocessed/training01_02_flair_pp.nii",
         *(f"training01/masks/training01_0{i}_mask{k}.nii" for i in (1, 2) for k in (1, 2))],
        {f"training01_0{i}_pp": ("training01", 2, 2) for i in (1, 2)},
    ),
    "WMH 2017": (
        ["0/pre/FLAIR.nii.gz", "0/pre/T1.nii.gz", "0/orig/FLAIR.nii.gz", "0/wmh.nii.gz", "1/pre/FLAIR.nii.gz"],
        {"0_pre": ("0", 1, 0), "0_orig": ("0", 1, 0), "1_pre": ("1", 0, 0)},
    ),
    "MSLesSeg": (
        [f"train/P1/T{i}/P1_T{i}_{what}.nii.gz" for i in (1, 2) for what in ("FLAIR", "T1", "T2", "MASK")],
        {"P1_T1": ("P1", 1, 0), "P1_T2": ("P1", 1, 0)},
    ),
    "MSSEG 2016": (
        [f"Center_0{c}/Patient_01/{f}" for c in (1, 2) for f in (
            "Raw_Data/FLAIR.nii.gz", "Masks/Consensus.nii.gz", "Masks/ManualSegmentation_1.nii.gz",
            "Masks/ManualSegmentation_2.nii.gz", "Masks/Brain_Mask.nii.gz")],
        {f"Center_0{c}_Patient_01": (f"Center_0{c}_Patient_01", 1, 0) for c in (1, 2)},
    ),
    "Ljubljana": (
        [f"patient01/patient01_{what}.nii.gz" for what in ("FLAIR", "T1W", "consensus_gt", "brainmask")],
        {"patient01": ("patient01", 1, 0)},
    ),
    "ISLES 2022": (
        ["sub-s1/ses-1/anat/sub-s1_ses-1_flair.nii.gz", "sub-s1/ses-1/dwi/sub-s1_ses-1_adc.nii.gz",
         "derivatives/sub-s1/ses-1/sub-s1_ses-1_msk.nii.gz"], {"sub-s1_ses-1": ("sub-s1", 1, 0)},
    ),
    "BraTS 2023": (
        [f"BraTS-GLI-00003-00{i}/BraTS-GLI-00003-00{i}-{what}.nii.gz" for i in (0, 1) for what in ("t2f", "t1n", "seg")],
        {f"BraTS-GLI-00003-00{i}": ("BraTS-GLI-00003", 1, 0) for i in (0, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_sets_are_found_with_patients_and_masks(tmp_path, name):
    files, expected = PUBLIC[name]
    cases = find_cases(tree(tmp_path, *files))
    assert {c.name: (c.patient, len(c.masks or ()), len(c.rater_masks)) for c in cases} == expected
    assert all("flair" in c.files for c in cases)


def test_own_results_are_no_annotation(tmp_path):
    tree(
        tmp_path,
        "p1/flair.nii.gz",
        "p1/p1_desc-lesion_mask.nii.gz",
        "out/p1_mask.nii.gz",
        "out/p1_flair.nii.gz",
    )
    (tmp_path / "out/dataset_description.json").write_text('{"GeneratedBy": [{"Name": "ddmd"}]}')
    cases = find_cases(tmp_path)
    assert [(c.name, c.masks) for c in cases] == [("p1", None)]
    assert any("out, a folder of earlier results" in note for note in cases.notes)


def test_bids_entities_are_kept(tmp_path):
    tree(tmp_path, "sub-01/ses-b/anat/sub-01_ses-b_acq-3d_run-2_FLAIR.nii.gz", "q/flair.nii")
    bids, plain = sorted(find_cases(tmp_path), key=lambda c: c.name, reverse=True)
    assert (bids.subject, bids.session, bids.run, bids.entities["acq"]) == ("01", "b", "2", "3d")
    assert (plain.subject, plain.entities) == (None, {})


def test_links_are_followed_once_and_a_circle_ends(tmp_path):
    tree(tmp_path, "cohort/b/flair.nii", "store/x9/flair.nii")
    (tmp_path / "cohort/a").symlink_to(tmp_path / "cohort/b")
    (tmp_path / "cohort/b/up").symlink_to(tmp_path / "cohort")
    (tmp_path / "cohort/self").symlink_to("self")
    (tmp_path / "cohort/p1").symlink_to(tmp_path / "store/x9")
    assert [c.name for c in find_cases(tmp_path / "cohort")] == ["b", "p1"]


def test_a_link_without_content_is_said_to_be_one(tmp_path):
    (tmp_path / "sub-1").mkdir()
    link = tmp_path / "sub-1/sub-1_FLAIR.nii.gz"
    link.symlink_to("../.git/annex/objects/aa/bb/MD5E-s1--x.nii.gz/MD5E-s1--x.nii.gz")
    for path in (link, tmp_path):
        (case,) = find_cases(path, require=("flair",))
        with pytest.raises(VolumeError, match=r"sub-1_FLAIR\.nii\.gz: a git-annex link"):
            case.volume(("flair",))
    link.unlink()
    link.write_text("/annex/objects/MD5E-s1--x.nii.gz\n")
    with pytest.raises(VolumeError, match="git-annex pointer"):
        find_cases(tmp_path)[0].volume(("flair",))


def test_a_folder_that_cannot_be_read_is_noted(tmp_path, monkeypatch):
    tree(tmp_path, "a/flair.nii", "b/flair.nii")
    plain = os.scandir

    def refused(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(os, "scandir", refused)
    cases = find_cases(tmp_path)
    assert [c.name for c in cases] == ["a"]
    assert cases.notes == (f"{tmp_path / 'b'}: cannot be searched (Permission denied)",)


def test_names_that_are_not_utf8_and_signs_of_terminals_do_no_harm(tmp_path):
    for name in (b"p\xe9ter_flair.nii", b"p\xeater_flair.nii", b"a\nb_flair.nii", b"\x1b[31mr_flair.nii"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).touch()
    names = [c.name for c in find_cases(tmp_path)]
    assert len(set(names)) == len({file_stem(n) for n in names}) == 4
    assert all(n.isprintable() and n.encode() for n in names)


@pytest.mark.parametrize(
    "files",
    [
        ["p 1_FLAIR.nii.gz", "p-1_FLAIR.nii.gz"], ["P1_flair.nii", "p1_flair.nii"], ["p1_flair.nii", "p1-flair.nii"],
        ["a/p_flair.nii", "b/p_flair.nii", "b/c/p_flair.nii"], ["é_flair.nii", "e_flair.nii"],
        ["p 1_flair.nii", "p+1_flair.nii", "p-1-85051de8_flair.nii"], ["x" * 220 + f"{i}_flair.nii" for i in (1, 2)],
    ],
)  # fmt: skip
def test_no_two_cases_share_files(tmp_path, files):
    names = [c.name for c in find_cases(tree(tmp_path, *files))]
    stems = [file_stem(name) for name in names]
    assert len({s.casefold() for s in stems}) == len(set(names)) == len(files)
    assert list(output_stems(names).values()) == stems


def test_stems_are_plain_short_and_no_two_the_same(rng):
    letters = list("ab1-_. /\\:é患\u202e\n$%=\udce9")
    names = ["".join(rng.choice(letters, rng.integers(1, 5))) for _ in range(3000)] + ["x" * 300, "x" * 301]
    stems = output_stems(names)
    assert len({s.casefold() for s in stems.values()}) == len(set(names))
    for stem in stems.values():
        assert 0 < len(stem.encode("ascii")) <= MAX_STEM_BYTES
        assert stem.replace("-", "").replace("_", "").isalnum()
        assert not stem.startswith(("-", "."))
    assert file_stem("sub-01_ses-1_run-2") == "sub-01_ses-1_run-2"
    assert unique_stems(["sub-01", "sub-02"]) == ["sub-01", "sub-02"]


def test_the_same_name_has_the_same_stem_whatever_the_order(rng):
    names = ["p 1", "p-1", "P-1", "p+1", "q"]
    stems = output_stems(names)
    for _ in range(5):
        assert output_stems(list(rng.permutation(names))) == stems


def test_words_of_names():
    assert without_sequence("BraTS-GLI-00001-000-t2f") == "BraTS-GLI-00001-000"
    assert without_sequence("20190101_t2_space_dark-fluid") == "20190101"
    assert bids_entities("sub-1_acq-x_FLAIR") == {"sub": "1", "acq": "x"}
    assert bids_entities("sub-1 copy_FLAIR") == {}


def test_errors_name_the_path_and_the_remedy(tmp_path):
    def refused(message, *args, **options):
        with pytest.raises(DatasetError, match=message):
            find_cases(*args, **options)

    refused("nowhere: no such file or folder; check", tmp_path / "nowhere")
    refused("no case found: no .nii or .nii.gz image", tmp_path)
    refused("'odd' not known; allowed are auto, slices", tmp_path, "odd")
    tree(tmp_path, "a/flair.nii")
    refused("no case found as layout 'bids'", tmp_path, "bids")


def test_files_of_two_subjects_are_never_one_examination(tmp_path):
    for name in ("sub-1_FLAIR.nii.gz", "sub-2_T1w.nii.gz", "sub-1_ses-2_T2w.nii.gz"):
        (tmp_path / name).touch()
    for other in ("sub-2_T1w.nii.gz", "sub-1_ses-2_T2w.nii.gz"):
        found = find_cases(
            [tmp_path / "sub-1_FLAIR.nii.gz", tmp_path / other], require=("flair",), annotations=False
        )
        assert [(case.name, list(case.files)) for case in found] == [("sub-1", ["flair"])]
        assert any(other in note for note in found.notes)
