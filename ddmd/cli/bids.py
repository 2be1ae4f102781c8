"""`ddmd BIDS_DIR OUT participant|group`: the BIDS App."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli import console, startup
from ddmd.cli.cohort_options import CohortSettings, plan_options, takes_settings
from ddmd.cli.cohort_run import log_file, run_cohort, write_page
from ddmd.cli.entry import SOME_FAILED, bad_usage
from ddmd.cli.options import set_threads

LEVELS = ("participant", "group")
LABEL_OPTIONS = {
    "--participant-label": "--participant-label",
    "--participant_label": "--participant-label",
    "--session-label": "--session-label",
    "--session_label": "--session-label",
}


def bids_app_arguments(arguments: Sequence[str], commands: Collection[str]) -> list[str]:
    """Arguments in the form of BIDS Apps as arguments of the command `bids`; others as they are.

    The form is known by its third argument. A label option takes all labels that follow it.

    Examples
    --------
    >>> bids_app_arguments(["in", "out", "participant", "--participant_label", "01", "02"], ["detect"])
    ['bids', 'in', 'out', 'participant', '--participant-label', '01', '--participant-label', '02']
    """
    given = list(arguments)
    if given[:1] == ["bids"]:
        given = given[1:]
    elif not (len(given) >= 3 and given[2] in LEVELS and given[0] not in commands):
        return given
    result, option, labels = ["bids"], "", 0
    for argument in given:
        name, equals, value = argument.partition("=")
        if name in LABEL_OPTIONS:
            option, labels = LABEL_OPTIONS[name], 0
            if equals:
                result += [option, value]
                labels = 1
            continue
        if option and not argument.startswith("-"):
            result += [option, argument]
            labels += 1
            continue
        if option and not labels:
            result.append(option)  # without a label: refused as an option without its value
        option = ""
        result.append(argument)
    return [*result, option] if option and not labels else result


@takes_settings
def command(
    bids_dir: Annotated[Path, typer.Argument(metavar="BIDS_DIR", help="A BIDS data set.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the derivatives.")],
    level: Annotated[str, typer.Argument(metavar="LEVEL", help="participant, then group.")],
    settings: CohortSettings,
    participant_label: Annotated[
        list[str] | None,
        typer.Option(
            "--participant-label", metavar="LABEL...", help="Only these participants, with or without sub-."
        ),
    ] = None,
    session_label: Annotated[
        list[str] | None,
        typer.Option(
            "--session-label", metavar="LABEL...", help="Only these sessions, with or without ses-."
        ),
    ] = None,
) -> None:
    """Find lesions in a BIDS data set, and write BIDS derivatives.

    Also called as ddmd BIDS_DIR OUT LEVEL. The level participant works on images, the level group writes one
    table of all results.
    """
    set_threads(settings.threads)
    if level not in LEVELS:
        raise bad_usage(f"LEVEL is {level!r}; allowed are {', '.join(LEVELS)}")
    if not bids_dir.is_dir():
        raise bad_usage(f"{bids_dir}: no such folder; name a BIDS data set")
    options = plan_options(settings)
    with startup.quick_imports():
        from ddmd.cohort.bids import plan_bids

    participants, sessions = tuple(participant_label or ()), tuple(session_label or ())
    if level == "group":
        _group(bids_dir, output, settings)
        return
    with log_file(settings.log):
        run_cohort(lambda: plan_bids(bids_dir, output, participants, sessions, **options), output, settings)


def _group(bids_dir: Path, output: Path, settings: CohortSettings) -> None:
    with startup.quick_imports():
        from ddmd.cohort.bids import write_group_tables
        from ddmd.cohort.discovery import find_cases
        from ddmd.cohort.errors import DatasetError
        from ddmd.io.results import OutputError

    try:
        done, failed = write_group_tables(output)
        cases = find_cases(bids_dir, "bids", annotations=False) if settings.report else ()
    except (DatasetError, OutputError) as error:
        console.error(error)
        raise typer.Exit(SOME_FAILED) from None
    if settings.json:
        console.json_value({"Done": done, "Failed": failed, "Table": str(output / "cohort.tsv")})
    elif not settings.quiet:
        console.say(
            f"{done} image{'' if done == 1 else 's'} with a result, {failed} without: {output / 'cohort.tsv'}"
        )
    if settings.report:
        write_page(output, cases, settings)
