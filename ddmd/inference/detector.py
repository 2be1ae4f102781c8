"""A trained system at work: a volume in, a Detection out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ddmd.inference.detection import Detection
from ddmd.inference.ensemble import Maps, Progress, detect_slices
from ddmd.inference.postprocess import LesionCriteria, find_lesions, lesion_score
from ddmd.inference.prefetch import prefetch
from ddmd.inference.provenance import provenance, without_folders
from ddmd.inference.session import SamplingConfig
from ddmd.inference.slices import SliceGrid, Slices, extract
from ddmd.io.results import file_sha256
from ddmd.io.volume import Volume
from ddmd.models import checkpoint


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; allowed are auto, cpu, cuda and cuda:N") from None
    if picked.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed are auto, cpu, cuda and cuda:N")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r} and torch sees no CUDA device; use cpu")
    return picked


@dataclass(frozen=True)
class Prepared:
    """A volume and its slices on a system's grid: what `Detector.detect` computes on."""

    volume: Volume
    slices: Slices


@dataclass(frozen=True)
class VolumeMaps:
    """`ddmd.ensemble.Maps` of one volume: float32 (X, Y, Z) on its canonical grid, zero outside the brain."""

    probability: np.ndarray
    uncertainty: np.ndarray
    inter: np.ndarray
    intra: np.ndarray


