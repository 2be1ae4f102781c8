"""Running a cohort for `ddmd detect` and `ddmd bids`, and printing what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ddmd.cli import console, startup
from ddmd.cli.entry import BAD_USAGE, SOME_FAILED, bad_usage

if TYPE_CHECKING:
    from ddmd.cli.cohort_options import CohortSettings
    from ddmd.cohort.cases import Case
    from ddmd.cohort.pipeline import CohortRun
    from ddmd.cohort.work import Outcome, Task

SHOWN_LESIONS = 10


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


def run_cohort(plan: Callable[[], CohortRun], output: Path, settings: CohortSettings) -> None:
    """Plan a cohort and do it; print each result; end the command with its exit code.

    Parameters
    ----------
    plan : makes the run
    output : folder of the results
    settings : what to print, and whether the page of all results is written at the end
    """
    quiet, json = settings.quiet, settings.json
    with startup.quick_imports():
        from ddmd.cohort.errors import DatasetError
        from ddmd.io.errors import VolumeError
        from ddmd.io.results import OutputError
        from ddmd.models.checkpoint import WeightsError

    try:
        with startup.quick_imports():  # it imports more
            run = plan()
    except (DatasetError, VolumeError) as error:
        console.error(error)
        raise typer.Exit(SOME_FAILED) from None
    except (OutputError, WeightsError, ValueError) as error:
        raise bad_usage(error) from None
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
    if settings.report and output.is_dir():  # a single image that failed leaves no folder
        write_page(output, run.cases, settings)
    if run.failures:
        if len(run.cases) > 1:
            console.error(f"{len(run.failures)} of {len(run.cases)} volumes failed")
        raise typer.Exit(SOME_FAILED)


def write_page(folder: Path, cases: Sequence[Case], settings: CohortSettings) -> None:
    """Write the page of all results of a folder, as `ddmd report` does.

    Parameters
    ----------
    folder : of the results
    cases : whose images the page shows
    settings : what to print
    """
    with startup.quick_imports():
        from ddmd.report.page import ReportError, write_report

    try:
        written = write_report(folder, cases)
    except ReportError as failure:
        console.error(failure)
        raise typer.Exit(SOME_FAILED) from None
    if not settings.quiet and not settings.json:
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
