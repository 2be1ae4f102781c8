"""A device of its own without hardware: tensors that say they lie on `DEVICE`, compute on the CPU, and are counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # torch knows it without hardware, and nothing computes there by chance
WAITING = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique",
    "aten.equal",
    "aten.is_nonzero",
)


class OnDevice(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the mode")


@dataclass
class Counts:
    """Operations that move values between host and device, and those for which the host waits."""

    uploads: list[tuple[int, ...]] = field(default_factory=list)
    downloads: list[tuple[int, ...]] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    allocations: list[str] = field(default_factory=list)  # that name no device


class StandInDevice(TorchDispatchMode):
    """Runs operations of tensors on the device on the CPU, and refuses those that mix devices."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # in inference mode, operations arrive before they are taken apart
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = str(func).rsplit(".", 1)[0]
        given = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        on_device = [a for a in given if isinstance(a, OnDevice)]
        if name == "aten.copy_":
            self._count_copy(args[1], args[0])
        elif name == "aten._to_copy":
            target = kwargs.get("device") or args[0].device
            self._count_copy(args[0], OnDevice if target == DEVICE else args[0] if target is None else None)
        elif on_device and any(not isinstance(a, OnDevice) and a.dim() for a in given):
            raise AssertionError(f"{func} mixes tensors of the host and of the device")
        if on_device and name in WAITING:
            self.counts.waits.append(str(func))
        if on_device and name in ("aten.index", "aten.index_put", "aten.index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.counts.waits += [f"{func} by a mask"] * len(masks)
        if not given and "device" in kwargs and kwargs["device"] is None:
            self.counts.allocations.append(str(func))
        made_there = bool(on_device) if kwargs.get("device") is None else kwargs["device"] == DEVICE
        if name == "aten.copy_":
            made_there = isinstance(args[0], OnDevice)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        plain = tree_map(lambda a: a.held if isinstance(a, OnDevice) else a, (args, kwargs))
        result = func(*plain[0], **plain[1])
        if name.endswith("_") and args:
            return args[0]  # in place
        if "out" in kwargs:
            return kwargs["out"]
        return tree_map(lambda a: OnDevice(a) if isinstance(a, Tensor) and made_there else a, result)

    def _count_copy(self, source: Tensor, target: Any) -> None:
        there = isinstance(target, OnDevice) or target is OnDevice
        if there and not isinstance(source, OnDevice):
            self.counts.uploads.append(tuple(source.shape))
        elif not there and isinstance(source, OnDevice):
            self.counts.downloads.append(tuple(source.shape))
