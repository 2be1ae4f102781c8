"""The command `ddmd`: detect, info, phantom, train, evaluate."""

from __future__ import annotations

import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ddmd.io.text import printable

app = typer.Typer(
    help="Lesions in brain MRI by discrepancy distribution medical diffusion. For research, not diagnosis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

SOME_FAILED, BAD_USAGE = 1, 2


def _bad_usage(message: object) -> typer.Exit:
    err.print(f"[red]error[/red]: {message}", markup=True)
    return typer.Exit(BAD_USAGE)


@app.command()
def detect(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="One volume, its sequences, or folders.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the results.")],
    weights: Annotated[
        str, typer.Option(help="Name of a shipped system, or a weights file.")
    ] = "flair-image-labels",
    samples: Annotated[int | None, typer.Option(help="S, masks drawn for each slice.")] = None,
    steps: Annotated[int | None, typer.Option(help="N, denoising steps of each.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm or dpm++2m.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threshold: Annotated[float | None, typer.Option(help="Probability from which a voxel is lesion.")] = None,
    sequence: Annotated[str | None, typer.Option(help="What a file is whose name does not say.")] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring sequences onto one grid first.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier results.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Find lesions: maps on the input's grid, a table of lesions and a picture of each volume."""
    from ddmd.cohort.discovery import find_cases
    from ddmd.cohort.errors import DatasetError
    from ddmd.inference.detection import OutputError, check_output
    from ddmd.inference.detector import Detector
    from ddmd.inference.prefetch import prefetch
    from ddmd.io.volume import SEQUENCES, VolumeError
    from ddmd.models.checkpoint import WeightsError

    if sequence is not None and sequence not in SEQUENCES:
        raise _bad_usage(f"--sequence is {sequence!r}; allowed are {', '.join(SEQUENCES)}")
    if threshold is not None and not 0 < threshold < 1:
        raise _bad_usage(f"--threshold is {threshold}; allowed are values between 0 and 1")
    try:
        detector = Detector.load(weights, device, precision)
        detector.sampling_config(samples, steps, sampler, seed)
        needed = detector.description.sequences
        found = find_cases(inputs, require=needed, sequence=sequence, annotations=False)
        for case in found:
            check_output(case.name, output, overwrite)
    except (VolumeError, WeightsError, OutputError, ValueError) as error:
        raise _bad_usage(error) from None
    if not quiet:
        for note in found.notes:
            out.print("[yellow]note[/yellow]:", Text(note))

    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = not quiet and out.is_terminal
    with Progress(*columns, console=out, disable=not shown, transient=True) as progress:
        prepare = partial(_prepare, detector, resample or None, all(path.is_file() for path in inputs))
        for case, prepared in prefetch(found, prepare):
            task = progress.add_task(case.name, total=None)
            begun = time.monotonic()

            def on_slices(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            try:
                _one(
                    prepared(), detector, output, overwrite, quiet, begun,
                    samples=samples, steps=steps, sampler=sampler, seed=seed, threshold=threshold,
                    progress=on_slices,
                )  # fmt: skip
            except (VolumeError, DatasetError, OutputError) as error:
                failed += 1
                err.print(f"[red]error[/red]: {case.name}: {error}")
            finally:
                progress.remove_task(task)
    if failed:
        if len(found) > 1:
            err.print(f"{failed} of {len(found)} volumes failed")
        raise typer.Exit(SOME_FAILED)


def _prepare(detector: Any, resample: bool | None, check_all: bool, case: Any) -> Any:
    """A case's volume, read and cut into slices."""
    needed = detector.description.sequences
    return detector.prepare(case.volume(needed, resample=resample, check_all=check_all))


def _one(
    prepared: Any, detector: Any, output: Path, overwrite: bool, quiet: bool, begun: float, **options: Any
) -> None:
    volume, detection = prepared.volume, detector.detect(prepared, **options)
    paths = detection.save(output, overwrite=overwrite, overlay=True)
    if quiet:
        return
    for note in detection.notes:
        out.print(f"[yellow]note[/yellow]: {note}")
    total = sum(lesion.volume_ml for lesion in detection.lesions)
    out.print(
        f"{volume.name}: {len(detection.lesions)} lesions, {total:.1f} ml, score {detection.score:.2f} "
        f"({time.monotonic() - begun:.1f} s)"
    )
    if detection.lesions:
        table = Table("lesion", "ml", "centre (mm, RAS)", "peak p", "mean p", "mean variance")
        for number, lesion in enumerate(detection.lesions[:10], 1):
            x, y, z = lesion.centre_mm
            table.add_row(
                str(number), f"{lesion.volume_ml:.2f}", f"{x:.0f}, {y:.0f}, {z:.0f}",
                f"{lesion.peak_probability:.2f}", f"{lesion.mean_probability:.2f}",
                f"{lesion.mean_uncertainty:.3f}",
            )  # fmt: skip
        out.print(table)
        if len(detection.lesions) > 10:
            out.print(f"and {len(detection.lesions) - 10} smaller ones, in {paths['lesions'].name}")
    for what, path in paths.items():
        out.print(f"  {what.replace('_', ' ')}: {path}")


@app.command()
def info() -> None:
    """Versions, what is compiled in, devices, which backend serves which op, and the weights."""
    import numpy
    import torch

    import ddmd
    from ddmd import ops
    from ddmd.models import checkpoint
    from ddmd.ops import native

    out.print(f"ddmd {ddmd.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
              f"numpy {numpy.__version__}")  # fmt: skip
    build = native.build_info()
    if build:
        cuda = f"CUDA {build['cuda']} for sm_{build['cuda_architectures']}" if build["cuda"] else "no CUDA"
        out.print(f"built with {build['compiler']}, {', '.join(build['simd'])}; {cuda}")
    else:
        out.print(f"not built: {native.why_not()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    out.print(f"devices: cpu ({torch.get_num_threads()} threads){''.join(f', {d}' for d in devices)}")
    if not devices:
        out.print("no CUDA device: the cuda column says what would serve")
    table = Table("op", "cpu", "cuda", "why not faster")
    for op in ops.OPS:
        served = [ops.serving(op, device) for device in ("cpu", "cuda")]
        why = "; ".join(sorted({reason for _, reason in served if reason}))
        table.add_row(op, *(name for name, _ in served), why)
    out.print(table)
    for name in checkpoint.available():
        d = checkpoint.describe(checkpoint.find(name))
        out.print(f"weights {name}: takes {', '.join(d.sequences)}; from {checkpoint.find(name)}")
        for key, value in d.training.items():
            out.print(f"  {key}: {value}")


@app.command()
def phantom(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="Which phantom.")] = 0,
    healthy: Annotated[bool, typer.Option("--healthy", help="Without lesions.")] = False,
    spacing: Annotated[float, typer.Option(help="Voxel size in mm.")] = 1.0,
) -> None:
    """Write a made-up brain with known lesions: t1, t1ce, t2, flair and the exact mask."""
    from ddmd.data.phantom import phantom as make
    from ddmd.data.phantom import write

    made = make(seed=seed, spacing_mm=spacing, lesions=0 if healthy else 3)
    for what, path in write(made, output, f"phantom-{seed}").items():
        out.print(f"{what}: {path}")


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file; see ddmd/training/light.toml.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
) -> None:
    """Train a system, or go on with a run that was killed."""
    import logging

    from ddmd.training import train as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        out.print(f"weights: {run(config, output)}")
    except ValueError as error:
        raise _bad_usage(error) from None


@app.command()
def evaluate(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Slices with labels.csv, or volumes, with masks.")
    ],
    weights: Annotated[
        str, typer.Option(help="Name of a shipped system, or a weights file.")
    ] = "flair-image-labels",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder.")] = Path(
        "evaluation"
    ),
    patients: Annotated[Path | None, typer.Option(help="split.json of a run: only its test part.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    samples: Annotated[int | None, typer.Option(help="S, masks drawn for each slice.")] = None,
    steps: Annotated[int | None, typer.Option(help="N, denoising steps of each.")] = None,
    layout: Annotated[
        str, typer.Option(help="Of the data: auto, slices, volumes, brats, bids or table.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evaluation.")] = False,
) -> None:
    """Compare detections with the annotators' masks, beside the single threshold and the empty mask."""
    from ddmd.evaluation.evaluate import evaluate as run

    try:
        report = run(
            data, weights=weights, out=output, split=patients, device=device, samples=samples, steps=steps,
            layout=layout, overwrite=overwrite,
        )  # fmt: skip
    except ValueError as error:
        raise _bad_usage(error) from None
    out.print(report.table())
    for failure in report.failures:
        line = f"{printable(failure.case)}: {failure.error}: {printable(failure.message)}"
        err.print(Text(line, style="red"))
    if report.failures:
        raise typer.Exit(SOME_FAILED)


def main() -> None:
    """Entry point of the `ddmd` command."""
    app()
