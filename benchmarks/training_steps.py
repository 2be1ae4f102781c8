"""Times the steps of a training run with whichever version of `ddmd` is on the path: `benchmarks.training` starts it.

`python benchmarks/training_steps.py SETTINGS.json RUN` trains as the settings say, in a new folder RUN, and prints the
seconds a step of each stage as JSON. It works with 0.1 and later, so it imports nothing of today's benchmarks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

RECIPES = ("recipes/flair-image-labels.toml", "light-4.toml")  # of today, and of 0.1, for the same weights


def configuration(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The version's own recipe, with the data, the start, the batch and the steps of the settings.

    Parameters
    ----------
    folder : of the package `ddmd.training`
    settings : `data`, `start`, `batch`, `steps` and `warm`
    """
    recipe = next(path for name in RECIPES if (path := folder / name).exists())
    values = tomllib.loads(recipe.read_text(encoding="utf-8"))
    steps = settings["warm"] + settings["steps"]
    for name in ("holdout", "validation_patients", "later_stages"):
        values.pop(name, None)
    values |= {"start": settings["start"], "validation": 0.0, "test": 0.0, "checkpoint_minutes": 1000.0}
    values["data"] = [{"root": settings["data"], "name": "data"}]
    values["autoencoder_stage"] |= {"steps": steps, "batch": settings["batch"]}
    # pseudo-masks are made at the start, so that batches have all kinds of samples; they are in no figure
    values["denoiser_stage"] |= {"steps": steps, "batch": settings["batch"], "rounds": [0.0]}
    if recipe.name == "light-4.toml":
        values["workers"] = 0  # batches are made in this process, whose CPU seconds are read
    return values


class BusyMeter:
    """The share of time in which the GPU worked, by nvidia-smi, between `start` and `stop`."""

    def start(self) -> None:
        """Begin to listen; without nvidia-smi nothing is heard."""
        command = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            "-lms",
            "200",
        ]
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._process = None

    def stop(self) -> float:
        """The mean share from 0 to 1; not a number where nothing was heard."""
        if self._process is None:
            return float("nan")
        self._process.terminate()
        text, _ = self._process.communicate()
        shares = [float(line) / 100 for line in text.splitlines() if line.strip().isdigit()]
        return sum(shares) / len(shares) if shares else float("nan")


def timed_steps(settings: dict[str, Any], run: Path) -> dict[str, dict[str, float]]:
    """CPU and wall seconds a step of every stage, the making of its batch included, after `warm` steps."""
    from ddmd import training
    from ddmd.training import loop
    from ddmd.training.config import read_run
    from ddmd.training.run import train

    torch.set_num_threads(settings["threads"])
    stamps: dict[str, list[tuple[float, float]]] = {}
    busy: dict[str, float] = {}
    first, last = settings["warm"], settings["warm"] + settings["steps"] - 1
    meter = BusyMeter()

    def stamp(stage: str) -> None:
        of_stage = stamps.setdefault(stage, [])
        number = len(of_stage)
        if torch.cuda.is_available() and number in (first, last):
            torch.cuda.synchronize()
            if number == first:
                meter.start()
            else:
                busy[stage] = meter.stop()
        of_stage.append((time.process_time(), time.perf_counter()))

    if hasattr(loop, "train_step"):
        plain = loop.train_step

        def train_step(model: Any, optimizer: Any, batch: Any, stage: Any) -> Any:
            stamp(stage.plan.name)
            return plain(model, optimizer, batch, stage)

        loop.train_step = train_step
    else:
        one = loop.Stage._one

        def step(stage: Any, *arguments: Any) -> Any:
            stamp(stage.plan.name)
            return one(stage, *arguments)

        loop.Stage._one = step
    values = configuration(Path(training.__file__).parent, settings)
    run.mkdir(parents=True)
    asked = run.with_name(f"{run.name}-asked")
    asked.mkdir()
    (asked / "config.json").write_text(json.dumps(values), encoding="utf-8")
    train(read_run(asked), run)
    figures = {name: _per_step(of_stage[first:]) for name, of_stage in stamps.items()}
    for stage, share in busy.items():
        if share == share:  # nvidia-smi said something
            figures[stage]["gpu_busy"] = share
    return figures


def _per_step(stamps: list[tuple[float, float]]) -> dict[str, float]:
    (cpu, wall), (cpu_end, wall_end) = stamps[0], stamps[-1]
    count = len(stamps) - 1
    return {"cpu_s": (cpu_end - cpu) / count, "wall_s": (wall_end - wall) / count}


if __name__ == "__main__":
    print(
        json.dumps(timed_steps(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])))
    )
