"""What a training run is: frozen, typed, read from TOML, written beside the run."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddmd.models.autoencoder import AutoencoderConfig
from ddmd.models.checkpoint import PARTS, Sampling
from ddmd.models.denoiser import MULTIPLE, DenoiserConfig


@dataclass(frozen=True)
class DataEntry:
    """One data set: where it is, how it is laid out, how often it is drawn from.

    With split = false all of it is trained on, but for the patients in `holdout`.
    """

    root: str
    layout: str = "auto"
    name: str | None = None
    weight: float = 1.0
    split: bool = True


@dataclass(frozen=True)
class AutoencoderStage:
    """Training of the K auto-encoders on A, and of the K on B.

    homogeneous and heterogeneous weigh L_homo and L_hetero; the latter is bounded by `bound` nats a
    dimension.
    """

    steps: int = 1500
    batch: int = 12
    learning_rate: float = 2e-3
    homogeneous: float = 0.02
    heterogeneous: float = 0.02
    bound: float = 2.0


@dataclass(frozen=True)
class DenoiserStage:
    """Training of the condition network and the denoiser.

    Parameters
    ----------
    rounds : tuple of float
        Shares of the steps at which the network's own masks on positive slices are made anew
        (image-label track).
    share_normal, share_painted, share_transplanted, share_painted_beside, share_masked : float
        Shares of a batch: normal slices as they are, lesions painted on normal slices, lesions of B's masks
        put into normal slices, lesions painted on positive slices beside what is there, and slices of B with
        their mask (pixel track) or pseudo-mask, where they have one (image track; from the first round on, the
        others' shares until then).
    share_symmetric : float
        Share of the samples whose mirror image is replaced by the slice itself, so that a lesion that is the same
        on both sides is not taken for normal.
    bag_weight : float
        Weight of the loss by which a positive slice holds a lesion somewhere, whatever its pseudo-mask
        (image-label track; multiple-instance learning, with the masked share's slices as bags).
    teacher_uncertainty : bool
        Whether the teacher may be uncertain about a patient: its threshold is then lower, all that reaches it is
        lesion, and little is said of what is far from it.
    hard_from : float
        Share of the steps from which lesions are also painted that are no brighter than their
        surroundings.
    use_inter, use_intra : bool
        Whether X and Y reach the network, for the ablations. Without both, no auto-encoder is trained.
    """

    steps: int = 9000
    batch: int = 16
    learning_rate: float = 2e-3
    ema: float = 0.998
    rounds: tuple[float, ...] = (0.3, 0.5, 0.68, 0.84)
    share_normal: float = 0.12
    share_painted: float = 0.35
    share_transplanted: float = 0.0
    share_painted_beside: float = 0.18
    share_masked: float = 0.35
    bag_weight: float = 0.15
    teacher_uncertainty: bool = True
    hard_from: float = 0.48
    share_symmetric: float = 0.4
    use_inter: bool = True
    use_intra: bool = True


# Measured on validation patients (`python -m benchmarks.quality`): one step finds as much as a hundred do, and the
# mirror image gives masks that differ where the network may be wrong. Where more steps are asked for, they are taken
# at the highest noise alone, with fresh noise at each.
SAMPLING = Sampling(steps=1, samples=6, eta=1.0, stop=0.98, mirror=True)


@dataclass(frozen=True)
class TrainConfig:
    """Everything `ddmd train` needs. A patient named in `holdout` is a test patient, one named in
    `validation_patients` a validation patient, whatever the shares; neither is trained on.

    sampling is how the finished weights draw masks by default.

    precision is "float32", "bfloat16" (convolutions only), or what is faster on the device.

    start is a weights file, or the name of a shipped system, from which every network begins that it has; a
    stage of 0 steps then leaves its networks as they are. The sizes must be that system's. Patients
    that the earlier training saw must be in this one's training part: it is the same where data,
    seed and shares are.

    system is "ddmd", or one of the systems beside it: "supervised", the condition network alone, and
    "anomaly", the auto-encoders of normal slices alone.
    """

    data: tuple[DataEntry, ...]
    name: str = "flair-image-labels"
    sequences: tuple[str, ...] = ("flair",)
    labels: Literal["image", "pixel"] = "image"
    system: Literal["ddmd", "supervised", "anomaly"] = "ddmd"
    seed: int = 0
    size: int = 144
    mm: float = 1.0
    validation: float = 0.1
    test: float = 0.2
    holdout: tuple[str, ...] = ()
    validation_patients: tuple[str, ...] = ()
    licence: str = ""
    checkpoint_minutes: float = 2.0
    precision: str = "auto"
    start: str | None = None
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    autoencoder_stage: AutoencoderStage = field(default_factory=AutoencoderStage)
    denoiser_stage: DenoiserStage = field(default_factory=DenoiserStage)
    sampling: Sampling = SAMPLING

    def __post_init__(self) -> None:
        if self.labels not in ("image", "pixel"):
            raise ValueError(f"labels is {self.labels!r}; allowed are 'image' and 'pixel'")
        if self.system not in PARTS:
            raise ValueError(f"system is {self.system!r}; allowed are {', '.join(PARTS)}")
        if self.size % MULTIPLE:
            raise ValueError(f"size is {self.size}; allowed are multiples of {MULTIPLE}")
        if not self.data:
            raise ValueError("data is empty; name at least one data set as [[data]]")
        for stage in (self.autoencoder_stage, self.denoiser_stage):
            if stage.steps < (0 if self.start else 1):
                raise ValueError(
                    f"steps is {stage.steps} in {type(stage).__name__}; allowed is at least 1, and 0 with `start`"
                )
        for part in (self.autoencoder, self.denoiser):
            if part.sequences != len(self.sequences):
                raise ValueError(
                    f"sequences is {self.sequences}; allowed are {part.sequences}, as in "
                    f"{type(part).__name__}"
                )


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)} not known; allowed are {', '.join(sorted(known))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_config(path: str | Path) -> TrainConfig:
    """Read a run's TOML. Roots of data sets are relative to the working directory.

    Raises
    ------
    ValueError
        Naming the file, the entry and what is allowed.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the path of a training configuration") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    return _whole(values, str(path))


def read_run(folder: str | Path) -> TrainConfig:
    """The configuration that `train` wrote into a run's folder; ValueError where there is none."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}); give the folder of a run") from None
    return _whole(values, str(path))


def _whole(values: dict[str, Any], where: str) -> TrainConfig:
    parts = {
        "autoencoder": AutoencoderConfig,
        "denoiser": DenoiserConfig,
        "autoencoder_stage": AutoencoderStage,
        "denoiser_stage": DenoiserStage,
        "sampling": Sampling,
    }
    for key, kind in parts.items():
        if key in values:
            values[key] = _build(kind, values[key], f"{where}, [{key}]")
    values["data"] = [_build(DataEntry, entry, f"{where}, [[data]]") for entry in values.get("data", [])]
    config: TrainConfig = _build(TrainConfig, values, where)
    return config
