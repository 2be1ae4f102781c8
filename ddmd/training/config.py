"""What a training run is: frozen, typed, read from TOML, written beside the run."""

from __future__ import annotations

import json
import tomllib
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ddmd.diffusion.samplers import SamplingConfig
from ddmd.models.autoencoder import AutoencoderConfig
from ddmd.models.denoiser import MULTIPLE, DenoiserConfig
from ddmd.models.description import check_channels
from ddmd.training.lesion_parameters import PainterConfig, Share

NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e6)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e6)]
Steps = Annotated[int, Field(ge=0, le=10**8)]
Batch = Annotated[int, Field(ge=1, le=4096)]
LearningRate = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]  # no folder, nothing hidden


@dataclass(frozen=True)
class DataEntry:
    """One data set: where it is, how it is laid out, how often it is drawn from.

    With split = false all of it is trained on, but for the patients in `holdout`.
    """

    root: Annotated[str, Field(min_length=1)]
    layout: str = "auto"
    name: str | None = None
    weight: Positive = 1.0
    split: bool = True

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def source(self) -> str:
        """What the data set is called: its name, or that of its folder."""
        return self.name or Path(self.root).name


@dataclass(frozen=True)
class AutoencoderStage:
    """Training of the K auto-encoders on A, and of the K on B.

    homogeneous and heterogeneous weigh L_homo and L_hetero; the latter is bounded by `bound` nats a
    dimension.
    """

    steps: Steps = 1500
    batch: Batch = 12
    learning_rate: LearningRate = 2e-3
    homogeneous: NotNegative = 0.02
    heterogeneous: NotNegative = 0.02
    bound: NotNegative = 2.0

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


