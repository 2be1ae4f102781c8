"""The C++ ops for tensors: pointers and strides go in, the module `ddmd._C` does the work."""

from __future__ import annotations

try:
    from ddmd import _C
except ImportError as error:
    _C = None
    _REASON: str | None = f"the extension ddmd._C is not built ({error}); run pip install ."
else:
    _REASON = None


def why_not(device: str = "cpu") -> str | None:
    """Why the C++ ops do not serve a device, or None where they do."""
    if _C is not None and device == "cuda" and not _C.build_info()["cuda"]:
        return "ddmd._C was built without CUDA; set DDMD_CUDA=ON and install again"
    return _REASON
