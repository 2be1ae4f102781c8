"""Convolutions of an image enlarged twofold, without enlarging it: the same function in fewer multiplications."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def joined(coarse: Tensor, fine: Tensor | None) -> Tensor:
    """What is enlarged twofold by repetition, and what need not be, as one image."""
    enlarged = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
    return enlarged if fine is None else torch.cat((enlarged, fine), 1)


def folded(weight: Tensor) -> Tensor:
    """The 4x4 kernels, stride 2 and padding 1, of a transposed convolution that does two things at once.

    Enlarging by repetition and a 3x3 convolution are one transposed convolution, whose kernel is the sum of
    the 3x3 one over 2x2 shifts: 16 multiplications for every pixel that is enlarged, not 36 (the sub-pixel
    convolution of Shi et al., CVPR 2016, for a fixed enlargement).

    Parameters
    ----------
    weight : (out, in / groups, 3, 3)

    Returns
    -------
    (out, in / groups, 4, 4)
    """
    kernels = weight.flatten(0, 1)[:, None]
    summed = functional.conv_transpose2d(kernels, torch.ones_like(kernels[:1, :, :2, :2])).flip(-1, -2)
    return summed.view(*weight.shape[:2], 4, 4)


class UpConv2d(nn.Conv2d):
    """A convolution of what is enlarged twofold by repetition, beside what need not be.

    The parameters are those of the plain convolution of `joined(coarse, fine)`. They are folded at
    every call, or by `prepare` once and for all.

    Parameters
    ----------
    coarse, fine : int
        Channels at half the resolution, and at the full one (0: none).
    channels : int
    kernel : 1 or 3
    groups : int
        Only without `fine`, of 3x3 convolutions.
    """

    # Where it was measured to be faster (`python -m benchmarks.end_to_end`); elsewhere the plain one is computed.
    folded_on: tuple[str, ...] = ("cpu",)
    for_coarse: Tensor | None
    for_fine: Tensor | None

    def __init__(
        self, coarse: int, fine: int, channels: int, kernel: int = 3, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(coarse + fine, channels, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.coarse, self.fine = coarse, fine
        self.register_buffer("for_coarse", None, persistent=False)
        self.register_buffer("for_fine", None, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.for_coarse = self.for_fine = None  # they were of other weights

    def _folded(self) -> tuple[Tensor, Tensor]:
        first = self.coarse // self.groups
        mine, other = self.weight[:, :first], self.weight[:, first:]
        if self.kernel_size[0] == 3:  # kernels of a transposed convolution lead with what comes in
            mine = folded(mine).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        memory = torch.channels_last
        return mine.contiguous(memory_format=memory), other.contiguous(memory_format=memory)

    def prepare(self) -> None:
        """Fold the weights for good: they are not to change any more."""
        with torch.no_grad():
            self.for_coarse, self.for_fine = self._folded()

    def folds(self, x: Tensor) -> bool:
        """Whether it is folded for a tensor on this device."""
        return x.device.type in self.folded_on

    def of_joined(self, x: Tensor) -> Tensor:
        """The plain convolution of `joined(coarse, fine)`."""
        return super().forward(x)

    def forward(self, coarse: Tensor, fine: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(Z, coarse, H, W) and (Z, fine, 2 H, 2 W) -> (Z, channels, 2 H, 2 W)."""
        if not self.folds(coarse):
            return self.of_joined(joined(coarse, fine))
        mine, other = self.for_coarse, self.for_fine
        if mine is None or other is None:
            mine, other = self._folded()
        if self.kernel_size[0] == 3:
            y = functional.conv_transpose2d(coarse, mine, self.bias, stride=2, padding=1, groups=self.groups)
        else:
            y = functional.conv2d(coarse, mine, self.bias)
            y = functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return y if fine is None else y.add_(functional.conv2d(fine, other, padding=self.padding))


def prepare(module: nn.Module) -> None:
    """`UpConv2d.prepare` for every one in a module."""
    for part in module.modules():
        if isinstance(part, UpConv2d):
            part.prepare()
