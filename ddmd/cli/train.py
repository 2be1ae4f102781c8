"""`ddmd train`: train a system from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli import console, startup
from ddmd.cli.entry import bad_usage, require_extra
from ddmd.cli.options import Debug, Overwrite, Threads, set_threads

EXTRA = ("accelerate", "tensorboard")


def command(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file; see those in ddmd/training/recipes.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
    threads: Threads = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train a system, or go on with a run that was stopped.

    With --overwrite, an earlier run in the folder is removed, and training begins anew.
    """
    import logging
    import sys

    set_threads(threads)
    require_extra("train", EXTRA)
    with startup.quick_imports():
        from ddmd.training import train

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        console.say(f"weights: {train(config, output, overwrite=overwrite)}")
    except ValueError as error:
        raise bad_usage(error) from None
