"""Medians of rivals measured in turn, in one run, with the buffers they reuse made beforehand."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import timer

Work = Callable[[], object]


def _seconds(work: Work, device: str, calls: int) -> float:
    """Seconds a call, the mean of `calls`: by torch.utils.benchmark's clock, or on a GPU by its own."""
    if device == "cuda" and calls > 1:  # launching hides behind running, as it does in use
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    begun = timer()  # waits for the device
    for _ in range(calls):
        work()
    return (timer() - begun) / calls


def cost(work: Work, device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call; CPU seconds are those of all threads of this process.

    Wall seconds count other work on the machine, too; CPU seconds hardly do.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


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


def machine(device: str = "auto", threads: int | None = None) -> str:
    """A short name of the processor or GPU, for file names.

    Parameters
    ----------
    device : "cpu", "cuda", or "auto" for a GPU where there is one
    threads : of a CPU that were used, by default torch's
    """
    if device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*:\s*(.+)", text)
        threads = torch.get_num_threads() if threads is None else threads
        name = f"{found[1] if found else platform.machine()} {threads} thread{'s' if threads > 1 else ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
