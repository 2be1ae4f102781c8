"""What `ddmd detect` and `ddmd bids` share: checking options, running a cohort, and printing what comes of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ddmd.cli import console
from ddmd.cli.entry import BAD_USAGE, SOME_FAILED, bad_usage, require_extra
from ddmd.cli.options import device_name

if TYPE_CHECKING:
    from ddmd.cohort.pipeline import CohortRun
    from ddmd.cohort.work import Outcome, Task

SHOWN_LESIONS = 10
CHOICES = {
    "skull": ("auto", "on", "off"),
    "bias": ("auto", "off", "on", "n4"),
    "sequence": ("flair", "t1", "t1ce", "t2"),
    "engine": ("threads", "ray"),
}


def cohort_options(
    *,
    sequence: str | None,
    threshold: float | None,
    resample: bool,
    skull: str,
    bias: str,
    maps: str | None,
    part: str | None,
    device: str,
    engine: str,
    strip: bool = False,
    brain: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The options of `plan_cohort`, of those of the command line; the command ends where one is wrong."""
    given = {"skull": skull, "bias": bias, "sequence": sequence, "engine": engine}
    for name, value in given.items():
        if value is not None and value not in CHOICES[name]:
            raise bad_usage(f"--{name} is {value!r}; allowed are {', '.join(CHOICES[name])}")
    if threshold is not None and not 0 < threshold < 1:
        raise bad_usage(f"--threshold is {threshold}; allowed are values between 0 and 1")
    if engine == "ray":
        require_extra("ray", ("ray",))
    if strip:
        require_extra("strip", ("deepbet",))
    if brain is not None and not brain.is_file():
        raise bad_usage(f"--brain is {str(brain)!r}, which is no file; name a mask on the grid of the image")
    return {
        **options,
        "sequence": sequence,
        "threshold": threshold,
        "reading": {
            "resample": resample or None,
            "skull": skull,
            "bias": bias,
            "strip": strip,
            "brain": brain,
        },
        "maps": _map_names(maps),
        "part": _part(part),
        "device": device_name(device),
        "engine": engine,
    }


def _map_names(text: str | None) -> tuple[str, ...] | None:
    from ddmd.inference.detection import check_maps

    try:
        return None if text is None else check_maps([name.strip() for name in text.split(",")])
    except ValueError as error:
        raise bad_usage(f"--{error}") from None


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return (1, 1)
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text, re.ASCII)
    i, n = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= i <= n:
        raise bad_usage(f"--part is {text!r}; write i/n, counted from 1, as 1/8")
    return i, n


@contextmanager
def log_file(path: Path | None) -> Iterator[None]:
    """Write what the cohort logs to a file, too; the command ends where that cannot be written."""
    if path is None:
        yield
        return
    logger = logging.getLogger("ddmd.cohort")
    try:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise bad_usage(f"--log {path}: cannot be written to ({error.strerror})") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    except BaseException as ending:
        if not (isinstance(ending, typer.Exit) and ending.exit_code in (0, SOME_FAILED, BAD_USAGE)):
            logger.error("ended by %s", type(ending).__name__)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()


def run_cohort(
    plan: Callable[[], CohortRun],
    quiet: bool,
    json: bool,
    before_work: Callable[[], object] | None = None,
    report: Path | None = None,
) -> None:
    """Plan a cohort and do it; print each result; end the command with its exit code.

    Parameters
    ----------
    plan : makes the run
    quiet, json : print nothing but errors; print JSON
    before_work : called when the plan is made
    report : folder of the results, whose page `ddmd report` writes at the end; None for no page
    """
    from ddmd.cohort.errors import DatasetError
    from ddmd.io.errors import VolumeError
    from ddmd.io.results import OutputError
    from ddmd.models.checkpoint import WeightsError

    try:
        run = plan()
    except (DatasetError, VolumeError) as error:
        console.error(error)
        raise typer.Exit(SOME_FAILED) from None
    except (OutputError, WeightsError, ValueError) as error:
        raise bad_usage(error) from None
    if before_work is not None:
        before_work()
    _print_earlier(run, quiet, json)
    with console.progress(not quiet and not json) as bar:
        several = len(run.tasks) > 1
        if run.tasks:
            bar.start(f"{len(run.tasks)} cases" if several else run.tasks[0].case.name)
        outcomes = run.outcomes(None if several else lambda _, done, total: bar.update(done, total))
        for count, (task, outcome) in enumerate(outcomes, 1):
            if outcome.failure is not None:
                _print_failure(task, outcome, json)
            elif outcome.summary is not None:
                _print_result(task, outcome.summary, run, quiet, json)
            if several:
                bar.update(count, len(run.tasks))
    if report is not None:
        _write_report(run, report, quiet, json)
    if run.failures:
        if len(run.cases) > 1:
            console.error(f"{len(run.failures)} of {len(run.cases)} volumes failed")
        raise typer.Exit(SOME_FAILED)


def _write_report(run: CohortRun, folder: Path, quiet: bool, json: bool) -> None:
    from ddmd.report.page import write_report

    if not folder.is_dir():  # nothing was written: a single image that failed
        return
    written = write_report(folder, run.cases)
    if not quiet and not json:
        console.say(f"report: {written.page}")


def _print_earlier(run: CohortRun, quiet: bool, json: bool) -> None:
    if quiet or json:
        return
    for note in run.notes:
        console.note(note)
    for name in run.done:
        console.say(f"{name}: done before, with the same input, weights and options")


def _print_failure(task: Task, outcome: Outcome, json: bool) -> None:
    failure = outcome.failure
    assert failure is not None
    words = failure.reason
    if not failure.explained:
        source = ", ".join(str(paths[0]) for paths in task.case.files.values())
        words = f"{failure.error}{'' if words == 'no message' else f': {words}'} ({source})"
    console.debug_text(failure.traceback)
    console.error(f"{task.case.name}: {words}")
    if json:
        console.json_value({"name": task.case.name, "error": failure.error, "message": words})


def _print_result(task: Task, summary: Mapping[str, Any], run: CohortRun, quiet: bool, json: bool) -> None:
    from ddmd.io.results import result_paths

    paths = result_paths(task.stem, task.folder, run.options.naming)
    paths = {what: path for what, path in paths.items() if path.exists()}
    if json:
        described = {key: value for key, value in summary.items() if key != "LesionTable"}
        console.json_value({**described, "Files": {what: str(path) for what, path in paths.items()}})
        return
    if quiet:
        return
    for note in summary["Notes"]:
        console.note(note)
    count = summary["Lesions"]
    console.say(
        f"{task.case.name}: {count} lesion{'' if count == 1 else 's'}, {summary['LesionMl']:.1f} ml, "
        f"score {summary['Score']:.2f} ({summary['Seconds']:.1f} s)"
    )
    lesions = summary["LesionTable"]
    if lesions:
        rows = [
            (
                row["lesion"], f"{row['volume_ml']:.2f}",
                ", ".join(f"{row[f'{axis}_mm']:.0f}" for axis in "xyz"),
                f"{row['peak_probability']:.2f}", f"{row['mean_probability']:.2f}", f"{row['mean_uncertainty']:.3f}",
            )
            for row in lesions[:SHOWN_LESIONS]
        ]  # fmt: skip
        console.table(("lesion", "ml", "centre (mm, RAS)", "peak p", "mean p", "mean variance"), rows)
        if len(lesions) > SHOWN_LESIONS:
            console.say(f"and {len(lesions) - SHOWN_LESIONS} smaller ones, in {paths['lesions'].name}")
    for what, path in paths.items():
        console.say(f"  {what.replace('_', ' ')}: {path}")
