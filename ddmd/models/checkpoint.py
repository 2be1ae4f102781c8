"""Trained systems as files: safetensors with a JSON description, never pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ddmd.diffusion.schedule import Schedule
from ddmd.models.autoencoder import AutoencoderConfig, AutoencoderEnsemble, NormSiLU
from ddmd.models.denoiser import ConditionNet, Denoiser, DenoiserConfig
from ddmd.models.fused_convolution import prepare

FORMAT = 1
PARTS = {  # of each kind of system, the networks it consists of
    "ddmd": ("autoencoders_a", "autoencoders_b", "condition", "denoiser"),
    "supervised": ("autoencoders_a", "autoencoders_b", "condition"),
    "anomaly": ("autoencoders_a",),
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRETRAINED = Path(__file__).parents[1] / "pretrained"
DEFAULT = "flair-image-labels"
RENAMED = {"ddmd-light": "flair-image-labels", "ddmd-pixel": "flair-pixel-labels"}  # since 0.2


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Sampling:
    """How masks are drawn by default; `ddmd.sampling.SamplingConfig` says what each is."""

    sampler: str = "ddim"
    steps: int = 5
    samples: int = 5
    eta: float = 0.0
    stop: float = 0.0
    mirror: bool = False


@dataclass(frozen=True)
class Description:
    """What a weights file says of itself.

    sequences : the C sequences, in the order the networks take them.
    grid : {"mm": millimetres a pixel, "multiple": of H and W}.
    discrepancy_scale : what X and Y are multiplied by before they enter the network.
    use_inter, use_intra : whether X and Y enter it at all.
    system : "ddmd"; "supervised", the condition network alone; "anomaly", the error of the
        auto-encoders trained on normal slices.
    threshold : probability from which a voxel is lesion; threshold_chosen says how.
    min_lesion_ml, min_peak : components that are smaller, or nowhere as probable, are left out of the mask.
    through_plane_mm : standard deviation of the Gaussian by which maps are smoothed across slices, each of
        which the networks see nearly alone.
    training : data, licence, labels, command.
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
    sampling: dict[str, Any] = field(default_factory=lambda: dataclasses.asdict(Sampling()))
    threshold: float = 0.5
    threshold_chosen: str = "one half"
    min_lesion_ml: float = 0.05
    min_peak: float = 0.8
    through_plane_mm: float = 1.5
    training: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class System:
    """A trained system: two ensembles of auto-encoders, the condition network and the denoiser.

    Of a baseline, the networks that are not in `PARTS` are there, untrained and unused.
    """

    description: Description
    autoencoders_a: AutoencoderEnsemble
    autoencoders_b: AutoencoderEnsemble
    condition: ConditionNet
    denoiser: Denoiser
    samplings: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def parts(self) -> dict[str, nn.Module]:
        """The trained networks by the name their tensors carry."""
        return {name: getattr(self, name) for name in PARTS[self.description.system]}

    @property
    def device(self) -> torch.device:
        return next(self.autoencoders_a.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return next(self.autoencoders_a.parameters()).dtype

    @property
    def schedule(self) -> Schedule:
        return Schedule(**self.description.schedule)


def build(description: Description) -> System:
    """The networks a description calls for, with fresh weights."""
    autoencoder = AutoencoderConfig(**description.autoencoder)
    sizes: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description.denoiser.items()
    }
    denoiser = DenoiserConfig(**sizes)
    return System(
        description,
        AutoencoderEnsemble(autoencoder),
        AutoencoderEnsemble(autoencoder),
        ConditionNet(denoiser),
        Denoiser(denoiser),
    )


def save(system: System, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a system to one file, whole or not at all. float16 halves it."""
    path = Path(path)
    tensors = {
        f"{part}.{key}": value.detach().to("cpu", dtype).contiguous()
        for part, module in system.parts().items()
        for key, value in module.state_dict().items()
    }
    temporary = path.with_name(f".{path.name}.partial")
    save_file(tensors, temporary, {"ddmd": json.dumps(dataclasses.asdict(system.description))})
    os.replace(temporary, path)


def available() -> list[str]:
    """Names of the systems that ship with the package."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped system's name, or of a path."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    name = os.fspath(name_or_path)
    if name in RENAMED:
        warnings.warn(
            f"the weights {name!r} are now called {RENAMED[name]!r}; the old name goes in the next release",
            FutureWarning,
            stacklevel=2,
        )
        name = RENAMED[name]
    pretrained = PRETRAINED / f"{name}.safetensors"
    if path.parent == Path() and pretrained.is_file():
        return pretrained
    raise WeightsError(
        f"{name_or_path}: no such weights; give the path of a .safetensors file, or one of "
        f"{', '.join(available()) or '(none is shipped)'}"
    )


def describe(path: Path) -> Description:
    """The description in a weights file's header; the tensors are not read."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not a safetensors file ({error}); pickled weights (.pt, .pth) are never loaded"
        ) from None
    if "ddmd" not in metadata:
        raise WeightsError(f"{path}: lacks its description; weights are written by ddmd train")
    try:
        values = json.loads(metadata["ddmd"])
        values["sequences"] = tuple(values["sequences"])
        description = Description(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: its description cannot be read ({error})") from None
    if description.format > FORMAT:
        raise WeightsError(f"{path}: format {description.format} is newer than {FORMAT}; update ddmd")
    if description.system not in PARTS:
        raise WeightsError(f"{path}: system is {description.system!r}; known are {', '.join(PARTS)}")
    return description


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What to compute in. "auto" is bfloat16 on a GPU and on a CPU that multiplies it, else float32.

    Convolutions of 32 to 96 channels, two threads: 375 against 205 GFLOP/s with AVX512_BF16; without it
    and without AMX 127 against 250.
    """
    if precision == "auto":
        fast = (
            device.type == "cuda"
            or torch.cpu._is_amx_tile_supported()
            or torch.cpu._is_avx512_bf16_supported()
        )
        return torch.bfloat16 if fast else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed are auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def load(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    device: str | torch.device = "cpu",
    precision: str = "auto",
) -> System:
    """Load a system.

    Parameters
    ----------
    name_or_path : name of a shipped system, or a weights file
    device : device or its name
    precision : "auto", "float32" or "bfloat16"
        What the networks compute in; sums, noise, X, Y and the state x_t are float32 always.

    Raises
    ------
    WeightsError
        If there is no such file, it is not safetensors, lacks its description, or its tensors are not
        those of the networks it describes.
    """
    path = find(name_or_path)
    dtype = pick_dtype(precision, torch.device(device))
    description = describe(path)
    try:
        system = build(description)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{path}: describes another architecture ({error})") from None
    with safe_open(path, "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    wanted = {
        f"{part}.{key}": value
        for part, module in system.parts().items()
        for key, value in module.state_dict().items()
    }
    wrong = sorted(
        key for key in held.keys() | wanted.keys()
        if key not in held or key not in wanted or held[key].shape != wanted[key].shape
    )  # fmt: skip
    if wrong:
        raise WeightsError(
            f"{path}: of another architecture: {len(wrong)} tensors missing, extra or of another shape "
            f"({', '.join(wrong[:3])}, ...); load it with the version of ddmd that wrote it"
        )
    for part, module in system.parts().items():
        module.load_state_dict({k: held[f"{part}.{k}"].float() for k in module.state_dict()})
        module.eval().requires_grad_(False)
        prepare(module)
        module.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for norm in module.modules():
            if isinstance(norm, NormSiLU):
                norm.float()  # what the op computes in: not converted at every call
    return system
