"""What made a result and how far to trust it: weights, options, device, brain volume and quality flags."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ddmd
from ddmd.inference.image_noise import noise_share
from ddmd.inference.postprocess import UNCERTAIN, LesionCriteria
from ddmd.inference.session import SamplingConfig
from ddmd.io.volume import Volume
from ddmd.models.checkpoint import Description

FEW_SLICES = 12
NOISY_SHARE = 0.5  # of the brain's spread; in 21 images of ten sources it was 0.01 to 0.35
SMALL_FIELD_MM = 100.0  # a brain is about 130 mm high, 140 wide and 170 long


def provenance(
    description: Description,
    weights_sha256: str | None,
    device: torch.device,
    dtype: torch.dtype,
    sampling: SamplingConfig,
    criteria: LesionCriteria,
    volume: Volume,
    probability: NDArray[np.floating],
    seconds: float,
) -> dict[str, Any]:
    """What the JSON files of a result say of how it was made.

    Parameters
    ----------
    description : of the weights
    weights_sha256 : checksum of the weights file, None for weights that come from no file
    device, dtype : what the networks computed on and in
    sampling, criteria : the options, with the weights' defaults filled in
    volume : the input
    probability : (X, Y, Z), on the volume's canonical grid
    seconds : time that the computation took

    Returns
    -------
    dict
        JSON values alone; of paths, the base names.
    """
    return {
        "Version": ddmd.__version__,
        "Weights": description.name,
        "WeightsSha256": weights_sha256,
        "Sampling": dataclasses.asdict(sampling),
        "Threshold": criteria.threshold,
        "MinLesionMl": criteria.min_ml,
        "MinPeak": criteria.min_peak,
        "MinRelativeContrast": criteria.min_relative_contrast,
        "LargeLesionMl": criteria.large_ml,
        "OutlineShare": criteria.outline_share,
        "ThroughPlaneMm": description.through_plane_mm,
        "Sources": {sequence: os.path.basename(source) for sequence, source in volume.sources.items()},
        "Device": str(device),
        "Precision": str(dtype).removeprefix("torch."),
        "Seconds": round(seconds, 2),
        "BrainMl": round(float(volume.brain.sum()) * volume.voxel_volume_ml, 1),
        "Quality": quality(volume, probability),
    }


def without_folders(text: str, sources: Mapping[str, str]) -> str:
    """The text with the base names of the sources where it has their paths."""
    for source in sorted(sources.values(), key=len, reverse=True):
        text = text.replace(source, os.path.basename(source) or source)
    return text


def quality(volume: Volume, probability: NDArray[np.floating]) -> dict[str, Any]:
    """Figures that say how far to trust a result, and a flag for each that is out of the usual range.

    Parameters
    ----------
    volume : the input
    probability : (X, Y, Z), on the volume's canonical grid

    Returns
    -------
    {"Skull": bool, "SkullConfidence": float, "Slices": int, "FieldOfViewMm": [x, y, z], "Noise": float, "UncertainShare": float, "Flags": [str, ...]}
        Noise is the `noise_share` of the noisiest sequence. UncertainShare is, of the voxels more probable than the lower bound of `UNCERTAIN`, the share below the
        upper one. Flags are "skull", "few slices", "small field of view", "noise" and "uncertain".
    """
    brain = volume.brain
    slices = int(brain.any(axis=(0, 1)).sum())
    field = [round(float(n * mm), 1) for n, mm in zip(brain.shape, volume.spacing, strict=True)]
    possible = int(np.count_nonzero(probability >= UNCERTAIN[0]))
    sure = int(np.count_nonzero(probability >= UNCERTAIN[1]))
    share = (possible - sure) / possible if possible else 0.0
    noise = max(noise_share(image, brain) for image in volume.images.values())
    flags = {
        "skull": bool(volume.skull),
        "few slices": slices < FEW_SLICES,
        "small field of view": min(field) < SMALL_FIELD_MM,
        "noise": noise > NOISY_SHARE,
        "uncertain": share > 0.5,
    }
    return {
        "Skull": bool(volume.skull),
        "SkullConfidence": round(volume.skull_confidence, 3),
        "Slices": slices,
        "FieldOfViewMm": field,
        "Noise": round(noise, 3),
        "UncertainShare": round(share, 3),
        "Flags": [flag for flag, is_set in flags.items() if is_set],
    }
