"""`ddmd report`: one offline HTML page of a folder of results, with a viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli import console, startup
from ddmd.cli.entry import SOME_FAILED
from ddmd.cli.options import Debug, Json, Quiet


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that ddmd detect wrote to.")],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images", metavar="IN", help="The volumes or folders that were detected in, to show the images."
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Of the page; by default the folder's name.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a page of all results of a folder: a table, and a viewer of each case.

    It is OUT/report.html, with volumes in OUT/report_volumes; it opens in a browser and needs no network.
    """
    with startup.quick_imports():
        from ddmd.cohort.discovery import find_cases
        from ddmd.cohort.errors import DatasetError
        from ddmd.report.page import ReportError, write_report

    try:
        cases = find_cases(images, annotations=False) if images else ()
        with console.progress(not quiet and not json) as bar:
            bar.start("report")
            report = write_report(folder, cases, title=title, progress=bar.update)
            bar.stop()
    except (DatasetError, ReportError) as failure:
        console.error(failure)
        raise typer.Exit(SOME_FAILED) from None
    if json:
        console.json_value(
            {
                "page": str(report.page),
                "cases": report.cases,
                "failures": report.failures,
                "notes": report.notes,
            }
        )
    elif not quiet:
        for note in report.notes:
            console.note(note)
        console.say(f"{report.cases} case{'' if report.cases == 1 else 's'}, {report.failures} failed")
        console.say(f"report: {report.page}")
