"""From what a caller names to a volume and its slices on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ddmd.inference.slices import extract
from ddmd.inference.volume_maps import Prepared
from ddmd.io.volume import Volume, VolumeError
from ddmd.models.checkpoint import Description

READING_OPTIONS = ("affine", "sequences", "resample", "skull", "brain", "bias", "strip")  # of `Volume.read`


def prepare_volume(volume: Any, description: Description, device: torch.device, **reading: Any) -> Prepared:
    """A volume, read where it is not yet, and its slices on a device.

    Parameters
    ----------
    volume : Volume, or what `Volume.read` takes
    description : of the weights
    device : that the slices are to be on
    **reading : all of READING_OPTIONS

    Returns
    -------
    Prepared

    Raises
    ------
    VolumeError
        If the volume cannot be used, naming the file and what to do.
    ValueError
        If an option is given that has no effect on a `Volume`.
    """
    if isinstance(volume, Volume):
        refuse_reading("Volume", *(reading[option] for option in READING_OPTIONS))
    else:
        volume = Volume.read(
            volume,
            require=description.required_sequences,
            optional=description.optional_sequences,
            **reading,
        )
    missing = [s for s in description.required_sequences if s not in volume.images]
    if missing:  # of a Volume that was read for other weights
        raise VolumeError(
            f"{volume.name}: the weights need {', '.join(description.required_sequences)}, and the volume "
            f"has {', '.join(volume.images)}; read it with {', '.join(missing)}, too"
        )
    slices = extract(volume, description.sequences, description.slice_grid, device)
    absent = [s for s in description.sequences if s not in volume.images]
    if absent:
        note = f"{volume.name}: without {', '.join(absent)}, which the weights take where they are there"
        volume = replace(volume, notes=(*volume.notes, note))
    return Prepared(volume, slices)


def check_prepared(prepared: Prepared, description: Description) -> None:
    """Raise ValueError where slices were cut for other weights."""
    wanted = (description.sequences, description.slice_grid)
    if (prepared.slices.sequences, prepared.slices.grid) != wanted:
        raise ValueError(
            f"{prepared.volume.name}: was prepared for weights of other sequences or another grid; use the "
            "`prepare` of this detector"
        )


def refuse_reading(kind: str, *values: Any) -> None:
    """Raise ValueError where options of reading are given for what was read before, and would have no effect."""
    given = [
        name
        for name, value in zip(READING_OPTIONS, values, strict=True)
        if not (value is None or value is False or (isinstance(value, str) and value == "auto"))
    ]
    if given:
        raise ValueError(
            f"{', '.join(given)}: without effect on a {kind}, which was read before; give it to Volume.read, or "
            "give the file"
        )
