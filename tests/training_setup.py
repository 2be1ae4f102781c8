"""A tiny configuration of a training run, and batches without changes, for the tests of training."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from ddmd.models.autoencoder import AutoencoderConfig
from ddmd.models.denoiser import DenoiserConfig
from ddmd.training import loop
from ddmd.training.augmentation import Augmentation
from ddmd.training.batch_maker import BatchMaker
from ddmd.training.config import AutoencoderStage, DataEntry, DenoiserStage, TrainConfig
from ddmd.training.device_slices import DeviceSlices
from tests.volumes import write_slices

STILL = Augmentation(
    **{field.name: 0.0 for field in dataclasses.fields(Augmentation) if field.type == "float"}
)


def batch_maker(prepared, config, stage="lesions", **options) -> BatchMaker:
    """Batches whose slices are neither moved nor altered, unless `options` say so."""
    made = DeviceSlices(prepared, torch.device("cpu"), config.mm)
    return BatchMaker(
        made, config, stage, {"set": 1.0}, **{"augmentation_config": STILL, "stripped": 0.0, **options}
    )


def tiny_config(folder: Path, rng: np.random.Generator) -> TrainConfig:
    """Four patients' slices, whose masks cannot be read, and networks that train in seconds."""
    return TrainConfig(
        data=(DataEntry(str(write_slices(folder / "set", rng, 4, garbage_masks=True))),),
        name="tiny", size=64, test=0.25, validation=0.0,
        autoencoder=AutoencoderConfig(members=2, width=4, code=2),
        denoiser=DenoiserConfig(widths=(8, 8, 8, 8), noise_width=8, mirrored=True),
        autoencoder_stage=AutoencoderStage(steps=3, batch=4),
        denoiser_stage=DenoiserStage(steps=4, batch=2, rounds=(0.5,)),
    )  # fmt: skip


def worst_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def as_if_stopped(path, step):
    """As if the run had been stopped at a step."""
    tensors, _ = loop.load_checkpoint(path)
    loop._save(path, tensors, {"step": step})
