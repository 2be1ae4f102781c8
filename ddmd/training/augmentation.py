"""What makes one scanner's images look like another's: MONAI's transforms, in the order of an acquisition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.random import Generator

from ddmd.training.lesion_painter import AIR_MARGIN, HIGH, LOW

MOST_SPREAD = 3.0  # a curve that left less of the tissue's range than a third of it is not wholly undone


@dataclass(frozen=True)
class Augmentation:
    """Geometry, contrast, bias field, resolution, ringing, noise and saturation, each with its chance.

    Masks are moved with the planes and keep their meaning; intensities never change them. Transforms:
    `monai.transforms` (the extra ddmd[train]), decided by the generator that a call is given.

    flip, affine, warp : left-right, rotation with scale, shear and shift, and a grid distorted.
    contrast : a random monotone curve; then, what normalisation would take back of it taken back, a gain about
        the tissue's median and an offset.
    bias, blur, coarse, ringing, noise, window : a smooth field, lost sharpness, lost resolution, Gibbs
        ringing, white noise, and the brightest tissue saturated.
    """

    flip: float = 0.5
    affine: float = 0.7
    warp: float = 0.2
    contrast: float = 0.7
    bias: float = 0.6
    blur: float = 0.25
    coarse: float = 0.2
    ringing: float = 0.1
    noise: float = 0.5
    window: float = 0.1

    @cached_property
    def _geometry(self) -> Any:
        from monai import transforms as T

        keys = ("planes", "masks")
        return T.Compose([
            T.RandFlipd(keys, spatial_axis=1, prob=self.flip),
            T.RandAffined(
                keys, rotate_range=0.35, shear_range=0.1, translate_range=12.0, scale_range=0.35,
                padding_mode="zeros", prob=self.affine,
            ),
            T.RandGridDistortiond(keys, num_cells=4, distort_limit=0.15, padding_mode="zeros", prob=self.warp),
        ])  # fmt: skip

    @cached_property
    def _curve(self) -> Any:
        from monai import transforms as T

        return T.OneOf([
            T.RandHistogramShift(num_control_points=(8, 14), prob=self.contrast),
            T.RandAdjustContrast(gamma=(0.65, 1.5), prob=self.contrast),
        ])  # fmt: skip

    @cached_property
    def _gain(self) -> Any:
        from monai import transforms as T

        return T.Compose([
            T.RandScaleIntensity(factors=(-0.25, 0.35), prob=self.contrast),
            T.RandShiftIntensity(offsets=0.25, prob=self.contrast),
        ])  # fmt: skip

    @cached_property
    def _acquisition(self) -> Any:
        from monai import transforms as T

        return T.Compose([
            T.RandBiasField(degree=3, coeff_range=(-0.1, 0.1), prob=self.bias),
            T.RandGaussianSmooth(sigma_x=(0.3, 1.2), sigma_y=(0.3, 1.2), prob=self.blur),
            T.RandSimulateLowResolution(
                downsample_mode="area", upsample_mode="bilinear", zoom_range=(0.35, 0.8), align_corners=False,
                prob=self.coarse,
            ),
            T.RandGibbsNoise(alpha=(0.2, 0.6), prob=self.ringing),
            T.RandGaussianNoise(std=0.2, prob=self.noise),
        ])  # fmt: skip

    def __call__(
        self, planes: np.ndarray, masks: np.ndarray, rng: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Planes (P, C, H, W) and masks (M, H, W), both float32, moved alike; planes also altered."""
        seed = int(rng.integers(2**32))
        flat = planes.reshape(-1, *planes.shape[-2:]) - LOW  # air is 0, as in an image
        moved = self._geometry.set_random_state(seed)({"planes": flat, "masks": masks})
        image, air = np.asarray(moved["planes"]), np.asarray(moved["planes"]) <= AIR_MARGIN
        if not air.all():
            image = self._contrast(image, ~air, seed)
        image = np.asarray(self._acquisition.set_random_state(seed + 3)(image))
        if rng.random() < self.window:
            image = np.minimum(image, np.quantile(image[..., ::2, ::2], rng.uniform(0.97, 0.999)))
        image = np.where(air, 0.0, np.maximum(image, 2 * AIR_MARGIN))  # dark tissue is not air
        image = np.clip(image + LOW, LOW, HIGH).astype(np.float32)
        return image.reshape(planes.shape), np.ascontiguousarray(moved["masks"], dtype=np.float32)

    def _contrast(self, image: np.ndarray, tissue: np.ndarray, seed: int) -> np.ndarray:
        """Median and interquartile range of the curve's result are what they were, as of any normalised volume."""
        quartiles = (0.25, 0.5, 0.75)
        low, median, high = np.quantile(image[tissue][::4], quartiles).astype(np.float32)
        curved = np.asarray(self._curve.set_random_state(seed + 1)(image))
        new_low, new_median, new_high = np.quantile(curved[tissue][::4], quartiles).astype(np.float32)
        spread = (
            min((high - low) / (new_high - new_low), MOST_SPREAD) if new_high - new_low > AIR_MARGIN else 1.0
        )
        centred = (curved - new_median) * spread
        return np.asarray(self._gain.set_random_state(seed + 2)(centred)) + median
