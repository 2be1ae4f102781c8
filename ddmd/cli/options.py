"""Options that several commands share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli.entry import bad_usage

MAX_THREADS = 256  # the runtime of OpenMP dies without a word where the system gives no more

Weights = Annotated[
    str, typer.Option("--weights", metavar="NAME|FILE", help="Name of a shipped system, or a weights file.")
]
Samples = Annotated[int | None, typer.Option("--samples", metavar="S", help="Masks drawn for each slice.")]
Steps = Annotated[int | None, typer.Option("--steps", metavar="N", help="Denoising steps of each mask.")]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, gpu, gpu:N, cuda, cuda:N or N.")
]
Devices = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", help="auto, cpu, gpu, gpu:N or N; several joined by commas; or all."
    ),
]
Engine = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="threads, or ray for a cluster (RAY_ADDRESS).")
]
Precision = Annotated[str, typer.Option("--precision", metavar="NAME", help="auto, float32 or bfloat16.")]
Sampler = Annotated[str | None, typer.Option("--sampler", metavar="NAME", help="ddim, ddpm or dpm++2m.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same result.")]
Threshold = Annotated[
    float | None,
    typer.Option("--threshold", metavar="P", help="Probability from which a voxel is lesion."),
]
Sequence = Annotated[
    str | None, typer.Option("--sequence", metavar="NAME", help="What a file is whose name does not say.")
]
Resample = Annotated[bool, typer.Option("--resample", help="Bring sequences onto one grid first.")]
Skull = Annotated[
    str, typer.Option("--skull", metavar="WHEN", help="Whether the skull is on: auto, on or off.")
]
Bias = Annotated[
    str, typer.Option("--bias", metavar="HOW", help="Correction of the bias field: auto, off, on or n4.")
]
Strip = Annotated[bool, typer.Option("--strip", help="Strip the skull where it is on (needs ddmd[strip]).")]
Brain = Annotated[
    Path | None,
    typer.Option("--brain", metavar="FILE", help="Brain mask on the image's grid, made by any program."),
]
DicomSeg = Annotated[
    bool | None,
    typer.Option(
        "--dicom-seg/--no-dicom-seg",
        help="Whether DICOM Segmentations are written, which name the patient; by default for DICOM input.",
    ),
]
Maps = Annotated[
    str | None,
    typer.Option("--maps", metavar="NAMES", help="Maps to write, joined by commas; by default all."),
]
Report = Annotated[
    bool, typer.Option("--report", help="Write report.html with a viewer, too; see ddmd report.")
]
SkipExisting = Annotated[
    bool,
    typer.Option(
        "--skip-existing", help="Also replace results that are incomplete or of an input that has changed."
    ),
]
Part = Annotated[
    str | None,
    typer.Option("--part", metavar="I/N", help="Only the I-th of N parts of the cases, counted from 1."),
]
Eta = Annotated[
    float | None, typer.Option("--eta", metavar="E", help="Noise of DDIM: 0 at the start, 1 at every step.")
]
Stop = Annotated[
    float | None,
    typer.Option("--stop", metavar="SHARE", help="Of the schedule, where steps end; 0 goes all the way."),
]
Quality = Annotated[
    str | None,
    typer.Option("--quality", metavar="NAME", help="fast (posterior mean) or draws (masks, intervals)."),
]
Fast = Annotated[bool, typer.Option("--fast", help="The posterior mean in one step: --quality fast.")]
Draws = Annotated[bool, typer.Option("--draws", help="Keep the drawn masks, and measure them.")]
LogFile = Annotated[
    Path | None, typer.Option("--log", metavar="FILE", help="Write what happens to a file, too.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="CPU threads to compute with; by default all cores."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace earlier results.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (or set DDMD_DEBUG=1).")]


def device_name(device: str) -> str:
    """A device as torch names it: gpu is cuda, and a number is the CUDA device of that number.

    Several are joined by commas.
    """
    if "," in device:
        return ",".join(device_name(one) for one in device.split(","))
    text = device.strip().lower()
    if re.fullmatch(r"\d+", text):
        return f"cuda:{text}"
    return re.sub(r"^gpu(?=$|:)", "cuda", text)


def set_threads(threads: int | None) -> None:
    """Compute with so many CPU threads; called before anything else imports torch."""
    if threads is None:
        return
    if not 1 <= threads <= MAX_THREADS:
        raise bad_usage(f"--threads is {threads}; allowed are 1 to {MAX_THREADS}")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
