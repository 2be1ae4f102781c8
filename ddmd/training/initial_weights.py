"""The trained system that a run begins from."""

from __future__ import annotations

import shutil
from pathlib import Path

from ddmd.io.atomic import atomic_path
from ddmd.models.checkpoint import PARTS, System, find, load
from ddmd.training.config import TrainConfig
from ddmd.training.stages import DISCREPANCY_SCALE


def initial_system(config: TrainConfig, out: Path, keep: bool = True) -> System | None:
    """The system that `config.start` names, in float32; None where a run begins from nothing.

    With `keep` its file is copied into the run's folder: a run goes on from there whatever becomes of the file.

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
    description = system.description
    required = {
        "sequences": (description.sequences, config.sequences),
        "mm": (description.grid["mm"], config.mm),
        "autoencoder": (system.autoencoders_a.config, config.autoencoder),
        "denoiser": (system.condition.config, config.denoiser),
        "the scale of X and Y": (description.discrepancy_scale, DISCREPANCY_SCALE),
    }
    for name, (given, wanted) in required.items():
        if given != wanted:
            raise ValueError(f"{name} is {wanted}; with start = {config.start!r} allowed is {given}")
    for part in PARTS[config.system]:
        stage = config.autoencoder_stage if part.startswith("autoencoders") else config.denoiser_stage
        if not stage.steps and part not in system.parts():
            raise ValueError(
                f"start is {config.start!r}, which has no {part}; allowed is what has all that is not trained"
            )
    if keep and path != kept:
        with atomic_path(kept) as temporary:
            shutil.copyfile(path, temporary)
    return system
