"""What tables of cases promise: read whole and right, or refused with the file and the line."""

import csv
import io
import random
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.errors import DatasetError
from ddmd.cohort.stacks import read_stack
from ddmd.cohort.tables import label_slices, read_rows
from ddmd.io.nifti import VolumeError
from tests.test_discovery import SHAPE, garbage, head, stack, tree, write

__all__ = ["head"]  # a fixture

HEADER = "file,patient,slice,has_lesion\n"


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


def test_names_that_look_like_paths_do_not_leave_the_folder(tmp_path, head):
    write(tmp_path / "in/flair.nii", head[0])
    mask = write(tmp_path / "in/lesion.nii", head[1])
    case = Case("../../x", "../../x", "s", {"flair": (tmp_path / "in/flair.nii",)}, (mask,))
    label_slices([case], tmp_path / "a/b/labels")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "flair.nii",
        "lesion.nii",
        "x.slices.txt",
        "cases.csv",
    }
    assert find_cases(tmp_path / "a/b/labels")[0].labels().max() == 1
    with pytest.raises(DatasetError, match="two cases have this name"):
        label_slices([case, Case("x", "x", "s", case.files)], tmp_path / "c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the columns file, patient, slice"),
        (HEADER + "x.png,p\n", "line 2 has 2 cells for 4 columns"),
        (HEADER + "x.png,p,1,0,5\n", "line 2 has 5 cells for 4 columns"),
        (HEADER + "x.png,,1,0\n", "line 2: patient is empty"),
        (HEADER + "\n\n,p,1,0\n", "line 4: file is empty"),
        (HEADER + "x.png,p,1e3,0\n", "line 2: slice is '1e3'; write a whole number"),
        (HEADER + "x.png,p,1,maybe\n", "has_lesion is 'maybe'; write 1, 0"),
        (HEADER + "x.png,p,1,0\ny.png,p,1,0\n", r"x\.png and y\.png are both slice 1 of p"),
        (HEADER + "../x.png,p,1,0\n", r"file is '\.\./x\.png'; write the name of a file in images"),
        (HEADER + "/dev/zero,p,1,0\n", "file is '/dev/zero'"),
        (HEADER + "..\\x.png,p,1,0\n", "write the name of a file in images"),
        (HEADER + 'x.png,p,1,"0\n', "line 2: not a table"),
        (HEADER + f'"{"a" * 200_000}",p,1,0\n', "line 2: not a table .*limit"),
        (HEADER + "x.png,p\0,1,0\n", "line 2 holds a NUL"),
        ("file,patient,slice,has_lesion,slice\nx.png,p,1,0,2\n", "the column slice is there twice"),
    ],
)  # fmt: skip
def test_a_broken_table_is_refused_by_file_and_line(tmp_path, text, message):
    stack(tmp_path, ("p1",), 2)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DatasetError, match=rf"labels\.csv.*{message}"):
        find_cases(tmp_path, "slices")


@pytest.mark.parametrize("change", [
    lambda t: b"\xef\xbb\xbf" + t.encode(), lambda t: t.encode("utf-16"), lambda t: t.replace(",", ";").encode(),
    lambda t: t.replace("\n", "\r\n").encode(), lambda t: (t + "\n\n").encode(),
])  # fmt: skip
def test_a_table_as_spreadsheets_save_it_is_read_the_same(tmp_path, change):
    stack(tmp_path)
    expected = find_cases(tmp_path).cases
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_bytes(change(text))
    assert find_cases(tmp_path).cases == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flair\nx.nii\n", "lacks the columns patient; add"),
        ("patient,flair\np,\n", "line 2: p names no image"),
        ("patient,flair,has_lesion\np,x.nii,maybe\n", "p: has_lesion is 'maybe'; write 1, 0"),
        ("patient,flair\np,/dev/zero\n", "line 2: flair is '/dev/zero', which is no file"),
        ("patient,flair,mask\np,x.nii,.\n", "line 2: mask is '.', which is no file"),
        ("patient,flair\np,x.nii\np,y.nii\n", "line 3: p is the name of line 2 as well"),
    ],
)  # fmt: skip
def test_a_broken_table_of_cases_is_refused(tmp_path, text, message):
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(DatasetError, match=rf"cases\.csv.*{message}"):
        find_cases(tmp_path)


def test_slice_labels_are_a_text_file_of_labels(tmp_path):
    (tmp_path / "odd.txt").write_text("0 2")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for cell, message in (("gone.txt", "no such file of slice labels"), ("/etc", "no such file"),
                          ("/dev/zero", "no such file"), ("odd.txt", "are 0, 1 or -1"), ("bytes.txt", "UTF")):  # fmt: skip
        (tmp_path / "cases.csv").write_text(f"patient,flair,slice_labels\np,x.nii,{cell}\n")
        with pytest.raises(DatasetError, match=message):
            find_cases(tmp_path)


