"""A cohort on the devices of one machine: threads read, one thread a device computes, threads write."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from ddmd.cohort.work import CaseError, CaseWorker, CohortOptions, Outcome, Progress, Task
from ddmd.inference.detection import Detection
from ddmd.inference.detector import Detector, Prepared


class _Ended(Exception):
    """The caller wants no more results."""


def detect_in_threads(
    tasks: Iterable[Task],
    detectors: Sequence[Detector],
    options: CohortOptions,
    workers: int,
    progress: Progress | None = None,
) -> Iterator[tuple[Task, Outcome]]:
    """Work on tasks, while reading, computing and writing of different cases overlap.

    Parameters
    ----------
    tasks : in the order in which they are worked on
    detectors : one for each thread that computes; the same one may be there several times
    options : CohortOptions
    workers : threads that read, and threads that write
        At most 2 * workers + 2 * len(detectors) cases are in memory.
    progress : as `CaseWorker` takes it

    Yields
    ------
    (task, its Outcome), in the order of the tasks. Any exception in a task is its failure.
    """
    ended = threading.Event()

    def report(case: str, done: int, total: int) -> None:
        if ended.is_set():
            raise _Ended
        if progress is not None:
            progress(case, done, total)

    free: SimpleQueue[CaseWorker] = SimpleQueue()
    for detector in detectors:
        free.put(CaseWorker(detector, options, report))
    anyone = CaseWorker(detectors[0], options)  # reading and writing need no device
    own = threading.local()

    def take_device() -> None:
        own.worker = free.get()

    def compute(task: Task, prepared: Future[tuple[Prepared, str]]) -> tuple[Detection, str]:
        slices, checksum = prepared.result()
        if ended.is_set():
            raise _Ended
        worker: CaseWorker = own.worker
        return worker.compute(task, slices), checksum

    def save(task: Task, computed: Future[tuple[Detection, str]]) -> Outcome:
        try:
            return anyone.save(task, *computed.result())
        except Exception as failure:
            return Outcome(failure=CaseError.of(task.case, failure))

    readers = ThreadPoolExecutor(workers, "ddmd-read")
    computers = ThreadPoolExecutor(len(detectors), "ddmd-compute", take_device)
    writers = ThreadPoolExecutor(workers + len(detectors) - 1, "ddmd-save")
    waiting, under_way = iter(tasks), deque[tuple[Task, Future[Outcome]]]()
    try:
        while True:
            while len(under_way) < 2 * workers + 2 * len(detectors):
                task = next(waiting, None)
                if task is None:
                    break
                prepared = readers.submit(anyone.prepare, task)
                computed = computers.submit(compute, task, prepared)
                under_way.append((task, writers.submit(save, task, computed)))
                del prepared, computed  # held by who works with them alone
            if not under_way:
                return
            task, written = under_way.popleft()
            outcome = written.result()
            del written
            yield task, outcome
            del outcome
    finally:
        ended.set()
        for pool in (readers, computers, writers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (readers, computers, writers):
            pool.shutdown(wait=True)
