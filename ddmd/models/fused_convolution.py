"""Convolutions of images enlarged, or cut into patches, without doing either: the same function, sooner.

The parameters are those of the plain convolution; the kernels that take its place are folded from them at every
call, or by `prepare` once and for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class FusedConv2d(nn.Conv2d, ABC):
    """A convolution with the parameters of a plain one, computed by `kernels` where that is faster."""

    # Where it was measured to be faster (`python -m benchmarks.end_to_end`); elsewhere the plain one is computed.
    folded_on: tuple[str, ...] = ("cpu",)

    def __init__(self, kernels: int, channels_in: int, channels: int, kernel: int, **options: Any) -> None:
        super().__init__(channels_in, channels, kernel, padding=kernel // 2, **options)
        self.names = [f"folded_{i}" for i in range(kernels)]
        for name in self.names:
            self.register_buffer(name, None, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.names:  # they were of other weights
            setattr(self, name, None)

    @abstractmethod
    def fold(self) -> tuple[Tensor, ...]:
        """The kernels, one for each input."""

    def kernels(self) -> tuple[Tensor, ...]:
        """The kernels that were prepared, or those of the weights as they are now."""
        held = tuple(getattr(self, name) for name in self.names)
        return self._laid_out() if held[0] is None else held

    def _laid_out(self) -> tuple[Tensor, ...]:
        return tuple(kernel.contiguous(memory_format=torch.channels_last) for kernel in self.fold())

    def prepare(self) -> None:
        """Fold the weights for good: they are not to change any more."""
        with torch.no_grad():
            for name, kernel in zip(self.names, self._laid_out(), strict=True):
                setattr(self, name, kernel)

    def is_fused(self, x: Tensor) -> bool:
        """Whether it is folded for a tensor on this device."""
        return x.device.type in self.folded_on

    def forward_plain(self, x: Tensor) -> Tensor:
        """The plain convolution of all inputs as one image."""
        return super().forward(x)


def prepare(module: nn.Module) -> None:
    """`FusedConv2d.prepare` for every one in a module."""
    for part in module.modules():
        if isinstance(part, FusedConv2d):
            part.prepare()


def concat_upsampled(coarse: Tensor, fine: Tensor | None) -> Tensor:
    """What is enlarged twofold by repetition, and what need not be, as one image."""
    enlarged = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
    return enlarged if fine is None else torch.cat((enlarged, fine), 1)


def upsample_kernel(weight: Tensor) -> Tensor:
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


class UpConv2d(FusedConv2d):
    """A convolution of what is enlarged twofold by repetition, beside what need not be (`joined`).

    Parameters
    ----------
    coarse, fine : int
        Channels at half the resolution, and at the full one (0: none).
    channels : int
    kernel : 1 or 3
    groups : int
        Only without `fine`, of 3x3 convolutions.
    """

    def __init__(
        self, coarse: int, fine: int, channels: int, kernel: int = 3, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(2, coarse + fine, channels, kernel, groups=groups, bias=bias)
        self.coarse = coarse

    def fold(self) -> tuple[Tensor, ...]:
        first = self.coarse // self.groups
        mine, other = self.weight[:, :first], self.weight[:, first:]
        if self.kernel_size[0] == 3:  # kernels of a transposed convolution lead with what comes in
            mine = upsample_kernel(mine).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return mine, other

    def forward(self, coarse: Tensor, fine: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(Z, coarse, H, W) and (Z, fine, 2 H, 2 W) -> (Z, channels, 2 H, 2 W)."""
        if not self.is_fused(coarse):
            return self.forward_plain(concat_upsampled(coarse, fine))
        mine, other = self.kernels()
        if self.kernel_size[0] == 3:
            y = functional.conv_transpose2d(coarse, mine, self.bias, stride=2, padding=1, groups=self.groups)
        else:
            y = functional.conv2d(coarse, mine, self.bias)
            y = functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return y if fine is None else y.add_(functional.conv2d(fine, other, padding=self.padding))


class PatchConv2d(FusedConv2d):
    """A 3x3 convolution of patches: of p x p pixels of an input, and of those of others beside it.

    With patches of p x p pixels as p^2 times the channels (`pixel_unshuffle`), a 3x3 convolution is one of
    3p x 3p pixels with stride p: nothing is rearranged, nor joined.

    Parameters
    ----------
    inputs : of each input, its channels and p
    channels : int
    """

    def __init__(self, inputs: Sequence[tuple[int, int]], channels: int) -> None:
        super().__init__(len(inputs), sum(c * p * p for c, p in inputs), channels, 3)
        self.inputs = tuple(inputs)

    def fold(self) -> tuple[Tensor, ...]:
        parts = self.weight.split([c * p * p for c, p in self.inputs], 1)
        return tuple(
            part.unflatten(1, (c, p, p)).permute(0, 1, 4, 2, 5, 3).reshape(len(part), c, 3 * p, 3 * p)
            for part, (c, p) in zip(parts, self.inputs, strict=True)
        )

    def forward(self, *images: Tensor) -> Tensor:
        """(Z, c, p H, p W) of each input -> (Z, channels, H, W), H and W the same of all."""
        if not self.is_fused(images[0]):
            patches = [
                functional.pixel_unshuffle(x, p) for x, (_, p) in zip(images, self.inputs, strict=True)
            ]
            return self.forward_plain(torch.cat(patches, 1))
        kernels = self.kernels()
        p = self.inputs[0][1]
        y = functional.conv2d(images[0], kernels[0], self.bias, stride=p, padding=p)
        for x, kernel, (_, p) in zip(images[1:], kernels[1:], self.inputs[1:], strict=True):
            y = y.add_(functional.conv2d(x, kernel, stride=p, padding=p))
        return y
