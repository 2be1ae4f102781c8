"""The engine of one thread on one device: sampling tables, and on a GPU a stream, buffers and captured graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddmd.diffusion.samplers import SamplingConfig
from ddmd.inference.ensemble import Maps, Progress, SamplingTable, compute_batch
from ddmd.inference.slices import Slices, planes_at
from ddmd.models.checkpoint import System

__all__ = ["SamplingConfig", "Session", "default_batch_size", "detect_slices"]

CPU_SLICES = 8  # measured: larger batches leave the cache
CPU_ROWS = 24  # samples of slices drawn as one batch on a CPU, by the same measure
CUDA_SLICES = 512
CUDA_ROWS = 512  # samples of slices drawn as one batch on a GPU
BYTES_PER_PIXEL = 1024  # of a slice's activations at their peak, by a generous count of the live tensors
MAX_GRAPHS = 16  # shapes whose graphs are kept; they share one memory pool
MAX_GRAPH_STEPS = 1024  # denoiser calls in one graph; longer loops are launched kernel by kernel
MAX_TABLES = 16
WARM_UP = 2  # runs before a capture: kernels are compiled, cuDNN and the allocator have settled
Z_BUCKETS = (1, 2, 4, 8)  # and then multiples of 16: slices of a graph; the last slice fills it up

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]


def bucket(slices: int) -> int:
    """The slices of the graph that `slices` are computed in."""
    return next((size for size in Z_BUCKETS if size >= slices), -(-slices // 16) * 16)


class _FullPrecision:
    """While any thread is inside, float32 is multiplied as float32: no TF32 on a GPU, no bfloat16 on a CPU.

    The settings are torch's and hold for the process: the first thread that enters keeps the caller's, the
    last one that leaves restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._callers: list[str] = []

    @staticmethod
    def _settings() -> tuple[Any, ...]:
        backends = torch.backends
        return (
            backends.cuda.matmul,
            backends.cudnn.conv,  # type: ignore[attr-defined]
            backends.mkldnn.matmul,  # type: ignore[attr-defined]
            backends.mkldnn.conv,  # type: ignore[attr-defined]
        )

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._callers = [setting.fp32_precision for setting in self._settings()]
                for setting in self._settings():
                    setting.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for setting, value in zip(self._settings(), self._callers, strict=True):
                    setting.fp32_precision = value


_FULL_PRECISION = _FullPrecision()
_CAPTURING = threading.Lock()  # torch captures one graph at a time


@contextmanager
def callers_state_aside(device: torch.device) -> Iterator[None]:
    """The caller's gradients, autocast and float32 precision have no effect inside.

    Nor have the default type and device: every allocation names its own.
    """
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), _FULL_PRECISION:
        yield


@dataclass(frozen=True)
class _StaticBatch:
    """One captured batch: the tensors it reads, the tensor it writes, and the function that runs it.

    `table` is what a graph reads, too, and so must live as long.
    """

    planes: Tensor
    index: Tensor
    seed: Tensor
    table: SamplingTable
    result: Tensor  # (4, Z, 1, H, W)
    draws: Tensor | None  # (S, Z, 1, H, W) uint8
    replay: Replay


