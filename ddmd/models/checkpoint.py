"""Trained systems as files: safetensors with a JSON description, never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddmd import validation
from ddmd.diffusion.samplers import SamplingConfig
from ddmd.diffusion.schedule import Schedule
from ddmd.io.atomic import atomic_path
from ddmd.models.autoencoder import AutoencoderEnsemble, NormSiLU
from ddmd.models.denoiser import ConditionNet, Denoiser
from ddmd.models.description import FORMAT, PARTS, Description
from ddmd.models.fused_convolution import freeze

__all__ = [
    "DEFAULT", "FORMAT", "PARTS", "PRECISIONS", "PRETRAINED", "Description", "System", "WeightsError", "available",
    "build", "check_tensors", "describe", "find", "load", "pick_dtype", "save",
]  # fmt: skip

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRETRAINED = Path(__file__).parents[1] / "pretrained"
DEFAULT = "flair-image-labels"
EARLIER = {"ddmd-light": "flair-image-labels", "ddmd-pixel": "flair-pixel-labels"}  # of 0.1: what came after
MAX_HEADER = 2**24  # bytes
MAX_PARAMETERS = 200_000_000
STORED_TYPES = {"F16": 2, "BF16": 2, "F32": 4}  # of safetensors, and their bytes
Sampling = SamplingConfig  # its name here until 0.1


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True, eq=False)
class System:
    """A trained system: two ensembles of auto-encoders, the condition network and the denoiser.

    Of a baseline, the networks that are not in `PARTS` are there, untrained and unused. A system that is in
    use must not be changed: copy it with `dataclasses.replace` and other networks.

    Parameters
    ----------
    description : Description
    autoencoders_a, autoencoders_b : AutoencoderEnsemble
        Trained on normal slices; trained on all slices.
    condition : ConditionNet
    denoiser : Denoiser
    sha256 : str, optional
        Checksum of the file it was loaded from.
    """

    description: Description
    autoencoders_a: AutoencoderEnsemble
    autoencoders_b: AutoencoderEnsemble
    condition: ConditionNet
    denoiser: Denoiser
    sha256: str | None = None

    def parts(self) -> dict[str, nn.Module]:
        """The trained networks by the name their tensors carry."""
        return {name: getattr(self, name) for name in PARTS[self.description.system]}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.autoencoders_a.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return next(self.autoencoders_a.parameters()).dtype

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.description.schedule_config


def build(description: Description, device: torch.device | str = "cpu") -> System:
    """The networks a description calls for, with fresh float32 weights.

    Raises
    ------
    ValueError
        If they have more than MAX_PARAMETERS parameters; nothing is allocated before that is known.
    """
    if torch.device(device).type != "meta":
        planned = build(description, "meta")
        count = sum(p.numel() for part in planned.parts().values() for p in part.parameters())
        if count > MAX_PARAMETERS:
            raise ValueError(f"its networks have {count:,} parameters; allowed are {MAX_PARAMETERS:,}")
    return System(
        description,
        AutoencoderEnsemble(description.autoencoder_config, device),
        AutoencoderEnsemble(description.autoencoder_config, device),
        ConditionNet(description.denoiser_config, device),
        Denoiser(description.denoiser_config, device),
    )


def check_tensors(source: str | os.PathLike[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that are not floating, or not finite.

    Parameters
    ----------
    source : the file they are of, for the message
    tensors : (name, tensor) of each

    Raises
    ------
    WeightsError
        Naming the file and the tensor.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            raise WeightsError(
                f"{source}: tensor {name} is of type {tensor.dtype}; allowed are floating types"
            )
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"{source}: tensor {name} has {count} of {tensor.numel()} values that are NaN or infinite; "
                "the training that wrote it failed, or the file is damaged"
            )


def save(system: System, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a system to one file, whole or not at all. float16 halves it.

    Raises
    ------
    WeightsError
        If a weight is not finite, or not in the range of the type.
    """
    path = Path(path)
    tensors = {
        f"{part}.{key}": value.detach().to("cpu", dtype).contiguous()
        for part, module in system.parts().items()
        for key, value in module.state_dict().items()
    }
    check_tensors(path, tensors.items())
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"ddmd": system.description.to_json()})


