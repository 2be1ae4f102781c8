"""`ddmd detect`: find lesions in volumes, and write maps, tables and pictures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddmd.cli import console
from ddmd.cli.entry import SOME_FAILED, bad_usage
from ddmd.cli.options import (
    Debug,
    Device,
    Json,
    Overwrite,
    Quiet,
    Samples,
    Steps,
    Threads,
    Weights,
    device_name,
    set_threads,
)

if TYPE_CHECKING:
    from ddmd.cohort.cases import Case
    from ddmd.inference.detection import Detection
    from ddmd.inference.detector import Detector, Prepared

SHOWN_LESIONS = 10
SKULL, BIAS = ("auto", "on", "off"), ("auto", "off", "on", "n4")


@dataclass(frozen=True)
class Request:
    """What the user asked for, but for the cases."""

    output: Path
    overwrite: bool
    maps: tuple[str, ...] | None
    check_all: bool  # whether the grids of sequences that the weights do not need must agree, too
    reading: dict[str, Any] = field(default_factory=dict)
    computing: dict[str, Any] = field(default_factory=dict)


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the results.")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="IN...", help="One volume, its sequences, or folders.")
    ] = None,
    more_inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", metavar="IN", help="The same; may be given more than once."),
    ] = None,
    weights: Weights = "flair-image-labels",
    samples: Samples = None,
    steps: Steps = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", metavar="NAME", help="ddim, ddpm or dpm++2m.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="The same seed gives the same result.")
    ] = 0,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="P", help="Probability from which a voxel is lesion."),
    ] = None,
    sequence: Annotated[
        str | None, typer.Option("--sequence", metavar="NAME", help="What a file is whose name does not say.")
    ] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring sequences onto one grid first.")
    ] = False,
    skull: Annotated[
        str, typer.Option("--skull", metavar="WHEN", help="Whether the skull is on: auto, on or off.")
    ] = "auto",
    bias: Annotated[
        str, typer.Option("--bias", metavar="HOW", help="Correction of the bias field: auto, off, on or n4.")
    ] = "auto",
    maps: Annotated[
        str | None,
        typer.Option("--maps", metavar="NAMES", help="Maps to write, joined by commas; by default all."),
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="auto, float32 or bfloat16.")
    ] = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find lesions: maps, a table and a picture of each volume.

    Maps are on the grid of the input. A case whose results are there, from the same input, weights and options, is not done again.
    """
    set_threads(threads)
    from ddmd.cohort.discovery import find_cases
    from ddmd.cohort.errors import DatasetError
    from ddmd.cohort.naming import output_stems
    from ddmd.inference.detection import OutputError, check_maps
    from ddmd.io.volume import SEQUENCES, VolumeError
    from ddmd.models.checkpoint import WeightsError

    sources = [*(inputs or ()), *(more_inputs or ())]
    if not sources:
        raise bad_usage("no input; name a volume, its sequences, or folders")
    for option, value, allowed in (
        ("--sequence", sequence, SEQUENCES), ("--skull", skull, SKULL), ("--bias", bias, BIAS),
    ):  # fmt: skip
        if value is not None and value not in allowed:
            raise bad_usage(f"{option} is {value!r}; allowed are {', '.join(allowed)}")
    if threshold is not None and not 0 < threshold < 1:
        raise bad_usage(f"--threshold is {threshold}; allowed are values between 0 and 1")
    chosen = {"resample": resample or None, "skull": skull, "bias": bias}
    try:
        wanted = None if maps is None else check_maps([name.strip() for name in maps.split(",")])
    except ValueError as error:
        raise bad_usage(f"--{error}") from None
    request = Request(
        output,
        overwrite,
        wanted,
        check_all=all(path.is_file() for path in sources),
        reading={k: v for k, v in chosen.items() if v not in (None, "auto")},
        computing={
            "samples": samples,
            "steps": steps,
            "sampler": sampler,
            "seed": seed,
            "threshold": threshold,
        },
    )
    try:
        detector = _load(weights, device_name(device), precision)
        options = _options(detector, request, sequence)
    except (WeightsError, ValueError) as error:
        raise bad_usage(error) from None
    try:
        needed = detector.description.sequences
        cases = find_cases(sources, require=needed, sequence=sequence, annotations=False)
    except (DatasetError, VolumeError) as error:
        console.error(error)
        raise typer.Exit(SOME_FAILED) from None
    stems = output_stems(case.name for case in cases)
    try:
        todo = [case for case in cases if not _is_done(case, stems[case.name], request, options)]
    except OutputError as error:
        raise bad_usage(error) from None
    if not quiet and not json:
        for note in cases.notes:
            console.note(note)
        for case in cases:
            if case not in todo:
                console.say(f"{case.name}: done before, with the same input, weights and options")
    failed = _detect_all(todo, stems, detector, request, options, quiet, json)
    if failed:
        if len(cases) > 1:
            console.error(f"{failed} of {len(cases)} volumes failed")
        raise typer.Exit(SOME_FAILED)


