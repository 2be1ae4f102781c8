"""Detection with a loaded system: a volume in, a Detection out."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddmd import validation
from ddmd.diffusion.samplers import QUALITIES, quality_of
from ddmd.inference.detection import Detection
from ddmd.inference.devices import DEVICES, pick_device
from ddmd.inference.draws import leave_out_faint
from ddmd.inference.ensemble import Maps, Progress
from ddmd.inference.lesion_contrast import BrightImage
from ddmd.inference.make_detection import make_detection
from ddmd.inference.postprocess import LesionCriteria
from ddmd.inference.prefetch import prefetch
from ddmd.inference.preparing import READING_OPTIONS, check_prepared, prepare_volume, refuse_reading
from ddmd.inference.session import SamplingConfig, Session, callers_state_aside
from ddmd.inference.volume_maps import (
    DetectionError,
    Prepared,
    VolumeMaps,
    draws_in_part,
    maps_on_volume,
    smooth_through_plane,
)
from ddmd.models import checkpoint

__all__ = [
    "DEVICES",
    "READING_OPTIONS",
    "DetectionError",
    "Detector",
    "Prepared",
    "VolumeMaps",
    "detect",
    "pick_device",
    "smooth_through_plane",
]

SAMPLING_OPTIONS = ("samples", "steps", "sampler", "seed", "batch", "eta", "stop", "quality")


RENAMED = {"configured": "sampling_config", "rule": "lesion_criteria", "restored": "to_volume"}  # since 0.2


@dataclass(frozen=True, eq=False)
class Detector:
    """A loaded system; load once, detect many.

    A detector does not change and may be shared by threads: each thread computes in a `Session` of its own.

    Parameters
    ----------
    system : System
        Networks and description, as `load` gives them.

    Examples
    --------
    >>> from ddmd.data.phantom import phantom
    >>> detector = Detector.load("flair-image-labels", device="cpu")
    >>> flair = phantom(seed=1, spacing_mm=4.0).images["flair"]
    >>> detector.detect({"flair": flair}, samples=2).mask.shape == flair.shape
    True
    """

    system: checkpoint.System
    _sessions: threading.local = field(default_factory=threading.local, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"system": self.system}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "system", state["system"])
        object.__setattr__(self, "_sessions", threading.local())

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Methods by their names of 0.1, with a warning."""
            if name not in RENAMED:
                raise AttributeError(f"Detector has no attribute {name!r}")
            warnings.warn(
                f"Detector.{name} is now Detector.{RENAMED[name]}; the old name goes in the next release",
                FutureWarning,
                stacklevel=2,
            )
            return getattr(self, RENAMED[name])

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] = checkpoint.DEFAULT,
        device: str | int | torch.device = "auto",
        precision: str = "auto",
    ) -> Detector:
        """Load a shipped system by name, or a weights file.

        Parameters
        ----------
        name_or_path : name of a shipped system, or path of a weights file
        device : "auto", "cpu", "cuda", "cuda:N"; "gpu" is "cuda", and a number N is "cuda:N"
        precision : "auto", "float32" or "bfloat16"
            "auto" is what is faster on the device; see `checkpoint.pick_dtype`.

        Returns
        -------
        Detector

        Raises
        ------
        WeightsError
            If the weights cannot be used.
        ValueError
            If there is no such device or precision.
        """
        return cls(checkpoint.load(name_or_path, pick_device(device), precision))

    @property
    def session(self) -> Session:
        """The engine of the thread that asks, made when it first does."""
        if not hasattr(self._sessions, "session"):
            self._sessions.session = Session(self.system)
        session: Session = self._sessions.session
        return session

    @property
    def weights_sha256(self) -> str | None:
        """Checksum of the weights file, None for weights that come from no file."""
        return self.system.sha256

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
        *,
        eta: float | None = None,
        stop: float | None = None,
        quality: str | None = None,
    ) -> SamplingConfig:
        """The weights' default sampling, but for what is given.

        Parameters
        ----------
        samples, steps, sampler, seed, batch, eta, stop, quality
            As `detect` takes them.

        Returns
        -------
        SamplingConfig

        Raises
        ------
        ValueError
            If an option is of another type or out of range; the message names it.
        """
        given = {
            "samples": samples, "steps": steps, "sampler": sampler, "batch": batch, "eta": eta, "stop": stop,
        }  # fmt: skip
        options: dict[str, Any] = {}
        if quality is not None:
            options |= QUALITIES[validation.choice("quality", quality, tuple(QUALITIES))]
        options |= {name: value for name, value in given.items() if value is not None}
        config = replace(self.description.sampling_config, seed=seed, **options)
        self.system.schedule.timesteps(config.steps, config.stop)  # raises where there are not so many
        return config

    def prepare(
        self,
        volume: Any,
        *,
        affine: np.ndarray | None = None,
        sequences: str | Sequence[str] | None = None,
        resample: str | bool | None = None,
        skull: str = "auto",
        brain: Any = None,
        bias: str = "auto",
        strip: bool = False,
    ) -> Prepared:
        """Read a volume and cut it into slices, so that `detect` has only to compute.

        It can be done for the next volume while this one is computed. Files, the estimate of the brain and bias fields
        are the host's; on a GPU, normalising and resampling are the device's.

        Parameters
        ----------
        volume : path, {sequence: path}, list of paths, nibabel image, array, or Volume
        affine, sequences, resample, skull, brain, bias, strip
            As `Volume.read` takes them; a `Volume` was read with its own, and takes none.

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
        return prepare_volume(
            volume, self.description, self.system.device, affine=affine, sequences=sequences, resample=resample,
            skull=skull, brain=brain, bias=bias, strip=strip,
        )  # fmt: skip

    def lesion_criteria(self, threshold: float | None = None) -> LesionCriteria:
        """Which components of a probability map are lesions, by the weights; the threshold may be another.

        Parameters
        ----------
        threshold : float in (0, 1), optional
            By default the weights' own, which validation patients chose.

        Returns
        -------
        LesionCriteria

        Raises
        ------
        ValueError
            If the threshold is not a number between 0 and 1.
        """
        description = self.description
        if threshold is None:
            threshold = description.threshold
        threshold = validation.real("threshold", threshold, 0.0, 1.0, inclusive=False)
        return LesionCriteria(
            threshold,
            description.min_lesion_ml,
            description.min_peak,
            description.min_relative_contrast,
            description.large_lesion_ml,
            description.outline_share,
        )

    def maps(
        self,
        prepared: Prepared,
        config: SamplingConfig,
        progress: Progress | None = None,
        keep_draws: bool = False,
    ) -> Maps:
        """What is computed of every slice, in the session of the thread that calls.

        Parameters
        ----------
        prepared : Prepared
        config : SamplingConfig
        progress : called with (slices done, slices in all), optional
        keep_draws : bool
            Whether the S draws are kept, too.

        Returns
        -------
        Maps
            Four maps (Z, 1, H, W) float32 on the slices' grid, on the device; draws on the CPU.
        """
        return self.session.run(prepared.slices, config, progress, keep_draws)

    def draws(self, prepared: Prepared, maps: Maps) -> NDArray[np.uint8] | None:
        """The draws of `maps`, where they were kept, as `volume_maps.draws_in_part` gives them.

        What is too faint beside the main lesion is no lesion in them either; see `draws.leave_out_faint`.

        Parameters
        ----------
        prepared : Prepared
        maps : Maps

        Returns
        -------
        (S, x, y, Z) uint8, or None
        """
        if maps.draws is None:
            return None
        sigma = self.description.through_plane_mm / prepared.volume.spacing[2]
        with callers_state_aside(self.system.device):
            draws = draws_in_part(prepared, maps.draws, sigma, self.system.device)
        least, image = self.description.min_relative_contrast, BrightImage.of(prepared.volume)
        if image is None or not least:
            return draws
        return leave_out_faint(draws, image.map(prepared.slices.part_of), least)

    def to_volume(self, prepared: Prepared, maps: Maps) -> VolumeMaps:
        """Maps of slices on the volume they are of; probability and uncertainty smoothed through the plane.

        Parameters
        ----------
        prepared : Prepared
        maps : Maps

        Returns
        -------
        VolumeMaps
            float32 (X, Y, Z) each, on the volume's canonical grid.

        Raises
        ------
        DetectionError
            If a map is not finite, naming the volume.
        """
        with callers_state_aside(maps.probability.device):
            return maps_on_volume(prepared, maps, self.system)

    def detect_all(self, volumes: Iterable[Any], **options: Any) -> Iterator[Detection]:
        """Find lesions in many volumes: the next one is read and prepared while this one is computed.

        Parameters
        ----------
        volumes : iterable of what `detect` takes as its volume
        **options
            As `detect` takes them, the same for all.

        Yields
        ------
        Detection
            One a volume, in their order.

        Raises
        ------
        VolumeError
            When it is the turn of a volume that cannot be used.
        ValueError
            If `volumes` is one volume, or an option is wrong.
        """
        if isinstance(volumes, str | bytes | os.PathLike | np.ndarray | Mapping) or not isinstance(
            volumes, Iterable
        ):
            raise ValueError(
                f"volumes is {validation.shown(volumes)}; give several, as a list, or one to `detect`"
            )
        reading = {key: options.pop(key) for key in READING_OPTIONS if key in options}
        sampling = {key: options[key] for key in SAMPLING_OPTIONS if key in options}
        quality_of(options.get("quality"), validation.flag("draws", options.get("draws", False)))
        self.sampling_config(**sampling)  # all refused before anything is read
        self.lesion_criteria(options.get("threshold"))
        for _, prepared in prefetch(volumes, lambda volume: self.prepare(volume, **reading)):
            yield self.detect(prepared(), **options)

    def detect(
        self,
        volume: Any,
        *,
        affine: np.ndarray | None = None,
        sequences: str | Sequence[str] | None = None,
        resample: str | bool | None = None,
        skull: str = "auto",
        brain: Any = None,
        bias: str = "auto",
        strip: bool = False,
        samples: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        threshold: float | None = None,
        batch: int | None = None,
        progress: Progress | None = None,
        eta: float | None = None,
        stop: float | None = None,
        quality: str | None = None,
        draws: bool = False,
    ) -> Detection:
        """Find lesions in one volume.

        Parameters
        ----------
        volume : path, DICOM folder, {sequence: path}, list of paths, nibabel image, array, Volume, or Prepared
        affine, sequences, resample, skull, brain, bias, strip
            As `Volume.read` takes them. A `Volume` or `Prepared` was read with its own, and takes none.
        samples, steps : int, optional
            S masks of N steps each; by default what the weights say.
        sampler : "ddim", "ddpm" or "dpm++2m", optional
        seed : int
            The same seed gives the same result on one machine with the same number of threads.
        threshold : float in (0, 1), optional
            Probability from which a voxel is lesion; large lesions reach on to a share of it, which the weights say.
        batch : int, optional
            Most slices computed at once. It changes time and memory; see Notes for the result.
        progress : called with (slices done, slices in all), optional
        eta : float in [0, 1], optional
            Of the DDIM sampler: 0 draws all noise at the start, 1 at every step.
        stop : float in [0, 1), optional
            Share of the T steps that are left out at the end, where x_0 is predicted at once; 0 leaves out none.
        quality : "fast" or "draws", optional
            Named sampling, by default what the weights say; options that are given override it. "fast" is the
            posterior mean in one step. "draws" samples masks that differ from one another, and with them
            intervals of the volumes and the probability that each lesion exists; it takes several times as long.
        draws : bool
            Whether the detection holds the drawn masks; the quality is then "draws", whatever sampling the weights
            store.

        Returns
        -------
        Detection

        Raises
        ------
        VolumeError
            If the volume cannot be used, naming the file and what to do.
        DetectionError
            If the maps are not finite.
        ValueError
            If an option is of another type or out of range, or draws of quality "fast" are asked for.

        Notes
        -----
        Convolutions are summed in an order that torch chooses by shape, threads and device. Between batches and
        thread counts on a CPU, probabilities differ by less than 1e-5 in float32 and 5e-3 in bfloat16.
        """
        begun = time.perf_counter()
        criteria = self.lesion_criteria(threshold)
        keep_image = validation.flag("draws", draws)
        quality = quality_of(quality, keep_image)
        config = self.sampling_config(
            samples, steps, sampler, seed, batch, eta=eta, stop=stop, quality=quality
        )
        if not isinstance(volume, Prepared):
            volume = self.prepare(
                volume, affine=affine, sequences=sequences, resample=resample, skull=skull, brain=brain,
                bias=bias, strip=strip,
            )  # fmt: skip
        else:
            refuse_reading("Prepared", affine, sequences, resample, skull, brain, bias, strip)
            check_prepared(volume, self.description)
        prepared: Prepared = volume
        sampled = self.maps(prepared, config, progress, keep_draws=quality == "draws")
        maps = self.to_volume(prepared, sampled)
        kept = self.draws(prepared, sampled)
        del sampled  # its memory is needed for the images
        return make_detection(self.system, prepared, maps, kept, config, criteria, keep_image, begun)


@lru_cache(maxsize=2)
def _loaded(path: Path, version: tuple[int, ...], device: str, precision: str) -> Detector:
    """The detector of a file as it is now: `version` changes when the file does."""
    return Detector.load(path, device, precision)


def _load_once(name_or_path: str | os.PathLike[str], device: str, precision: str) -> Detector:
    path = Path(os.path.realpath(checkpoint.find(name_or_path)))
    stat = path.stat()
    version = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
    return _loaded(path, version, str(device), precision)


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
    volume : path, DICOM folder, {sequence: path}, list of paths, nibabel image, or array with affine=
    weights : name of a shipped system, or path of a weights file
        Loaded once, and again when the file has changed; the last two are kept.
    device, precision
        As `Detector.load` takes them.
    **options
        As `Detector.detect` takes them.

    Returns
    -------
    Detection

    Examples
    --------
    >>> import ddmd
    >>> from ddmd.data.phantom import phantom
    >>> detection = ddmd.detect({"flair": phantom(seed=1, spacing_mm=4.0).images["flair"]})
    >>> detection.mask.shape == detection.probability.shape
    True
    """
    return _load_once(weights, device, precision).detect(volume, **options)
