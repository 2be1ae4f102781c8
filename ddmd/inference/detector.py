"""Detection with a loaded system: a volume in, a Detection out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddmd import validation
from ddmd.inference.detection import Detection
from ddmd.inference.ensemble import Maps, Progress
from ddmd.inference.postprocess import LesionCriteria, find_lesions, lesion_score
from ddmd.inference.prefetch import prefetch
from ddmd.inference.provenance import provenance, without_folders
from ddmd.inference.session import SamplingConfig, Session, callers_state_aside
from ddmd.inference.slices import Slices, extract
from ddmd.io.volume import Volume, VolumeError
from ddmd.models import checkpoint

DEVICES = "auto, cpu, cuda, cuda:N, and gpu for cuda"
READING_OPTIONS = ("affine", "sequences", "resample", "skull", "brain", "bias", "strip")  # of `Volume.read`


class DetectionError(VolumeError):
    """Maps of a case that are not finite; the message names the case and says what to do."""


def pick_device(device: str | int | torch.device) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, "gpu" is CUDA, and a number its index.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    name = str(device)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{name}" if name.isdecimal() else name
    if name == "gpu" or name.startswith("gpu:"):
        name = name.replace("gpu", "cuda", 1)
    try:
        picked = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {validation.shown(device)}; allowed are {DEVICES}") from None
    if picked.type not in ("cpu", "cuda") or (picked.type == "cpu" and picked.index):
        raise ValueError(f"device is {validation.shown(device)}; allowed are {DEVICES}")
    if picked.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {str(device)!r} and torch sees no CUDA device; use cpu")
        if (picked.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {str(device)!r}; torch sees {torch.cuda.device_count()} CUDA devices"
            )
    return picked


@dataclass(frozen=True)
class Prepared:
    """A volume and its slices on a system's grid: what `Detector.detect` computes on."""

    volume: Volume
    slices: Slices


@dataclass(frozen=True)
class VolumeMaps:
    """`Maps` of one volume: float32 (X, Y, Z) on its canonical grid, zero outside the brain."""

    probability: NDArray[np.float32]
    uncertainty: NDArray[np.float32]
    inter: NDArray[np.float32]
    intra: NDArray[np.float32]


