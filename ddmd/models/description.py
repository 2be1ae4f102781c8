"""What a weights file says of itself: sizes, grid, sampling, thresholds, each checked before anything is built."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddmd import validation
from ddmd.diffusion.samplers import SamplingConfig
from ddmd.diffusion.schedule import Schedule
from ddmd.models.autoencoder import MAX_SEQUENCES, AutoencoderConfig
from ddmd.models.denoiser import DenoiserConfig

FORMAT = 1
PARTS = {  # of each kind of system, the networks it consists of
    "ddmd": ("autoencoders_a", "autoencoders_b", "condition", "denoiser"),
    "supervised": ("autoencoders_a", "autoencoders_b", "condition"),
    "anomaly": ("autoencoders_a",),
}
MAX_CHARACTERS = 2**20  # of a description as JSON
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
SEQUENCE = re.compile(r"[a-z][a-z0-9]{0,15}")
STORED_SAMPLING = (
    "sampler",
    "steps",
    "samples",
    "eta",
    "stop",
    "mirror",
    "shared_noise",
    "rater_sd",
    "rater_mean",
)  # not the seed, nor the batch


@dataclass(frozen=True)
class SliceGrid:
    """The grid the networks work on.

    Parameters
    ----------
    mm : float
        Millimetres a pixel, in plane.
    multiple : int
        What H and W are multiples of: a multiple of 16 itself.
    """

    mm: float = 1.0
    multiple: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "mm", validation.real("mm", self.mm, 0.25, 16.0))
        object.__setattr__(self, "multiple", validation.integer("multiple", self.multiple, 16, 256))
        if self.multiple % 16:
            raise ValueError(f"multiple is {self.multiple}; allowed are multiples of 16")


def _part(name: str, values: Any, build: Callable[..., Any]) -> Any:
    """A section of the description as its dataclass."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is {validation.shown(values)}; allowed is a section of named values")
    fields = {f.name for f in dataclasses.fields(build)}  # type: ignore[arg-type]
    _known(name, values, fields)
    try:
        return build(**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _known(name: str, values: Mapping[str, Any], fields: set[str]) -> None:
    unknown = sorted(map(str, values.keys() - fields))
    if unknown:
        raise ValueError(f"{name} has unknown keys: {validation.shown(', '.join(unknown[:5]))}")


def check_channels(
    sequences: tuple[str, ...], autoencoder: AutoencoderConfig, denoiser: DenoiserConfig
) -> None:
    """Refuse networks that do not take these sequences.

    Auto-encoders take all sequences at once; where some may be absent, one sequence at a time.

    Raises
    ------
    ValueError
        Naming the section, what it takes and what is allowed.
    """
    count = len(sequences)
    if denoiser.sequences != count:
        raise ValueError(f"denoiser.sequences is {denoiser.sequences}; allowed is {count}, as sequences says")
    wanted, why = (1, "with denoiser.presence") if denoiser.presence else (count, "as sequences says")
    if autoencoder.sequences != wanted:
        raise ValueError(f"autoencoder.sequences is {autoencoder.sequences}; allowed is {wanted}, {why}")


@dataclass(frozen=True)
class Description:
    """What a weights file says of itself.

    Parameters
    ----------
    name : str
        Of letters, digits and ._+-
    sequences : tuple of str
        The C sequences, in the order the networks take them. With `denoiser.presence` an input may lack some.
    grid : {"mm": millimetres a pixel, "multiple": of H and W}
    schedule, autoencoder, denoiser : fields of `Schedule`, `AutoencoderConfig`, `DenoiserConfig`
    discrepancy_scale : float
        What X and Y are multiplied by before they enter the network.
    use_inter, use_intra : bool
        Whether X and Y enter it at all.
    system : "ddmd", "supervised" or "anomaly"
        The method; the condition network alone; the error of the auto-encoders trained on normal slices.
    sampling : fields of `SamplingConfig`, but for seed and batch
        The defaults.
    threshold : float in (0, 1)
        Probability from which a voxel is lesion, but for the outline of large ones; threshold_chosen says how it was
        chosen.
    min_lesion_ml, min_peak : float
        Components that are smaller, or nowhere as probable, are left out of the mask.
    min_relative_contrast : float
        So are those with less than so much of the contrast of the main one on FLAIR; 0 in files without this entry.
    large_lesion_ml, outline_share : float
        Lesions of that volume end where the probability falls below so much of the threshold, at most 5 mm along
        each axis beyond where others would; 1 in files without.
    through_plane_mm : float
        Standard deviation of the Gaussian that smooths maps across slices.
    training : dict
        Data, licence, labels.

    Raises
    ------
    ValueError
        If a value is of another type or out of range; the message names its key.
    """

    name: str
    sequences: tuple[str, ...]
    grid: dict[str, Any]
    schedule: dict[str, Any]
    autoencoder: dict[str, Any]
    denoiser: dict[str, Any]
    discrepancy_scale: float
    use_inter: bool = True
    use_intra: bool = True
    system: str = "ddmd"
    sampling: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.5
    threshold_chosen: str = "one half"
    min_lesion_ml: float = 0.05
    min_peak: float = 0.8
    min_relative_contrast: float = 0.0
    large_lesion_ml: float = 20.0
    outline_share: float = 1.0
    through_plane_mm: float = 1.5
    training: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(
                f"name is {validation.shown(self.name)}; allowed are letters, digits and ._+-, at most 100"
            )
        checked = {
            "sequences": self._checked_sequences(),
            "discrepancy_scale": validation.real("discrepancy_scale", self.discrepancy_scale, 0.0, 1e3),
            "use_inter": validation.flag("use_inter", self.use_inter),
            "use_intra": validation.flag("use_intra", self.use_intra),
            "system": validation.choice("system", self.system, tuple(PARTS)),
            "threshold": validation.real("threshold", self.threshold, 0.0, 1.0, inclusive=False),
            "threshold_chosen": validation.text("threshold_chosen", self.threshold_chosen, 1000),
            "min_lesion_ml": validation.real("min_lesion_ml", self.min_lesion_ml, 0.0, 1000.0),
            "min_peak": validation.real("min_peak", self.min_peak, 0.0, 1.0),
            "min_relative_contrast": validation.real(
                "min_relative_contrast", self.min_relative_contrast, 0.0, 1.0
            ),
            "large_lesion_ml": validation.real("large_lesion_ml", self.large_lesion_ml, 0.0, 1e4),
            "outline_share": validation.real("outline_share", self.outline_share, 0.01, 1.0),
            "through_plane_mm": validation.real("through_plane_mm", self.through_plane_mm, 0.0, 50.0),
            "format": validation.integer("format", self.format, 1, FORMAT),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.training, Mapping):
            raise ValueError(f"training is {validation.shown(self.training)}; allowed is a section")
        _ = self.slice_grid
        schedule = self.schedule_config
        check_channels(self.sequences, self.autoencoder_config, self.denoiser_config)
        sampling = self.sampling_config
        try:
            schedule.timesteps(sampling.steps, sampling.stop)
        except ValueError as error:
            raise ValueError(f"sampling: {error}") from None

    def _checked_sequences(self) -> tuple[str, ...]:
        names = self.sequences
        if (
            not isinstance(names, tuple | list)
            or not 1 <= len(names) <= MAX_SEQUENCES
            or not all(isinstance(name, str) and SEQUENCE.fullmatch(name) for name in names)
            or len(set(names)) != len(names)
        ):
            raise ValueError(
                f"sequences is {validation.shown(names)}; allowed are 1 to {MAX_SEQUENCES} different names"
            )
        return tuple(names)

    @property
    def optional_sequences(self) -> tuple[str, ...]:
        """The sequences of which an input may lack some, but not all; none where all are needed."""
        return self.sequences if self.denoiser_config.presence else ()

    @property
    def required_sequences(self) -> tuple[str, ...]:
        """The sequences that every input has."""
        return () if self.denoiser_config.presence else self.sequences

    @property
    def slice_grid(self) -> SliceGrid:
        """The grid of the networks."""
        grid: SliceGrid = _part("grid", self.grid, SliceGrid)
        return grid

    @property
    def schedule_config(self) -> Schedule:
        """The noise schedule."""
        schedule: Schedule = _part("schedule", self.schedule, Schedule)
        return schedule

    @property
    def autoencoder_config(self) -> AutoencoderConfig:
        """Sizes of the auto-encoders."""
        config: AutoencoderConfig = _part("autoencoder", self.autoencoder, AutoencoderConfig)
        return config

    @property
    def denoiser_config(self) -> DenoiserConfig:
        """Sizes of condition network and denoiser."""
        config: DenoiserConfig = _part("denoiser", self.denoiser, DenoiserConfig)
        return config

    @property
    def sampling_config(self) -> SamplingConfig:
        """The default sampling."""
        config: SamplingConfig = _part("sampling", self.sampling, SamplingConfig)
        return config

    def to_json(self) -> str:
        """The description as it is stored."""
        values = dataclasses.asdict(self)
        values["sampling"] = {k: v for k, v in self.sampling.items() if k in STORED_SAMPLING}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: Any) -> Description:
        """Read and check a stored description.

        Raises
        ------
        ValueError
            If it is no description, naming the key.
        """
        if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
            raise ValueError(f"its description is no text of at most {MAX_CHARACTERS} characters")
        try:
            values = json.loads(text, object_pairs_hook=validation.unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its description is not JSON ({validation.shown(str(error))})") from None
        if not isinstance(values, dict):
            raise ValueError(f"its description is {validation.shown(values)}; allowed is a JSON object")
        version = values.get("format", FORMAT)
        if isinstance(version, int) and version > FORMAT:
            raise ValueError(f"format {validation.shown(version)} is newer than {FORMAT}; update ddmd")
        _known("its description", values, {f.name for f in dataclasses.fields(cls)})
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"its description lacks {', '.join(missing)}")
        return cls(**values)
