"""A quick start and end of the command line: what a short process need not do."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType

IMPORT_THRESHOLD = (
    100_000  # new objects before the garbage collector looks; with Python's 700, imports take 0.2 s more
)

HUGE_PAGES = (
    "THP_MEM_ALLOC_ENABLE",
    "1",
)  # torch asks Linux for pages of 2 MB, as numpy does: half the page faults


class _WithoutPydicom(MetaPathFinder):
    """While nibabel is imported, there is no pydicom: it would import it for extensions that we never read."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if fullname == "pydicom" and _is_initialising("nibabel"):
            raise ModuleNotFoundError("not needed by nibabel here", name="pydicom")


def _is_initialising(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def begin() -> None:
    """Make imports and large tensors quick: for a process of our own, never for a program that imports ddmd."""
    sys.meta_path.insert(0, _WithoutPydicom())
    os.environ.setdefault(*HUGE_PAGES)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import quickly: the garbage collector rests meanwhile, and afterwards never looks at what is there then.

    How often it looks is as before at the end.
    """
    before = gc.get_threshold()
    gc.set_threshold(IMPORT_THRESHOLD)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)


def end() -> None:
    """The process ends: what is still there is left to the system, not looked through and freed piece by piece.

    Where Triton is loaded, Python cleans up as usual: Triton's bindings print what is left.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()
