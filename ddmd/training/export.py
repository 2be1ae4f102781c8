"""From a run to one weights file that says what it is: at its end, or from the last checkpoints of an unfinished run.

`python -m ddmd.training.export RUN WEIGHTS` writes the averaged weights of the run's last checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ddmd.cohort.splits import read_split
from ddmd.diffusion.schedule import Schedule
from ddmd.models import checkpoint
from ddmd.models.checkpoint import PARTS, Description
from ddmd.training.config import TrainConfig, read_run
from ddmd.training.initial_weights import initial_system
from ddmd.training.loop import CheckpointError, load_checkpoint
from ddmd.training.stages import DISCREPANCY_SCALE


def describe(config: TrainConfig, split: Mapping[str, str], schedule: Schedule) -> Description:
    """What the weights of a run say of themselves."""
    sampling = dataclasses.asdict(config.sampling)
    return Description(
        name=config.name,
        sequences=config.sequences,
        grid={"mm": config.mm, "multiple": 16},
        schedule=dataclasses.asdict(schedule),
        autoencoder=dataclasses.asdict(config.autoencoder),
        denoiser=dataclasses.asdict(config.denoiser),
        discrepancy_scale=DISCREPANCY_SCALE,
        use_inter=config.denoiser_stage.use_inter,
        use_intra=config.denoiser_stage.use_intra,
        system=config.system,
        sampling={k: v for k, v in sampling.items() if k not in ("seed", "batch")},
        min_peak=0.0 if config.system == "anomaly" else Description.min_peak,
        training={
            "labels": config.labels,
            "data": [entry.name or Path(entry.root).name for entry in config.data],
            "licence": config.licence,
            "patients": sum(part == "train" for part in split.values()),
            "seed": config.seed,
            "start": config.start,
        },
    )


def export_checkpoints(run: Path, path: Path) -> int:
    """Write the averaged weights of a run's last checkpoints, finished or not; the step of the last stage.

    Networks of which there is no checkpoint are those that the run began from.

    Raises
    ------
    ValueError
        If the folder holds no run, or there is neither a checkpoint nor a beginning of a network.
    """
    config = read_run(run)
    description = describe(config, read_split(run / "split.json"), Schedule())
    initial = initial_system(config, run)
    system = (
        checkpoint.build(description)
        if initial is None
        else dataclasses.replace(initial, description=description)
    )
    step, found = 0, set() if initial is None else set(initial.parts())
    averaged = {
        name: "ema" if stage.ema else "model"
        for name, stage in zip(config.denoiser_stage_names, config.denoiser_stages, strict=True)
    }
    for stage in ("autoencoders_a", "autoencoders_b", *averaged):
        file = run / f"{stage}.checkpoint.safetensors"
        if not file.exists():
            continue
        tensors, state = load_checkpoint(file)
        step = int(state["step"])
        for part in ("condition", "denoiser") if stage in averaged else (stage,):
            inside = f"{averaged[stage]}.{part}." if stage in averaged else "model.ensemble."
            weights = {k[len(inside) :]: v for k, v in tensors.items() if k.startswith(inside)}
            try:
                getattr(system, part).load_state_dict(weights)
            except RuntimeError as error:
                raise CheckpointError(f"{file}: of other networks ({str(error).splitlines()[0]})") from None
            found.add(part)
    lacking = sorted(set(PARTS[config.system]) - found)
    if lacking:
        raise ValueError(f"{run}: there is no checkpoint of {', '.join(lacking)} yet; wait for one")
    checkpoint.save(system, path)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=Path)
    options = parser.parse_args()
    try:
        step = export_checkpoints(options.run, options.weights)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.weights}: step {step}")


if __name__ == "__main__":
    main()
