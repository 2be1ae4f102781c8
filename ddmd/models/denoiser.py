"""The slim conditional denoiser: what depends on the image once a slice, what depends on x_t often.

epsilon_theta(b + X + Y + x_t, t) is split in two. `ConditionNet`, a U-Net, sees the slice b (with
its neighbours), X and Y, runs once a slice, and gives features and an evidence map. `Denoiser`, an
order of magnitude cheaper, sees those features, x_t and t, and runs once a sample and step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddmd import validation
from ddmd.models.autoencoder import MAX_SEQUENCES, NormSiLU, float32_on
from ddmd.models.fused_convolution import PatchConv2d, UpConv2d, concat_upsampled

IMAGE_PATCH = 2  # the U-Net works on 2x2 patches of the slice
NOISE_PATCH = 4  # the denoiser on 4x4 patches of x_t
MULTIPLE = 16  # H and W are multiples of this


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of the two networks.

    Parameters
    ----------
    sequences : int
        C.
    context : int
        Neighbouring slices seen on either side.
    widths : tuple of 4 int
        Channels of the U-Net at 1/2, 1/4, 1/8 and 1/16 of the grid.
    noise_width : int
        Channels of the denoiser at 1/4 of the grid; twice as many at 1/8.
    mirrored : bool
        Whether the slice's left-right mirror image is an input, too, so that asymmetry is seen directly.
    presence : bool
        Whether any of the sequences may be absent: a plane a sequence then says whether it is there.

    Raises
    ------
    ValueError
        If a size is of another type or out of range.
    """

    sequences: int = 1
    context: int = 1
    widths: tuple[int, ...] = (32, 64, 96, 128)
    noise_width: int = 32
    mirrored: bool = False
    presence: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.widths, tuple | list) or len(self.widths) != 4:
            raise ValueError(f"widths is {validation.shown(self.widths)}; allowed are 4 integers")
        checked: dict[str, Any] = {
            "sequences": validation.integer("sequences", self.sequences, 1, MAX_SEQUENCES),
            "context": validation.integer("context", self.context, 0, 8),
            "widths": tuple(validation.integer("widths", width, 1, 4096) for width in self.widths),
            "noise_width": validation.integer("noise_width", self.noise_width, 1, 1024),
            "mirrored": validation.flag("mirrored", self.mirrored),
            "presence": validation.flag("presence", self.presence),
        }
        normed = [("widths", width) for width in checked["widths"]]
        for name, width in (*normed, *(("noise_width", i * checked["noise_width"]) for i in (1, 2))):
            if width % _groups(width):
                raise ValueError(
                    f"{name} gives {width} channels, which {_groups(width)} groups do not divide"
                )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def inputs(self) -> int:
        """Planes of the condition: every sequence of every slice seen, its mirror image, presence, X and Y."""
        return self.sequences * (2 * self.context + 1 + self.mirrored + self.presence) + 2

    @property
    def middle_planes(self) -> slice:
        """Which of the planes are the slice itself, between its neighbours."""
        return self._planes(self.context)

    @property
    def mirror_planes(self) -> slice:
        """Which of the planes are the slice's mirror image; none without `mirrored`."""
        return self._planes(2 * self.context + 1, self.mirrored)

    @property
    def presence_planes(self) -> slice:
        """Which of the planes say what sequences are there; none without `presence`."""
        return self._planes(2 * self.context + 1 + self.mirrored, self.presence)

    def _planes(self, group: int, there: bool = True) -> slice:
        """The planes of one group of C, or none."""
        first = group * self.sequences
        return slice(first, first + self.sequences * there)


