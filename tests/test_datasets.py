"""What finding cases, labelling slices and splitting by patient promise."""

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image as png

from ddmd.cohort import cases as datasets
from ddmd.cohort.cases import (
    Case,
    DatasetError,
    find_cases,
    label_slices,
    read_split,
    split_by_patient,
    write_split,
)

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
            plane[4:28, 6:34] = 100
            plane[4, 6 + i] = 250  # near the front and, in columns, towards the right: marks the slice
            name = f"{patient}_{i}.png"
            png.imsave(root / "images" / name, plane, cmap="gray", vmin=0, vmax=255)
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


def test_two_lesion_masks_are_refused_unless_one_is_the_consensus(tmp_path, head):
    write(tmp_path / "a" / "flair.nii.gz", head[0])
    for rater in ("rater1_lesion", "rater2_lesion"):
        garbage(tmp_path / "a" / f"{rater}.nii.gz")
    with pytest.raises(DatasetError, match=r"rater1_lesion.*rater2_lesion.*keep one"):
        find_cases(tmp_path)
    consensus = garbage(tmp_path / "a" / "consensus_mask.nii.gz")
    assert find_cases(tmp_path)[0].masks == (consensus,)


def test_table_layout_reads_labels_and_never_a_mask(tmp_path, head):
    write(tmp_path / "images" / "x.nii.gz", head[0])
    garbage(tmp_path / "mask.nii.gz")
    (tmp_path / "x.txt").write_text("0 0 1 1 0 -1")
    (tmp_path / "cases.csv").write_text(
        "patient,flair,mask,has_lesion,slice_labels\np,images/x.nii.gz,mask.nii.gz,1,x.txt\n"
    )
    for root in (tmp_path, tmp_path / "cases.csv"):
        (case,) = find_cases(root)
        assert case.labels().tolist() == [0, 0, 1, 1, 0, -1]
        assert case.has_lesion


@pytest.mark.parametrize("affine", [LPS, np.diag([4.0, 4.0, 6.0, 1.0]), np.diag([4.0, -4.0, -6.0, 1.0])])
def test_lesion_lies_on_the_grid_of_the_volume(tmp_path, head, affine):
    image, lesion = head
    image = np.where(lesion, 1000.0, image)
    write(tmp_path / "a" / "flair.nii.gz", image, affine)
    write(tmp_path / "a" / "seg.nii.gz", lesion * 4, affine)
    (case,) = find_cases(tmp_path)
    assert np.array_equal(case.lesion(), case.volume(("flair",)).images["flair"] == 1000)


def test_slices_labelled_once_are_trained_on_without_masks(tmp_path, head):
    image, lesion = head
    lesion = lesion.copy()
    lesion[..., 3] = False
    upside_down = np.diag([-4.0, -4.0, -6.0, 1.0])
    for name in ("ill", "well", "unmarked"):
        write(tmp_path / "data" / name / "flair.nii.gz", image, upside_down)
    write(tmp_path / "data/ill/lesion.nii.gz", lesion, upside_down)
    write(tmp_path / "data/unmarked/lesion.nii.gz", np.zeros(SHAPE), upside_down)
    table = label_slices(find_cases(tmp_path / "data", name="here"), tmp_path / "labels", healthy=["well"])
    for mask in (tmp_path / "data").glob("*/lesion.nii.gz"):
        garbage(mask)
    cases = {c.name: c for c in find_cases(table)}
    assert {n: c.labels().tolist() for n, c in cases.items()} == {
        "ill": [0, 0, 0, 1, 0, 0],  # native slice 2, counted from the feet
        "well": [0] * 6,
        "unmarked": [0] * 6,
    }
    assert [cases[n].has_lesion for n in ("ill", "well", "unmarked")] == [True, False, False]
    assert all(c.masks is None and c.source == "here" for c in cases.values())
    assert str(tmp_path) not in table.read_text()
    assert cases["ill"].volume(("flair",)).images["flair"].shape == SHAPE


