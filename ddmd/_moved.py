"""Module paths of 0.1: importing one gives the module that took its place, with a FutureWarning, for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "ddmd.ahead": "ddmd.inference.prefetch",
    "ddmd.autoencoder": "ddmd.models.autoencoder",
    "ddmd.baselines": "ddmd.evaluation.baselines",
    "ddmd.bias_field": "ddmd.io.bias_field",
    "ddmd.cases": "ddmd.cohort.discovery",
    "ddmd.data.datasets": "ddmd.cohort.cases",
    "ddmd.denoiser": "ddmd.models.denoiser",
    "ddmd.detection": "ddmd.inference.detection",
    "ddmd.detector": "ddmd.inference.detector",
    "ddmd.discrepancy": "ddmd.models.discrepancy",
    "ddmd.ensemble": "ddmd.inference.ensemble",
    "ddmd.folding": "ddmd.models.fused_convolution",
    "ddmd.metrics": "ddmd.evaluation.metrics",
    "ddmd.native": "ddmd.ops.native",
    "ddmd.nifti": "ddmd.io.nifti",
    "ddmd.reference": "ddmd.ops.reference",
    "ddmd.registry": "ddmd.ops.registry",
    "ddmd.sampling": "ddmd.inference.session",
    "ddmd.slices": "ddmd.inference.slices",
    "ddmd.training.average": "ddmd.training.weight_average",
    "ddmd.training.extraction": "ddmd.io.brain_extraction",
    "ddmd.training.painting": "ddmd.training.lesion_painter",
    "ddmd.training.samples": "ddmd.training.prepared_case",
    "ddmd.training.start": "ddmd.training.initial_weights",
    "ddmd.volume": "ddmd.io.volume",
    "ddmd.weights": "ddmd.models.checkpoint",
}


# Names that are in another module now than the rest of their old one.
MOVED_NAMES = {
    "ddmd.data.datasets": {
        "LAYOUTS": "ddmd.cohort.discovery",
        "find_cases": "ddmd.cohort.discovery",
        "read_split": "ddmd.cohort.splits",
        "split_by_patient": "ddmd.cohort.splits",
        "write_split": "ddmd.cohort.splits",
    },
    "ddmd.diffusion": {
        "SAMPLERS": "ddmd.diffusion.samplers",
        "Schedule": "ddmd.diffusion.schedule",
        "pure_noise": "ddmd.diffusion.noise",
    },
}


def moved_name(module: str, name: str) -> Any:
    """A name of 0.1 that another module has now, with a FutureWarning; AttributeError where there is none."""
    new = MOVED_NAMES.get(module, {}).get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(
        f"{module}.{name} is now {new}.{name}; the old name goes in the next release",
        FutureWarning,
        stacklevel=3,
    )
    return getattr(importlib.import_module(new), name)


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(
            f"{old} is now {MOVED[old]}; the old name goes in the next release", FutureWarning, stacklevel=2
        )
        new = importlib.import_module(MOVED[old])
        if old not in MOVED_NAMES:
            sys.modules[old] = new
            return
        module.__dict__["__getattr__"] = lambda name: (
            moved_name(old, name) if name in MOVED_NAMES[old] else getattr(new, name)
        )


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
