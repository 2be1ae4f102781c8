"""Stacks of PNG slices as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddmd.cohort.errors import DatasetError

MAX_PIXELS = 4096 * 4096  # of one slice


def read_stack(paths: Sequence[Path]) -> np.ndarray:
    """Read PNG slices, from the feet up, as one array.

    Parameters
    ----------
    paths : PNG files of one size, grey; of colour, the first channel is taken.

    Returns
    -------
    float32 (X, Y, Z), 0 to 255 whatever the bit depth; rows run to the back and columns to the patient's left.

    Raises
    ------
    DatasetError
        If a slice cannot be read or is of another size.
    """
    planes = [_plane(path) for path in paths]
    for path, plane in zip(paths, planes, strict=True):
        if plane.shape != planes[0].shape:
            raise DatasetError(
                f"{path}: {plane.shape[1]}x{plane.shape[0]} pixels, and {paths[0].name} has "
                f"{planes[0].shape[1]}x{planes[0].shape[0]}; slices of one patient have one size"
            )
    return np.ascontiguousarray(np.stack(planes, -1)[::-1, ::-1].transpose(1, 0, 2))


def _plane(path: Path) -> np.ndarray:
    from PIL import Image

    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise DatasetError(f"{path}: {what}; copy the slice again, or correct labels.csv")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels")
            values: np.ndarray = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    except Exception as error:  # Pillow raises many kinds for a file that is not its own
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise DatasetError(f"{path}: not a readable PNG ({reason}); copy it again") from None
    values = values if values.ndim == 2 else values[..., 0]
    if values.dtype == np.bool_:
        return values.astype(np.float32) * 255
    if values.dtype == np.uint8:
        return values.astype(np.float32)
    return values.astype(np.float32) / np.float32(65535) * 255
