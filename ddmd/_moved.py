"""Module paths of 0.1: importing one gives the module that took its place, with a FutureWarning, for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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
        sys.modules[old] = importlib.import_module(MOVED[old])


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
