"""Options that several commands share."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from ddmd.cli import startup
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
Quality = Annotated[
    str | None,
    typer.Option("--quality", metavar="NAME", help="fast (posterior mean) or draws (masks, intervals)."),
]
Draws = Annotated[
    bool, typer.Option("--draws", help="Keep the drawn masks: --quality draws, and its masks in files.")
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
    with startup.quick_imports():
        import torch

    torch.set_num_threads(threads)
