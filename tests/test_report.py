"""`ddmd report`: what is in its page and in the volumes beside it."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ddmd.cohort.discovery import find_cases
from ddmd.io.results import BIDS_NAMES
from ddmd.models import checkpoint
from ddmd.report import volumes
from ddmd.report.page import ReportError, write_report
from ddmd.report.volumes import display_image, display_map, thinned
from tests.report_cases import NASTY, brain, detection, write_cohort
from tests.volumes import head, tiny_system, write


@pytest.fixture
def cohort(rng, tmp_path) -> tuple[Path, Path]:
    return write_cohort(tmp_path, rng)


def script_volumes(path: Path) -> dict[str, nib.Nifti1Image]:
    """The images in a script file, decoded by nibabel."""
    text = path.read_text("ascii")
    found = re.findall(r'^"(\w+)": "([^"]+)",$', text, re.MULTILINE)
    return {
        key: nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content))) for key, content in found
    }


# ---------------------------------------------------------------- volumes


def test_image_values_come_back_within_half_a_level(rng):
    values = rng.normal(500, 100, (12, 10, 8)).astype(np.float32)
    values[0] = 0
    shown = display_image(values, np.eye(4))
    assert shown.get_data_dtype() == np.uint8
    restored = nib.Nifti1Image.from_bytes(shown.to_bytes()).get_fdata()
    slope = float(shown.header["scl_slope"])
    low, high = shown.header["cal_min"], shown.header["cal_max"]
    np.testing.assert_allclose(restored, np.clip(values, low, high), atol=0.51 * slope)
    inside = values[1:]
    assert np.mean((inside >= low) & (inside <= high)) > 0.98


def test_image_of_odd_values_is_shown(rng):
    values = rng.normal(size=(6, 5, 4)).astype(np.float32)
    values[2, 2, 2], values[3, 3, 3], values[1, 1, 1] = np.nan, np.inf, -np.inf
    for odd in (values, np.zeros((3, 3, 3)), np.full((3, 3, 3), np.nan), values.astype(bool)):
        assert display_image(odd, np.eye(4)).get_data_dtype() == np.uint8


def test_maps_keep_their_meaning(rng):
    probability = rng.random((7, 6, 5)).astype(np.float32)
    labels = rng.integers(0, 300, (7, 6, 5))
    affine = np.diag([1.0, 2.0, 3.0, 1.0])

    def restored(key, values):
        return nib.Nifti1Image.from_bytes(display_map(key, values, affine).to_bytes())

    np.testing.assert_allclose(
        restored("probability", probability).get_fdata(), probability, atol=0.501 / 255
    )
    top = float((probability * 0.2).max())
    uncertainty = restored("uncertainty", probability * 0.2)
    np.testing.assert_allclose(uncertainty.get_fdata(), probability * 0.2, atol=0.501 / 255 * top)
    np.testing.assert_array_equal(restored("mask", probability > 0.5).get_fdata(), probability > 0.5)
    np.testing.assert_array_equal(restored("labels", labels).get_fdata(), labels)
    np.testing.assert_array_equal(uncertainty.affine, affine)


def test_a_fine_grid_is_thinned_and_loses_no_lesion(rng, monkeypatch):
    monkeypatch.setattr(volumes, "MAX_VOXELS", 1000)
    values = np.zeros((31, 22, 17), np.uint8)
    spot = tuple(int(rng.integers(n)) for n in values.shape)
    values[spot] = 1
    affine = np.array([[0, -0.5, 0, 10], [0.5, 0, 0, -20], [0, 0, 0.7, 5], [0, 0, 0, 1]])
    coarse, moved = thinned(values, affine)
    assert coarse.size <= 2 * 1000
    assert coarse.sum() == 1
    where = nib.affines.apply_affine(moved, np.argwhere(coarse)[0])
    distance = np.abs(where - nib.affines.apply_affine(affine, spot))
    step = np.linalg.norm(moved[:3, :3], axis=0) / np.linalg.norm(affine[:3, :3], axis=0)
    assert (distance <= np.array([0.5, 0.5, 0.7]) * (step[0] - 1) / 2 + 1e-9).all()


def test_script_file_holds_image_and_maps_of_the_result(cohort):
    inputs, out = cohort
    report = write_report(out, find_cases(inputs, annotations=False))
    assert (report.cases, report.failures, report.notes) == (1, 0, ())
    made = script_volumes(out / "report_volumes" / "p-1.js")
    assert list(made) == ["image", "mask", "labels", "probability", "uncertainty"]
    source = nib.load(inputs / "p-1_flair.nii.gz")
    mask = nib.load(next(out.glob("*_mask.nii.gz")))
    np.testing.assert_array_equal(made["mask"].get_fdata(), mask.get_fdata())
    for image in made.values():
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-4)
    correlation = np.corrcoef(made["image"].get_fdata().ravel(), source.get_fdata().ravel())[0, 1]
    assert correlation > 0.99


# ---------------------------------------------------------------- folder and page


def test_a_second_report_keeps_the_image_and_a_new_result_does_not(cohort):
    inputs, out = cohort
    script = out / "report_volumes" / "p-1.js"
    write_report(out, find_cases(inputs, annotations=False))
    first = script.stat()
    write_report(out)
    assert script.stat().st_mtime_ns == first.st_mtime_ns
    emptied = nib.Nifti1Image(np.roll(np.asarray(brain().lesion.dataobj), 2, axis=0), brain().lesion.affine)
    detection("p-1", brain().images["flair"], emptied).save(out, overwrite=True)
    write_report(out)
    assert "image" not in script_volumes(script)
    np.testing.assert_array_equal(script_volumes(script)["mask"].get_fdata(), emptied.get_fdata())


def test_an_image_of_another_grid_or_name_is_not_shown(cohort):
    inputs, out = cohort
    other = brain().images["flair"]
    moved = other.affine.copy()
    moved[:3, 3] += 9.0
    nib.save(nib.Nifti1Image(other.dataobj, moved), inputs / "p-1_flair.nii.gz")
    report = write_report(out, find_cases(inputs, annotations=False))
    assert "grid" in " ".join(report.notes)
    assert "image" not in script_volumes(out / "report_volumes" / "p-1.js")


def test_an_image_of_another_file_is_not_shown(cohort):
    inputs, out = cohort
    (case,) = find_cases(inputs, annotations=False)
    other = inputs / "other_flair.nii.gz"
    shutil.move(inputs / "p-1_flair.nii.gz", other)
    report = write_report(out, [dataclasses.replace(case, files={"flair": (other,)})])
    assert "not of other_flair.nii.gz" in " ".join(report.notes)
    assert str(inputs) not in report.page.read_text("utf-8") + " ".join(report.notes)


def test_results_with_bids_names_below_the_folder_are_read(tmp_path):
    image, mask = brain().images["flair"], brain().lesion
    for subject in ("01", "02"):
        uris = [f"bids:raw:sub-{subject}/anat/sub-{subject}_FLAIR.nii.gz"]
        folder = tmp_path / f"sub-{subject}" / "anat"
        detection(f"sub-{subject}", image, mask).save(
            folder, naming=BIDS_NAMES, extra={"Sources": uris}, stem=f"sub-{subject}"
        )
        nib.save(image, tmp_path / f"sub-{subject}_FLAIR.nii.gz")
    report = write_report(tmp_path, find_cases(sorted(tmp_path.glob("*_FLAIR.nii.gz")), annotations=False))
    assert (report.cases, report.failures) == (2, 0)
    for script in (tmp_path / "report_volumes").glob("*.js"):
        made = script_volumes(script)
        np.testing.assert_array_equal(made["mask"].get_fdata(), mask.get_fdata())
        assert {"labels", "probability", "uncertainty"} <= set(made)


def test_detect_writes_the_report_with_the_images(tmp_path, rng):
    inputs = tmp_path / "my scans"
    inputs.mkdir()
    for n in range(2):
        write(inputs / f"p{n}_flair.nii.gz", *head(rng))
    (inputs / "p7_flair.nii.gz").write_bytes(b"broken")
    weights = tmp_path / "tiny.safetensors"
    checkpoint.save(tiny_system(), weights)
    command = [sys.executable, "-m", "ddmd", "detect", str(inputs), "-o", str(tmp_path / "out"), "--report"]
    done = subprocess.run([*command, "--weights", str(weights)], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 1
    page = tmp_path / "out" / "report.html"
    assert f"report: {page}" in done.stdout
    assert str(tmp_path) not in page.read_text("utf-8")
    assert "p7_flair.nii.gz: not a NIfTI file" in page.read_text("utf-8")
    scripts = sorted((tmp_path / "out" / "report_volumes").iterdir())
    assert [path.name for path in scripts] == ["p0.js", "p1.js"]
    assert all("image" in script_volumes(path) for path in scripts)


def test_volumes_of_a_case_that_is_gone_are_removed_and_no_other_file(cohort):
    _, out = cohort
    write_report(out)
    own = out / "report_volumes" / "notes.js"
    own.write_text("// mine")
    for path in out.glob("p-1_*"):
        path.unlink()
    (out / "failures.tsv").write_text("case\tfile\terror\treason\np-1\tp.nii\tVolumeError\tno brain\n")
    write_report(out)
    assert sorted(path.name for path in (out / "report_volumes").iterdir()) == ["notes.js"]


def test_incomplete_results_and_failed_cases_are_listed(cohort):
    _, out = cohort
    (out / "failures.tsv").write_text(
        f"case\tfile\terror\treason\nbad & {NASTY}\t/home/me/b.nii\tVolumeError\t/home/my me/b.nii: no <b>brain</b>\n"
    )
    shutil.copy(out / "p-1_result.json", out / "p-2_result.json")
    report = write_report(out)
    assert (report.cases, report.failures) == (1, 2)
    text = report.page.read_text("utf-8")
    assert "<td>b.nii: no &lt;b&gt;brain&lt;/b&gt;</td>" in text
    assert "/home" not in text
    next(out.glob("*_mask.nii.gz")).write_bytes(b"changed")
    assert write_report(out).failures == 3


def test_a_folder_without_results_and_a_page_of_somebody_else_are_refused(cohort, tmp_path):
    _, out = cohort
    with pytest.raises(ReportError, match="no folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="no results"):
        write_report(tmp_path / "empty")
    (out / "report.html").write_text("<p>mine")
    with pytest.raises(ReportError, match="move it away"):
        write_report(out)
    assert (out / "report.html").read_text() == "<p>mine"
    (out / "report.html").unlink()
    (out / "report_volumes").symlink_to(tmp_path / "empty")
    with pytest.raises(ReportError, match="link"):
        write_report(out)
    assert not list((tmp_path / "empty").iterdir())


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))


def test_names_are_text_and_no_path_of_the_machine_is_in_the_page(cohort, tmp_path):
    inputs, out = cohort
    plain = write_report(out).page.read_text("utf-8")
    provenance = {"Weights": NASTY, "Quality": {"Flags": [NASTY]}, "Sources": {"flair": NASTY}}
    case = detection(NASTY, brain().images["flair"], brain().lesion, provenance=provenance, notes=(NASTY,))
    case.save(out, overlay=True)
    report = write_report(out, find_cases(inputs, annotations=False), title=NASTY)
    text = report.page.read_text("utf-8")
    tags = Tags(text).found
    scripts = [attrs for tag, attrs in tags if tag == "script"]
    assert len(scripts) == sum(tag == "script" for tag, _ in Tags(plain).found)
    assert not any("onerror" in attrs for _, attrs in tags)
    everything = text + "".join(path.read_text() for path in (out / "report_volumes").glob("*.js"))
    assert str(tmp_path) not in everything
    assert "http://" not in re.sub(r"(?s)<script.*?</script>|<pre>.*?</pre>", "", text)
    assert all(
        not attrs.get(key, "").startswith(("http", "//")) for _, attrs in tags for key in ("src", "href")
    )
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == 2
    assert all(attrs["alt"].strip() for attrs in images)


def test_the_old_module_of_this_name_warns_and_works():
    import ddmd.report
    from ddmd.evaluation.report import html as expected

    with pytest.warns(FutureWarning, match="evaluation.report"):
        assert ddmd.report.html is expected


def test_odd_values_in_a_result_do_not_stop_the_page(cohort, rng):
    _, out = cohort
    path = out / "p-1_result.json"
    original = json.loads(path.read_text())
    odd = [
        None,
        [],
        {},
        "x",
        -1,
        1e308,
        True,
        [None, {}],
        {"Flags": "skull"},
        {"samples": [1]},
        "\ud800",
        [1, "2"],
    ]
    for key in set(original) - {"Files"}:
        changed = original | {key: odd[rng.integers(len(odd))]}
        path.write_text(json.dumps(changed))
        report = write_report(out)
        assert (report.cases, report.failures) == (1, 0), changed[key]
        report.page.read_text("utf-8")