PSEUDO_MASK_LIMITS = (0.1, 0.9)


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
    pseudo_mask_limits : (faint, certain)
        Pixels that the teacher finds less probable than the first are not lesion; those that reach the second times
        the peak of a component are; those between say nothing. Masks grow where the two are far apart.
    follow_edges : bool
        Whether pseudo-masks end at the edges that the first sequence shows (`ddmd.training.edges`). Lesions must be
        bright on it. What an uncertain teacher's lower threshold adds follows no edge.
    hard_from : float
        Share of the steps from which lesions are also painted that are no brighter than their
        surroundings.
    share_complete, share_first_alone : float
        With `denoiser.presence`, shares of the samples that have every sequence there is of the patient, and the
        first one alone. Of the others each sequence is taken away with a chance of one half; one stays.
    use_inter, use_intra : bool
        Whether X and Y reach the network, for the ablations. Without both, no auto-encoder is trained.
    painter : PainterConfig, optional
        Lesions that a later stage paints. None: as in [painter].
    """

    steps: Steps = 9000
    batch: Batch = 16
    learning_rate: LearningRate = 2e-3
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.998
    rounds: tuple[Share, ...] = (0.3, 0.5, 0.68, 0.84)
    share_normal: Share = 0.12
    share_painted: Share = 0.35
    share_transplanted: Share = 0.0
    share_painted_beside: Share = 0.18
    share_masked: Share = 0.35
    bag_weight: NotNegative = 0.15
    teacher_uncertainty: bool = True
    pseudo_mask_limits: tuple[Share, Share] = PSEUDO_MASK_LIMITS
    follow_edges: bool = False
    hard_from: Share = 0.48
    share_symmetric: Share = 0.4
    share_complete: Share = 0.4
    share_first_alone: Share = 0.3
    use_inter: bool = True
    use_intra: bool = True
    painter: PainterConfig | None = None

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        shares = (
            self.share_normal, self.share_painted, self.share_transplanted, self.share_painted_beside,
            self.share_masked,
        )  # fmt: skip
        if not any(shares):
            raise ValueError("all shares of a batch are 0; give at least one share_*")
        if self.share_complete + self.share_first_alone > 1:
            raise ValueError(
                f"share_complete and share_first_alone are {self.share_complete} and {self.share_first_alone}; "
                "allowed are shares whose sum is at most 1"
            )
        if list(self.rounds) != sorted(set(self.rounds)):
            raise ValueError(f"rounds is {list(self.rounds)}; allowed are shares of the steps that rise")
        if self.pseudo_mask_limits[0] > self.pseudo_mask_limits[1]:
            raise ValueError(
                f"pseudo_mask_limits is {list(self.pseudo_mask_limits)}; allowed are two shares that rise"
            )


# Measured on validation patients (`python -m benchmarks.quality`): one step finds as much as a hundred do, and the
# mirror image gives masks that differ where the network may be wrong. Where more steps are asked for, they are taken
# at the highest noise alone, with fresh noise at each.
SAMPLING = SamplingConfig(steps=1, samples=6, eta=1.0, stop=0.98, mirror=True)


@dataclass(frozen=True)
class TrainConfig:
    """Everything `ddmd train` needs. A patient named in `holdout` is a test patient, one named in
    `validation_patients` a validation patient, whatever the shares; neither is trained on.

    painter says what lesions are painted: which kinds, how large, how bright.

    later_stages train the denoiser on, in order, each from the averaged weights of the stage before. Entries that one
    of them leaves out in a TOML file are those of the stage before. With image-level labels the rounds of each begin with 0.0.

    sampling is how the finished weights draw masks by default.

    precision is "float32", "bfloat16" (convolutions only), or what is faster on the device.

    sequences are the channels of the networks. With [denoiser] presence = true any subset of them will do, in
    training and later, and the auto-encoders take one sequence at a time.

    start is a weights file, or the name of a shipped system, from which every network begins that it has; a
    stage of 0 steps then leaves its networks as they are. The sizes must be that system's; only `sequences` may
    have more with presence, and what is new then has no effect before it is trained. Patients
    that the earlier training saw must be in this one's training part: it is the same where data,
    split_seed and shares are.

    split_seed decides which patients are kept aside; None is seed. Runs that differ in seed alone then have one split.

    system is "ddmd", or one of the systems beside it: "supervised", the condition network alone, and
    "anomaly", the auto-encoders of normal slices alone.
    """

    data: tuple[DataEntry, ...]
    name: FileName = "flair-image-labels"
    sequences: Annotated[tuple[str, ...], Field(min_length=1)] = ("flair",)
    labels: Literal["image", "pixel"] = "image"
    system: Literal["ddmd", "supervised", "anomaly"] = "ddmd"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    size: Annotated[int, Field(ge=32, le=1024)] = 144
    mm: Annotated[float, Field(ge=0.25, le=8)] = 1.0
    validation: Share = 0.1
    test: Share = 0.2
    holdout: tuple[str, ...] = ()
    validation_patients: tuple[str, ...] = ()
    licence: str = ""
    checkpoint_minutes: NotNegative = 2.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    start: Annotated[str, Field(min_length=1)] | None = None
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    autoencoder_stage: AutoencoderStage = field(default_factory=AutoencoderStage)
    denoiser_stage: DenoiserStage = field(default_factory=DenoiserStage)
    later_stages: tuple[DenoiserStage, ...] = ()
    painter: PainterConfig = field(default_factory=PainterConfig)
    sampling: SamplingConfig = SAMPLING

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty; name at least one data set as [[data]]")
        sources = [entry.source for entry in self.data]
        twice = sorted({source for source in sources if sources.count(source) > 1})
        if twice:
            raise ValueError(f"two [[data]] are called {twice[0]!r}; give each a name of its own")
        if self.size % MULTIPLE:
            raise ValueError(f"size is {self.size}; allowed are multiples of {MULTIPLE}")
        for stage in (self.autoencoder_stage, self.denoiser_stage):
            if stage.steps < (0 if self.start else 1):
                raise ValueError(
                    f"steps is {stage.steps} in {type(stage).__name__}; allowed is at least 1, and 0 with `start`"
                )
        self._check_denoiser_stages()
        check_channels(self.sequences, self.autoencoder, self.denoiser)
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test are {self.validation} and {self.test}; allowed are shares that leave "
                "some to train on"
            )

    @property
    def denoiser_stages(self) -> tuple[DenoiserStage, ...]:
        """The first stage of the denoiser and the later ones."""
        return (self.denoiser_stage, *self.later_stages)

    def for_stage(self, number: int) -> TrainConfig:
        """This configuration with stage `number` of the denoiser, from 0, as its only one."""
        stage = self.denoiser_stages[number]
        alone = replace(stage, painter=None)
        return replace(self, denoiser_stage=alone, later_stages=(), painter=stage.painter or self.painter)

    @property
    def stage_names(self) -> list[str]:
        """What is trained, in order; only what the system needs."""
        anomaly, plan = self.system == "anomaly", self.denoiser_stage
        names = []
        if self.autoencoder_stage.steps and (anomaly or plan.use_inter or plan.use_intra):
            names = ["autoencoders_a"] if anomaly else ["autoencoders_a", "autoencoders_b"]
        return names if anomaly else [*names, *self.denoiser_stage_names]

    @property
    def denoiser_stage_names(self) -> list[str]:
        """ "denoiser", "denoiser_2", "denoiser_3" and so on."""
        later = range(2, len(self.denoiser_stages) + 1)
        return ["denoiser", *(f"denoiser_{number}" for number in later)]

    def _check_denoiser_stages(self) -> None:
        """Refuse later stages that do not go with the first, and edges where there are no pseudo-masks."""
        first, pseudo_masks = self.denoiser_stage, self.labels == "image" and self.system != "anomaly"
        if first.painter is not None:
            raise ValueError("painter of [denoiser_stage] is that of the run; give it as [painter]")
        if self.later_stages and self.system == "anomaly":
            raise ValueError(
                "later_stages train the denoiser, and anomaly detection has none; leave them out"
            )
        for number, stage in enumerate(self.later_stages, 1):
            where = f"later stage {number}"
            if stage.steps < 1:
                raise ValueError(f"steps is 0 in {where}; allowed is at least 1")
            if (stage.use_inter, stage.use_intra) != (first.use_inter, first.use_intra):
                raise ValueError(f"use_inter and use_intra in {where} are not those of the first stage")
            if pseudo_masks and stage.rounds[:1] != (0.0,):
                raise ValueError(
                    f"rounds is {list(stage.rounds)} in {where}; the first must be 0.0: pseudo-masks are made by the "
                    "weights that the stage begins with"
                )
        for stage in self.denoiser_stages:
            if stage.follow_edges and not (pseudo_masks and stage.rounds):
                raise ValueError(
                    "follow_edges is of pseudo-masks, and there are no rounds of image-level labels; give rounds, or "
                    "leave it out"
                )


# Entries of 0.1 that have another name now, and those that are no longer needed.
RENAMED = {
    "normal": "share_normal",
    "painted": "share_painted",
    "carved": "share_transplanted",
    "over": "share_painted_beside",
    "masked": "share_masked",
    "bag": "bag_weight",
    "doubt": "teacher_uncertainty",
}
GONE = {"workers": "batches are made on the device"}


def validate(values: dict[str, Any], where: str) -> TrainConfig:
    """A configuration from a dictionary as TOML gives it: types, ranges and names of all entries are checked.

    Raises
    ------
    ValueError
        In one line: `where`, the entry, what it is and what is allowed.
    """
    values = _with_entries_of_earlier_stages(_with_old_names(values, where))
    try:
        return _ADAPTER.validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_problem(error)}") from None


def _with_old_names(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Entries of 0.1 under their names of today, with a warning."""
    values = dict(values)
    for name, why in GONE.items():
        if name in values:
            warnings.warn(f"{where}: {name} is not used any more: {why}", FutureWarning, stacklevel=3)
            del values[name]
    stage = values.get("denoiser_stage")
    if isinstance(stage, dict):
        for old in sorted(RENAMED.keys() & stage.keys()):
            warnings.warn(
                f"{where}: [denoiser_stage] {old} is now {RENAMED[old]}", FutureWarning, stacklevel=3
            )
        values["denoiser_stage"] = {RENAMED.get(k, k): v for k, v in stage.items()}
    return values