def test_participants_of_another_data_set_are_refused_and_detection_does_not_mind(tmp_path):
    tree(tmp_path, "a/flair.nii.gz")
    for text, message in (
        ("participant_id\thas_lesion\nother\t1\n", "no participant_id is the name of a folder"),
        ("participant_id\thas_lesion\na\t1\na\t0\n", "line 3: a is there twice"),
        ("participant_id\thas_lesion\na\n", "line 2 has 1 cells for 2 columns"),
        ("id\na\n", "lacks the columns participant_id"),
    ):
        (tmp_path / "participants.tsv").write_text(text)
        with pytest.raises(DatasetError, match=rf"participants\.tsv.*{message}"):
            find_cases(tmp_path)
        assert [c.name for c in find_cases(tmp_path, annotations=False)] == ["a"]


def test_any_mutant_of_a_table_is_read_or_refused_in_one_line(tmp_path, seed):
    """Random changes to labels.csv and participants.tsv: nothing but one clear error, of one line."""
    stack(tmp_path, ("p1",), 3)
    tree(tmp_path / "v", "sub-1/flair.nii.gz")
    generator = random.Random(seed)
    special = [
        b"",
        b"\0",
        b"\xff\xfe",
        b'"',
        b"\n",
        b"\r",
        b",",
        b"-1",
        b"1e400",
        b"../../x",
        b"9" * 20,
        b"\xc2\xa0",
        b"=1+1",
    ]
    tables = {
        tmp_path / "labels.csv": (tmp_path / "labels.csv").read_bytes(),
        tmp_path / "v/participants.tsv": b"participant_id\thas_lesion\nsub-1\t1\n",
    }
    messages = []
    for table, plain in tables.items():
        for _ in range(300):
            content = bytearray(plain)
            for _ in range(generator.choice([1, 2, 5])):
                at = generator.randrange(len(content) + 1)
                content[at : at + generator.choice([0, 1, 5])] = generator.choice(special)
            table.write_bytes(content)
            try:
                for case in find_cases(table.parent):
                    if case.stack:
                        case.labels()
                        case.volume(("flair",))
            except (DatasetError, VolumeError) as error:
                messages.append(str(error))
    assert all("\n" not in message and len(message) < 600 for message in messages)


def test_rows_are_what_the_csv_module_wrote(tmp_path, rng):
    letters = list('ab,;"\n\té \\')
    rows = [{"id": f"r{i}", "text": "".join(rng.choice(letters, 6))} for i in range(50)]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "t.csv").write_text(text.getvalue(), newline="")
    assert [row for _, row in read_rows(tmp_path / "t.csv", ("id",), ("text",))] == rows


# Masks and stacks ------------------------------------------------------------------------------------------------


def case_of(folder: Path, image, mask, affine=None, mask_affine=None) -> Case:
    affine = np.diag([-4.0, -4.0, 6.0, 1.0]) if affine is None else affine
    write(folder / "flair.nii.gz", image, affine)
    mask_affine = affine if mask_affine is None else mask_affine
    nib.save(nib.Nifti1Image(np.asarray(mask), mask_affine), folder / "lesion.nii.gz")
    return find_cases(folder)[0]


@pytest.mark.parametrize("degrees", [0, 44, 45, 46])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_a_mask_in_another_orientation_is_brought_to_its_image(tmp_path, head, rng, degrees, order):
    image, lesion = head
    turn = np.eye(4)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn[:2, :2] = [[c, -s], [s, c]]
    affine = turn @ np.diag([-4.0, -4.0, 6.0, 1.0])
    shown = np.where(lesion, 1000.0, image)
    flips = [int(f) for f in rng.choice([-1, 1], 3)]
    values, other = lesion.astype(np.uint8), affine
    matrix = np.eye(4)
    for axis, flip in enumerate(flips):
        if flip < 0:
            values = np.flip(values, axis)
            matrix[axis, axis], matrix[axis, 3] = -1, SHAPE[axis] - 1
    values, swap = values.transpose(order), np.zeros((4, 4))
    swap[3, 3] = 1
    for new, old in enumerate(order):
        swap[old, new] = 1
    case = case_of(tmp_path, shown, values, affine, other @ matrix @ swap)
    volume = case.volume(("flair",))
    assert np.array_equal(case.lesion(), volume.images["flair"] == 1000)


