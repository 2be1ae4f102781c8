"""Skull stripping by deepbet, a network for head MRI whose weights come with its package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddmd.io.brain import BrainEstimate
from ddmd.io.errors import VolumeError

INSTALL = "pip install 'ddmd[strip]'"
THRESHOLD = 0.5  # of the network's probability, deepbet's own default
PLAUSIBLE_SHARE = (0.3, 2.0)  # of the volume inside the head's outline


def require_deepbet(label: str) -> None:
    """Raise VolumeError, saying what to install, where deepbet is missing.

    Parameters
    ----------
    label : what is to be stripped; the message begins with it
    """
    from importlib.util import find_spec

    if find_spec("deepbet") is None:
        raise VolumeError(f"{label}: to strip the skull needs deepbet; {INSTALL}")


def stripped(
    estimate: BrainEstimate, images: Mapping[str, np.ndarray], labels: Mapping[str, str]
) -> tuple[BrainEstimate, str]:
    """The brain after stripping, where the skull is on, and a note that says what was done.

    Parameters
    ----------
    estimate : where the brain is so far
    images : sequence -> (X, Y, Z) float32, finite, axes to the right, front and top
        The T1 is looked at, where there is one, else the first.
    labels : sequence -> what messages begin with

    Raises
    ------
    VolumeError
        As `strip_skull`, where the skull is on.
    """
    s = "t1" if "t1" in images else next(iter(images))
    if not estimate.skull_on:
        why = "a brain mask was given" if estimate.source == "given" else f"{estimate.describe()}"
        return estimate, f"{labels[s]}: not stripped: {why}"
    mask = strip_skull(images[s], estimate.mask, labels[s])
    return BrainEstimate(mask, False, 1.0, "stripped"), f"{labels[s]}: skull stripped by deepbet"


def strip_skull(values: np.ndarray, inside_head: np.ndarray, label: str) -> np.ndarray:
    """The brain in an image of a head with its skull (Fisch et al. 2024, doi:10.1016/j.compbiomed.2024.108845).

    The network was trained on T1 images; on FLAIR it agrees with manual masks, too. It computes on the CPU, and
    nothing is downloaded.

    Parameters
    ----------
    values : (X, Y, Z) float32, finite, axes to the right, front and top
    inside_head : bool (X, Y, Z), a rough estimate of the brain, to see that the result is one
    label : of the image; messages begin with it

    Returns
    -------
    bool (X, Y, Z)

    Raises
    ------
    VolumeError
        If deepbet is missing, or finds no brain or one of an implausible size.
    """
    require_deepbet(label)
    import torch

    with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        mask = _brain(np.ascontiguousarray(values, dtype=np.float32))
    share = 0.0 if mask is None else float(mask.sum()) / max(float(inside_head.sum()), 1.0)
    low, high = PLAUSIBLE_SHARE
    if mask is None or not low <= share <= high:
        found = "no brain" if not share else f"a brain of {share:.0%} of the inside of the head"
        raise VolumeError(
            f"{label}: deepbet finds {found}; strip it by another program, and give the mask "
            "by brain= (--brain)"
        )
    return mask


def _brain(values: np.ndarray) -> np.ndarray | None:
    from deepbet import BrainExtraction

    with warnings.catch_warnings(
        action="ignore", category=DeprecationWarning
    ):  # torch.jit, in which it is kept
        network: Any = BrainExtraction(no_gpu=True)  # it keeps the last image's box: one for each call
    try:
        mask: np.ndarray = network.run_model(values.copy()) > THRESHOLD
        return np.asarray(network.postprocess(mask) > 0)
    except (AssertionError, ValueError):  # how deepbet says that it finds nothing
        return None
