"""Detection in many cases: reading, computing and writing overlap, failures stay with their case, runs resume."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddmd
from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.inference.detection import Detection
from ddmd.inference.detector import Detector, Prepared
from ddmd.inference.session import SamplingConfig
from ddmd.io.atomic import write_text
from ddmd.io.results import SUFFIXES, OutputError, check_output, read_result
from ddmd.io.text import json_text, printable, table_text
from ddmd.models import checkpoint

COHORT_COLUMNS = (
    "case", "patient", "lesion_ml", "lesions", "score", "brain_ml", "flags", "seconds", "device",
)  # fmt: skip
FAILURE_COLUMNS = ("case", "file", "error", "reason")


@dataclass(frozen=True)
class CaseError:
    """Why a case has no result.

    case : its name. file : the base name of its first image. error : type of the exception, as "VolumeError".
    reason : its message, in one line.
    """

    case: str
    file: str
    error: str
    reason: str

    @classmethod
    def of(cls, case: Case, exception: Exception) -> CaseError:
        """The failure of a case by an exception."""
        reason = str(exception) or "no message"
        first = next(iter(case.files.values()))[0]
        return cls(case.name, printable(first.name), type(exception).__name__, printable(reason))


def part_of(cases: Sequence[Case], part: tuple[int, int]) -> list[Case]:
    """The i-th of n parts of a cohort, counted from 1: every n-th case, so that parts take equally long.

    Raises
    ------
    ValueError
        If i is not in 1 to n.
    """
    i, n = part
    if not 1 <= i <= n:
        raise ValueError(f"part is {i}/{n}; parts are counted from 1 to n")
    return list(cases)[i - 1 :: n]


def detect_cohort(
    cases: str | os.PathLike[str] | Iterable[Case | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | Detector = checkpoint.DEFAULT,
    device: str = "auto",
    precision: str = "auto",
    skip_existing: bool = False,
    overwrite: bool = False,
    part: tuple[int, int] = (1, 1),
    maps: Sequence[str] | None = None,
    overlay: bool = True,
    workers: int = 2,
    threshold: float | None = None,
    samples: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch: int | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Case, Detection | CaseError]]:
    """Detect lesions in many cases and write the results, while reading and writing go on in threads.

    Results are those of one case after another. Any exception of a case is that case's failure. After each
    case, cohort.tsv (a row a case with a result), failures.tsv and run.json are written whole to `out`; their
    names end in _part-i-of-n where there are several parts.

    Parameters
    ----------
    cases : of `find_cases`, or files and folders to find them in
    out : folder of the results, made if it is not there
    weights : name of a shipped system, weights file, or a loaded Detector
    device, precision : as `Detector.load` takes them
    skip_existing : bool
        Whether cases stay as they are that have a complete result of the same weights and options. Incomplete
        results are replaced.
    overwrite : whether earlier results are replaced
    part : (i, n), the i-th of n parts of the cohort, counted from 1
    maps, overlay : as `Detection.save` takes them
    workers : threads that read, and threads that write; cases in memory are at most 2 * workers + 2.
    threshold, samples, steps, sampler, seed, batch : as `Detector.detect` takes them
    reading : options of `Volume.read`, optional

    Yields
    ------
    (case, its Detection or CaseError), in the order of the cases, when its files are written. Cases that are
    skipped are not yielded; they are in cohort.tsv.

    Raises
    ------
    DatasetError, WeightsError, ValueError
        If no case is found, or weights or an option cannot be used; before the work.
    OutputError
        If `out` holds earlier results that are not to be replaced; before the work.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 is needed")
    detector = weights if isinstance(weights, Detector) else Detector.load(weights, device, precision)
    run = _Run(
        detector=detector,
        out=Path(out),
        part=part,
        maps=tuple(SUFFIXES) if maps is None else tuple(maps),
        overlay=overlay,
        sampling=detector.sampling_config(samples, steps, sampler, seed, batch),
        threshold=threshold,
        reading=dict(reading or {}),
        skip_existing=skip_existing,
        overwrite=overwrite,
    )
    return run.detect(part_of(_cases(cases, detector), part), workers)


def _cases(
    cases: str | os.PathLike[str] | Iterable[Case | str | os.PathLike[str]], detector: Detector
) -> list[Case]:
    listed = [cases] if isinstance(cases, str | os.PathLike) else list(cases)
    given = [case for case in listed if isinstance(case, Case)]
    paths = [path for path in listed if not isinstance(path, Case)]
    if paths:
        given += find_cases(paths, require=detector.description.sequences, annotations=False)
    names = [case.name for case in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]}: two cases have this name; give each its own")
    return given


