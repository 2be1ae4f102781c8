"""Lesions in brain MRI by discrepancy distribution medical diffusion (DDMD), from image-level labels."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ddmd import _moved
from ddmd._register_ops import register_with_torch

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddmd.cohort.pipeline import detect_cohort
    from ddmd.evaluation.evaluate import evaluate
    from ddmd.inference.detection import Detection, OutputError
    from ddmd.inference.detector import Detector, detect
    from ddmd.io.volume import Volume, VolumeError
    from ddmd.models.checkpoint import WeightsError
    from ddmd.training import train

# What `ddmd.<name>` is and where it lives: loaded when first asked for, so that importing is quick.
_FACE = {
    "Detection": "ddmd.inference.detection",
    "Detector": "ddmd.inference.detector",
    "OutputError": "ddmd.inference.detection",
    "Volume": "ddmd.io.volume",
    "VolumeError": "ddmd.io.volume",
    "WeightsError": "ddmd.models.checkpoint",
    "detect": "ddmd.inference.detector",
    "detect_cohort": "ddmd.cohort.pipeline",
    "evaluate": "ddmd.evaluation.evaluate",
    "train": "ddmd.training",
}
__all__ = [
    "Detection", "Detector", "OutputError", "Volume", "VolumeError", "WeightsError", "detect",
    "detect_cohort", "evaluate", "train",
]  # fmt: skip


register_with_torch()
_moved.install()
logging.getLogger("ddmd").addHandler(logging.NullHandler())  # messages go where the program sends them


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'ddmd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_FACE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