def smooth_through_plane(maps: Tensor, sigma: float) -> Tensor:
    """Convolve maps (Z, ...) along Z with a Gaussian cut off at 4 sigma; the end slices repeat.

    The sums are float64, as those of `scipy.ndimage.gaussian_filter1d(mode="nearest")`.

    Parameters
    ----------
    maps : (Z, ...) float32
    sigma : float, in slices
    """
    count, radius = len(maps), int(4.0 * sigma + 0.5)
    if radius == 0:
        return maps
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64, device=maps.device)
    weights = torch.exp(-0.5 * (distance / sigma).square())
    weights = weights / weights.sum()
    rows = torch.arange(count, dtype=torch.int64, device=maps.device)[:, None]
    columns = (rows + distance.long()).clamp(0, count - 1)
    matrix = torch.zeros(count, count, dtype=torch.float64, device=maps.device)
    matrix.scatter_add_(1, columns, weights.expand(count, -1))
    return (matrix @ maps.flatten(1).double()).float().view(maps.shape)


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
    ) -> SamplingConfig:
        """The weights' default sampling, but for what is given.

        Parameters
        ----------
        samples, steps, sampler, seed, batch
            As `detect` takes them.

        Returns
        -------
        SamplingConfig

        Raises
        ------
        ValueError
            If an option is of another type or out of range; the message names it.
        """
        given = {"samples": samples, "steps": steps, "sampler": sampler, "batch": batch}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
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

        Needs no device: it can be done for the next volume while this one is computed.

        Parameters
        ----------
        volume : path, {sequence: path}, list of paths, nibabel image, array, or Volume
        affine, sequences, resample, skull, brain, bias, strip
            As `Volume.read` takes them.

        Returns
        -------
        Prepared

        Raises
        ------
        VolumeError
            If the volume cannot be used, naming the file and what to do.
        """
        if not isinstance(volume, Volume):
            volume = Volume.read(
                volume,
                affine=affine,
                sequences=sequences,
                require=self.description.sequences,
                resample=resample,
                skull=skull,
                brain=brain,
                bias=bias,
                strip=strip,
            )
        slices = extract(volume, self.description.sequences, self.description.slice_grid)
        return Prepared(volume, slices)

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
        return LesionCriteria(threshold, description.min_lesion_ml, description.min_peak)

    def maps(self, prepared: Prepared, config: SamplingConfig, progress: Progress | None = None) -> Maps:
        """What is computed of every slice, in the session of the thread that calls.

        Parameters
        ----------
        prepared : Prepared
        config : SamplingConfig
        progress : called with (slices done, slices in all), optional

        Returns
        -------
        Maps
            Four maps (Z, 1, H, W) float32 on the slices' grid, on the device.
        """
        return self.session.run(prepared.slices, config, progress)

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
        volume, slices = prepared.volume, prepared.slices
        sigma = self.description.through_plane_mm / volume.spacing[2]
        with callers_state_aside(maps.probability.device):
            smoothed = (
                smooth_through_plane(values, sigma) for values in (maps.probability, maps.uncertainty)
            )
            values = torch.cat((*smoothed, maps.inter, maps.intra), 1)
            if not bool(torch.isfinite(values).all()):
                names = [n for n, v in vars(maps).items() if not bool(torch.isfinite(v).all())]
                raise DetectionError(
                    f"{volume.name}: its maps of {', '.join(names)} are not finite: the weights "
                    f"{self.description.name} overflow in {str(self.system.dtype).removeprefix('torch.')}; "
                    "use precision float32, or other weights"
                )
            brain = torch.from_numpy(slices.part_of(volume.brain)).to(values.device).permute(2, 1, 0)
            part = slices.to_canonical(values)  # (4, x, y, Z), in memory (Z, 4, y, x)
            part[0].clamp_(0.0, 1.0)
            part[1].clamp_(min=0.0)
            part.permute(3, 0, 2, 1).mul_(brain.contiguous()[:, None])
            part = part.contiguous() if part.is_cuda else part  # one copy from the device
            probability, uncertainty, inter, intra = (slices.place(p) for p in part.cpu().numpy())
        return VolumeMaps(probability, uncertainty, inter, intra)

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
        """
        reading = {key: options.pop(key) for key in READING_OPTIONS if key in options}
        sampling = {k: options[k] for k in ("samples", "steps", "sampler", "seed", "batch") if k in options}
        self.sampling_config(**sampling)  # refused before anything is read
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
    ) -> Detection:
        """Find lesions in one volume.

        Parameters
        ----------
        volume : path, DICOM folder, {sequence: path}, list of paths, nibabel image, array, Volume, or Prepared
        affine, sequences, resample, skull, brain, bias, strip
            As `Volume.read` takes them; a `Volume` or `Prepared` was read with its own.
        samples, steps : int, optional
            S masks of N steps each; by default what the weights say.
        sampler : "ddim", "ddpm" or "dpm++2m", optional
        seed : int
            The same seed gives the same result on one machine with the same number of threads.
        threshold : float in (0, 1), optional
            Probability from which a voxel is lesion.
        batch : int, optional
            Most slices computed at once. It changes time and memory; see Notes for the result.
        progress : called with (slices done, slices in all), optional

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
            If an option is of another type or out of range.

        Notes
        -----
        Convolutions are summed in an order that torch chooses by shape, threads and device. Between batches and
        thread counts on a CPU, probabilities differ by less than 1e-5 in float32 and 5e-3 in bfloat16.
        """
        begun = time.perf_counter()
        criteria = self.lesion_criteria(threshold)
        config = self.sampling_config(samples, steps, sampler, seed, batch)
        if not isinstance(volume, Prepared):
            volume = self.prepare(
                volume,
                affine=affine,
                sequences=sequences,
                resample=resample,
                skull=skull,
                brain=brain,
                bias=bias,
                strip=strip,
            )
        maps = self.to_volume(volume, self.maps(volume, config, progress))
        volume = volume.volume
        found = find_lesions(maps.probability, maps.uncertainty, volume.affine, criteria)
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
                criteria,
                volume,
                maps.probability,
                time.perf_counter() - begun,
            ),
            name=volume.name,
            labels=volume.to_native(found.labels, np.min_scalar_type(len(found.lesions))),
            dicom=volume.dicom,
        )


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
