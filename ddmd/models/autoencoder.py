"""The K slim auto-encoders of an ensemble, run as one network of grouped convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddmd import ops, validation
from ddmd.models.fused_convolution import UpConv2d

PATCH = 4  # pixels of a patch's side: the convolutions start on patches
MAX_SEQUENCES = 8


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an ensemble.

    Parameters
    ----------
    sequences : int
        C.
    members : int
        K.
    width : int
        Channels of the first stage of each member: even, for GroupNorm in two groups.
    code : int
        Channels of a code.

    Raises
    ------
    ValueError
        If a size is no integer or out of range.
    """

    sequences: int = 1
    members: int = 3
    width: int = 24
    code: int = 6

    def __post_init__(self) -> None:
        most = {"sequences": MAX_SEQUENCES, "members": 32, "width": 1024, "code": 1024}
        for name, highest in most.items():
            object.__setattr__(self, name, validation.integer(name, getattr(self, name), 1, highest))
        if self.width % 2:
            raise ValueError(f"width is {self.width}; allowed are even integers")


def float32_on(device: torch.device | str) -> dict[str, Any]:
    """What every parameter is made with: never the caller's default type or device."""
    return {"device": torch.device(device), "dtype": torch.float32}


class NormSiLU(nn.Module):
    """GroupNorm + SiLU, with the scale, shift and residual of `ops.group_norm_silu`."""

    def __init__(self, channels: int, groups: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels, **float32_on(device)))
        self.bias = nn.Parameter(torch.zeros(channels, **float32_on(device)))

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return ops.group_norm_silu(
            x, self.groups, self.weight, self.bias, scale=scale, shift=shift, residual=residual
        )


class AutoencoderEnsemble(nn.Module):
    """K auto-encoders that never mix: channels of member k are group k of every convolution.

    A slice is cut into 4x4 patches, brought to a code of `code` channels a 16x16 tile (43 times
    fewer numbers than pixels by default), and back. The bottleneck is what makes an ensemble that
    never saw a lesion unable to reconstruct one.
    """

    def __init__(self, config: AutoencoderConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        k, w = config.members, config.width
        patch = config.sequences * PATCH**2

        def conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
            padding = kernel // 2 if stride == 1 else 1
            return nn.Conv2d(
                k * channels_in, k * channels_out, kernel, stride, padding, groups=k, **float32_on(device)
            )

        self.encoder = nn.ModuleList((conv(patch, w), conv(w, 2 * w, 4, 2), conv(2 * w, 3 * w, 4, 2)))
        self.to_code = conv(3 * w, config.code, 1)
        self.from_code = conv(config.code, 3 * w)
        self.decoder = nn.ModuleList(
            UpConv2d(k * i * w, 0, k * o * w, groups=k, device=device) for i, o in ((3, 2), (2, 1))
        )
        self.encoder_norms = nn.ModuleList(NormSiLU(k * i * w, k * 2, device) for i in (1, 2, 3))
        self.decoder_norms = nn.ModuleList(NormSiLU(k * i * w, k * 2, device) for i in (3, 2, 1))
        self.to_patch = conv(w, patch)

    def encode_shared(self, b: Tensor) -> Tensor:
        """Slices, the same for all members (Z, C, H, W) -> codes (Z, K, code, H / 16, W / 16).

        The first convolution is then one of all members: its groups have the same input.
        """
        first = cast(nn.Conv2d, self.encoder[0])
        patches = functional.pixel_unshuffle(b, PATCH).contiguous(memory_format=torch.channels_last)
        h = self.encoder_norms[0](functional.conv2d(patches, first.weight, first.bias, padding=1))
        for conv, norm in zip(list(self.encoder)[1:], list(self.encoder_norms)[1:], strict=True):
            h = norm(conv(h))
        codes: Tensor = self.to_code(h).unflatten(1, (self.config.members, self.config.code))
        return codes

    def decode_patches(self, code: Tensor) -> Tensor:
        """Codes (Z, K, code, H / 16, W / 16) -> patches of the reconstructions (Z, K C 16, H / 4, W / 4)."""
        h = self.decoder_norms[0](self.from_code(code.flatten(1, 2)))
        for conv, norm in zip(self.decoder, list(self.decoder_norms)[1:], strict=True):
            h = norm(conv(h))
        patches: Tensor = self.to_patch(h)
        return patches

    def decode(self, code: Tensor) -> Tensor:
        """Codes (Z, K, code, H / 16, W / 16) -> reconstructions (K, Z, C, H, W)."""
        x = functional.pixel_shuffle(self.decode_patches(code), PATCH)
        reconstructions: Tensor = x.unflatten(1, (self.config.members, self.config.sequences)).transpose(0, 1)
        return reconstructions

    def reconstructed_patches(self, b: Tensor) -> Tensor:
        """Slices (Z, C, H, W) -> contiguous reconstructions (K, Z, C, H / 4, 4 W), pixels in patches.

        A patch of 4x4 pixels follows the other, which is an order as good as any for what looks at pixels one by
        one, and needs a shorter copy than rows of pixels.
        """
        patches = self.decode_patches(self.encode_shared(b)).permute(0, 2, 3, 1)
        split = patches.unflatten(3, (self.config.members, self.config.sequences, PATCH**2))
        reordered: Tensor = split.permute(3, 0, 4, 1, 2, 5).contiguous().flatten(4)
        return reordered

    def forward(self, b: Tensor) -> Tensor:
        """Slices (Z, C, H, W), H and W multiples of 16 -> reconstructions (K, Z, C, H, W)."""
        return self.decode(self.encode_shared(b))
