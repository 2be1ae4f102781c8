"""The loop of every training stage: batch, step, average, log, checkpoint, and resuming after a stop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ddmd.io.atomic import atomic_path

WARM_UP = 100  # steps over which the learning rate rises
READ_EVERY = 25  # steps between looks at the losses, each of which waits for the device


class DivergedError(ValueError, RuntimeError):
    """The loss is no longer a number; the batch that did it was saved."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and says what to delete."""


class BatchSource(Protocol):
    """Makes the part of the batch of a step that one process trains on."""

    def make(self, step: int, rank: int, processes: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Plan:
    """One stage: its name (of the checkpoint), steps, global batch, learning rate and EMA decay.

    dtype is what convolutions and products compute in; weights, their averages and losses are float32.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    ema: float = 0.0
    checkpoint_minutes: float = 2.0
    dtype: torch.dtype = torch.float32


def learning_rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then half a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / min(WARM_UP, plan.steps))
    return plan.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))


def _save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(state)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            state = json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({error}); delete it, and its stage begins anew"
        ) from None
    broken = sorted(k for k, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all()))
    if broken:
        raise CheckpointError(
            f"{path}: {broken[0]} has values that are not finite; delete it, and its stage begins anew"
        )
    return tensors, state


class Stage:
    """Trains `model`, whose forward takes a batch and returns its losses by name.

    What is optimised is their sum. Sample i of the run is decided by (seed, i), step s takes the samples from
    s times batch on, split over processes; so neither a stop nor the number of processes changes what is learnt,
    up to the order of floating-point sums. A step never waits for the device: losses are read every READ_EVERY
    steps, and a step whose gradient is not finite changes no weight.
    """

    def __init__(self, model: nn.Module, plan: Plan, folder: Path, accelerator: Any) -> None:
        self.plan, self.folder, self.accelerator = plan, folder, accelerator
        self.model: nn.Module = model.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=plan.learning_rate, weight_decay=1e-3, fused=True,
        )  # fmt: skip
        self.step = 0
        self.path = folder / f"{plan.name}.checkpoint.safetensors"
        if self.path.exists():
            self._resume()

    def autocast(self) -> torch.autocast:
        """Compute in the plan's dtype where it is safe."""
        kind = self.accelerator.device.type
        return torch.autocast(kind, self.plan.dtype, enabled=self.plan.dtype != torch.float32)

    @property
    def finished(self) -> bool:
        return self.step >= self.plan.steps

    def _resume(self) -> None:
        tensors, state = load_checkpoint(self.path)
        try:
            self.step = int(state["step"])
            self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            for k in self.ema:
                self.ema[k].copy_(tensors[f"ema.{k}"])
            moments: dict[int, dict[str, Tensor]] = {}
            parameters = self.optimizer.param_groups[0]["params"]
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, index, name = key.split(".")
                    if value.ndim:  # fused optimisers go through memory in its order
                        value = torch.empty_like(parameters[int(index)]).copy_(value)
                    moments.setdefault(int(index), {})[name] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path}: of other networks ({str(error).splitlines()[0]}); delete it, and its stage "
                "begins anew"
            ) from None

    def save(self) -> None:
        """Write model, average and optimizer to one file, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": v for name, v in moments.items()}
        _save(self.path, {k: v.clone() for k, v in tensors.items()}, {"step": self.step})

    def averaged(self) -> dict[str, Tensor]:
        """The EMA of the weights (the weights themselves where the plan has none)."""
        return self.ema if self.plan.ema else self.model.state_dict()

    def run(
        self, batches: BatchSource, until: int, on_losses: Callable[[int, dict[str, float]], None]
    ) -> None:
        """Train from the current step to `until`; `on_losses` gets the means of READ_EVERY steps.

        Raises
        ------
        TrainingStopped
            After a checkpoint, where SIGINT or SIGTERM asked for an end.
        DivergedError
            If a gradient was not finite.
        """
        until = min(until, self.plan.steps)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.plan.batch % processes:
            raise ValueError(f"batch is {self.plan.batch}; allowed are multiples of {processes} processes")
        model = self.accelerator.prepare(self.model)
        model.train()
        saved, first = time.monotonic(), self.step
        read = _Losses(self.accelerator.device)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        )  # fmt: skip
        quiet = not self.accelerator.is_main_process
        with _StopSignals() as stop, Progress(*columns, disable=quiet) as progress:
            task = progress.add_task(self.plan.name, total=self.plan.steps, completed=first, losses="")
            while self.step < until:
                batch = batches.make(self.step, rank, processes)
                read.add(*train_step(model, self.optimizer, batch, self), self.step)
                self.step += 1
                if self.step % READ_EVERY and self.step < until and stop.number is None:
                    continue
                losses = read.means()
                if read.first_bad is not None:
                    self._diverged(batches.make(read.first_bad, rank, processes), read.first_bad)
                on_losses(self.step, losses)
                shown = " ".join(f"{k} {v:.3f}" for k, v in losses.items())
                progress.update(task, completed=self.step, losses=shown)
                if stop.number is not None or time.monotonic() - saved > 60 * self.plan.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
                if stop.number is not None:
                    raise TrainingStopped(f"stopped at step {self.step} of {self.plan.name}", stop.number)
        self.accelerator.free_memory()
        self.save()

    def _diverged(self, batch: dict[str, Tensor], step: int) -> None:
        where = self.folder / f"{self.plan.name}.diverged.safetensors"
        if self.accelerator.is_main_process:
            with atomic_path(where) as temporary:
                save_file({k: v.contiguous().cpu() for k, v in batch.items()}, temporary)
        raise DivergedError(
            f"{self.plan.name}: the loss is not finite at step {step}; the batch is in {where}. "
            "Lower the learning rate, or look for damaged input in that batch."
        )


class TrainingStopped(KeyboardInterrupt):
    """A signal ended the training; `number` is the signal's.

    It is a KeyboardInterrupt, so that a caller who handles Ctrl-C handles SIGTERM as well.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class _StopSignals:
    """While entered, SIGINT and SIGTERM ask for an end after the step; a second one ends at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], stage: Stage
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step that never waits for the device.

    Returns
    -------
    losses : scalars on the device
    bad : () float32, 1 where the gradient was not finite and no weight was changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage.step, stage.plan)
    with stage.autocast():
        losses = model(batch)
    total = torch.stack([v.float() for v in losses.values()]).sum()
    optimizer.zero_grad()
    stage.accelerator.backward(total)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    bad = (~torch.isfinite(norm)).float()  # the same for all processes: gradients are means over them
    optimizer.found_inf = bad  # type: ignore[attr-defined]  # fused optimisers then leave weights as they are
    optimizer.step()
    if stage.plan.ema:
        decay = min(stage.plan.ema, (2 + stage.step) / (11 + stage.step))
        floats = [(stage.ema[k], v) for k, v in stage.model.state_dict().items() if v.is_floating_point()]
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)([e for e, _ in floats], [v for _, v in floats], None)
    return {k: v.detach() for k, v in losses.items()}, bad


class _Losses:
    """Sums of losses on the device, and the first step whose gradient was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_bad: int | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._bad = torch.full((), -1.0, dtype=torch.float64, device=self.device)

    def add(self, losses: dict[str, Tensor], bad: Tensor, step: int) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
        self._steps += 1
        self._bad = torch.where((bad > 0) & (self._bad < 0), float(step), self._bad)

    def means(self) -> dict[str, float]:
        """Read and forget: one wait for the device."""
        names = list(self._sums)
        values = torch.stack([*(self._sums[n].double() for n in names), self._bad]).tolist()
        self.first_bad = int(values[-1]) if values[-1] >= 0 else None
        means = {n: v / self._steps for n, v in zip(names, values, strict=False)}
        self._clear()
        return means