def _with_entries_of_earlier_stages(values: dict[str, Any]) -> dict[str, Any]:
    """Later stages with what they leave out. What is not a table is left to the check of types."""
    later, before = values.get("later_stages"), values.get("denoiser_stage", {})
    if not isinstance(later, list | tuple) or not all(isinstance(one, dict) for one in (before, *later)):
        return values
    painter, completed = values.get("painter", {}), []
    for stage in later:
        before = before | stage
        if isinstance(painter, dict) and isinstance(stage.get("painter"), dict):
            painter = before["painter"] = painter | stage["painter"]
        completed.append(before)
    return values | {"later_stages": completed}


def _first_problem(error: ValidationError) -> str:
    """The first of the problems, in one line that names the entry."""
    first = error.errors()[0]
    entry = " ".join(str(part) for part in first["loc"]) or "the configuration"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{entry} not known; see the examples in ddmd/training/recipes"
    if first["type"] == "value_error":  # raised by a check of our own, which names what is within the section
        section = f"[{entry}] " if first["loc"] else ""
        return section + str(first["ctx"]["error"]).replace("\n", " ")
    if first["type"] == "missing":
        return f"{entry} is missing; see the examples in ddmd/training/recipes"
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    allowed = "it should be a plain file name: letters, digits and . _ + -, the first a letter or a digit"
    if first["type"] != "string_pattern_mismatch":
        allowed = first["msg"].replace("Input", "it")
    return f"{entry} is {value}; {allowed}"


_ADAPTER = TypeAdapter(TrainConfig)


def read_config(path: str | Path) -> TrainConfig:
    """Read a run's TOML. Roots of data sets are relative to the working directory.

    Raises
    ------
    ValueError
        Naming the file, the entry and what is allowed.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the path of a training configuration") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    return validate(values, str(path))


def read_run(folder: str | Path) -> TrainConfig:
    """The configuration that `train` wrote into a run's folder; ValueError where there is none."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error}); give the folder of a run") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not the configuration of a run; give the folder of a run")
    return validate(values, str(path))
