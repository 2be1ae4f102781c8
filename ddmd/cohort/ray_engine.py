"""A cohort on a Ray cluster: actors hold a detector each, cases are streamed to them, lost ones are done again."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ddmd.cohort.work import CaseError, CaseWorker, CohortOptions, Outcome, Progress, SystemFacts, Task
from ddmd.inference.detector import Detector
from ddmd.models import checkpoint

CASES_PER_ACTOR = 3  # one is read, one computed, one written
MAX_ATTEMPTS = 3  # at a case whose actor is lost
MAX_FAILED_STARTS = 3  # of actors, one after another
CLOSING_S = 60.0  # that cases under way have to end in
log = logging.getLogger("ddmd.cohort")


class LostWorkerError(RuntimeError):
    """A case whose process ended each time that it was tried."""


class RayError(ValueError):
    """A cluster that cannot be used; the message says what to do."""


class _Ended(Exception):
    """The caller wants no more results."""


class CaseActor:
    """Works on cases in a process of its own: some are read and written while one is computed.

    Parameters
    ----------
    weights : content of a weights file, or a detector
    device, precision : as `Detector.load` takes them
    """

    def __init__(self, weights: bytes | Detector, device: str, precision: str) -> None:
        if isinstance(weights, Detector):
            self.detector = weights
        else:
            with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
                file.write(weights)
                file.flush()
                self.detector = Detector.load(file.name, device, precision)
        self._computing = ThreadPoolExecutor(1, "ddmd-compute")
        self._ended = False

    def process_id(self) -> int:
        """The process, when it is ready."""
        return os.getpid()

    def end(self) -> None:
        """End what is computed."""
        self._ended = True

    def work(self, task: Task, options: CohortOptions) -> Outcome:
        """Read a case, compute, and write its files. Any exception is the case's failure."""

        def report(*_: object) -> None:
            if self._ended:
                raise _Ended

        worker = CaseWorker(self.detector, options, report)
        try:
            prepared, checksum = worker.prepare(task)
            detection = self._computing.submit(worker.compute, task, prepared).result()
            return worker.save(task, detection, checksum)
        except Exception as failure:
            return Outcome(failure=CaseError.of(task.case, failure))


@dataclass
class _Actor:
    """An actor as the driver sees it: its handle, what says that it is ready, and its cases."""

    handle: Any
    ready: Any
    process_id: int | None = None
    tasks: dict[Any, Task] = field(default_factory=dict)  # by the reference of the outcome


