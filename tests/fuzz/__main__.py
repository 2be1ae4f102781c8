"""Runs mutants for a time: `python -m tests.fuzz --seconds 120 --seed N`; exits 1 where one fails.

Each mutant must end in success or in one line of an error of this library, within 20 s and 2 GiB. What fails
is kept under build/fuzz, with what was seen; `--only I` with the same seed runs that one again, with its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import ddmd
from ddmd.io.errors import VolumeError
from tests.fuzz import tables, volumes, weights
from tests.fuzz.mutants import Mutant

KINDS = {"volumes": volumes.mutant, "weights": weights.mutant, "tables": tables.mutant}
TURNS = ("volumes", "volumes", "volumes", "weights", "tables", "tables")  # by the time one takes
SECONDS, MEMORY = 20, 2 << 30
MUTANTS = 1000  # at least, whatever the time
SAVED = Path("build/fuzz")
OURS = str(Path(ddmd.__file__).parent)


def mutant_of(seed: int, number: int, kinds: list[str]) -> tuple[str, Mutant]:
    """The mutant of a number: always the same for a seed."""
    turns = [kind for kind in TURNS if kind in kinds]
    kind = turns[number % len(turns)]
    return kind, KINDS[kind](random.Random(f"{seed} {number} {kind}"))


def outcome_of(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """What became of a mutant: "success", "refused", or "fault" with what is wrong."""
    try:
        mutant.write(folder)
        mutant.use(folder)
    except AssertionError:
        return "fault", "wrong result without a word: " + traceback.format_exc()[-600:]
    except Exception as error:
        said = str(error)
        frames = traceback.extract_tb(error.__traceback__)
        if not isinstance(error, VolumeError) and not (
            isinstance(error, ValueError) and frames[-1].filename.startswith(OURS)
        ):
            return "fault", traceback.format_exc()[-1500:]
        if "\n" in said.strip() or not said.strip() or len(said) > 2000:
            return "fault", f"not one line: {said[:500]!r}"
        if "not enough memory" in said:
            return "fault", f"over {MEMORY} bytes: {said}"
        return "refused", said[:300]
    return "success", ""


def work(seed: int, numbers: range, kinds: list[str], pipe: int) -> None:
    """In a child: mutants one after another, each announced and then reported on as a line of JSON."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if sys.platform == "linux"
        else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with os.fdopen(pipe, "w") as report:
        for number in numbers:
            print(json.dumps({"begun": number}), file=report, flush=True)
            kind, mutant = mutant_of(seed, number, kinds)
            folder = Path(tempfile.mkdtemp(prefix="ddmd-fuzz-"))
            signal.alarm(SECONDS)
            try:
                outcome, said = outcome_of(mutant, folder)
            finally:
                signal.alarm(0)
                shutil.rmtree(folder, ignore_errors=True)
            print(
                json.dumps({"number": number, "kind": kind, "outcome": outcome, "said": said}),
                file=report,
                flush=True,
            )


def reports(seed: int, first: int, kinds: list[str], deadline: float, at_least: int) -> Any:
    """The reports of mutants from `first` on; a child that dies is a report of its own, and the next goes on."""
    number = first
    while time.monotonic() < deadline or number - first < at_least:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                work(seed, range(number, number + 200), kinds, writing)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(97)
        os.close(writing)
        begun = None
        with os.fdopen(reading) as lines:
            for line in lines:
                report = json.loads(line)
                begun = report.get("begun")
                if begun is None:
                    number = report["number"] + 1
                    yield report
                    if time.monotonic() >= deadline and number - first >= at_least:
                        break
        if begun is not None:  # it died
            _, status = os.waitpid(child, 0)
            kind, _ = mutant_of(seed, begun, kinds)
            code = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            said = (
                f"signal {signal.Signals(code).name}" if code else f"exit {os.waitstatus_to_exitcode(status)}"
            )
            yield {
                "number": begun,
                "kind": kind,
                "outcome": "fault",
                "said": said + f" (SIGALRM: over {SECONDS} s)" * (code == signal.SIGALRM),
            }
            number = begun + 1
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def save(seed: int, report: dict[str, Any], mutant: Mutant) -> Path:
    """Keep a mutant that failed, and what was seen."""
    folder = SAVED / f"{report['kind']}-{seed}-{report['number']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mutant.write(folder)
    (folder / "seen.txt").write_text(f"{mutant.what}\n{report['said']}\n", encoding="utf-8", errors="replace")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--mutants", type=int, default=MUTANTS, help="run at least so many")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these kinds")
    parser.add_argument("--only", type=int, help="run the mutant of this number in this process")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    torch.set_num_threads(1)
    if options.only is not None:
        kind, mutant = mutant_of(options.seed, options.only, kinds)
        print(f"{kind}: {mutant.what}")
        with tempfile.TemporaryDirectory() as folder:
            outcome, said = outcome_of(mutant, Path(folder))
        print(outcome, said)
        return int(outcome == "fault")
    print(f"fuzzing with seed {options.seed}", flush=True)
    begun = time.monotonic()
    counts: Counter[tuple[str, str]] = Counter()
    for report in reports(options.seed, 0, kinds, begun + options.seconds, options.mutants):
        counts[report["kind"], report["outcome"]] += 1
        if report["outcome"] == "fault":
            _, mutant = mutant_of(options.seed, report["number"], kinds)
            folder = save(options.seed, report, mutant)
            print(
                f"FAULT {report['number']} {mutant.what}: {report['said'].strip().splitlines()[-1][:200]} ({folder})",
                flush=True,
            )
    faults = sum(n for (_, outcome), n in counts.items() if outcome == "fault")
    print(f"{sum(counts.values())} mutants in {time.monotonic() - begun:.0f} s, seed {options.seed}, {faults} faults: "
          + ", ".join(f"{kind} {n} {outcome}" for (kind, outcome), n in sorted(counts.items())))  # fmt: skip
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