@dataclass
class _Run:
    """One run over a part of a cohort: its options, and what is known of its cases so far."""

    detector: Detector
    out: Path
    part: tuple[int, int]
    maps: tuple[str, ...]
    overlay: bool
    sampling: SamplingConfig
    threshold: float | None
    reading: dict[str, Any]
    skip_existing: bool
    overwrite: bool

    def detect(self, cases: Sequence[Case], workers: int) -> Iterator[tuple[Case, Detection | CaseError]]:
        """Check the output, then give the iterator over the work."""
        done, replaced = self._earlier(cases)
        return self._work(cases, done, replaced, workers)

    def _earlier(self, cases: Sequence[Case]) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """Results of cases that are skipped, by name, and names of those that are replaced."""
        done: dict[str, dict[str, Any]] = {}
        replaced: set[str] = set()
        for case in cases:
            if self.skip_existing and not self.overwrite:
                summary = read_result(case.name, self.out)
                if summary is not None and self._is_same(summary):
                    done[case.name] = summary
                    continue
                if summary is None:  # nothing there, or incomplete
                    replaced.add(case.name)
            may_replace = self.overwrite or case.name in replaced
            check_output(case.name, self.out, may_replace)
            if may_replace:
                replaced.add(case.name)
        return done, replaced

    def _is_same(self, summary: Mapping[str, Any]) -> bool:
        """Whether a result is of the same weights and options, with the maps that are asked for."""
        criteria = self.detector.lesion_criteria(self.threshold)
        sampling = {**dataclasses.asdict(self.sampling), "batch": None}
        files = " ".join(summary.get("Files", {}))
        return (
            summary.get("Version") == ddmd.__version__
            and summary.get("WeightsSha256") == self.detector.weights_sha256
            and {**summary.get("Sampling", {}), "batch": None} == sampling
            and summary.get("Threshold") == criteria.threshold
            and summary.get("Precision") == str(self.detector.system.dtype).removeprefix("torch.")
            and summary.get("Reading") == _as_json(self.reading)
            and all(SUFFIXES[key] in files for key in self.maps)
            and (not self.overlay or "_overlay.png" in files)
        )

    def _work(
        self, cases: Sequence[Case], done: dict[str, dict[str, Any]], replaced: set[str], workers: int
    ) -> Iterator[tuple[Case, Detection | CaseError]]:
        failures: dict[str, CaseError] = {}
        waiting = deque(case for case in cases if case.name not in done)
        reading: deque[tuple[Case, Future[Prepared]]] = deque()
        writing: deque[tuple[Case, Future[Detection] | CaseError]] = deque()
        readers = ThreadPoolExecutor(workers, thread_name_prefix="ddmd-read")
        writers = ThreadPoolExecutor(workers, thread_name_prefix="ddmd-save")

        def finished() -> tuple[Case, Detection | CaseError]:
            case, pending = writing.popleft()
            result: Detection | CaseError
            try:
                result = pending if isinstance(pending, CaseError) else pending.result()
            except Exception as error:
                result = CaseError.of(case, error)
            if isinstance(result, CaseError):
                failures[case.name] = result
            else:
                done[case.name] = result.description()
            self._write_tables(cases, done, failures)
            return case, result

        try:
            self._write_tables(cases, done, failures)
            while waiting or reading or writing:
                while waiting and len(reading) < workers + 1:
                    case = waiting.popleft()
                    reading.append((case, readers.submit(self._prepare, case)))
                while writing and (len(writing) > workers or not reading or _is_done(writing[0][1])):
                    yield finished()
                if reading:
                    case, prepared = reading.popleft()
                    try:
                        detection = self._compute(prepared.result())
                        save = writers.submit(self._save, detection, case.name in replaced)
                        writing.append((case, save))
                    except Exception as error:
                        writing.append((case, CaseError.of(case, error)))
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
            writers.shutdown(wait=True)

    def _prepare(self, case: Case) -> Prepared:
        return self.detector.prepare(case.volume(self.detector.description.sequences, **self.reading))

    def _compute(self, prepared: Prepared) -> Detection:
        s = self.sampling
        return self.detector.detect(
            prepared, samples=s.samples, steps=s.steps, sampler=s.sampler, seed=s.seed, batch=s.batch,
            threshold=self.threshold,
        )  # fmt: skip

    def _save(self, detection: Detection, overwrite: bool) -> Detection:
        extra = {"Reading": _as_json(self.reading)}
        detection.save(self.out, overwrite, maps=self.maps, overlay=self.overlay, extra=extra)
        return detection

    def _path(self, name: str) -> Path:
        i, n = self.part
        stem, extension = os.path.splitext(name)
        return self.out / (name if n == 1 else f"{stem}_part-{i}-of-{n}{extension}")

    def _write_tables(
        self,
        cases: Sequence[Case],
        done: Mapping[str, Mapping[str, Any]],
        failures: Mapping[str, CaseError],
    ) -> None:
        rows = [_row(case, done[case.name]) for case in cases if case.name in done]
        failed = [dataclasses.asdict(failures[case.name]) for case in cases if case.name in failures]
        summary = {
            "Version": ddmd.__version__,
            "Weights": self.detector.description.name,
            "WeightsSha256": self.detector.weights_sha256,
            "Sampling": dataclasses.asdict(self.sampling),
            "Threshold": self.detector.lesion_criteria(self.threshold).threshold,
            "Reading": _as_json(self.reading),
            "Maps": list(self.maps),
            "Part": list(self.part),
            "Device": str(self.detector.system.device),
            "Python": platform.python_version(),
            "System": f"{platform.system()} {platform.machine()}",
            "Cases": len(cases),
            "Done": len(rows),
            "Failed": len(failed),
        }
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self._path("cohort.tsv"), table_text(rows, COHORT_COLUMNS))
            write_text(self._path("failures.tsv"), table_text(failed, FAILURE_COLUMNS))
            write_text(self._path("run.json"), json_text(summary))
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written to ({error}); choose another folder") from None


def _is_done(pending: Future[Detection] | CaseError) -> bool:
    return isinstance(pending, CaseError) or pending.done()


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of reading that differ from the defaults, as they come back from JSON."""
    return {key: value for key, value in sorted(options.items()) if value not in (None, False)}


def _row(case: Case, summary: Mapping[str, Any]) -> dict[str, object]:
    return {
        "case": case.name,
        "patient": case.patient,
        "lesion_ml": summary.get("LesionMl", ""),
        "lesions": summary.get("Lesions", ""),
        "score": summary.get("Score", ""),
        "brain_ml": summary.get("BrainMl", ""),
        "flags": "; ".join(summary.get("Quality", {}).get("Flags", [])),
        "seconds": summary.get("Seconds", ""),
        "device": summary.get("Device", ""),
    }
