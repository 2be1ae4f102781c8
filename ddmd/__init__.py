"""Lesions in brain MRI by discrepancy distribution medical diffusion (DDMD), from image-level labels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddmd.detection import Detection, OutputError
    from ddmd.detector import Detector, detect
    from ddmd.evaluation import evaluate
    from ddmd.training import train
    from ddmd.volume import Volume, VolumeError
    from ddmd.weights import WeightsError

# What `ddmd.<name>` is and where it lives: loaded when first asked for, so that importing is quick.
_FACE = {
    "Detection": "ddmd.detection",
    "Detector": "ddmd.detector",
    "OutputError": "ddmd.detection",
    "Volume": "ddmd.volume",
    "VolumeError": "ddmd.volume",
    "WeightsError": "ddmd.weights",
    "detect": "ddmd.detector",
    "evaluate": "ddmd.evaluation",
    "train": "ddmd.training",
}
__all__ = [
    "Detection", "Detector", "OutputError", "Volume", "VolumeError", "WeightsError", "detect", "evaluate", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'ddmd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_FACE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