def default_batch_size(system: System, height: int, width: int, graph_bytes: int = 0) -> int:
    """Slices at once that suit the device: few enough for the cache of a CPU, or for a GPU's free memory.

    Parameters
    ----------
    system : System
    height, width : int
        Of a slice on the networks' grid.
    graph_bytes : int
        Memory that torch holds for captured graphs, which nothing else can use.
    """
    if system.device.type != "cuda":
        return CPU_SLICES
    free, _ = torch.cuda.mem_get_info(system.device)
    # what torch holds and does not use is free, too, but for the graphs' pool
    unused = torch.cuda.memory_reserved(system.device) - torch.cuda.memory_allocated(system.device)
    free += max(0, unused - graph_bytes)
    return max(1, min(CUDA_SLICES, int(0.8 * free) // (BYTES_PER_PIXEL * height * width)))


class Session:
    """One thread's engine for one system on the system's device. Not to be shared between threads.

    It owns everything that changes while slices are computed: sampling tables, and on a GPU a stream, buffers
    and one captured graph for each shape. `Detector.session` gives each thread its own.

    Parameters
    ----------
    system : System
        Must not change while the session is in use.
    capture : function, optional
        Takes a function without arguments that computes on fixed tensors, and returns one that does so
        again: a CUDA graph on a GPU. None computes every batch eagerly, as on a CPU.
    """

    def __init__(self, system: System, capture: Capture | None = None) -> None:
        self.system = system
        self.device = system.device
        self._tables: OrderedDict[Hashable, SamplingTable] = OrderedDict()
        self._batches: OrderedDict[Hashable, _StaticBatch] = OrderedDict()
        self._stream: Any = None
        self._pool: Any = None
        self._pool_bytes = 0
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            capture = capture or self._capture_graph
        self._capture = capture

    def run(
        self,
        slices: Slices,
        config: SamplingConfig,
        progress: Progress | None = None,
        keep_draws: bool = False,
    ) -> Maps:
        """Draw S masks for every slice of a volume; of a baseline, its one map.

        The result does not depend on the batch but for the rounding of the convolutions, whose order of
        summation torch chooses by shape, threads and device.

        Parameters
        ----------
        slices : Slices
        config : SamplingConfig
        progress : called with (slices done, slices in all), optional
        keep_draws : bool
            Whether the maps hold the samples, too, S Z H W bytes on the CPU.

        Returns
        -------
        Maps of all slices, on the session's device
        """
        with callers_state_aside(self.device):
            if self._stream is None:
                return self._run(slices, config, progress, keep_draws)
            with torch.cuda.device(self.device):
                callers = torch.cuda.current_stream(self.device)
                self._stream.wait_stream(callers)
                with torch.cuda.stream(self._stream):
                    slices.used_by(self._stream)
                    maps = self._run(slices, config, progress, keep_draws)
                callers.wait_stream(self._stream)
                for values in maps.tensors():
                    values.record_stream(callers)
                if maps.draws is not None:
                    self._stream.synchronize()  # they are on the CPU, where no stream is waited for
                return maps

    def _run(
        self, slices: Slices, config: SamplingConfig, progress: Progress | None, keep_draws: bool
    ) -> Maps:
        count, (height, width) = len(slices), slices.image.shape[2:]
        image, index = self._upload(slices.image).to(self.system.dtype), self._upload(slices.index)
        seed = torch.full((), config.seed, dtype=torch.int64, device=self.device)
        table = self._table(config)
        shape = (4, count, 1, height, width)
        maps = torch.zeros(shape, dtype=torch.float32, device=self.device)
        draws = None
        if keep_draws:
            draws = torch.empty(
                (config.samples, *shape[1:]), dtype=torch.uint8, device="cpu", pin_memory=image.is_cuda
            )
        batch = config.batch or default_batch_size(self.system, height, width, self._pool_bytes)
        first = 0
        while first < count:
            size = min(batch, count - first)
            try:
                part = self._batch(slices, image, index, seed, first, size, batch, config, table, keep_draws)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch = max(1, min(batch, count) // 2)
                self.release()
                continue
            for target, values in zip(maps, part.tensors(), strict=True):
                target[first : first + size].copy_(values[:size])
            if draws is not None and part.draws is not None:
                for target, values in zip(draws, part.draws, strict=True):  # each in one piece of memory
                    target[first : first + size].copy_(values[:size], non_blocking=True)
            first += size
            if progress is not None:
                progress(first, count)
        probability, uncertainty, inter, intra = maps
        return Maps(probability, uncertainty, inter, intra, draws)

    def release(self) -> None:
        """Give up the captured graphs and the memory they hold."""
        self._batches.clear()
        self._pool, self._pool_bytes = None, 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch(
        self,
        slices: Slices,
        image: Tensor,
        index: Tensor,
        seed: Tensor,
        first: int,
        size: int,
        most: int,
        config: SamplingConfig,
        table: SamplingTable,
        keep_draws: bool,
    ) -> Maps:
        """The maps of `size` slices (or a few more) from number `first`; draws on the session's device."""
        network = self.system.condition.config
        present = self._upload(slices.present).to(image.dtype) if network.presence else None
        steps = config.steps * config.samples
        if self._capture is None or steps > MAX_GRAPH_STEPS:
            rows = torch.arange(first, first + size, dtype=torch.int64, device=self.device)
            planes = planes_at(image, rows, slices.offset, network.context, network.mirrored, present)
            rows_at_once = CPU_ROWS if self.device.type == "cpu" else CUDA_ROWS
            draws = self._draws_of(planes, config) if keep_draws else None
            maps = compute_batch(self.system, config, table, planes, index[rows], seed, rows_at_once, draws)
            return replace(maps, draws=draws)
        z = min(bucket(size), max(most, size))
        rows = torch.arange(first, first + z, dtype=torch.int64, device=self.device)
        rows = rows.clamp(max=first + size - 1)
        planes = planes_at(image, rows, slices.offset, network.context, network.mirrored, present)
        held = self._static(planes, index[rows], seed, config, table, keep_draws)
        held.planes.copy_(planes)
        held.index.copy_(index[rows])
        held.seed.copy_(seed)
        held.replay()
        probability, uncertainty, inter, intra = held.result
        return Maps(probability, uncertainty, inter, intra, held.draws)

    def _draws_of(self, planes: Tensor, config: SamplingConfig) -> Tensor:
        """Room for the draws of these slices."""
        shape = (config.samples, len(planes), 1, *planes.shape[2:])
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def _static(
        self,
        planes: Tensor,
        index: Tensor,
        seed: Tensor,
        config: SamplingConfig,
        table: SamplingTable,
        keep_draws: bool,
    ) -> _StaticBatch:
        """The captured batch of this shape and configuration, whatever the seed."""
        parts = self.system.parts().values()
        weights = tuple(p.data_ptr() for part in parts for p in part.parameters())
        key = (tuple(planes.shape), replace(config, seed=0, batch=None), weights, keep_draws)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        while len(self._batches) >= MAX_GRAPHS:
            self._batches.popitem(last=False)
        planes, index, seed = planes.clone(), index.clone(), seed.clone()
        shape = (4, len(planes), 1, *planes.shape[2:])
        result = torch.zeros(shape, dtype=torch.float32, device=self.device)
        draws = self._draws_of(planes, config) if keep_draws else None

        def work() -> None:
            maps = compute_batch(self.system, config, table, planes, index, seed, CUDA_ROWS, draws)
            for target, values in zip(result, maps.tensors(), strict=True):
                target.copy_(values)

        assert self._capture is not None
        self._batches[key] = _StaticBatch(planes, index, seed, table, result, draws, self._capture(work))
        return self._batches[key]

    def _capture_graph(self, work: Replay) -> Replay:
        """The work as a CUDA graph on the session's stream; all graphs of a session share one memory pool."""
        for _ in range(WARM_UP):
            work()
        with _CAPTURING:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self.device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
            self._pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph.replay

    def _table(self, config: SamplingConfig) -> SamplingTable:
        """The constants of a configuration, made once."""
        key = replace(config, seed=0, batch=None)
        if key not in self._tables:
            while len(self._tables) >= MAX_TABLES:
                self._tables.popitem(last=False)
            self._tables[key] = SamplingTable.of(self.system, config)
        return self._tables[key]

    def _upload(self, values: Tensor) -> Tensor:
        """A tensor on the session's device, by an asynchronous copy from pinned memory."""
        if self.device.type != "cuda" or values.is_cuda:
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)


def detect_slices(
    system: System, slices: Slices, config: SamplingConfig, progress: Progress | None = None
) -> Maps:
    """`Session.run` in a session of its own; `Detector.maps` keeps the session, and with it the captured graphs."""
    return Session(system).run(slices, config, progress)
