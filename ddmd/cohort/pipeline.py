"""Detection in many cases: reading, computing and writing overlap, failures stay with their case, runs resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ddmd import validation
from ddmd.cohort.case_names import output_stems
from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import Discovery, find_cases
from ddmd.cohort.run_tables import RunTables
from ddmd.cohort.threads import detect_in_threads
from ddmd.cohort.work import (
    CaseError,
    CohortOptions,
    Outcome,
    Progress,
    SystemFacts,
    Task,
    input_sha256,
)
from ddmd.diffusion.samplers import quality_of
from ddmd.inference.detection import Detection, check_maps
from ddmd.inference.detector import READING_OPTIONS, Detector
from ddmd.io.results import (
    PLAIN_NAMES,
    SEG_SUFFIXES,
    Naming,
    OutputError,
    check_output,
    read_result,
    result_name,
)
from ddmd.io.volume import check_choices
from ddmd.models import checkpoint

__all__ = ["ENGINES", "CaseError", "CohortRun", "detect_cohort", "part_of", "plan_cohort"]

ENGINES = ("threads", "ray")
Cases = str | os.PathLike[str] | Iterable[Case | str | os.PathLike[str]]
log = logging.getLogger("ddmd.cohort")
log.addHandler(logging.NullHandler())  # who wants the lines adds a handler; without one, errors go to stderr


class Engine(Protocol):
    """What computes the cases of a cohort."""

    @property
    def facts(self) -> SystemFacts:
        """What decides a result, and the devices."""
        ...

    def run(
        self, tasks: Sequence[Task], options: CohortOptions, progress: Progress | None
    ) -> Iterator[tuple[Task, Outcome]]:
        """Work on tasks; each with its outcome, when it is done."""
        ...

    def close(self) -> None:
        """Give back what is held for the work, where `run` is not called."""
        ...


@dataclass(frozen=True)
class ThreadEngine:
    """Threads of this process, one for each device beside those that read and write."""

    detectors: Sequence[Detector]
    workers: int

    @property
    def facts(self) -> SystemFacts:
        """What decides a result, and the devices."""
        devices = ",".join(str(detector.system.device) for detector in self.detectors)
        return replace(SystemFacts.of(self.detectors[0]), device=devices)

    def run(
        self, tasks: Sequence[Task], options: CohortOptions, progress: Progress | None
    ) -> Iterator[tuple[Task, Outcome]]:
        """Work on tasks; each with its outcome, in their order."""
        return detect_in_threads(tasks, self.detectors, options, self.workers, progress)

    def close(self) -> None:
        """Nothing is held."""


def part_of(cases: Sequence[Case], part: tuple[int, int]) -> list[Case]:
    """The i-th of n parts of a cohort, counted from 1: every n-th case, so that parts take equally long.

    Raises
    ------
    ValueError
        If i is not in 1 to n.
    """
    try:
        i, n = part
        n = validation.integer("n of part", n, 1, 2**31 - 1)
        i = validation.integer("i of part", i, 1, n)
    except (TypeError, ValueError):
        raise ValueError(f"part is {validation.shown(part)}; give (i, n), counted from 1 to n") from None
    return list(cases)[i - 1 :: n]


def load_detectors(weights: str | os.PathLike[str] | Detector, device: str, precision: str) -> list[Detector]:
    """A detector for each device of "cuda:0,cuda:1"; "all" is every CUDA device, or the CPU where there is none.

    A device that is named twice computes in two threads.
    """
    if isinstance(weights, Detector):
        return [weights]
    names = [name.strip() for name in str(device).split(",")]
    if names == ["all"]:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [f"cuda:{i}" for i in range(count)] or ["cpu"]
    loaded = {name: Detector.load(weights, name, precision) for name in dict.fromkeys(names)}
    return [loaded[name] for name in names]


@dataclass
class CohortRun:
    """A run over a part of a cohort that was checked and can begin.

    Parameters
    ----------
    engine, options : what computes, and how
    cases : of this part
    tasks : those to do
    done : summaries of the results that are there and stay, by the names of their cases
    tables : what writes the tables; None where none are wanted
    notes : on files that were left aside
    """

    engine: Engine
    options: CohortOptions
    cases: Sequence[Case]
    tasks: Sequence[Task]
    done: dict[str, Mapping[str, Any]]
    tables: RunTables | None
    notes: tuple[str, ...] = ()
    failures: dict[str, CaseError] = field(default_factory=dict)

    def outcomes(self, progress: Progress | None = None) -> Iterator[tuple[Task, Outcome]]:
        """Do the work: each task with its outcome, when its files and the tables are written."""
        log.info("%d cases, %d of them done before", len(self.cases), len(self.done))
        self._write_tables()
        for task, outcome in self.engine.run(self.tasks, self.options, progress):
            name = task.case.name
            if outcome.failure is not None:
                self.failures[name] = outcome.failure
                log.error("%s: %s: %s", name, outcome.failure.error, outcome.failure.reason)
                log.debug("%s", outcome.failure.traceback)
            elif outcome.summary is not None:
                self.done[name] = outcome.summary
                log.info(
                    "%s: %d lesions, %.2f ml, score %.2f, %.1f s",
                    name, outcome.summary["Lesions"], outcome.summary["LesionMl"], outcome.summary["Score"],
                    outcome.summary["Seconds"],
                )  # fmt: skip
            self._write_tables()
            yield task, outcome
        log.info(
            "%d of %d cases have a result, %d failed", len(self.done), len(self.cases), len(self.failures)
        )

    def _write_tables(self) -> None:
        if self.tables is not None:
            self.tables.write(self.cases, self.done, self.failures)


def plan_cohort(
    cases: Cases,
    out: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | Detector = checkpoint.DEFAULT,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "threads",
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
    eta: float | None = None,
    stop: float | None = None,
    quality: str | None = None,
    draws: bool = False,
    reading: Mapping[str, Any] | None = None,
    sequence: str | None = None,
    keep_detections: bool = False,
    tables: bool | None = None,
    tag: str | None = None,
    naming: Naming = PLAIN_NAMES,
    dicom_seg: bool | None = None,
    select: Callable[[Sequence[Case]], Sequence[Case]] | None = None,
    place: Callable[[Sequence[Case], Sequence[str]], Sequence[Task]] | None = None,
    layout: str = "auto",
) -> CohortRun:
    """Check the options, find the cases and look at earlier results, so that the work can begin.

    Takes what `detect_cohort` takes, and raises what it raises. Beyond that:

    Parameters
    ----------
    keep_detections : whether outcomes hold the detections, and not their summaries alone
    tables : whether tables are written; None where there are several cases
    tag : what names of the tables end in; by default the part
    naming : how the maps are called
    dicom_seg : as `Detection.save` takes it
    select : the cases to work on, of those that were found
    place : all cases and the weights' sequences -> where results go; by default side by side in `out`
    layout : as `find_cases` takes it
    """
    workers = validation.integer("workers", workers, 1, 1024)
    flags = {
        "skip_existing": skip_existing, "overwrite": overwrite, "overlay": overlay, "draws": draws,
        "dicom_seg": False if dicom_seg is None else dicom_seg,
    }  # fmt: skip
    for flag, value in flags.items():
        validation.flag(flag, value)
    _check_reading(reading or {})
    if cases == "" or out == "":
        raise ValueError("a path is empty; name a file or a folder")
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; allowed are {', '.join(ENGINES)}")
    listed = [cases] if isinstance(cases, str | os.PathLike) else list(cases)
    detectors = load_detectors(weights, "cpu" if engine == "ray" else device, precision)
    detector = detectors[0]
    kept_maps = tuple(dict.fromkeys((*check_maps(maps), *(("draws",) if draws else ()))))
    quality = quality_of(quality, "draws" in kept_maps)
    options = CohortOptions(
        sampling=detector.sampling_config(
            samples, steps, sampler, seed, batch, eta=eta, stop=stop, quality=quality
        ),
        threshold=detector.lesion_criteria(threshold).threshold,
        maps=kept_maps,
        overlay=overlay,
        reading=dict(reading or {}),
        check_all=all(not isinstance(case, Case) and Path(case).is_file() for case in listed),
        naming=naming,
        dicom_seg=dicom_seg,
        keep_detections=keep_detections,
        quality=quality,
    )
    found = _cases(listed, detector, sequence, layout)
    selected = part_of(found if select is None else select(found), part)
    here = Path(out)
    if place is None:
        stems = output_stems(case.name for case in found)
        places = [Task(case, stems[case.name], here) for case in found]
    else:
        places = list(place(found, detector.description.sequences))
    by_name = {task.case.name: task for task in places}
    planned = [by_name[case.name] for case in selected]
    chosen: Engine = ThreadEngine(detectors, workers)
    if engine == "ray":
        from ddmd.cohort.ray_engine import RayEngine

        chosen = RayEngine(weights, device, precision)
    try:
        with ThreadPoolExecutor(workers) as pool:
            checked = list(
                pool.map(
                    lambda task: _earlier(task, options, chosen.facts, skip_existing, overwrite), planned
                )
            )
    except BaseException:
        chosen.close()
        raise
    done = {
        task.case.name: earlier
        for task, earlier in zip(planned, checked, strict=True)
        if not isinstance(earlier, Task)
    }
    i, n = part
    tag = f"{tag or ''}_part-{i}-of-{n}" if n > 1 else tag or ""
    wanted = tables or (tables is None and (len(found) > 1 or n > 1))
    return CohortRun(
        engine=chosen,
        options=options,
        cases=selected,
        tasks=[earlier for earlier in checked if isinstance(earlier, Task)],
        done=done,
        tables=RunTables(here, tag, options, chosen.facts, {"Part": [i, n]}) if wanted else None,
        notes=found.notes if isinstance(found, Discovery) else (),
    )


def _check_reading(reading: Mapping[str, Any]) -> None:
    """Raise ValueError where an option of reading would fail every case."""
    unknown = [name for name in reading if name not in READING_OPTIONS]
    if unknown:
        raise ValueError(f"reading has {unknown[0]!r}; allowed are {', '.join(READING_OPTIONS)}")
    check_choices(reading.get("skull", "auto"), reading.get("bias", "auto"))
    validation.flag("strip", reading.get("strip", False))
    brain = reading.get("brain")
    if brain is not None and not (isinstance(brain, str | os.PathLike) and os.path.isfile(brain)):
        raise ValueError(
            f"brain is {validation.shown(brain)}; give the path of a file, a mask on the image's grid"
        )


def detect_cohort(
    cases: Cases, out: str | os.PathLike[str], **options: Any
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
    device : as `Detector.load` takes it, several joined by commas ("cuda:0,cuda:1"), or "all"
    precision : as `Detector.load` takes it
    engine : "threads" of this process, or "ray": actors of a Ray cluster, one a GPU
    skip_existing : bool
        Whether results that are incomplete or of another input are replaced. Cases that have a complete result of
        the same input, weights and options stay as they are in any case.
    overwrite : bool
        Whether every case is done again and its result replaced; with skip_existing, only those of other
        weights or options.
    part : (i, n), the i-th of n parts of the cohort, counted from 1
    maps, overlay, dicom_seg : as `Detection.save` takes them
    workers : threads that read, and threads that write
        At most 2 * workers + 2 cases for one device are in memory.
    threshold, samples, steps, sampler, seed, batch, eta, stop, quality : as `Detector.detect` takes them
    draws : whether the drawn masks are written, as "draws" among the maps does; the quality is then "draws"
    reading : options of `Volume.read`, optional; a brain mask is the path of a file
    sequence : what images are whose names do not say it, optional

    Yields
    ------
    (case, its Detection or CaseError) when its files are written: in the order of the cases, with Ray in the
    order in which they are done. Cases that are skipped are not yielded; they are in cohort.tsv.

    Raises
    ------
    DatasetError, WeightsError, ValueError
        If no case is found, or weights or an option cannot be used; before the work.
    OutputError
        If `out` holds earlier results that are not to be replaced; before the work.
    """
    run = plan_cohort(cases, out, **{"tables": True, "keep_detections": True, **options})
    return _results(run)


