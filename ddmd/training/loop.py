"""The loop every stage shares: draw, step, average, log, save, and go on from where it was killed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

WARM_UP = 100  # steps over which the learning rate rises


class DivergedError(RuntimeError):
    """The loss is no longer a number; the batch that did it was saved."""


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
    workers: int = 1
    checkpoint_minutes: float = 2.0
    dtype: torch.dtype = torch.float32


def learning_rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then half a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / min(WARM_UP, plan.steps))
    return plan.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))


def _save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"state": json.dumps(state)})
    os.replace(temporary, path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118


class Stage:
    """Trains `model`, whose forward takes a batch and returns its losses by name.

    What is optimised is their sum. Sample i of the run is drawn from (seed, i), step s takes samples
    s x batch and on, split over processes; so neither a kill nor the number of processes changes
    what is learnt, up to the order of floating-point sums.
    """

    def __init__(self, model: nn.Module, plan: Plan, folder: Path, accelerator: Any) -> None:
        self.plan, self.folder, self.accelerator = plan, folder, accelerator
        self.model: nn.Module = model.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=1e-3)
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
        tensors, state = _load(self.path)
        self.step = state["step"]
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        for k in self.ema:
            self.ema[k].copy_(tensors[f"ema.{k}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(
            {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )

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

    def run(self, data: Dataset, until: int, on_step: Callable[[int, dict[str, float]], None]) -> None:
        """Train from the current step to `until`."""
        until = min(until, self.plan.steps)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.plan.batch % processes:
            raise ValueError(f"batch is {self.plan.batch}; allowed are multiples of {processes} processes")
        local = self.plan.batch // processes
        mine = [s * self.plan.batch + rank * local + j for s in range(self.step, until) for j in range(local)]
        loader = DataLoader(
            Subset(data, mine), batch_size=local, num_workers=self.plan.workers,
            prefetch_factor=6 if self.plan.workers else None,
        )  # fmt: skip
        model, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        model.train()
        saved = time.monotonic()
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        )  # fmt: skip
        with Progress(*columns, disable=not self.accelerator.is_main_process) as progress:
            task = progress.add_task(self.plan.name, total=self.plan.steps, completed=self.step, losses="")
            for batch in loader:
                losses = self._one(model, optimizer, batch)
                on_step(self.step, losses)
                shown = " ".join(f"{k} {v:.3f}" for k, v in losses.items())
                progress.update(task, advance=1, losses=shown)
                if time.monotonic() - saved > 60 * self.plan.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
        self.accelerator.free_memory()
        self.save()

    def _one(self, model: nn.Module, optimizer: Any, batch: dict[str, Tensor]) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.plan)
        batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
        # noise of the step depends on the step and rank alone, so that a resumed run repeats it
        torch.manual_seed(self.step * self.accelerator.num_processes + self.accelerator.process_index)
        with self.autocast():
            losses = model(batch, self.step)
        total = torch.stack([v.float() for v in losses.values()]).sum()
        if not bool(torch.isfinite(total)):
            where = self.folder / f"{self.plan.name}.diverged.safetensors"
            save_file({k: v.contiguous().cpu() for k, v in batch.items()}, where)
            raise DivergedError(
                f"{self.plan.name}: the loss is {float(total.detach())} at step {self.step}; the batch is in {where}. "
                "Lower the learning rate, or look for damaged input in that batch."
            )
        optimizer.zero_grad()
        self.accelerator.backward(total)
        self.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        self.step += 1
        if self.plan.ema:
            decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
            for k, v in self.model.state_dict().items():
                if v.is_floating_point():
                    self.ema[k].lerp_(v, 1 - decay)
        return {k: float(v.detach()) for k, v in losses.items()}
