"""The trained system that a run begins from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ddmd.io.atomic import atomic_path
from ddmd.models.checkpoint import PARTS, System, WeightsError, build, find, load
from ddmd.models.denoiser import IMAGE_PATCH, DenoiserConfig
from ddmd.training.config import TrainConfig
from ddmd.training.stages import DISCREPANCY_SCALE

START = "start.safetensors"  # in a run's folder, the weights that it began from


def initial_system(config: TrainConfig, out: Path, overwrite: bool = False) -> System | None:
    """The system that `config.start` names, in float32; None where a run begins from nothing.

    The copy of its file in the run's folder comes first, unless `overwrite` is set, which removes that copy.

    Raises
    ------
    WeightsError
        If there is no such system.
    ValueError
        If its networks are not of the configured sizes, or it lacks one that a stage of 0 steps leaves as it is;
        with `overwrite`, if its file is in the run's folder.
    """
    if config.start is None:
        return None
    kept = out / START
    path = kept if kept.exists() and not overwrite else find(config.start)
    if overwrite and any(
        out.resolve() in p.parents for p in (path.resolve(), path.parent.resolve() / path.name)
    ):
        raise ValueError(
            f"start is {config.start!r}, in the folder {out} that is overwritten; copy that file elsewhere, or choose "
            "another folder"
        )
    system = load(path, precision="float32")
    if config.denoiser.presence and not system.condition.config.presence:
        system = with_presence(system, config.sequences)
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
    return system


def keep_start(config: TrainConfig, out: Path) -> None:
    """Copy the file that `config.start` names into the run's folder: a run goes on from it without the original."""
    kept = out / START
    if config.start is not None and not kept.exists():
        with atomic_path(kept) as temporary:
            shutil.copyfile(find(config.start), temporary)


@torch.no_grad()
def with_presence(system: System, sequences: Sequence[str]) -> System:
    """A system of one sequence as one that takes any of several: with its own sequence alone it does what it did.

    The auto-encoders are the same, and take each sequence by itself. Weights of new sequences, and of the planes
    that say what is there, are 0.

    Parameters
    ----------
    system : of one sequence, float32
    sequences : the C sequences of the new one, its own among them

    Raises
    ------
    WeightsError
        If the system takes another sequence, or several.
    """
    own = system.description.sequences
    if len(own) > 1 or own[0] not in sequences:
        raise WeightsError(
            f"{system.description.name} takes {', '.join(own)}; allowed is one of {', '.join(sequences)} alone"
        )
    before = system.condition.config
    after = dataclasses.replace(before, sequences=len(sequences), presence=True)
    description = dataclasses.replace(
        system.description, sequences=tuple(sequences), denoiser=dataclasses.asdict(after)
    )
    made = build(description)
    for part, module in system.parts().items():
        state = module.state_dict()
        if part == "condition":
            state["stem.weight"] = _spread(state["stem.weight"], before, after, sequences.index(own[0]))
        made.parts()[part].load_state_dict(state)
    return made


def _spread(
    weight: torch.Tensor, before: DenoiserConfig, after: DenoiserConfig, sequence: int
) -> torch.Tensor:
    """The stem's weights where one sequence's planes are among those of several; 0 for all that is new."""
    area = IMAGE_PATCH**2  # of a plane's channels: the stem works on patches
    spread = weight.new_zeros(len(weight), after.inputs * area, *weight.shape[2:])
    count = before.inputs - 2  # planes of the slices and of their mirror image; X and Y come last in both
    planes = [
        *(group * after.sequences + sequence for group in range(count)),
        after.inputs - 2,
        after.inputs - 1,
    ]
    for old, new in enumerate(planes):
        spread[:, new * area : (new + 1) * area] = weight[:, old * area : (old + 1) * area]
    return spread
