"""From the maps of a volume to its Detection: lesions, intervals, images on the input's grid, provenance."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ddmd.diffusion.samplers import SamplingConfig
from ddmd.inference.detection import Detection
from ddmd.inference.draws import summarise_draws
from ddmd.inference.lesion_contrast import BrightImage
from ddmd.inference.postprocess import LesionCriteria, find_lesions, lesion_score
from ddmd.inference.provenance import provenance, without_folders
from ddmd.inference.volume_maps import Prepared, VolumeMaps, draws_image
from ddmd.io.volume import Volume
from ddmd.models.checkpoint import Description, System


def make_detection(
    system: System,
    prepared: Prepared,
    maps: VolumeMaps,
    draws: NDArray[np.uint8] | None,
    config: SamplingConfig,
    criteria: LesionCriteria,
    keep_draws: bool,
    begun: float,
) -> Detection:
    """The Detection of one volume. All of it is done on the CPU: components are found there soonest.

    Parameters
    ----------
    system : System
        That the maps were made with.
    prepared : Prepared
    maps : VolumeMaps
    draws : (S, x, y, Z) uint8 or None
        As `volume_maps.draws_in_part` gives them; intervals and existence come with them.
    config : SamplingConfig
    criteria : LesionCriteria
    keep_draws : bool
        Whether the detection holds the image of the draws.
    begun : float
        When the detection was begun, by `time.perf_counter`.

    Returns
    -------
    Detection
    """
    volume = prepared.volume
    lesion_map = find_lesions(
        maps.probability, maps.uncertainty, volume.affine, criteria, BrightImage.of(volume)
    )
    lesions, interval, image = lesion_map.lesions, None, None
    if draws is not None:
        labels = prepared.slices.part_of(lesion_map.labels)
        summary = summarise_draws(draws, labels, volume.affine)
        interval = summary.volume_interval_ml
        lesions = tuple(
            replace(lesion, existence=share, volume_interval_ml=ends)
            for lesion, share, ends in zip(
                lesions, summary.existence, summary.lesion_intervals_ml, strict=True
            )
        )
        image = draws_image(prepared, draws) if keep_draws else None
    return Detection(
        mask=volume.to_native(lesion_map.mask, np.uint8),
        probability=volume.to_native(maps.probability, copy=False),
        uncertainty=volume.to_native(maps.uncertainty, copy=False),
        inter_discrepancy=volume.to_native(maps.inter, copy=False),
        intra_discrepancy=volume.to_native(maps.intra, copy=False),
        image=volume.to_native(_shown_image(system.description, volume)),
        score=lesion_score(maps.probability, volume.voxel_volume_ml, bool(lesion_map.lesions)),
        lesions=lesions,
        notes=tuple(without_folders(note, volume.sources) for note in volume.notes),
        provenance=provenance(
            system.description,
            system.sha256,
            system.device,
            system.dtype,
            config,
            criteria,
            volume,
            maps.probability,
            time.perf_counter() - begun,
        ),
        name=volume.name,
        labels=volume.to_native(lesion_map.labels, np.min_scalar_type(len(lesion_map.lesions))),
        dicom=volume.dicom,
        draws=image,
        volume_interval_ml=interval,
    )


def _shown_image(description: Description, volume: Volume) -> NDArray[np.float32]:
    """The first of the weights' sequences that is there."""
    return next(volume.images[s] for s in description.sequences if s in volume.images)