@pytest.mark.parametrize(
    ("shift", "scale", "crop", "message"),
    [
        ((40, 0, 0), 1, 0, "its centre is 40.0 mm away"),
        ((0, 0, 0.2), 1, 0, "its centre is 0.2 mm away"),
        ((0, 0, 0), 1.1, 0, "voxels of"),
        ((0, 0, 0), 1, 1, "23x28x6 voxels against 24x28x6"),
    ],
)
def test_a_mask_on_another_grid_is_refused_with_both_files_and_by_how_much(
    tmp_path, head, shift, scale, crop, message
):
    image, lesion = head
    affine = np.diag([-4.0, -4.0, 6.0, 1.0])
    other = affine.copy()
    other[:3, 3] += shift
    other[:3, :3] *= scale
    case = case_of(tmp_path, image, lesion[crop:].astype(np.uint8), affine, other)
    with pytest.raises(
        DatasetError, match=rf"lesion\.nii\.gz is not on the grid of .*flair\.nii\.gz: .*{message}"
    ):
        case.lesion()


def test_headers_that_differ_by_rounding_are_the_same_grid(tmp_path, head):
    image, lesion = head
    affine = np.diag([-4.0, -4.0, 6.0, 1.0])
    other = affine.copy()
    other[:3, 3] += 0.05
    assert case_of(tmp_path, image, lesion.astype(np.uint8), affine, other).lesion().sum() == lesion.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: np.where(m > 0, np.nan, 0).astype(np.float32), r"\d+ voxels of the mask are NaN or Inf"),
        (lambda m: (m * 0.37).astype(np.float32), "the mask holds 0.37, and labels are whole numbers"),
        (lambda m: -m.astype(np.int16), "the mask holds -1; labels are 0"),
        (lambda m: np.stack([m] * 2, -1).astype(np.uint8), "a series of volumes"),
        (lambda m: (m * 1j).astype(np.complex64), "complex64"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path, head, change, message):
    case = case_of(tmp_path, head[0], change(head[1]))
    with pytest.raises(DatasetError, match=rf"lesion\.nii\.gz.*{message}"):
        case.lesion()


@pytest.mark.parametrize("change", [
    lambda m: (m * 4).astype(np.uint8), lambda m: m[..., None].astype(np.uint8), lambda m: m.astype(np.float64),
    lambda m: (m * np.float32(0.99999)).astype(np.float32),
])  # fmt: skip
def test_labels_floats_and_one_volume_of_four_axes_are_masks(tmp_path, head, change):
    case = case_of(tmp_path, head[0], change(head[1]))
    assert case.lesion().sum() == head[1].sum()


def test_a_stack_has_the_values_of_its_pixels_at_every_bit_depth(tmp_path, rng):
    grey = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    grey[0, :] = np.arange(7)
    expected = grey.astype(np.float32)[::-1, ::-1].T[..., None]
    colour = np.stack([grey, 255 - grey, grey], -1)
    images = {
        "L": Image.fromarray(grey), "RGB": Image.fromarray(colour), "LA": Image.fromarray(grey).convert("LA"),
        "16": Image.fromarray(grey.astype(np.uint16) * 257),
    }  # fmt: skip
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_allclose(read_stack([tmp_path / f"{name}.png"]), expected, rtol=1e-6)
    Image.fromarray(grey > 99).save(tmp_path / "1.png")
    assert np.array_equal(read_stack([tmp_path / "1.png"]), (expected > 99) * np.float32(255))


def test_slices_of_two_sizes_and_what_is_no_png_are_refused(tmp_path):
    Image.new("L", (4, 5)).save(tmp_path / "a.png")
    Image.new("L", (5, 5)).save(tmp_path / "b.png")
    Image.new("L", (5, 5)).save(tmp_path / "c.png", format="JPEG")
    with pytest.raises(DatasetError, match=r"b\.png: 5x5 pixels, and a\.png has 4x5"):
        read_stack([tmp_path / "a.png", tmp_path / "b.png"])
    for path in (tmp_path / "c.png", tmp_path / "gone.png", Path("/dev/zero"), garbage(tmp_path / "d.png")):
        with pytest.raises(DatasetError, match=path.name):
            read_stack([path])


def test_a_table_of_many_columns_is_read_at_once(tmp_path):
    columns = [f"c{i}" for i in range(200_000)]
    (tmp_path / "many.csv").write_text("patient," + ",".join(columns) + "\np" + "," * len(columns) + "\n")
    begun = time.process_time()
    assert len(read_rows(tmp_path / "many.csv", ("patient",))) == 1
    assert time.process_time() - begun < 10  # comparing each with each takes minutes
