"""How many shapes in plane the slices of a data set have, and what wider windows would change.

`python -m benchmarks.grid_shapes DATA... [--volumes FILE...] [--output FOLDER]`. A GPU captures one graph a shape. The
window of a case is the smallest of some sizes that holds its brain; it is widened with the image's own content, and
padded with air only where the image ends. Masks and CPU seconds with wider windows are compared with those of today.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.result_file import ResultFile, commit
from benchmarks.timing import machine
from ddmd.cohort.discovery import find_cases
from ddmd.inference import slices
from ddmd.inference.detector import Detector
from ddmd.io.volume import Volume

RESULTS = Path(__file__).with_name("results")
Window = Callable[[int, int], tuple[int, int]]  # pixels of the brain's box -> those of the window


def multiples(of: int) -> Window:
    """Windows whose sides are the next multiples."""
    return lambda height, width: (-(-height // of) * of, -(-width // of) * of)


def short_list(*sizes: tuple[int, int]) -> Window:
    """The smallest of some windows that holds the box; multiples of 64 where none does."""

    def window(height: int, width: int) -> tuple[int, int]:
        fitting = (size for size in sizes if size[0] >= height and size[1] >= width)
        return min(fitting, key=lambda size: size[0] * size[1], default=multiples(64)(height, width))

    return window


WINDOWS: dict[str, Window] = {
    "multiples of 16": multiples(16),  # as `SliceGrid.multiple` has it
    "multiples of 32": multiples(32),
    "three sizes": short_list((192, 160), (224, 192), (256, 224)),
}


@contextmanager
def cut_to(window: Window, grid: slices.SliceGrid) -> Iterator[None]:
    """Inside, `extract` cuts windows of these sizes."""
    box, cut = slices._box, slices._cut

    def wider(brain: np.ndarray, spacing: tuple[float, ...]) -> tuple[slice, slice]:
        edges = box(brain, spacing)
        pixels = [max(1, round((e.stop - e.start) * spacing[i] / grid.mm)) for i, e in enumerate(edges)]
        height, width = window(pixels[1], pixels[0])
        return tuple(  # type: ignore[return-value]
            _widened(edge, round(size * grid.mm / spacing[i]), brain.shape[i])
            for i, (edge, size) in enumerate(zip(edges, (width, height), strict=True))
        )

    def padded(values, edges, index, size, full, background):  # type: ignore[no-untyped-def]
        return cut(values, edges, index, size, window(*size), background)

    slices._box, slices._cut = wider, padded
    try:
        yield
    finally:
        slices._box, slices._cut = box, cut


def _widened(edge: slice, size: int, limit: int) -> slice:
    """A range of `size` round another, shifted to lie in 0 to `limit`, and shorter only where that is shorter.

    Examples
    --------
    >>> _widened(slice(4, 8), 8, 20), _widened(slice(4, 8), 12, 10)
    (slice(2, 10, None), slice(0, 10, None))
    """
    size = min(max(size, edge.stop - edge.start), limit)
    start = min(max((edge.start + edge.stop - size) // 2, 0), limit - size)
    return slice(start, start + size)


def boxes(root: Path, sequence: str) -> dict[str, tuple[int, int]]:
    """Case -> (H, W) of the brain's box on the networks' grid, before padding."""
    found = {}
    for case in find_cases(root):
        if sequence in case.files:
            volume = case.volume((sequence,))
            edges, grid = slices._box(volume.search_region, volume.spacing), slices.SliceGrid()
            width, height = (
                max(1, round((e.stop - e.start) * volume.spacing[i] / grid.mm)) for i, e in enumerate(edges)
            )
            found[case.name] = height, width
    return found


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Of two masks; 1 where both are empty."""
    both = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / both if both else 1.0


def compare_masks(detector: Detector, path: Path) -> dict[str, dict[str, float]]:
    """Of each kind of window: shape, CPU seconds of a detection, Dice of its mask with today's."""
    volume = Volume.read(path, require=detector.description.sequences)
    figures, today = {}, None
    detector.detect(volume)  # loads what is loaded once
    for name, window in WINDOWS.items():
        with cut_to(window, detector.description.slice_grid):
            begun = time.process_time()
            detection = detector.detect(volume)
            seconds = time.process_time() - begun
            cut = slices.extract(volume, detector.description.sequences, detector.description.slice_grid)
        mask = np.asanyarray(detection.mask.dataobj) > 0
        today = mask if today is None else today
        height, width = cut.image.shape[2:]
        figures[name] = {"height": height, "width": width, "cpu_s": seconds, "dice": dice(mask, today)}
        print(f"{path.parent.name}, {name}: {figures[name]}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--volumes", type=Path, nargs="*", default=[], help="whose masks are compared")
    parser.add_argument("--sequence", default="flair")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {"kind": "shapes", "machine": machine("cpu"), "torch": torch.__version__, "commit": commit()}
    results = ResultFile(options.output / f"shapes-{datetime.date.today()}.json", settings)
    detector = Detector.load(device="cpu")
    for path in options.volumes:
        masks = results.get("masks", {})
        if path.parent.name not in masks:
            results.put("masks", masks | {path.parent.name: compare_masks(detector, path)})
    for root in options.data:
        done = results.get("boxes", {})
        if root.name not in done:
            results.put("boxes", done | {root.name: boxes(root, options.sequence)})
    every = [tuple(box) for of_root in results.get("boxes").values() for box in of_root.values()]
    area = sum(h * w for h, w in map(multiples(16), *zip(*every, strict=True)))
    counts = {}
    for name, window in WINDOWS.items():
        shapes = [window(*box) for box in every]
        counts[name] = {
            "cases": len(every),
            "shapes": len(set(shapes)),
            "area": sum(h * w for h, w in shapes) / area,
        }
    results.put("counts", counts)
    print(counts)


if __name__ == "__main__":
    main()
