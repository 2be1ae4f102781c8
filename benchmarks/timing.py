"""Medians of rivals measured in turn, in one run, with the buffers they reuse made beforehand."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Work = Callable[[], object]


def _seconds(work: Work, device: str, calls: int) -> float:
    """Seconds a call. Several calls on a GPU are timed by its own clock: launching hides behind running."""
    if device != "cuda" or calls == 1:
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def alternate(
    rivals: dict[str, Work], device: str, rounds: int = 15, calls: int = 1, warm: int = 3
) -> dict[str, float]:
    """Median seconds of each rival; every round runs all of them, `calls` times, one after the other."""
    for work in rivals.values():
        for _ in range(warm):
            work()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, work in rivals.items():
            times[name].append(_seconds(work, device, calls))
    return {name: statistics.median(t) for name, t in times.items()}


def agree(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """Refuse to report a figure of an op that does not agree with its reference."""
    error = float(((ours.double() - reference.double()).abs() / (1 + reference.double().abs())).max())
    if not error <= tolerance:
        raise RuntimeError(f"the op is off by {error:.1e} from the reference (tolerance {tolerance:.0e})")


def machine() -> str:
    """A short name of the processor or GPU, for file names."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*:\s*(.+)", text)
        name = f"{found[1] if found else platform.machine()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