def _load(weights: str, device: str, precision: str) -> Detector:
    from ddmd.inference.detector import Detector

    return Detector.load(weights, device, precision)


def _options(detector: Detector, request: Request, sequence: str | None) -> dict[str, Any]:
    """All that decides a result but the input, in words that JSON keeps."""
    import dataclasses

    import ddmd

    config = {k: v for k, v in request.computing.items() if k != "threshold"}
    sampling = dataclasses.asdict(detector.sampling_config(**config))
    sampling.pop("batch", None)  # changes the time, not the result
    return {
        "Version": ddmd.__version__,
        "WeightsSha256": detector.weights_sha256,
        "Precision": str(detector.system.dtype),
        "Sampling": sampling,
        "Criteria": dataclasses.asdict(detector.lesion_criteria(request.computing["threshold"])),
        "Reading": {**request.reading, "sequence": sequence},
        "Maps": None if request.maps is None else sorted(request.maps),
    }


def _fingerprint(case: Case, options: dict[str, Any]) -> str:
    """SHA-256 over the options and the content of a case's files."""
    from ddmd.io.results import file_sha256
    from ddmd.io.text import json_line

    files = sorted(
        (sequence, [file_sha256(path) for path in paths]) for sequence, paths in case.files.items()
    )
    return hashlib.sha256(json_line([options, files]).encode()).hexdigest()


def _is_done(case: Case, stem: str, request: Request, options: dict[str, Any]) -> bool:
    """Whether this very result is there already. Raises OutputError where another one is in the way."""
    from ddmd.io.results import check_output, read_result

    if not request.overwrite:
        check_output(stem, request.output, True)
        earlier = read_result(stem, request.output)
        try:
            if earlier is not None and earlier.get("Fingerprint") == _fingerprint(case, options):
                return True
        except OSError:
            pass  # the input cannot be read: it fails as a case
    check_output(stem, request.output, request.overwrite)
    return False


@dataclass(frozen=True)
class _Ready:
    prepared: Prepared
    fingerprint: str


def _detect_all(
    cases: Sequence[Case],
    stems: dict[str, str],
    detector: Detector,
    request: Request,
    options: dict[str, Any],
    quiet: bool,
    json: bool,
) -> int:
    """Detect one case after another; how many failed."""
    from ddmd.inference.prefetch import prefetch

    def prepare(case: Case) -> _Ready:
        volume = case.volume(detector.description.sequences, check_all=request.check_all, **request.reading)
        return _Ready(detector.prepare(volume), _fingerprint(case, options))

    failed = 0
    with console.progress(not quiet and not json) as bar:
        for case, ready in prefetch(cases, prepare):
            begun = time.monotonic()
            bar.start(case.name)
            try:
                case_input = ready()
                detection = detector.detect(case_input.prepared, progress=bar.update, **request.computing)
                paths = detection.save(
                    request.output,
                    overwrite=request.overwrite,
                    maps=request.maps,
                    overlay=True,
                    extra={"Fingerprint": case_input.fingerprint},
                    stem=stems[case.name],
                )
            except Exception as failure:
                bar.stop()
                failed += 1
                source = ", ".join(str(paths[0]) for paths in case.files.values())
                words = console.explain(failure, source)
                console.debug_traceback(failure)
                console.error(f"{case.name}: {words}")
                if json:
                    console.json_value({"name": case.name, "error": type(failure).__name__, "message": words})
                continue
            bar.stop()
            if json:
                console.json_value(
                    {**detection.description(), "Files": {k: str(p) for k, p in paths.items()}}
                )
            elif not quiet:
                _report(detection, paths, time.monotonic() - begun)
    return failed


def _report(detection: Detection, paths: dict[str, Path], seconds: float) -> None:
    for note in detection.notes:
        console.note(note)
    console.say(f"{detection.name}: {detection.summary} ({seconds:.1f} s)")
    if detection.lesions:
        rows = [
            (
                number, f"{lesion.volume_ml:.2f}", "{:.0f}, {:.0f}, {:.0f}".format(*lesion.centre_mm),
                f"{lesion.peak_probability:.2f}", f"{lesion.mean_probability:.2f}", f"{lesion.mean_uncertainty:.3f}",
            )
            for number, lesion in enumerate(detection.lesions[:SHOWN_LESIONS], 1)
        ]  # fmt: skip
        console.table(("lesion", "ml", "centre (mm, RAS)", "peak p", "mean p", "mean variance"), rows)
        if len(detection.lesions) > SHOWN_LESIONS:
            console.say(
                f"and {len(detection.lesions) - SHOWN_LESIONS} smaller ones, in {paths['lesions'].name}"
            )
    for what, path in paths.items():
        console.say(f"  {what.replace('_', ' ')}: {path}")