@dataclass(frozen=True)
class Detector:
    """A loaded system; load once, detect many.

    >>> detector = Detector.load("flair-image-labels")        # doctest: +SKIP
    >>> detection = detector.detect("flair.nii.gz")   # doctest: +SKIP
    """

    system: checkpoint.System
    weights_sha256: str | None = None  # of the file they come from

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] = checkpoint.DEFAULT,
        device: str = "auto",
        precision: str = "auto",
    ) -> Detector:
        """Load a shipped system by name, or a weights file.

        precision is "float32", "bfloat16", or what is faster on the device; see `checkpoint.pick_dtype`.

        Raises
        ------
        WeightsError
            If the weights cannot be used.
        ValueError
            If there is no such device or precision.
        """
        system = checkpoint.load(name_or_path, pick_device(device), precision)
        return cls(system, file_sha256(checkpoint.find(name_or_path)))

    @property
    def description(self) -> checkpoint.Description:
        """What the weights say of themselves."""
        return self.system.description

    def sampling_config(
        self,
        samples: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        batch: int | None = None,
    ) -> SamplingConfig:
        """Sampling by the weights' defaults, but for what is given."""
        default = checkpoint.Sampling(**self.description.sampling)
        config = SamplingConfig(
            samples=default.samples if samples is None else samples,
            steps=default.steps if steps is None else steps,
            sampler=default.sampler if sampler is None else sampler,
            eta=default.eta,
            stop=default.stop,
            mirror=default.mirror,
            seed=seed,
            batch=batch,
        )
        self.system.schedule.timesteps(config.steps, config.stop)  # raises where there are not so many
        return config

    def prepare(
        self,
        volume: Any,
        *,
        affine: np.ndarray | None = None,
        sequences: str | Sequence[str] | None = None,
        resample: str | bool | None = None,
    ) -> Prepared:
        """Read a volume and cut it into slices, so that `detect` has only to compute.

        Takes what `detect` takes, and raises what it raises of the volume. Needs no device: it can be
        done for the next volume while this one is computed.
        """
        if not isinstance(volume, Volume):
            volume = Volume.read(
                volume,
                affine=affine,
                sequences=sequences,
                require=self.description.sequences,
                resample=resample,
            )
        grid = SliceGrid(**self.description.grid)
        return Prepared(volume, extract(volume, self.description.sequences, grid))

    def lesion_criteria(self, threshold: float | None = None) -> LesionCriteria:
        """What of a probability is lesion, by the weights; the threshold may be another."""
        told = self.description
        return LesionCriteria(
            told.threshold if threshold is None else threshold, told.min_lesion_ml, told.min_peak
        )

    def to_volume(self, prepared: Prepared, maps: Maps) -> VolumeMaps:
        """Maps of slices on the volume they are of; probability and uncertainty smoothed through the plane."""
        sigma = max(self.description.through_plane_mm / prepared.volume.spacing[2], 1e-3)  # 0 is none
        brain, restore = prepared.volume.brain, prepared.slices.restore

        def smooth(values: Tensor) -> Tensor:
            return torch.from_numpy(ndimage.gaussian_filter1d(values.numpy(), sigma, axis=0, mode="nearest"))

        return VolumeMaps(
            probability=restore(smooth(maps.probability)).clip(0, 1) * brain,
            uncertainty=restore(smooth(maps.uncertainty)).clip(0) * brain,
            inter=restore(maps.inter) * brain,
            intra=restore(maps.intra) * brain,
        )

    def detect_all(self, volumes: Iterable[Any], **options: Any) -> Iterator[Detection]:
        """Find lesions in many volumes: the next one is read and prepared while this one is computed.

        Parameters
        ----------
        volumes : iterable of what `detect` takes as its volume
        **options
            As `detect` takes them, the same for all.

        Raises
        ------
        VolumeError
            When it is the turn of a volume that cannot be used.
        """
        reading = {key: options.pop(key) for key in ("affine", "sequences", "resample") if key in options}
        for _, prepared in prefetch(volumes, lambda volume: self.prepare(volume, **reading)):
            yield self.detect(prepared(), **options)

    def detect(
        self,
        volume: Any,
        *,
        affine: np.ndarray | None = None,
        sequences: str | Sequence[str] | None = None,
        resample: str | bool | None = None,
        samples: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        threshold: float | None = None,
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> Detection:
        """Find lesions in one volume.

        Parameters
        ----------
        volume : path, {sequence: path}, list of paths, nibabel image, array, Volume, or Prepared
        affine, sequences, resample
            As `Volume.read` takes them.
        samples, steps : int, optional
            S masks of N steps each; by default what the weights say.
        sampler : "ddim", "ddpm" or "dpm++2m", optional
        seed : int
            The same seed gives the same result.
        threshold : float in (0, 1), optional
            Probability from which a voxel is lesion.
        batch : int, optional
            Slices at once; changes time and memory, not the result.
        progress : called with (slices done, slices in all), optional

        Raises
        ------
        VolumeError
            If the volume cannot be used, naming the file and what to do.
        ValueError
            If an option is out of range.
        """
        begun = time.perf_counter()
        rule = self.lesion_criteria(threshold)
        config = self.sampling_config(samples, steps, sampler, seed, batch)
        if not isinstance(volume, Prepared):
            volume = self.prepare(volume, affine=affine, sequences=sequences, resample=resample)
        maps = self.to_volume(volume, detect_slices(self.system, volume.slices, config, progress))
        volume = volume.volume
        found = find_lesions(maps.probability, maps.uncertainty, volume.affine, rule)
        return Detection(
            mask=volume.to_native(found.mask, np.uint8),
            probability=volume.to_native(maps.probability),
            uncertainty=volume.to_native(maps.uncertainty),
            inter_discrepancy=volume.to_native(maps.inter),
            intra_discrepancy=volume.to_native(maps.intra),
            image=volume.to_native(volume.images[self.description.sequences[0]]),
            score=lesion_score(maps.probability, float(np.prod(volume.spacing)) / 1000, bool(found.lesions)),
            lesions=found.lesions,
            notes=tuple(without_folders(note, volume.sources) for note in volume.notes),
            provenance=provenance(
                self.description,
                self.weights_sha256,
                self.system.device,
                self.system.dtype,
                config,
                rule,
                volume,
                maps.probability,
                time.perf_counter() - begun,
            ),
            name=volume.name,
            labels=volume.to_native(found.labels, np.min_scalar_type(len(found.lesions))),
        )


@lru_cache(maxsize=2)
def _loaded(name_or_path: str, device: str, precision: str) -> Detector:
    return Detector.load(name_or_path, device, precision)


def detect(
    volume: Any,
    *,
    weights: str | os.PathLike[str] = checkpoint.DEFAULT,
    device: str = "auto",
    precision: str = "auto",
    **options: Any,
) -> Detection:
    """Find lesions in one brain MRI volume.

    Parameters
    ----------
    volume : path, {sequence: path}, list of paths, nibabel image, or array with affine=
    weights : name of a shipped system, or path of a weights file
    device : "auto", "cpu", "cuda" or "cuda:N"
    precision : "auto", "float32" or "bfloat16"
    **options
        As `Detector.detect` takes them.

    Returns
    -------
    Detection

    Examples
    --------
    >>> import ddmd
    >>> from ddmd.data.phantom import phantom
    >>> found = ddmd.detect({"flair": phantom(seed=1, spacing_mm=4.0).images["flair"]})
    >>> found.mask.shape == found.probability.shape
    True
    """
    return _loaded(os.fspath(weights), device, precision).detect(volume, **options)
