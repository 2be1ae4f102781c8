"""Results as files: whole sets by one writer at a time, clean headers, honest JSON, names that hurt nobody."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib

import nibabel as nib
import numpy as np
import pytest

from ddmd.inference.detection import Detection
from ddmd.inference.postprocess import Lesion
from ddmd.io import atomic, results
from ddmd.io.atomic import FileSet, atomic_path, claim
from ddmd.io.naming import file_stem
from ddmd.io.results import (
    OutputError,
    compressed,
    nifti_bytes,
    nifti_parts,
    read_result,
    result_paths,
    sidecar_path,
)
from ddmd.io.text import json_text, printable, table_text

MAPS = tuple(key for key in results.SUFFIXES if key != "draws")  # those are kept on request


def made_up(rng, name="case", shape=(20, 24, 10), **changes) -> Detection:
    """A detection of random maps with two lesions."""
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    probability = rng.random(shape).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    labels[2:6, 3:7, 2:5], labels[10:12, 10:12, 5] = 1, 2

    def image(values):
        return nib.Nifti1Image(values, affine)

    found = {
        "mask": image((labels > 0).astype(np.uint8)),
        "probability": image(probability),
        "uncertainty": image(probability * np.float32(0.1)),
        "inter_discrepancy": image(probability),
        "intra_discrepancy": image(probability),
        "image": image(probability * 100),
        "score": 0.75,
        "lesions": (
            Lesion(0.5, (1.0, -2.0, 3.0), 0.9, 0.8, 0.05),
            Lesion(0.1, (5.0, 6.0, 7.0), 0.8, 0.7, 0.1),
        ),
        "notes": ("a note",),
        "provenance": {"Weights": "tiny", "Threshold": np.float32(0.5)},
        "name": name,
        "labels": image(labels),
    }
    return Detection(**{**found, **changes})


def data(path_or_image):
    image = path_or_image if hasattr(path_or_image, "dataobj") else nib.load(path_or_image)
    return np.asanyarray(image.dataobj)


def test_a_saved_result_reads_back_and_lists_its_files(rng, tmp_path):
    detection = made_up(rng)
    paths = detection.save(tmp_path / "a" / "b", overlay=True)
    folder = tmp_path / "a" / "b"
    assert set(paths) == {*MAPS, "lesions", "overlay", "result"}
    for key in MAPS:
        assert np.array_equal(data(paths[key]), data(getattr(detection, key)))
        assert np.array_equal(nib.load(paths[key]).affine, detection.mask.affine)
        sidecar = json.loads(sidecar_path(paths[key]).read_text())
        assert (sidecar["Score"], sidecar["Weights"], sidecar["Threshold"], sidecar["Notes"]) == (
            0.75, "tiny", 0.5, ["a note"],
        )  # fmt: skip
    rows = [line.split("\t") for line in paths["lesions"].read_text().splitlines()]
    assert [row[0] for row in rows] == ["lesion", "1", "2"]
    assert rows[1][1:5] == ["1.0", "-2.0", "3.0", "0.5"]
    summary = read_result("case", folder)
    assert summary is not None
    assert {*summary["Files"], "case_result.json"} == {p.name for p in folder.iterdir()}
    assert [row["lesion"] for row in summary["LesionTable"]] == [1, 2]


def test_a_result_that_was_changed_is_not_complete(rng, tmp_path):
    paths = made_up(rng).save(tmp_path)
    assert read_result("case", tmp_path) is not None
    paths["lesions"].write_text("other")
    assert read_result("case", tmp_path) is None
    assert read_result("nobody", tmp_path) is None


def test_earlier_results_are_kept_or_replaced_as_a_set(rng, tmp_path):
    first, second = made_up(rng), made_up(rng)
    first.save(tmp_path, overlay=True)
    with pytest.raises(OutputError, match=r"holds earlier results .*--overwrite"):
        second.save(tmp_path)
    paths = second.save(tmp_path, overwrite=True, maps=["probability"])
    assert {p.name for p in tmp_path.iterdir()} == {
        "case_desc-lesion_probseg.nii.gz", "case_desc-lesion_probseg.json", "case_lesions.tsv", "case_result.json",
    }, "maps and picture of the first result would lie beside those of the second"  # fmt: skip
    assert np.array_equal(data(paths["probability"]), data(second.probability))
    with pytest.raises(ValueError, match="maps has 'lesion'; allowed are mask"):
        first.save(tmp_path, maps=["lesion"])


def test_a_place_that_cannot_be_written_to_is_named(rng, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        made_up(rng).save(tmp_path / "file")
    (tmp_path / "out" / "case_desc-lesion_mask.nii.gz").mkdir(parents=True)
    with pytest.raises(OutputError, match="is a folder where a result is to be"):
        made_up(rng).save(tmp_path / "out", overwrite=True)


def test_a_disk_that_fills_up_leaves_what_was_there(rng, tmp_path, monkeypatch):
    made_up(rng).save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    add, calls = FileSet.add, []

    def full(self, name, content):
        calls.append(name)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        add(self, name, content)

    monkeypatch.setattr(FileSet, "add", full)
    with pytest.raises(OutputError, match="No space left"):
        made_up(rng).save(tmp_path, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_maps_that_are_not_finite_are_refused_by_the_name_of_the_case(rng, tmp_path):
    bad = made_up(rng)
    data(bad.uncertainty)[3, 3, 3] = np.nan
    with pytest.raises(OutputError, match="case: 1 voxels of the uncertainty map are NaN or Inf"):
        bad.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_are_replaced_and_never_followed(rng, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("case_desc-lesion_mask.nii.gz", "case_lesions.tsv", ".case.lock", ".case.journal"):
        (out / name).symlink_to(outside)
    with pytest.raises(OutputError, match="holds earlier results"):
        made_up(rng).save(out)
    made_up(rng).save(out, overwrite=True, overlay=True)
    assert outside.read_text() == "precious"
    assert not any(p.is_symlink() for p in out.iterdir())
    dangling = tmp_path / "dangling"
    dangling.mkdir()
    (dangling / "case_lesions.tsv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="holds earlier results"):
        made_up(rng).save(dangling)
    assert not (tmp_path / "nowhere").exists()


def test_a_planted_journal_moves_nothing(rng, tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.write_text("precious")
    out.mkdir()
    for steps in ({"remove": ["../outside"], "rename": {}}, {"remove": [], "rename": {"case_x": "../outside"}},
                  {"remove": ["other_x"], "rename": {}}, ["x"], 3):  # fmt: skip
        (out / "other_x").write_text("of another case")
        (out / ".case.journal").write_text(json.dumps(steps))
        made_up(rng).save(out, overwrite=True)
        assert outside.read_text() == "precious"
        assert (out / "other_x").exists()
        assert not (out / ".case.journal").exists()


def test_a_second_writer_is_told_and_writes_nothing(rng, tmp_path):
    with (
        claim(tmp_path, "case"),
        pytest.raises(OutputError, match="another process is writing the results of case"),
    ):
        made_up(rng).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    made_up(rng).save(tmp_path)


def _save_at_once(detection, folder, gate, codes):
    gate.wait()
    try:
        detection.save(folder, overwrite=True, overlay=True)
        codes.put("saved")
    except OutputError as error:
        codes.put(str(error))


def test_two_writers_leave_one_whole_set(rng, tmp_path):
    context = multiprocessing.get_context("fork")
    pair = [made_up(rng, shape=(40, 40, 30), provenance={"Seed": n}) for n in (1, 2)]
    for attempt in range(5):
        folder, gate, codes = tmp_path / str(attempt), context.Event(), context.SimpleQueue()
        writers = [context.Process(target=_save_at_once, args=(d, folder, gate, codes)) for d in pair]
        for writer in writers:
            writer.start()
        gate.set()
        said = [codes.get() for _ in writers]
        for writer in writers:
            writer.join()
        assert "saved" in said
        assert all(s == "saved" or "another process is writing" in s for s in said)
        assert read_result("case", folder) is not None, "checksums say whether all files are of one writer"
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


KILLED = """
import os, signal, sys
from ddmd.io import atomic
folder, when = sys.argv[1], int(sys.argv[2])
calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.replace, os.unlink = counted(os.replace), counted(os.unlink)
atomic._create = counted(atomic._create)
from pathlib import Path
Path.unlink = counted(Path.unlink)
with atomic.claim(Path(folder), "case"):
    files = atomic.FileSet(Path(folder), "case")
    for name in "abcd":
        files.add(f"case_{name}", b"new")
    files.commit("case_d", ["case_a", "case_b", "case_c", "case_d", "case_old"])
