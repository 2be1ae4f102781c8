"""Options that `ddmd detect` and `ddmd bids` share: declared once, checked once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ddmd.cli.entry import bad_usage, require_extra
from ddmd.cli.options import (
    Debug,
    Draws,
    Json,
    Overwrite,
    Quality,
    Quiet,
    Samples,
    Steps,
    Threads,
    Weights,
    device_name,
)

CHOICES = {
    "skull": ("auto", "on", "off"),
    "bias": ("auto", "off", "on", "n4"),
    "sequence": ("flair", "t1", "t1ce", "t2"),
    "engine": ("threads", "ray"),
}


@dataclass(frozen=True)
class CohortSettings:
    """What the command line says of a run over one case or many; each field is an option."""

    weights: Weights = "flair-image-labels"
    samples: Samples = None
    steps: Steps = None
    sampler: Annotated[
        str | None, typer.Option("--sampler", metavar="NAME", help="ddim, ddpm or dpm++2m.")
    ] = None
    eta: Annotated[
        float | None,
        typer.Option("--eta", metavar="E", help="Noise of DDIM: 0 at the start, 1 at every step."),
    ] = None
    stop: Annotated[
        float | None,
        typer.Option("--stop", metavar="SHARE", help="Of the schedule, where steps end; 0 goes all the way."),
    ] = None
    quality: Quality = None
    fast: Annotated[bool, typer.Option("--fast", help="The posterior mean in one step: --quality fast.")] = (
        False
    )
    draws: Draws = False
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same result.")] = 0
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", metavar="P", help="Probability from which a voxel is lesion; large ones reach on."
        ),
    ] = None
    resample: Annotated[bool, typer.Option("--resample", help="Bring sequences onto one grid first.")] = False
    skull: Annotated[
        str, typer.Option("--skull", metavar="WHEN", help="Whether the skull is on: auto, on or off.")
    ] = "auto"
    strip: Annotated[
        bool, typer.Option("--strip", help="Strip the skull where it is on (needs ddmd[strip]).")
    ] = False
    bias: Annotated[
        str,
        typer.Option("--bias", metavar="HOW", help="Correction of the bias field: auto, off, on or n4."),
    ] = "auto"
    maps: Annotated[
        str | None,
        typer.Option("--maps", metavar="NAMES", help="Maps to write, joined by commas; by default all."),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="DEVICE", help="auto, cpu, gpu, gpu:N or N; several joined by commas; or all."
        ),
    ] = "auto"
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="threads, or ray for a cluster (RAY_ADDRESS).")
    ] = "threads"
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="auto, float32 or bfloat16.")
    ] = "auto"
    threads: Threads = None
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Also replace results that are incomplete or of an input that has changed.",
        ),
    ] = False
    overwrite: Overwrite = False
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Only the I-th of N parts of the cases, counted from 1."),
    ] = None
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html with a viewer, too; see ddmd report.")
    ] = False
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Write what happens to a file, too.")
    ] = None
    quiet: Quiet = False
    json: Json = False
    debug: Debug = False


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `CohortSettings` in place of its parameter `settings`.

    Parameters
    ----------
    command : a function with a parameter `settings`, and others with annotations of typer

    Returns
    -------
    A function whose signature has the fields of `CohortSettings` instead.
    """
    hints = get_type_hints(command, include_extras=True)
    setting_hints = get_type_hints(CohortSettings, include_extras=True)
    names = [field.name for field in fields(CohortSettings)]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "settings":
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=setting_hints[field.name],
                )
                for field in fields(CohortSettings)
            ]
        else:
            parameters.append(
                parameter.replace(
                    kind=inspect.Parameter.KEYWORD_ONLY,
                    annotation=hints.get(parameter.name, parameter.annotation),
                )
            )

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        settings = CohortSettings(**{name: given.pop(name) for name in names})
        command(**given, settings=settings)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return expanded


def plan_options(
    settings: CohortSettings,
    *,
    sequence: str | None = None,
    brain: Path | None = None,
    dicom_seg: bool | None = None,
) -> dict[str, Any]:
    """The options of `ddmd.cohort.pipeline.plan_cohort`; ends the command where a setting is wrong.

    Parameters
    ----------
    settings : what the command line says
    sequence, brain, dicom_seg : what only `ddmd detect` takes
    """
    given = {
        "skull": settings.skull,
        "bias": settings.bias,
        "sequence": sequence,
        "engine": settings.engine,
    }
    for name, value in given.items():
        if value is not None and value not in CHOICES[name]:
            raise bad_usage(f"--{name} is {value!r}; allowed are {', '.join(CHOICES[name])}")
    if settings.threshold is not None and not 0 < settings.threshold < 1:
        raise bad_usage(f"--threshold is {settings.threshold}; allowed are values between 0 and 1")
    if settings.fast and settings.quality not in (None, "fast"):
        raise bad_usage(f"--fast and --quality {settings.quality} exclude each other; give one")
    if settings.engine == "ray":
        require_extra("ray", ("ray",))
    if settings.strip:
        require_extra("strip", ("deepbet",))
    if brain is not None and not brain.is_file():
        raise bad_usage(f"--brain is {str(brain)!r}, which is no file; name a mask on the grid of the image")
    return {
        "weights": settings.weights,
        "samples": settings.samples,
        "steps": settings.steps,
        "sampler": settings.sampler,
        "eta": settings.eta,
        "stop": settings.stop,
        "quality": "fast" if settings.fast else settings.quality,
        "draws": settings.draws,
        "seed": settings.seed,
        "precision": settings.precision,
        "skip_existing": settings.skip_existing,
        "overwrite": settings.overwrite,
        "sequence": sequence,
        "threshold": settings.threshold,
        "reading": {
            "resample": settings.resample or None,
            "skull": settings.skull,
            "bias": settings.bias,
            "strip": settings.strip,
            "brain": brain,
        },
        "maps": _map_names(settings.maps),
        "part": _part(settings.part),
        "device": device_name(settings.device),
        "engine": settings.engine,
        "dicom_seg": dicom_seg,
    }


def _map_names(text: str | None) -> tuple[str, ...] | None:
    from ddmd.inference.detection import check_maps

    try:
        return None if text is None else check_maps([name.strip() for name in text.split(",")])
    except ValueError as error:
        raise bad_usage(f"--{error}") from None


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return (1, 1)
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
    i, n = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= i <= n:
        raise bad_usage(f"--part is {text!r}; write i/n, counted from 1, as 1/8")
    return i, n
