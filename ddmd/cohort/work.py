"""The work on one case of a cohort: reading, computing, writing, and what comes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ddmd
from ddmd.cohort.cases import Case
from ddmd.inference.detection import DRAWS_INTERVAL, Detection
from ddmd.inference.detector import Detector, Prepared
from ddmd.inference.session import SamplingConfig
from ddmd.io.results import Naming, file_sha256
from ddmd.io.text import json_line, printable

Progress = Callable[[str, int, int], None]  # (case, slices done, slices in all)


@dataclass(frozen=True)
class CaseError:
    """Why a case has no result.

    Parameters
    ----------
    case : its name
    file : base name of its first image
    error : type of the exception, as "VolumeError"
    reason : its message, in one line
    explained : whether the message names the file and says what to do, as those of ddmd do
    traceback : for developers
    """

    case: str
    file: str
    error: str
    reason: str
    explained: bool = False
    traceback: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, case: Case, exception: BaseException) -> CaseError:
        """The failure of a case by an exception."""
        explained = type(exception).__module__.split(".")[0] == "ddmd"
        lines = [line.strip() for line in str(exception).splitlines() if line.strip()]
        reason = str(exception) if explained else lines[0] if lines else ""
        if not reason:
            reason = "out of memory" if isinstance(exception, MemoryError) else "no message"
        first = next(iter(case.files.values()))[0]
        return cls(
            case.name,
            printable(first.name),
            type(exception).__name__,
            printable(reason),
            explained,
            "".join(traceback.format_exception(exception)),
        )


@dataclass(frozen=True)
class Task:
    """A case, and where its result goes.

    Parameters
    ----------
    case : Case
    stem : what the names of its files begin with
    folder : of its files
    replace : whether an earlier result is replaced
    extra : further keys of its JSON files
    """

    case: Case
    stem: str
    folder: Path
    replace: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Parameters
    ----------
    summary : what the JSON of the result says, or None where there is no result
    failure : why there is none
    detection : the result itself, where it was asked for
    """

    summary: Mapping[str, Any] | None = None
    failure: CaseError | None = None
    detection: Detection | None = None


@dataclass(frozen=True)
class SystemFacts:
    """What of a loaded system decides a result, and where it computes."""

    weights: str
    sha256: str | None
    precision: str
    device: str

    @classmethod
    def of(cls, detector: Detector) -> SystemFacts:
        """The facts of a detector."""
        precision = str(detector.system.dtype).removeprefix("torch.")
        return cls(detector.description.name, detector.weights_sha256, precision, str(detector.system.device))


@dataclass(frozen=True)
class CohortOptions:
    """What is done with each case.

    Parameters
    ----------
    sampling, threshold : as they are given to `Detector.detect`, the weights' defaults filled in
    maps : names of the maps that are written
    overlay : whether the picture is written
    reading : options of `Volume.read`
    check_all : whether the grids of sequences that the weights do not need must agree, too
    naming : how the maps are called
    dicom_seg : as `Detection.save` takes it
    keep_detections : whether outcomes hold the detections
    quality : as `Detector.detect` takes it; its sampling is filled in
    """

    sampling: SamplingConfig
    threshold: float
    maps: tuple[str, ...]
    overlay: bool = True
    reading: Mapping[str, Any] = field(default_factory=dict)
    check_all: bool = False
    naming: Naming = field(default_factory=lambda: Naming({}))
    dicom_seg: bool | None = None
    keep_detections: bool = True
    quality: str | None = None

    def description(self, facts: SystemFacts) -> dict[str, Any]:
        """All that decides a result but the input, as it comes back from the JSON of a result."""
        sampling = dataclasses.asdict(self.sampling)
        sampling.pop("batch", None)  # changes the time, not the result
        return {
            "Version": ddmd.__version__,
            "WeightsSha256": facts.sha256,
            "Precision": facts.precision,
            "Sampling": sampling,
            "Threshold": self.threshold,
            "Reading": {
                name: file_sha256(value) if name == "brain" else str(value)
                for name, value in sorted(self.reading.items())
                if value not in (None, False, "auto")
            },
        }

    def is_result_of(self, summary: Mapping[str, Any], facts: SystemFacts) -> bool:
        """Whether a result is of these options and weights, with the maps and picture that are asked for."""
        wanted = self.description(facts)
        earlier = {key: summary.get(key) for key in wanted}
        if isinstance(earlier["Sampling"], Mapping):
            earlier["Sampling"] = {k: v for k, v in earlier["Sampling"].items() if k != "batch"}
        files = summary.get("Files", {})
        endings = [f"_{self.naming.suffixes[key]}.nii.gz" for key in self.maps]
        if self.overlay:
            endings.append("_overlay.png")
        there = all(any(str(file).endswith(ending) for file in files) for ending in endings)
        measured = summary.get("LesionMlIntervalKind") == DRAWS_INTERVAL
        if measured != (self.quality == "draws"):
            return False
        return there and facts.sha256 is not None and json_line(earlier) == json_line(wanted)


def input_sha256(case: Case) -> str:
    """SHA-256 over the content of a case's images, and over which sequence each is.

    Raises
    ------
    OSError
        If one cannot be read.
    """
    files = sorted(
        (sequence, [file_sha256(path) for path in paths]) for sequence, paths in case.files.items()
    )
    return hashlib.sha256(json_line(files).encode()).hexdigest()


class CaseWorker:
    """Works on tasks with one detector: `prepare`, then `compute`, then `save`, maybe each in another thread.

    Parameters
    ----------
    detector : Detector
    options : CohortOptions
    progress : called with (case, slices done, slices in all); may raise to end the work
    """

    def __init__(self, detector: Detector, options: CohortOptions, progress: Progress | None = None) -> None:
        self.detector, self.options, self.progress = detector, options, progress
        self.facts = SystemFacts.of(detector)

    def prepare(self, task: Task) -> tuple[Prepared, str]:
        """Read a case; the slices to compute, and the checksum of the input."""
        checksum = input_sha256(task.case)  # first: who changes the file meanwhile has it done again
        reading = dict(self.options.reading)
        if self.options.check_all:
            reading["check_all"] = True
        volume = task.case.volume(
            self.detector.description.required_sequences,
            self.detector.description.optional_sequences,
            **reading,
        )
        return self.detector.prepare(volume), checksum

    def compute(self, task: Task, prepared: Prepared) -> Detection:
        """Detect lesions in a case that was read."""
        sampling, progress = self.options.sampling, self.progress

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(task.case.name, done, total)

        return self.detector.detect(
            prepared,
            samples=sampling.samples,
            steps=sampling.steps,
            sampler=sampling.sampler,
            seed=sampling.seed,
            batch=sampling.batch,
            eta=sampling.eta,
            stop=sampling.stop,
            quality=self.options.quality,
            draws="draws" in self.options.maps,
            threshold=self.options.threshold,
            progress=report,
        )

    def save(self, task: Task, detection: Detection, checksum: str) -> Outcome:
        """Write the files of a case."""
        described = self.options.description(self.facts)
        extra = {"InputSha256": checksum, "Reading": described["Reading"], **task.extra}
        detection.save(
            task.folder,
            task.replace,
            maps=self.options.maps,
            overlay=self.options.overlay,
            extra=extra,
            stem=task.stem,
            naming=self.options.naming,
            dicom_seg=self.options.dicom_seg,
        )
        summary = {**detection.description(), **extra, "LesionTable": detection.lesion_rows()}
        return Outcome(summary, None, detection if self.options.keep_detections else None)