print("done", calls)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_set(tmp_path):
    new = dict.fromkeys(("case_a", "case_b", "case_c", "case_d"), b"new")
    seen = set()
    for when in range(1, 100):
        folder = tmp_path / str(when)
        folder.mkdir()
        old = dict.fromkeys(("case_a", "case_b", "case_d", "case_old"), b"old")
        for name, content in old.items():
            (folder / name).write_bytes(content)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, folder, str(when)], capture_output=True, text=True
        )
        with claim(folder, "case"):
            pass  # what the next run does first
        found = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert found in (old, new), when
        seen.add(found == new)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert seen == {True, False}
    assert when > 12


def test_leftovers_of_other_cases_stay(tmp_path):
    (tmp_path / ".partial-0123456789ab-11-0").write_bytes(b"of another writer, who may be at work")
    with claim(tmp_path, "case"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".partial-0123456789ab-11-0"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0])
def test_modes_follow_the_umask(rng, tmp_path, mask):
    before = os.umask(mask)
    try:
        made_up(rng).save(tmp_path / "out", overlay=True)
        with atomic_path(tmp_path / "one") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    for path in (*(tmp_path / "out").iterdir(), tmp_path / "one"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_headers_hold_geometry_and_units_alone(rng, tmp_path):
    affine = np.array([[-1.1, 0.1, 0, 20], [0.1, 1.1, 0, -30], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(rng.random((5, 6, 7)).astype(np.float32), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 4)
    header = image.header
    header.set_xyzt_units("mm", "sec")
    for key in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        header[key] = b"DOE^JANE"
    header["intent_code"], header["toffset"], header["slice_duration"], header["extents"] = 1001, 47, 5, 4711
    header["pixdim"][4] = 2.5
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    content = nifti_bytes(image)
    assert b"DOE" not in content
    back = nib.Nifti1Image.from_bytes(content)
    assert np.array_equal(data(back), data(image))
    assert np.array_equal(back.affine, image.affine)
    for form in ("qform", "sform"):
        (matrix, code), (wanted, wanted_code) = (getattr(i, f"get_{form}")(coded=True) for i in (back, image))
        assert code == wanted_code
        assert np.array_equal(matrix, wanted)
    assert back.header.get_xyzt_units() == ("mm", "sec")
    for key in ("intent_code", "toffset", "slice_duration"):
        assert back.header[key] == 0
    second = nib.Nifti2Image(data(image), affine)
    assert isinstance(nib.Nifti2Image.from_bytes(nifti_bytes(second)), nib.Nifti2Image)


def test_gzip_members_carry_no_name_and_no_time(rng):
    content = rng.integers(0, 5, 100_000, dtype=np.uint8).tobytes()
    member = compressed(content)
    assert gzip.decompress(member) == content
    assert len(member) < len(content) / 2
    assert member[3] == 0, "flags: no name, no comment"
    assert member[4:8] == bytes(4), "time"
    time.sleep(1.1)
    assert compressed(content) == member


def _map_like(rng, size: int) -> bytes:
    """Zeros with runs of numbers in them, as maps are."""
    values = np.where(
        np.repeat(rng.random(size // 400 + 1) < 0.3, 100)[: size // 4], rng.random(size // 4), 0.0
    )
    return values.astype(np.float32).tobytes() + rng.bytes(size % 4)


def test_compressing_depends_on_the_content_alone(rng):
    """Not on where it lies, what lay in the memory before, how it is cut, or which of the two libraries there is."""
    contents = [_map_like(rng, int(size)) for size in rng.integers(1, 300_000, 20)]
    contents += [
        b"",
        b"\0",
        rng.bytes(100_000),
        bytes(1 << 20),
        rng.integers(0, 2, 1 << 18, np.uint8).tobytes(),
    ]
    expected = []
    for content in contents:
        packer = zlib.compressobj(1, zlib.DEFLATED, 31, 8, zlib.Z_RLE)
        expected.append(packer.compress(content) + packer.flush())
    for _ in range(4):
        for content, member in zip(contents, expected, strict=True):
            assert gzip.decompress(member) == content
            offset, cut = int(rng.integers(64)), int(rng.integers(len(content) + 1))
            moved = memoryview(rng.bytes(offset) + content)[offset:]
            dirty = [bytearray(rng.bytes(1)) * int(n) for n in rng.integers(1, 300_000, 20)]
            del dirty  # what is allocated next lies there
            assert compressed(moved) == member
            assert compressed(moved[:cut], moved[cut:]) == member


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 2), (1, 6, 1)])
def test_a_file_is_what_nibabel_writes(rng, kind, shape):
    affine = np.diag((-1.5, 2.0, 3.0, 1.0))
    for format_ in (nib.Nifti1Image, nib.Nifti2Image):
        values = (100 * rng.random(shape)).astype(kind, order="F")
        for laid in (values, np.ascontiguousarray(values), values[::-1, :, ::-1]):
            image = format_(laid, affine, dtype=laid.dtype)
            image.header.set_xyzt_units("mm")
            assert nifti_bytes(image) == image.to_bytes()
        image = format_(values, affine, dtype=values.dtype)
        assert np.shares_memory(np.frombuffer(nifti_parts(image)[1], np.uint8), values)


def test_equal_results_are_equal_bytes(rng, tmp_path):
    detection = made_up(rng)
    sums = [
        {
            key: hashlib.sha256(path.read_bytes()).hexdigest()
            for key, path in detection.save(tmp_path / n).items()
        }
        for n in "ab"
    ]
    assert sums[0] == sums[1]


def test_json_takes_numpy_and_says_null_for_what_is_no_number():
    text = json_text(
        {
            "a": np.int64(3),
            "b": np.float32(0.5),
            "c": [np.nan, np.inf],
            "d": np.arange(2),
            "e": np.bool_(True),
        }
    )
    assert json.loads(text) == {"a": 3, "b": 0.5, "c": [None, None], "d": [0, 1], "e": True}
    assert json.loads(json_text({"name": os.fsdecode(b"p\xe9ter")})) == {"name": "p\\xe9ter"}


@pytest.mark.parametrize(
    "name", ["a[/b]", "p$^$", "a\nb", os.fsdecode(b"p\xe9ter"), "-x", "患者", "\u202exyz", "=1+1", "a/../b"]
)
def test_any_name_is_saved_inside_the_folder(rng, tmp_path, name):
    paths = made_up(rng, name).save(tmp_path / "out", overlay=True)
    assert all(path.parent == tmp_path / "out" and path.is_file() for path in paths.values())
    assert read_result(file_stem(name), tmp_path / "out") is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_printable_text_has_no_character_that_acts():
    assert printable("plain, äöü 患者 😀") == "plain, äöü 患者 😀"
    for text in ("\x1b[31m", "a\nb", "a\rb", "\u202eabc", "\u2028", "\x9b", "\udce9", "\x00"):
        safe = printable(text)
        assert safe.isprintable()
        assert safe.encode("utf-8")


def test_cells_are_no_formulas():
    names = ["=cmd|' /C calc'!A0", "+1+1", "-x", "@sum", " =1", "\t=1", "\uff1d1", "p-1", "-3.5", "1e5", ""]
    lines = table_text([{"name": n, "ml": -1.5} for n in names], ["name", "ml"]).splitlines()[1:]
    cells = [line.split("\t")[0] for line in lines]
    assert cells[-4:] == ["p-1", "-3.5", "1e5", ""]
    assert all(c.startswith("'") or c.startswith("\\t") for c in cells[:-4])
    assert all(line.endswith("\t-1.5") for line in lines)


def test_how_is_called_provenance_now(rng):
    detection = made_up(rng)
    with pytest.warns(FutureWarning, match="provenance"):
        assert detection.how is detection.provenance


def test_names_of_results(tmp_path):
    paths = result_paths("p1", tmp_path)
    assert paths["mask"].name == "p1_desc-lesion_mask.nii.gz"
    assert paths["labels"].name == "p1_desc-lesion_dseg.nii.gz"
    assert paths["lesions"].name == "p1_lesions.tsv"


@pytest.mark.parametrize("file", ["result", "mask"])
def test_a_pipe_in_place_of_a_result_is_never_waited_for(tmp_path, rng, file):
    paths = made_up(rng).save(tmp_path)
    assert read_result("case", tmp_path) is not None
    paths[file].unlink()
    os.mkfifo(paths[file])

    def stop_waiting(*_: object) -> None:
        raise TimeoutError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, stop_waiting)
    signal.alarm(20)
    try:
        assert read_result("case", tmp_path) is None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_same_result_computed_at_another_pace_is_the_same_bytes(tmp_path, rng):
    state = rng.bit_generator.state
    written = []
    for seconds in (0.5, 3.25):
        rng.bit_generator.state = state
        detection = made_up(rng, provenance={"Weights": "tiny", "Seconds": seconds})
        detection.save(tmp_path / str(seconds), overlay=True)
        written.append({p.name: p.read_bytes() for p in (tmp_path / str(seconds)).iterdir()})
    one, other = written
    assert sorted(one) == sorted(other)
    for name in sorted(one, key=lambda name: name.endswith(".json")):  # the JSON lists checksums of the rest
        where = ""
        if one[name] != other[name] and name.endswith(".gz"):
            where = (
                "in the voxels or the header"
                if gzip.decompress(one[name]) != gzip.decompress(other[name])
                else ("in the compressed stream alone")
            )
        assert one[name] == other[name], f"{name} differs {where}"


def test_what_a_killed_writer_of_tables_left_goes_with_the_next_one(tmp_path):
    """Killed between creating and renaming; what a living process or another machine writes stays."""
    code = (
        "import os, sys, pathlib; from ddmd.io import atomic; "
        "os.replace = lambda *_: os.kill(os.getpid(), 9); "
        "atomic.write_texts(pathlib.Path(sys.argv[1]), 'cohort', {'cohort.tsv': 'half'})"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    *start, machine, _, token = left.name.split("-")
    other_machine = left.with_name("-".join((*start, machine[::-1], "1", token)))
    living = left.with_name("-".join((*start, machine, str(os.getppid()), token)))
    for path in (other_machine, living):
        path.write_text("x")
    atomic.write_texts(tmp_path, "cohort", {"cohort.tsv": "a\n", "run.json": "{}\n"})
    expected = {other_machine.name, living.name, "cohort.tsv", "run.json"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert (tmp_path / "cohort.tsv").read_text() == "a\n"