class RayEngine:
    """Actors on the cluster that RAY_ADDRESS names, or on a Ray of this machine alone: one a GPU, or by CPUs.

    Parameters
    ----------
    weights : name or path of weights, or a detector
    device : "auto", "cpu", "cuda"; several joined by commas are as many actors
    precision : as `Detector.load` takes it

    Raises
    ------
    RayError
        If Ray is not installed, or the cluster cannot be joined.
    """

    def __init__(self, weights: str | os.PathLike[str] | Detector, device: str, precision: str) -> None:
        self.ray = _import_ray()
        self._owns_ray = _connect(self.ray, len(str(device).split(",")))
        self._actors: list[_Actor] = []
        self._failed_starts = 0
        try:
            self._plan_actors(str(device))
            dtype = checkpoint.pick_dtype(precision, torch.device("cuda" if self._gpus else "cpu"))
            self.precision = str(dtype).removeprefix("torch.")  # of all actors, whatever they run on
            if isinstance(weights, Detector):
                facts = SystemFacts.of(weights)
                self._weights = self.ray.put(weights)
            else:
                facts = SystemFacts.of(Detector.load(weights, "cpu", self.precision))
                self._weights = self.ray.put(checkpoint.find(weights).read_bytes())
        except BaseException:
            self.close()
            raise
        kind = "GPU" if self._gpus else "CPU"
        self.facts = replace(
            facts, device=f"ray, {self.count} x {self._cpus} {kind}".replace(" 1 GPU", " GPU")
        )

    def _plan_actors(self, device: str) -> None:
        names = [name.strip() for name in device.split(",")]
        there = self.ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), max(1, int(there.get("CPU", 1)))
        wants_gpu = any(name.startswith(("cuda", "gpu")) or name.isdecimal() for name in names)
        if wants_gpu and not gpus:
            raise RayError(f"device is {device!r} and the Ray cluster has no GPU; use cpu")
        self._gpus = 1 if gpus and (wants_gpu or names in (["auto"], ["all"])) else 0
        if not self._gpus and any(name not in ("auto", "all", "cpu") for name in names):
            raise RayError(
                f"device is {device!r}; with Ray it is auto, cpu, cuda, or several joined by commas"
            )
        several = len(names) if len(names) > 1 else 0
        self.count = several or (gpus if self._gpus else max(1, cpus // (4 if cpus >= 8 else 1)))
        self._cpus = 1 if self._gpus else max(1, cpus // self.count)

    def process_ids(self) -> list[int]:
        """Processes of the actors that are ready."""
        return [actor.process_id for actor in self._actors if actor.process_id is not None]

    def _start_actor(self) -> None:
        remote = self.ray.remote(CaseActor).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_concurrency=CASES_PER_ACTOR + 1
        )
        handle = remote.remote(self._weights, "cuda" if self._gpus else "cpu", self.precision)
        self._actors.append(_Actor(handle, handle.process_id.remote()))

    def run(
        self, tasks: Sequence[Task], options: CohortOptions, progress: Progress | None
    ) -> Iterator[tuple[Task, Outcome]]:
        """Work on tasks; each with its outcome, when it is done."""
        waiting, attempts = deque(tasks), Counter[str]()
        shared = self.ray.put(options)
        try:
            for _ in range(min(self.count, len(waiting))):
                self._start_actor()
            while waiting or any(actor.tasks for actor in self._actors):
                self._submit(waiting, attempts, shared)
                for actor, reference in self._next():
                    if reference == actor.ready:
                        self._became_ready(actor)
                        continue
                    if reference not in actor.tasks:
                        continue  # of an actor that was lost meanwhile
                    task = actor.tasks[reference]
                    try:
                        outcome = self.ray.get(reference)
                    except self.ray.exceptions.RayActorError:
                        yield from self._lose(actor, waiting, attempts)
                        continue
                    except Exception as failure:
                        outcome = Outcome(failure=CaseError.of(task.case, failure))
                    del actor.tasks[reference]
                    yield task, outcome
        finally:
            self.close()

    def _submit(self, waiting: deque[Task], attempts: Counter[str], options: Any) -> None:
        """Give the actors that are ready their next cases. One that lost its actor before is worked on alone."""
        for actor in self._actors:
            while waiting and actor.process_id is not None and len(actor.tasks) < CASES_PER_ACTOR:
                alone = attempts[waiting[0].case.name] > 0
                busy = bool(actor.tasks)
                if busy and (alone or any(attempts[t.case.name] for t in actor.tasks.values())):
                    break
                task = waiting.popleft()
                actor.tasks[actor.handle.work.remote(task, options)] = task

    def _next(self) -> list[tuple[_Actor, Any]]:
        """What is done: references of actors that became ready, and of outcomes."""
        pending = {
            reference: actor
            for actor in self._actors
            for reference in ([actor.ready] if actor.process_id is None else actor.tasks)
        }
        if not pending:
            raise RayError("no actor is left on the Ray cluster; look at its logs")
        done, _ = self.ray.wait(list(pending), num_returns=1, timeout=5.0)
        return [(pending[reference], reference) for reference in done]

    def _became_ready(self, actor: _Actor) -> None:
        try:
            actor.process_id = self.ray.get(actor.ready)
            self._failed_starts = 0
        except Exception as failure:
            self._actors.remove(actor)
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RayError(
                    f"actors do not start on the Ray cluster ({type(failure).__name__}); ddmd and its weights must "
                    "be usable on each of its machines"
                ) from None
            self._start_actor()

    def _lose(
        self, actor: _Actor, waiting: deque[Task], attempts: Counter[str]
    ) -> Iterator[tuple[Task, Outcome]]:
        """Put the cases of a lost actor in front of those that wait; yield those that were tried too often."""
        log.warning("an actor was lost; its %d cases are done again", len(actor.tasks))
        self._actors.remove(actor)
        self._start_actor()
        for task in reversed(actor.tasks.values()):
            attempts[task.case.name] += 1
            if attempts[task.case.name] < MAX_ATTEMPTS:
                waiting.appendleft(replace(task, replace=True))  # of its own half result
                continue
            lost = LostWorkerError(f"its process ended {MAX_ATTEMPTS} times, maybe for want of memory")
            yield task, Outcome(failure=CaseError.of(task.case, lost))
        actor.tasks.clear()

    def close(self) -> None:
        """Let cases under way end, and give the actors back; the cluster stays, unless it was started here."""
        under_way = [reference for actor in self._actors for reference in actor.tasks]
        if under_way:
            for actor in self._actors:
                actor.handle.end.remote()
            self.ray.wait(under_way, num_returns=len(under_way), timeout=CLOSING_S)
        for actor in self._actors:
            self.ray.kill(actor.handle)
        self._actors.clear()
        if self._owns_ray:
            self._owns_ray = False
            self.ray.shutdown()
            _print_worker_logs(self.ray, True)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # both are read when Ray is imported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if _address() is None:
        os.environ.setdefault(
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"
        )  # on Linux, too: only the loopback address
    try:
        import ray
    except ImportError as missing:
        raise RayError(
            f"the engine ray needs ray ({missing}); install it with: pip install 'ddmd[ray]'"
        ) from None
    return ray


def _address() -> str | None:
    """The cluster that RAY_ADDRESS names, None for one of this machine alone."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def _connect(ray: Any, workers: int) -> bool:
    """Join the cluster, or start one with room for so many workers; whether this was done here."""
    if ray.is_initialized():
        return False
    address = _address()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            cpus = max(os.cpu_count() or 1, workers)
            with _loopback_only(ray):
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
    except (OSError, RuntimeError, ValueError) as failure:
        where = address or "on this machine"
        raise RayError(f"Ray {where}: cannot be used ({failure}); check RAY_ADDRESS") from None
    finally:
        with suppress(ValueError):  # only the main thread has handlers
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray sets its own
    _print_worker_logs(ray, False)
    return True


@contextmanager
def _loopback_only(ray: Any) -> Iterator[None]:
    """A Ray that is started inside listens at the loopback address alone, as it does on macOS by itself."""
    name, constants = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray._private.ray_constants
    before, clusters = os.environ.get(name), constants.ENABLE_RAY_CLUSTER
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False  # for its processes; for this one
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _print_worker_logs(ray: Any, wanted: bool) -> None:
    """Whether Ray prints lines of its own to standard output, where the results of a command may go."""
    worker = ray._private.worker
    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = wanted
