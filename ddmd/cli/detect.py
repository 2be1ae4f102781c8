"""`ddmd detect`: find lesions in volumes, and write maps, tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli.cohort_run import cohort_options, log_file, run_cohort
from ddmd.cli.entry import bad_usage
from ddmd.cli.options import (
    Bias,
    Brain,
    Debug,
    Devices,
    DicomSeg,
    Draws,
    Engine,
    Eta,
    Fast,
    Json,
    LogFile,
    Maps,
    Overwrite,
    Part,
    Precision,
    Quality,
    Quiet,
    Report,
    Resample,
    Sampler,
    Samples,
    Seed,
    Sequence,
    SkipExisting,
    Skull,
    Steps,
    Stop,
    Strip,
    Threads,
    Threshold,
    Weights,
    set_threads,
)


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the results.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IN...", help="One volume, its sequences, or folders (NIfTI or DICOM)."),
    ] = None,
    more_inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", metavar="IN", help="The same; may be given more than once."),
    ] = None,
    weights: Weights = "flair-image-labels",
    samples: Samples = None,
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Eta = None,
    stop: Stop = None,
    quality: Quality = None,
    fast: Fast = False,
    draws: Draws = False,
    seed: Seed = 0,
    threshold: Threshold = None,
    sequence: Sequence = None,
    resample: Resample = False,
    skull: Skull = "auto",
    bias: Bias = "auto",
    strip: Strip = False,
    brain: Brain = None,
    maps: Maps = None,
    dicom_seg: DicomSeg = None,
    device: Devices = "auto",
    engine: Engine = "threads",
    precision: Precision = "auto",
    threads: Threads = None,
    skip_existing: SkipExisting = False,
    overwrite: Overwrite = False,
    part: Part = None,
    report: Report = False,
    log: LogFile = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find lesions: maps, a table and a picture of each volume.

    Maps are on the grid of the input. Of several volumes, cohort.tsv has a row each, failures.tsv those that
    failed, and run.json the options. The same command goes on with a run that was cut off.
    """
    set_threads(threads)
    sources = [*(inputs or ()), *(more_inputs or ())]
    if not sources:
        raise bad_usage("no input; name a volume, its sequences, or folders")
    if fast and quality not in (None, "fast"):
        raise bad_usage(f"--fast and --quality {quality} exclude each other; give one")
    options = cohort_options(
        weights=weights, samples=samples, steps=steps, sampler=sampler, seed=seed, threshold=threshold,
        sequence=sequence, resample=resample, skull=skull, bias=bias, maps=maps, device=device, engine=engine,
        eta=eta, stop=stop, quality="fast" if fast else quality, draws=draws,
        precision=precision, skip_existing=skip_existing, overwrite=overwrite, part=part,
        strip=strip, brain=brain, dicom_seg=dicom_seg,
    )  # fmt: skip
    from ddmd.cohort.pipeline import plan_cohort

    with log_file(log):
        run_cohort(
            lambda: plan_cohort(sources, output, **options), quiet, json, report=output if report else None
        )
