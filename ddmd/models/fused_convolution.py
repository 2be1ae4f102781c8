"""Convolutions of upsampled images, or of images cut into patches, that make neither: the same function, faster.

The parameters are those of the plain convolution. The fused kernels that take their place are computed from
them at every call, but for weights that do not change: `freeze` keeps their kernels, with a copy of the
weights they are of. Kept kernels serve only while the weights still equal that copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def _channels_last(kernels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies with channels-last strides, of one channel, too: oneDNN sums by the strides it is given."""
    return tuple(kernel.clone(memory_format=torch.channels_last) for kernel in kernels)


class FusedConv2d(nn.Conv2d, ABC):
    """A convolution with the parameters of a plain one, computed by other kernels where that is faster."""

    # Where it was measured to be faster (`python -m benchmarks.end_to_end`); elsewhere the plain one is computed.
    fused_on: tuple[str, ...] = ("cpu",)

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int,
        device: torch.device | str = "cpu",
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            channels_in, channels, kernel, padding=kernel // 2, groups=groups, bias=bias,
            device=torch.device(device), dtype=torch.float32,
        )  # fmt: skip
        self._frozen: tuple[Tensor, tuple[Tensor, ...]] | None = None  # weights, and their kernels

    @abstractmethod
    def fuse(self) -> tuple[Tensor, ...]:
        """The fused kernels of the weights as they are now, one for each input."""

    def fused_kernels(self) -> tuple[Tensor, ...]:
        """The frozen kernels where they are those of the weights, or else the kernels computed anew."""
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(self.weight):
            return self.fuse()  # neither values nor strides are there to be read
        if self._frozen is not None and self._serves(self._frozen[0]):
            return self._frozen[1]
        return _channels_last(self.fuse())

    def _serves(self, frozen: Tensor) -> bool:
        """Whether the weights are still those that were frozen: by value, since no counter sees every change."""
        weight = self.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return False  # a gradient needs to pass through `fuse`
        return weight.dtype == frozen.dtype and weight.device == frozen.device and torch.equal(weight, frozen)

    def freeze(self, dtype: torch.dtype | None = None) -> None:
        """Keep the fused kernels of the weights as they are now.

        Parameters
        ----------
        dtype : torch.dtype, optional
            What the kernels and the weights are rounded to, after the kernels are computed.
        """
        with torch.no_grad():
            dtype = dtype or self.weight.dtype
            kernels = _channels_last(tuple(kernel.to(dtype) for kernel in self.fuse()))
            self._frozen = self.weight.detach().to(dtype, copy=True), kernels

    def is_fused(self, x: Tensor) -> bool:
        """Whether the fused kernels are used for a tensor on this device."""
        return x.device.type in self.fused_on

    def forward_plain(self, x: Tensor) -> Tensor:
        """The plain convolution of all inputs as one image."""
        return super().forward(x)


def freeze(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """`FusedConv2d.freeze` for every one in a module."""
    for part in module.modules():
        if isinstance(part, FusedConv2d):
            part.freeze(dtype)


def concat_upsampled(coarse: Tensor, fine: Tensor | None) -> Tensor:
    """The coarse image, upsampled twofold by repetition, concatenated with the fine one where there is one."""
    upsampled = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
    return upsampled if fine is None else torch.cat((upsampled, fine), 1)


def upsample_kernel(weight: Tensor) -> Tensor:
    """The 4x4 kernels, stride 2 and padding 1, of the transposed convolution that upsamples and convolves.

    Upsampling by repetition and a 3x3 convolution are one transposed convolution, whose kernel is the sum of
    the 3x3 one over 2x2 shifts: 16 multiplications for every coarse pixel, not 36 (the sub-pixel
    convolution of Shi et al., CVPR 2016, for a fixed upsampling).

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
    """A convolution of a coarse image, upsampled twofold by repetition, concatenated with a fine one.

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
        self,
        coarse: int,
        fine: int,
        channels: int,
        kernel: int = 3,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(coarse + fine, channels, kernel, device, groups, bias)
        self.coarse = coarse

    def fuse(self) -> tuple[Tensor, ...]:
        first = self.coarse // self.groups
        coarse, fine = self.weight[:, :first], self.weight[:, first:]
        if self.kernel_size[0] == 3:  # kernels of a transposed convolution have the input's channels first
            coarse = upsample_kernel(coarse).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return coarse, fine

    def forward(self, coarse: Tensor, fine: Tensor | None = None) -> Tensor:
        """(Z, coarse, H, W) and (Z, fine, 2 H, 2 W) -> (Z, channels, 2 H, 2 W)."""
        if not self.is_fused(coarse):
            return self.forward_plain(concat_upsampled(coarse, fine))
        coarse_kernel, fine_kernel = self.fused_kernels()
        if self.kernel_size[0] == 3:
            y = functional.conv_transpose2d(
                coarse, coarse_kernel, self.bias, stride=2, padding=1, groups=self.groups
            )
        else:
            y = functional.conv2d(coarse, coarse_kernel, self.bias)
            y = functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return y if fine is None else y.add_(functional.conv2d(fine, fine_kernel, padding=self.padding))


class PatchConv2d(FusedConv2d):
    """A 3x3 convolution of the patches of several images, concatenated.

    With patches of p x p pixels as p^2 times the channels (`pixel_unshuffle`), a 3x3 convolution is one of
    3p x 3p pixels with stride p: nothing is rearranged or concatenated.

    Parameters
    ----------
    inputs : of each input, its channels and p
    channels : int
    """

    def __init__(
        self, inputs: Sequence[tuple[int, int]], channels: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(sum(c * p * p for c, p in inputs), channels, 3, device)
        self.inputs = tuple(inputs)

    def fuse(self) -> tuple[Tensor, ...]:
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
        kernels = self.fused_kernels()
        p = self.inputs[0][1]
        y = functional.conv2d(images[0], kernels[0], self.bias, stride=p, padding=p)
        for x, kernel, (_, p) in zip(images[1:], kernels[1:], self.inputs[1:], strict=True):
            y = y.add_(functional.conv2d(x, kernel, stride=p, padding=p))
        return y
