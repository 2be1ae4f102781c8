"""From a finished run to one weights file that says what it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ddmd.training.stages import DISCREPANCY_SCALE

if TYPE_CHECKING:
    from ddmd.training.run import _Run


def weights_path(run: _Run) -> Path:
    """Where `export` writes."""
    return run.out / f"{run.config.name}.safetensors"


def export(run: _Run, split: dict[str, str]) -> Path:
    """Write OUT/<name>.safetensors: the networks, their sizes, and how they were trained."""
    from ddmd.models import checkpoint

    config = run.config
    path = weights_path(run)
    description = checkpoint.Description(
        name=config.name,
        sequences=config.sequences,
        grid={"mm": config.mm, "multiple": 16},
        schedule=dataclasses.asdict(run.schedule),
        autoencoder=dataclasses.asdict(config.autoencoder),
        denoiser=dataclasses.asdict(config.denoiser),
        discrepancy_scale=DISCREPANCY_SCALE,
        use_inter=config.denoiser_stage.use_inter,
        use_intra=config.denoiser_stage.use_intra,
        system=config.system,
        sampling={k: v for k, v in dataclasses.asdict(config.sampling).items() if k not in ("seed", "batch")},
        min_peak=0.0 if config.system == "anomaly" else checkpoint.Description.min_peak,
        training={
            "labels": config.labels,
            "data": [entry.name or Path(entry.root).name for entry in config.data],
            "licence": config.licence,
            "patients": sum(part == "train" for part in split.values()),
            "seed": config.seed,
            "start": config.start,
        },
    )
    system = checkpoint.System(
        description, run.autoencoders["a"], run.autoencoders["b"], run.condition, run.denoiser
    )
    checkpoint.save(system, path)
    return path