def _groups(channels: int) -> int:
    return max(1, channels // 8)


Modulation = tuple[Tensor, Tensor]  # what t makes of a block: scale and shift, (R, C) each, or (1, C) for all


def _expanded(modulation: Modulation | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of every row."""
    return (
        (None, None)
        if modulation is None
        else (modulation[0].expand(rows, -1), modulation[1].expand(rows, -1))
    )


class _Residual(nn.Module):
    """Two convolutions, each followed by GroupNorm + SiLU; what passes them by is added by the second.

    modulation: what t makes of the first norm.
    """

    def __init__(
        self,
        first: nn.Module,
        skip: nn.Module | None,
        channels: int,
        embedding: int,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        made_with = float32_on(device)
        self.first = first
        self.first_norm = NormSiLU(channels, _groups(channels), device)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **made_with)
        self.second_norm = NormSiLU(channels, _groups(channels), device)
        self.skip = skip
        self.time = nn.Linear(embedding, 2 * channels, **made_with) if embedding else None

    def _rest(self, h: Tensor, residual: Tensor, modulation: Modulation | None) -> Tensor:
        """What follows the first convolution."""
        h = self.first_norm(h, *_expanded(modulation, len(h)))
        y: Tensor = self.second_norm(self.second(h), residual=residual)
        return y


class Block(_Residual):
    """The two convolutions of one image."""

    def __init__(
        self, channels_in: int, channels: int, embedding: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        made_with = float32_on(device)
        first = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False, **made_with)
        skip = nn.Conv2d(channels_in, channels, 1, **made_with) if channels_in != channels else None
        super().__init__(first, skip, channels, embedding, device)

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        h = self.first(x)
        return self._rest(h, x if self.skip is None else self.skip(x), modulation)


class UpBlock(_Residual):
    """The two convolutions of a coarse image, upsampled twofold, concatenated with a fine one.

    Where fused convolutions are faster, neither the upsampled nor the concatenated image is made.
    """

    first: UpConv2d
    skip: UpConv2d

    def __init__(
        self,
        coarse: int,
        fine: int,
        channels: int,
        embedding: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        first = UpConv2d(coarse, fine, channels, bias=False, device=device)
        skip = UpConv2d(coarse, fine, channels, kernel=1, device=device)
        super().__init__(first, skip, channels, embedding, device)

    def forward(self, coarse: Tensor, fine: Tensor, modulation: Modulation | None = None) -> Tensor:
        if self.first.is_fused(fine):
            return self._rest(self.first(coarse, fine), self.skip(coarse, fine), modulation)
        x = concat_upsampled(coarse, fine)
        return self._rest(self.first.forward_plain(x), self.skip.forward_plain(x), modulation)


@dataclass(frozen=True)
class Condition:
    """What the denoiser needs to know of each slice.

    features : (Z, noise_width, H / 4, W / 4); evidence : (Z, 1, H, W) logits of a lesion.
    """

    features: Tensor
    evidence: Tensor


class ConditionNet(nn.Module):
    """U-Net over the image, X and Y. Also, alone, the supervised baseline: its evidence map."""

    def __init__(self, config: DenoiserConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        w = config.widths
        self.stem = PatchConv2d([(config.inputs, IMAGE_PATCH)], w[0], device)
        self.down = nn.ModuleList(Block(w[max(i - 1, 0)], w[i], device=device) for i in range(len(w)))
        self.up = nn.ModuleList(
            UpBlock(w[i + 1], w[i], w[i], device=device) for i in reversed(range(len(w) - 1))
        )
        self.to_evidence = nn.Conv2d(w[0], IMAGE_PATCH**2, 3, padding=1, **float32_on(device))
        nn.init.constant_(self.to_evidence.bias, -4.0)  # type: ignore[arg-type]  # lesions are rare
        inputs = [(w[0], NOISE_PATCH // IMAGE_PATCH), (w[1], 1), (1, NOISE_PATCH)]
        self.to_features = PatchConv2d(inputs, config.noise_width, device)

    def forward(self, planes: Tensor) -> Condition:
        """Planes (Z, inputs, H, W) of `DenoiserConfig.inputs` -> Condition."""
        h = self.stem(planes)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            h = block(functional.avg_pool2d(h, 2) if i else h)
            skips.append(h)
        skips.pop()
        quarter = h
        for block in self.up:
            quarter, h = h, block(h, skips.pop())
        evidence = functional.pixel_shuffle(self.to_evidence(h), IMAGE_PATCH)
        features = self.to_features(h, quarter, evidence.detach().clamp(-8, 8) / 4)
        return Condition(features, evidence)


def to_patches(x: Tensor) -> Tensor:
    """Pixels (R, 1, H, W) in 4x4 patches (R, H / 4, W / 4, 16), in memory as channels-last convolutions want them."""
    p, (height, width) = NOISE_PATCH, x.shape[2:]
    cut = x.reshape(len(x), height // p, p, width // p, p).permute(0, 1, 3, 2, 4)
    return cut.reshape(len(x), height // p, width // p, p * p)


def from_patches(x: Tensor) -> Tensor:
    """The pixels (R, 1, H, W) of patches (R, H / 4, W / 4, 16)."""
    p, (rows, height, width) = NOISE_PATCH, x.shape[:3]
    cut = x.reshape(rows, height, width, p, p).permute(0, 1, 3, 2, 4)
    return cut.reshape(rows, 1, height * p, width * p)


def time_embedding(t: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding (R, size) of the step t (R,), as in DDPM."""
    frequency = torch.exp(
        -math.log(10_000.0) * torch.arange(size // 2, device=t.device, dtype=torch.float32) / (size // 2)
    )
    angle = t.float()[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), 1)


class Denoiser(nn.Module):
    """The part that runs once a sample and step: a two-level U-Net on 4x4 patches of x_t."""

    def __init__(self, config: DenoiserConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        w, made_with = config.noise_width, float32_on(device)
        self.embedding = 4 * w
        self.embed = nn.Sequential(
            nn.Linear(self.embedding, self.embedding, **made_with),
            nn.SiLU(),
            nn.Linear(self.embedding, self.embedding, **made_with),
            nn.SiLU(),
        )
        self.from_noise = nn.Conv2d(NOISE_PATCH**2, w, 3, padding=1, bias=False, **made_with)
        self.down = Block(w, w, self.embedding, device)
        self.middle = Block(w, 2 * w, self.embedding, device)
        self.up = UpBlock(2 * w, w, w, self.embedding, device)
        self.to_output = nn.Conv2d(w, NOISE_PATCH**2, 3, padding=1, **made_with)
        nn.init.zeros_(self.to_output.weight)
        nn.init.zeros_(self.to_output.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Condition, t: Tensor) -> Tensor:
        """Logits of x_0 = 1 (R, 1, H, W) for x_t (R, 1, H, W), a row of the condition each, t (R,), or (1,) for all."""
        return from_patches(self.patches(to_patches(x), condition, self.modulations(t))) + condition.evidence

    def modulations(self, t: Tensor) -> tuple[Modulation, ...]:
        """What t (R,) makes of every block: the same for all samples, so that a loop needs it once a step."""
        embedding = self.embed(time_embedding(t, self.embedding).to(self.from_noise.weight.dtype))
        blocks = (self.down, self.middle, self.up)
        return tuple(block.time(embedding).chunk(2, dim=1) for block in blocks if block.time is not None)

    def patches(self, x: Tensor, condition: Condition, modulations: tuple[Modulation, ...]) -> Tensor:
        """What is added to the evidence's patches: the patches of x_t in, both as `to_patches` gives them.

        Parameters
        ----------
        x : (S Z, H / 4, W / 4, 16)
            S samples of each of the condition's Z slices, sample after sample.
        condition : Condition
        modulations : as `modulations` gives them
        """
        down, middle, up = modulations
        h = self.from_noise(x.permute(0, 3, 1, 2))
        samples = len(h) // len(condition.features)
        if samples == 1:
            h = h + condition.features
        else:
            h = (h.unflatten(0, (samples, -1)) + condition.features).flatten(0, 1)
        fine = self.down(h, down)
        coarse = self.middle(functional.avg_pool2d(fine, 2), middle)
        h = self.up(coarse, fine, up)
        y: Tensor = self.to_output(h)
        return y.permute(0, 2, 3, 1)


def predicted_sample(logits: Tensor) -> Tensor:
    """x_0 in [-1, 1] from the denoiser's logits: 2 sigmoid(logits) - 1, which is tanh(logits / 2)."""
    return torch.sigmoid(logits) * 2 - 1