def available() -> list[str]:
    """Names of the systems that ship with the package, without those kept from the release before."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors") if path.stem not in EARLIER)


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped system's name, or of a path.

    Raises
    ------
    WeightsError
        If there is none.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not isinstance(os.fspath(name_or_path), str):
        raise WeightsError(f"weights is {validation.shown(name_or_path)}; give a name or a path")
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # a name too long, or with a NUL
        pass
    name = os.fspath(name_or_path)
    if name in EARLIER:
        warnings.warn(
            f"the weights {name!r} are those of 0.1, kept for one release; today's are {EARLIER[name]!r}; "
            "scores and volume intervals follow the calibration of today's weights",
            FutureWarning,
            stacklevel=2,
        )
    if name in EARLIER or name in available():
        return PRETRAINED / f"{name}.safetensors"
    raise WeightsError(
        f"{validation.shown(os.fspath(name_or_path))}: no such weights; give the path of a .safetensors file, or one of "
        f"{', '.join(available()) or '(none is shipped)'}"
    )


@dataclass(frozen=True)
class _Header:
    """What stands before the tensors of a safetensors file."""

    description: Description
    shapes: dict[str, tuple[int, ...]]


def _read_header(path: Path) -> _Header:
    """The checked header of a weights file: nothing large is read or allocated for a damaged one."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError("its header is cut off or too long")
            entries = json.loads(file.read(length), object_pairs_hook=validation.unique_keys)
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: not a safetensors file ({validation.shown(str(error))}); "
            "pickled weights (.pt, .pth) are never loaded"
        ) from None
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or "ddmd" not in metadata:
        raise WeightsError(f"{path}: lacks its description; weights are written by ddmd train")
    try:
        return _Header(Description.from_json(metadata["ddmd"]), _shapes(entries, size - 8 - length))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None


def _shapes(entries: dict[str, Any], size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a header whose data takes `size` bytes."""
    shapes, total = {}, 0
    for name, entry in entries.items():
        shown = validation.shown(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise ValueError(f"tensor {shown} has no shape")
        kind = entry.get("dtype")
        if not isinstance(kind, str) or kind not in STORED_TYPES:
            raise ValueError(
                f"tensor {shown} is of type {validation.shown(kind)}; allowed are {', '.join(STORED_TYPES)}"
            )
        count = STORED_TYPES[kind]
        for side in entry["shape"]:
            count *= validation.integer(f"a side of tensor {shown}", side, 0, 2**31)
            if count > size:
                raise ValueError(f"tensor {shown} is larger than the file")
        shapes[name], total = tuple(entry["shape"]), total + count
    if total != size:
        raise ValueError(f"its tensors take {total} bytes, and it has {size}: it is cut off or damaged")
    return shapes


def describe(path: Path) -> Description:
    """The description in a weights file's header; the tensors are not read.

    Raises
    ------
    WeightsError
        If the file is no weights file, or its description is out of range; the message names the key.
    """
    return _read_header(path).description


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in. "auto" is bfloat16 on a GPU and on a CPU that multiplies it, else float32.

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
    if not isinstance(precision, str) or precision not in PRECISIONS:
        shown = validation.shown(precision)
        raise ValueError(f"precision is {shown}; allowed are auto, {', '.join(PRECISIONS)}")
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
        If there is no such file, it is not safetensors, lacks its description, describes what is out of
        range, or its tensors are not finite or not those of the networks it describes.
    ValueError
        If there is no such precision.
    """
    path, device = find(name_or_path), torch.device(device)
    dtype = pick_dtype(precision, device)
    header = _read_header(path)
    try:
        planned = build(header.description, "meta")
        system = dataclasses.replace(build(header.description), sha256=_sha256(path))
    except (ValueError, OverflowError, RuntimeError) as error:
        raise WeightsError(f"{path}: its networks cannot be built ({error})") from None
    wanted = {
        f"{part}.{key}": tuple(value.shape)
        for part, module in planned.parts().items()
        for key, value in module.state_dict().items()
    }
    shapes = header.shapes
    wrong = sorted(
        key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key)
    )  # fmt: skip
    if wrong:
        raise WeightsError(
            f"{path}: of another architecture: {len(wrong)} tensors missing, extra or of another shape "
            f"({validation.shown(', '.join(wrong[:3]))}); load it with the version of ddmd that wrote it"
        )
    tensors = _read_tensors(path)
    check_tensors(path, tensors.items())
    # ordinary float32 tensors, whatever the caller's mode
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for part, module in system.parts().items():
            module.load_state_dict({k: tensors[f"{part}.{k}"].float() for k in module.state_dict()})
            module.eval().requires_grad_(False)
            freeze(module, dtype)
            module.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for norm in module.modules():
                if isinstance(norm, NormSiLU):
                    norm.float()  # what the op computes in: not converted at every call
            check_tensors(f"{path} in {dtype}", module.named_parameters(part))
    return system


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file whose header was checked, on the CPU whatever the caller's default device."""
    try:
        with torch.inference_mode(False), torch.device("cpu"), safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged ({error})") from None
