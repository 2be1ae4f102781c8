"""`ddmd detect`: find lesions in volumes, and write maps, tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli import startup
from ddmd.cli.cohort_options import CohortSettings, plan_options, takes_settings
from ddmd.cli.cohort_run import log_file, run_cohort
from ddmd.cli.entry import bad_usage
from ddmd.cli.options import set_threads


@takes_settings
def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the results.")],
    settings: CohortSettings,
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IN", help="One volume, its sequences, or folders (NIfTI or DICOM)."),
    ] = None,
    more_inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", metavar="IN", help="The same; may be given more than once."),
    ] = None,
    sequence: Annotated[
        str | None,
        typer.Option("--sequence", metavar="NAME", help="What a file is whose name does not say."),
    ] = None,
    brain: Annotated[
        Path | None,
        typer.Option("--brain", metavar="FILE", help="Brain mask on the image's grid, made by any program."),
    ] = None,
    dicom_seg: Annotated[
        bool | None,
        typer.Option(
            "--dicom-seg/--no-dicom-seg",
            help="Whether DICOM Segmentations are written, which name the patient; by default for DICOM input.",
        ),
    ] = None,
) -> None:
    """Find lesions: maps, a table and a picture of each volume.

    Maps are on the grid of the input. Of several volumes, cohort.tsv has a row each, failures.tsv those that
    failed, and run.json the options. The same command goes on with a run that was cut off.
    """
    set_threads(settings.threads)
    sources = [*(inputs or ()), *(more_inputs or ())]
    if not sources:
        raise bad_usage("no input; name a volume, its sequences, or folders")
    options = plan_options(settings, sequence=sequence, brain=brain, dicom_seg=dicom_seg)
    with startup.quick_imports():
        from ddmd.cohort.pipeline import plan_cohort

    with log_file(settings.log):
        run_cohort(lambda: plan_cohort(sources, output, **options), output, settings)
