"""The volumes of a case for the viewer: uint8 NIfTI on one grid, compressed, in a script file a page can load."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ddmd.io.atomic import write_text
from ddmd.io.results import compressed

FORMAT = 1  # of the script files; another number makes them anew
MAX_VOXELS = 1 << 25  # of one volume: 320 x 320 x 320; finer grids are shown on every second voxel, or third
WINDOW = (0.5, 99.5)  # percentiles of the tissue between which an image is shown
_HEAD = "/* ddmd report volumes "


@dataclass(frozen=True)
class ScriptInfo:
    """What a script file was made from.

    format : `FORMAT`. checksum : of the case's result. volumes : keys of the volumes in it.
    """

    format: int
    checksum: str
    volumes: tuple[str, ...]


def display_image(values: NDArray[Any], affine: NDArray[np.float64]) -> nib.Nifti1Image:
    """An image as uint8, its contrast between two percentiles of the tissue.

    Parameters
    ----------
    values : (X, Y, Z), real numbers; what is not finite is background
    affine : (4, 4), voxels to mm

    Returns
    -------
    nib.Nifti1Image
        uint8; slope and intercept of the header give the values back, rounded.
    """
    values = np.asarray(values, np.float32)
    finite = values[np.isfinite(values)]
    tissue = finite[finite != finite[0]] if finite.size else finite
    low, high = (float(v) for v in np.percentile(tissue, WINDOW)) if tissue.size else (0.0, 1.0)
    background = float(finite.min()) if finite.size else 0.0
    filled = np.nan_to_num(values, nan=background, posinf=high, neginf=background)
    if tissue.size and finite[0] < low:
        low = max(float(finite[0]), low - 0.1 * (high - low))  # so that dark tissue is not as black as air
    return _scaled(filled, affine, low, high if high > low else low + 1.0)


def display_map(key: str, values: NDArray[Any], affine: NDArray[np.float64]) -> nib.Nifti1Image:
    """A map of a result as uint8.

    Parameters
    ----------
    key : "mask", "labels", "probability" or "uncertainty"
    values : (X, Y, Z)
    affine : (4, 4), voxels to mm

    Returns
    -------
    nib.Nifti1Image
        uint8 (uint16 for more than 255 labels). Probability is scaled from [0, 1], uncertainty from 0 to its
        largest value.
    """
    values = np.nan_to_num(np.asarray(values, np.float32), posinf=0.0, neginf=0.0)
    if key == "probability":
        return _scaled(values, affine, 0.0, 1.0)
    if key == "uncertainty":
        return _scaled(values, affine, 0.0, max(float(values.max(initial=0.0)), 1e-6))
    if key == "mask":
        return _image((values > 0).astype(np.uint8), affine, 0.0, 1.0)
    top = float(values.max(initial=0.0))
    return _image(values.astype(np.uint8 if top <= 255 else np.uint16), affine, 0.0, max(top, 1.0))


def _scaled(
    values: NDArray[np.float32], affine: NDArray[np.float64], low: float, high: float
) -> nib.Nifti1Image:
    levels = np.rint((np.clip(values, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    image = _image(levels, affine, low, high)
    image.header.set_slope_inter((high - low) / 255, low)
    return image


def _image(
    levels: NDArray[Any], affine: NDArray[np.float64], shown_min: float, shown_max: float
) -> nib.Nifti1Image:
    image = nib.Nifti1Image(levels, affine)
    image.header["cal_min"], image.header["cal_max"] = shown_min, shown_max
    image.header.set_xyzt_units("mm")
    return image


def thinned(values: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A volume (X, Y, Z) of at most `MAX_VOXELS`: the largest of each block of voxels, and the blocks' affine.

    The largest, so that no lesion is lost.
    """
    step = 1
    while values.size > MAX_VOXELS * step**3:
        step += 1
    if step == 1:
        return values, affine
    starts = [np.arange(0, n, step) for n in values.shape]
    for axis, start in enumerate(starts):
        values = np.maximum.reduceat(values, start, axis=axis)
    coarse = affine.copy()
    coarse[:3, :3] *= step
    coarse[:3, 3] += affine[:3, :3] @ np.full(3, (step - 1) / 2)
    return values, coarse


def write_volumes(path: Path, case_id: str, checksum: str, volumes: Mapping[str, nib.Nifti1Image]) -> None:
    """Write the script file of a case; its folder is there.

    Parameters
    ----------
    path : the file, .js
    case_id : what the page calls the case
    checksum : of the case's result
    volumes : key -> uint8 image of `display_image` or `display_map`
    """
    head = json.dumps({"format": FORMAT, "checksum": checksum, "volumes": list(volumes)})
    lines = [f"{_HEAD}{head} */", f"ddmdReport.receive({json.dumps(case_id)}, {{"]
    for key, image in volumes.items():
        content = base64.b64encode(compressed(image.to_bytes())).decode("ascii")
        lines.append(f"{json.dumps(key)}: {json.dumps(content)},")
    write_text(path, "\n".join([*lines, "});", ""]))


def read_info(path: Path) -> ScriptInfo | None:
    """What a script file was made from; None where there is none, or none that this version reads."""
    try:
        with open(path, encoding="ascii") as file:
            line = file.readline(1 << 12)
        values = json.loads(line.removeprefix(_HEAD).removesuffix("*/\n"))
        if line.startswith(_HEAD) and values["format"] == FORMAT:
            return ScriptInfo(FORMAT, str(values["checksum"]), tuple(map(str, values["volumes"])))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
