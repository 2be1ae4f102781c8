"""The trained system that a run begins from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ddmd.models.checkpoint import PARTS, System, find, load
from ddmd.training.config import TrainConfig
from ddmd.training.stages import DISCREPANCY_SCALE


def start_of(config: TrainConfig, out: Path) -> System | None:
    """The system that `config.start` names, in float32; None where a run begins from nothing.

    Its file is kept in the run's folder: a run goes on from there whatever becomes of the file.

    Raises
    ------
    WeightsError
        If there is no such system.
    ValueError
        If its networks are not of the configured sizes, or it lacks one that a stage of 0 steps leaves as it is.
    """
    if config.start is None:
        return None
    kept = out / "start.safetensors"
    path = kept if kept.exists() else find(config.start)
    system = load(path, precision="float32")
    told = system.description
    agreed = {
        "sequences": (told.sequences, config.sequences),
        "mm": (told.grid["mm"], config.mm),
        "autoencoder": (system.autoencoders_a.config, config.autoencoder),
        "denoiser": (system.condition.config, config.denoiser),
        "the scale of X and Y": (told.discrepancy_scale, DISCREPANCY_SCALE),
    }
    for name, (theirs, mine) in agreed.items():
        if theirs != mine:
            raise ValueError(f"{name} is {mine}; with start = {config.start!r} allowed is {theirs}")
    for part in PARTS[config.system]:
        stage = config.autoencoder_stage if part.startswith("autoencoders") else config.denoiser_stage
        if not stage.steps and part not in system.parts():
            raise ValueError(
                f"start is {config.start!r}, which has no {part}; allowed is what has all that is not trained"
            )
    if path != kept:
        temporary = out / f".start.{os.getpid()}.partial"
        shutil.copyfile(path, temporary)
        os.replace(temporary, kept)
    return system
