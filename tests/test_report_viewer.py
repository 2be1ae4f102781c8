"""What a real browser makes of the page of `ddmd report`, offline."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ddmd.cohort.discovery import find_cases
from ddmd.report.page import write_report
from tests.report_cases import NASTY, SPACING, brain, detection, write_cohort

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
)  # fmt: skip


@pytest.fixture
def cohort(rng, tmp_path) -> tuple[Path, Path]:
    return write_cohort(tmp_path, rng)


class Visit:
    """A page in Chromium, with what it asked for and complained of."""

    def __init__(self, page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console", lambda message: self.errors.append(message.text) if message.type == "error" else None
        )

    def go(self, path: Path) -> None:
        self.page.goto(path.as_uri())

    def open_case(self, name: str, key: str | None = None) -> None:
        button = self.page.get_by_role("button", name=name, exact=True)
        if key is None:
            button.click()
        else:
            button.press(key)
        self.page.wait_for_selector("dialog[data-shown]", timeout=60_000)

    def canvas(self) -> np.ndarray:
        """The pixels of the viewer, (height, width, 3)."""
        picture = self.page.locator("#canvas").screenshot()
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)

    def wait_until_drawn(self, right: Callable[[np.ndarray], bool], seconds: float = 30.0) -> np.ndarray:
        """The pixels of the viewer once they are right: what is asked for is drawn some frames later."""
        end = time.monotonic() + seconds
        while not right(pixels := self.canvas()) and time.monotonic() < end:
            self.page.wait_for_timeout(100)
        assert right(pixels)
        return pixels

    def is_clean(self) -> bool:
        schemes = {url.split(":")[0] for url in self.requests}
        print(self.errors, schemes)
        return not self.errors and schemes <= {"file", "blob", "data"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(reason="no Chromium is installed; make browser installs it")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=found, headless=True, args=list(FLAGS),
            viewport={"width": 1200, "height": 760},
        )  # fmt: skip
        context.set_default_timeout(30_000)
        yield context
        context.close()


@pytest.fixture
def visit(browser) -> Iterator[Visit]:
    page = browser.new_page()
    yield Visit(page)
    page.close()


def red(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 0] > 150) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)


def expected_red(mask, size: tuple[int, int], radiological: bool) -> np.ndarray:
    """Where an axial view shows the mask at the height of its centre: the field of view fits the canvas."""
    mask = nib.as_closest_canonical(mask)
    values = np.asarray(mask.dataobj) > 0
    centre = nib.affines.apply_affine(mask.affine, np.argwhere(values).mean(axis=0))
    z = round(nib.affines.apply_affine(np.linalg.inv(mask.affine), centre)[2])
    height, width = size
    nx, ny = values.shape[:2]
    scale = min(width / nx, height / ny)
    x = np.floor((np.arange(width) - (width - nx * scale) / 2) / scale).astype(int)
    y = np.floor((np.arange(height) - (height - ny * scale) / 2) / scale).astype(int)
    inside = ((x >= 0) & (x < nx))[None, :] & ((y >= 0) & (y < ny))[:, None]
    plane = values[:, ::-1, z].T  # the front above
    plane = plane[:, ::-1] if radiological else plane
    return plane[np.clip(y, 0, ny - 1)[:, None], np.clip(x, 0, nx - 1)[None, :]] & inside


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / max(1, one.sum() + other.sum()))


def test_the_mask_lies_on_the_lesion(cohort, visit):
    inputs, out = cohort
    visit.go(write_report(out, find_cases(inputs, annotations=False)).page)
    visit.open_case("p-1")
    page = visit.page
    page.get_by_role("radio", name="Axial").click()
    page.uncheck("#crosshair")
    page.uncheck("#outline")
    page.get_by_label("Opacity of Lesion mask").fill("100")
    size = visit.canvas().shape[:2]
    right_way, mirrored = (expected_red(brain().lesion, size, radiological) for radiological in (False, True))
    shown = red(visit.wait_until_drawn(lambda pixels: dice(red(pixels), right_way) > 0.85))
    assert dice(shown, right_way[:, ::-1]) < 0.1
    page.check("#outline")
    visit.wait_until_drawn(lambda pixels: 0.1 < red(pixels).sum() / shown.sum() < 0.8)
    page.uncheck("#outline")
    page.check("#radiological")
    visit.wait_until_drawn(lambda pixels: dice(red(pixels), mirrored) > 0.85)
    page.uncheck("[data-layer=mask]")
    visit.wait_until_drawn(lambda pixels: red(pixels).sum() == 0)
    assert "probability 0.90" in page.inner_text("#location")
    assert visit.is_clean()


def test_the_page_can_ask_nobody_for_anything(cohort, visit):
    _, out = cohort
    visit.go(write_report(out).page)
    calls: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = visit.page.evaluate(
            """async (url) => {
                new Image().src = url;
                document.body.append(Object.assign(document.createElement("script"), {src: url}));
                document.body.append(Object.assign(document.createElement("script"), {text: "window.hacked = 1"}));
                try { await fetch(url); return "fetched" } catch (error) { return String(window.hacked) }
            }""",
            f"http://127.0.0.1:{port}/x",
        )
        server.settimeout(3)
        with contextlib.suppress(TimeoutError):  # a connection made meanwhile waits
            calls.append(server.accept()[0].recv(100))
    assert (said, calls) == ("undefined", [])


def test_keyboard_alone_opens_moves_through_and_closes(cohort, visit):
    _, out = cohort
    empty = nib.Nifti1Image(np.zeros(brain().lesion.shape, np.uint8), brain().lesion.affine)
    detection(NASTY, brain().images["flair"], brain().lesion, notes=(NASTY,)).save(out, overlay=True)
    detection("p-3", brain().images["flair"], empty, lesions=()).save(out, maps=())
    visit.go(write_report(out).page)
    page = visit.page
    assert page.locator("#cases .open").all_inner_texts() == [NASTY, "p-1", "p-3"]
    visit.open_case("p-1", "Enter")
    page.focus("#canvas")
    places = [page.inner_text("#location")]
    for key in ("ArrowRight", "ArrowRight", "PageUp"):  # the first goes to the centre of a voxel, too
        page.keyboard.press(key)
        page.wait_for_function("t => document.querySelector('#location').innerText !== t", arg=places[-1])
        places.append(page.inner_text("#location"))
    mm = np.array([[float(v) for v in text.split(" mm")[0].split(",")] for text in places])
    np.testing.assert_allclose(np.diff(mm[1:], axis=0), [[SPACING, 0, 0], [0, 0, SPACING]], atol=0.11)
    page.keyboard.press("n")
    page.wait_for_function("document.querySelector('#message').innerText.includes('no volumes')")
    assert page.inner_text("#viewer-name") == "p-3"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.innerText") == "p-1"
    visit.open_case(NASTY, "Enter")
    assert page.inner_text("#viewer-name") == NASTY
    assert NASTY in page.inner_text("#notes")
    assert page.evaluate("window.hacked") is None
    assert visit.is_clean()


def test_a_case_opened_before_the_former_has_finished_closing(cohort, visit):
    """The browser tells of a closed dialog later: by then the next case may be open, or have the focus."""
    _, out = cohort
    detection("p-2", brain().images["flair"], brain().lesion).save(out)
    visit.go(write_report(out).page)
    visit.open_case("p-1")
    page = visit.page
    close = """([next, act]) => new Promise((done) => {
        const button = [...document.querySelectorAll("#cases .open")].find((b) => b.innerText === next);
        const dialog = document.querySelector("#viewer");
        dialog.addEventListener("close", () => setTimeout(() => done(document.activeElement.innerText)));
        dialog.close();
        button[act]();
    })"""
    assert page.evaluate(close, ["p-2", "focus"]) == "p-2"
    visit.open_case("p-1")
    page.evaluate(close, ["p-2", "click"])
    page.wait_for_selector("dialog[data-shown]")
    assert page.inner_text("#viewer-name") == "p-2"
    assert "probability 0.90" in page.inner_text("#location")
    assert visit.is_clean()


def test_a_hundred_cases_load_quickly_sort_and_filter(tmp_path, rng, visit):
    shape, affine = (24, 28, 20), np.diag([8.0, 8.0, 8.0, 1.0])
    scores = rng.permutation(100) / 100
    for n, score in enumerate(scores):
        mask = np.zeros(shape, np.uint8)
        mask[5:9, 5 : 6 + n % 9, 5:9] = 1
        case = detection(
            f"case-{n}",
            nib.Nifti1Image(rng.random(shape).astype(np.float32), affine),
            nib.Nifti1Image(mask, affine),
            score=float(score) if n else float("nan"),
            provenance={"Quality": {"Flags": ["few slices"] if n % 4 == 0 else []}},
        )
        case.save(tmp_path, overlay=n % 10 == 0, maps=("mask", "probability"))
    begun = time.perf_counter()
    page_path = write_report(tmp_path).page
    print("written in", time.perf_counter() - begun)
    begun = time.perf_counter()
    visit.go(page_path)
    page = visit.page
    assert page.locator("#cases tbody tr").count() == 100
    assert time.perf_counter() - begun < 3
    assert visit.requests == [page_path.as_uri()]

    def names() -> list[str]:
        return page.locator("#cases tbody tr:visible .open").all_inner_texts()

    assert names() == [f"case-{n}" for n in range(100)]
    by_score = [f"case-{n}" for n in sorted(range(1, 100), key=lambda n: scores[n])]
    page.get_by_role("button", name="Score").click()
    assert names() == [*by_score[::-1], "case-0"]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Score")
    page.get_by_role("button", name="Score").click()
    assert names() == [*by_score, "case-0"]
    page.check("#only-flags")
    assert names() == [name for name in [*by_score, "case-0"] if int(name[5:]) % 4 == 0]
    page.fill("#find", "case-4")
    assert set(names()) == {"case-4", "case-40", "case-44", "case-48"}
    assert page.inner_text("#shown") == "4 of 100 cases"
    page.fill("#find", "")
    page.uncheck("#only-flags")
    visit.open_case("case-57")
    assert [Path(url).name for url in visit.requests if url.endswith(".js")] == ["case-57.js"]
    assert visit.is_clean()
