"""Makes `import ddmd` register `torch.ops.ddmd.*` without importing torch, which takes seconds.

Where torch is imported already, the ops are registered at once. Otherwise a finder on `sys.meta_path`
waits for the first import of torch, lets it run as it would have, registers the ops and goes away.
It answers for the name "torch" alone, with the spec that the other finders give.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_ops() -> None:
    """Import `ddmd.ops`, which registers them; a failure is a warning, and an error once they are used."""
    try:
        importlib.import_module("ddmd.ops")
    except Exception as error:  # `import torch` of a program that only has ddmd installed goes on
        warnings.warn(f"torch.ops.ddmd is not registered: {type(error).__name__}: {error}", stacklevel=2)


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Finds torch where the others do, and registers the ops after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                self._register_after(spec)
                return spec
        return None

    def _register_after(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None:
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # this one was the instance's own; the class has torch's
            execute(module)
            if self in sys.meta_path:  # the first import, not a reload
                sys.meta_path.remove(self)
                register_ops()

        loader.exec_module = exec_module  # type: ignore[method-assign]


def register_with_torch() -> None:
    """Register the ops now, or right after torch is first imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        if not any(isinstance(finder, _TorchFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _TorchFinder())
    elif not getattr(getattr(torch, "__spec__", None), "_initializing", False):
        register_ops()
