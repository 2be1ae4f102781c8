"""Ours and its rivals on the same slices, in turn, round by round, so that a stopped comparison goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.rivals import OURS, Rivals, compared, difference
from benchmarks.timing import cost
from ddmd.inference.session import SamplingConfig
from ddmd.inference.slices import Slices

TOLERANCE = 0.1  # largest `difference` at which two loops count as doing the same work

Stored = dict[
    str, Any
]  # "first_s" by name, "rounds": a list of {name: [wall, CPU seconds]}, "missing": reasons


def compare(
    rivals: Rivals,
    slices: Slices,
    config: SamplingConfig,
    names: Sequence[str],
    rounds: int,
    stored: Stored | None = None,
    keep: Callable[[Stored], None] = lambda stored: None,
    end: float = float("inf"),
) -> Stored:
    """Measure ours and some rivals, `rounds` times in turn.

    All sides do the same work: slices on the CPU in, four maps on the CPU out. The first call of each side is apart
    from the rounds: it compiles, captures and fills caches. A rival whose probabilities from the same x_T differ
    from ours is not measured.

    Parameters
    ----------
    rivals : Rivals
    slices, config : what is computed; the configuration is brought to what all sides can do
    names : of `rivals.NAMES`, ours first
    rounds : in all, those stored included
    stored : what an earlier run gave, with the same names
    keep : called after each round with all that is known
    end : time.monotonic() after which no further round begins
    """
    config = compared(config)
    result: Stored = stored or {"first_s": {}, "rounds": [], "missing": {}}
    if len(result["rounds"]) >= rounds or time.monotonic() > end:
        return result
    device = rivals.system.device.type
    work: dict[str, Callable[[], object]] = {}
    expected = None
    for name in names:
        if name in result["missing"]:
            continue
        if work and time.monotonic() > end:
            return result
        begun = time.perf_counter()
        try:
            check, run = rivals.work(name, slices, config)
            maps = check()
        except Exception as error:  # a rival that does not run here is reported as missing
            if name == OURS:
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            result["first_s"].setdefault(name, time.perf_counter() - begun)
            expected = maps.probability if expected is None else expected
            apart = difference(maps.probability, expected)
            reason = (
                ""
                if apart <= TOLERANCE
                else f"its probabilities differ from ours by {apart:.3f} of their sum"
            )
        if reason:
            result["missing"][name] = reason
        else:
            work[name] = run
        print(f"  {name}: {reason or f'{time.perf_counter() - begun:.2f} s the first time'}", flush=True)
        keep(result)
    if device == "cuda":  # the measured form, once: it may be captured or compiled apart
        for run in work.values():
            run()
    while len(result["rounds"]) < rounds and time.monotonic() < end:
        result["rounds"].append({name: list(cost(run, device)) for name, run in work.items()})
        keep(result)
        seconds = ", ".join(f"{name} {cpu:.2f}" for name, (_, cpu) in result["rounds"][-1].items())
        print(f"  round {len(result['rounds'])} of {rounds}, CPU seconds: {seconds}", flush=True)
    return result


def medians(stored: Stored) -> dict[str, dict[str, float]]:
    """Of each side the median wall and CPU seconds, and the median over the rounds of its time over ours.

    Examples
    --------
    >>> medians({"rounds": [{"ours": [1.0, 0.5], "MONAI": [3.0, 2.0]}]})["MONAI"]
    {'wall_s': 3.0, 'cpu_s': 2.0, 'wall_ratio': 3.0, 'cpu_ratio': 4.0}
    """
    rounds = stored["rounds"]
    figures: dict[str, dict[str, float]] = {}
    for name in rounds[0] if rounds else ():
        of_name = figures[name] = {}
        for position, clock in enumerate(("wall", "cpu")):
            of_name[f"{clock}_s"] = statistics.median(one[name][position] for one in rounds)
        for position, clock in enumerate(("wall", "cpu")):
            ratios = [one[name][position] / max(one[OURS][position], 1e-9) for one in rounds]
            of_name[f"{clock}_ratio"] = statistics.median(ratios)
    return figures
