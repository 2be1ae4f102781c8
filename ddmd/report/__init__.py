"""One offline HTML page of a folder of results: a table of the cases, and a viewer of their volumes."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_OLD = "ddmd.evaluation.report"  # what this module's name stood for in 0.1


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    old = importlib.import_module(_OLD)
    if not hasattr(old, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} is now {_OLD}.{name}; the old name goes in the next release",
        FutureWarning,
        stacklevel=2,
    )
    return getattr(old, name)
