"""`ddmd phantom`: a made-up brain with known lesions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddmd.cli import console, startup
from ddmd.cli.entry import bad_usage, require_extra
from ddmd.cli.options import Debug


def command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which phantom.")] = 0,
    healthy: Annotated[bool, typer.Option("--healthy", help="Without lesions.")] = False,
    spacing: Annotated[float, typer.Option("--spacing", metavar="MM", help="Voxel size.")] = 1.0,
    debug: Debug = False,
) -> None:
    """Write a made-up brain with known lesions.

    Its files are t1, t1ce, t2, flair and the exact mask.
    """
    require_extra("phantom", ("nilearn",))
    with startup.quick_imports():
        from ddmd.data.phantom import phantom, write

    if seed < 0:
        raise bad_usage(f"--seed is {seed}; allowed is 0 or more")
    if output.exists() and not output.is_dir():
        raise bad_usage(f"{output}: is a file; name a folder")
    try:
        made = phantom(seed=seed, spacing_mm=spacing, lesions=0 if healthy else 3)
    except ValueError as error:
        raise bad_usage(error) from None
    for what, path in write(made, output, f"phantom-{seed}").items():
        console.say(f"{what}: {path}")
