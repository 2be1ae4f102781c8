"""Devices by the names that people use."""

from __future__ import annotations

import torch

from ddmd import validation

DEVICES = "auto, cpu, cuda, cuda:N, and gpu for cuda"


def pick_device(device: str | int | torch.device) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, "gpu" is CUDA, and a number its index.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    name = str(device)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{name}" if name.isdecimal() else name
    if name == "gpu" or name.startswith("gpu:"):
        name = name.replace("gpu", "cuda", 1)
    try:
        picked = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {validation.shown(device)}; allowed are {DEVICES}") from None
    if picked.type not in ("cpu", "cuda") or (picked.type == "cpu" and picked.index):
        raise ValueError(f"device is {validation.shown(device)}; allowed are {DEVICES}")
    if picked.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {str(device)!r} and torch sees no CUDA device; use cpu")
        if (picked.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {str(device)!r}; torch sees {torch.cuda.device_count()} CUDA devices"
            )
    return picked