def many(count: int, source: str) -> list[Case]:
    """Two scans of every patient."""
    files = {"flair": (Path("x.nii"),)}
    return [Case(f"{source}{i // 2}", f"{source}{i}", source, files) for i in range(2 * count)]


def test_a_patient_is_in_one_part_and_every_source_in_all(seed):
    cases = many(50, "lgg") + many(20, "ms")
    split = split_by_patient(cases, seed=seed)
    assert split == split_by_patient(cases[::-1], seed=seed)
    assert set(split) == {c.patient for c in cases}
    for source, counts in (("lgg", (35, 5, 10)), ("ms", (14, 2, 4))):
        found = Counter(part for patient, part in split.items() if patient.startswith(source))
        assert (found["train"], found["validation"], found["test"]) == counts
    assert any(split != split_by_patient(cases, seed=seed + i) for i in range(1, 4))


def test_a_patient_of_two_sources_is_in_one_part(seed):
    files = {"flair": (Path("x.nii"),)}
    cases = [Case(f"p{i}", f"{s}{i}", s, files) for s in ("a", "b") for i in range(30)]
    assert len(split_by_patient(cases, seed=seed)) == 30


def test_a_split_is_read_as_it_was_written(tmp_path, seed):
    split = split_by_patient(many(9, "a"), seed=seed)
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json") == split


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}'])
def test_what_is_no_split_is_refused(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(DatasetError, match=r"split\.json: .*give the split\.json"):
        read_split(tmp_path / "split.json")


def test_errors_name_the_file_and_the_remedy(tmp_path, head):
    def refused(message, *args, **kwargs):
        with pytest.raises(DatasetError, match=message):
            find_cases(*args, **kwargs)

    refused("nowhere: no such data set; check", tmp_path / "nowhere")
    refused("no case found", tmp_path)
    refused("'odd' not known; allowed are auto, slices", tmp_path, "odd")
    table = tmp_path / "cases.csv"
    table.write_text("flair\nx.nii\n")
    refused(r"cases\.csv: lacks the columns patient; add", tmp_path)
    table.write_text("patient,flair,has_lesion\np,x.nii,maybe\n")
    refused(r"cases\.csv: p: has_lesion is 'maybe'; write 1, 0", tmp_path)
    table.write_text("patient,flair,slice_labels\np,x.nii,gone.txt\n")
    refused(r"gone\.txt: no such file of slice labels", tmp_path)
    table.unlink()
    write(tmp_path / "a" / "flair.nii.gz", head[0])
    (tmp_path / "participants.tsv").write_text("participant_id\thas_lesion\nother\t1\n")
    refused(r"participants\.tsv: no participant_id is the name of a folder", tmp_path)
    with pytest.raises(DatasetError, match="fractions are"):
        split_by_patient(many(3, "a"), {"train": 0.7, "test": 0.7})


def test_the_real_slices_are_found_and_labelled_as_their_masks_say(shared_data):
    cases = find_cases(shared_data / "lgg")
    assert len(cases) == 88
    assert sum(len(c.labels()) for c in cases) == 3126
    for case in cases[::30]:
        lesion = case.lesion()
        assert lesion.shape == case.volume(("flair",)).brain.shape
        assert np.array_equal(lesion.any(axis=(0, 1)), case.labels() == 1)


def test_the_real_volumes_are_found_with_and_without_masks(shared_data):
    cases = {c.name: c for c in datasets.find_cases(shared_data / "volumes")}
    assert len(cases) == 10
    assert {n for n, c in cases.items() if c.masks is None} == {
        "brats-gli-00001", "brats-met-00110", "healthy-kirby113",
    }  # fmt: skip
    assert set(cases["brats-gli-00001"].files) == {"t1", "t1ce", "t2", "flair"}
    case = cases["ms-patient07"]
    assert case.lesion().shape == case.volume(("flair",)).brain.shape
    assert set(case.labels()) == {-1}
