"""`ddmd evaluate`: compare detections with the annotators' masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli import console, startup
from ddmd.cli.entry import SOME_FAILED, bad_usage, require_extra
from ddmd.cli.options import (
    Debug,
    Device,
    Json,
    Overwrite,
    Quality,
    Quiet,
    Samples,
    Steps,
    Threads,
    Weights,
    device_name,
    set_threads,
)

EXTRA = ("sklearn", "monai", "matplotlib")


def command(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Slices with labels.csv, or volumes, with masks.")
    ],
    weights: Weights = "flair-image-labels",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the report.")
    ] = Path("evaluation"),
    patients: Annotated[
        Path | None,
        typer.Option("--patients", metavar="FILE", help="split.json of a run: only its test part."),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout", metavar="NAME", help="Of the data: auto, slices, volumes, brats, bids or table."
        ),
    ] = "auto",
    samples: Samples = None,
    steps: Steps = None,
    quality: Quality = None,
    device: Device = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare detections with the annotators' masks.

    The single threshold and the empty mask stand beside.
    """
    set_threads(threads)
    require_extra("evaluate", EXTRA)
    with startup.quick_imports():
        from ddmd.evaluation.evaluate import evaluate
        from ddmd.evaluation.summary import FIGURE_COLUMNS

    try:
        report = evaluate(
            data, weights=weights, out=output, split=patients, device=device_name(device), samples=samples,
            steps=steps, layout=layout, overwrite=overwrite, quality=quality,
        )  # fmt: skip
    except ValueError as error:
        raise bad_usage(error) from None
    if json:
        console.json_value({"pooled": report.pooled, "intervals": report.intervals, "output": output})
    elif not quiet:
        for note in report.provenance["notes"]:
            console.note(note)
        count = len(report.patients)
        console.say(f"{count} patient{'' if count == 1 else 's'}")
        console.table(FIGURE_COLUMNS, report.figure_rows())
        console.say(f"report: {output / 'report.html'}")
    for failure in report.failures:
        console.error(f"{failure.case}: {failure.error}: {failure.message}")
    if report.failures:
        raise typer.Exit(SOME_FAILED)