def _results(run: CohortRun) -> Iterator[tuple[Case, Detection | CaseError]]:
    outcomes = run.outcomes()
    try:
        for task, outcome in outcomes:
            result = outcome.failure or outcome.detection
            if result is not None:
                yield task.case, result
    finally:
        outcomes.close()  # type: ignore[attr-defined]


def _cases(
    listed: Sequence[Case | str | os.PathLike[str]], detector: Detector, sequence: str | None, layout: str
) -> Sequence[Case]:
    given = [case for case in listed if isinstance(case, Case)]
    paths = [path for path in listed if not isinstance(path, Case)]
    if paths:
        found = find_cases(
            paths,
            layout,
            require=detector.description.required_sequences,
            optional=detector.description.optional_sequences,
            sequence=sequence,
            annotations=False,
        )
        if not given:
            return found
        given += found
    names = [case.name for case in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]}: two cases have this name; give each its own")
    return given


def _earlier(
    task: Task, options: CohortOptions, facts: SystemFacts, skip_existing: bool, overwrite: bool
) -> Task | Mapping[str, Any]:
    """The summary of the result that is there and stays, or else the task, which may replace one or not.

    Raises
    ------
    OutputError
        If another result is there and is not to be replaced.
    """
    replaced = overwrite
    earlier = result_name(task.stem, task.folder)
    if earlier is not None and earlier != task.case.name:
        raise OutputError(
            f"{task.folder}: {task.stem}_result.json is of another case, {earlier}, whose files have the names of "
            f"{task.case.name}; choose another folder, or rename one of the two"
        )
    if skip_existing or not overwrite:
        check_output(task.stem, task.folder, True, options.naming)  # completes what a killed writer had begun
        summary = read_result(task.stem, task.folder)
        same_options = (
            summary is not None
            and options.is_result_of(summary, facts)
            and _has_segs(task.case, options, summary)
        )
        if summary is not None and same_options and _is_same_input(task.case, summary):
            return summary
        replaced |= skip_existing and (summary is None or same_options)
    check_output(task.stem, task.folder, replaced, options.naming)
    return replace(task, replace=replaced)


def _has_segs(case: Case, options: CohortOptions, summary: Mapping[str, Any]) -> bool:
    """Whether a result has the DICOM Segmentations that are asked for."""
    asked = bool(case.dicom) if options.dicom_seg is None else options.dicom_seg
    endings = [ending for kind, ending in SEG_SUFFIXES.items() if asked and kind in options.maps]
    return all(any(str(file).endswith(f"_{ending}") for file in summary["Files"]) for ending in endings)


def _is_same_input(case: Case, summary: Mapping[str, Any]) -> bool:
    try:
        return bool(summary.get("InputSha256") == input_sha256(case))
    except OSError:
        return False  # it cannot be read: it fails as a case
