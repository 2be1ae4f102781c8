"""A brain MRI volume: sequences on one canonical grid, checked, with its brain, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage

from ddmd.io.bias_field import bias_field
from ddmd.io.brain import background_value, estimate_brain
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import GRID_TOLERANCE_MM, Geometry, grid_gap
from ddmd.io.inputs import InputImage, array_image, input_images
from ddmd.io.intensities import intensities_of
from ddmd.io.sequences import SEQUENCES, sequence_of, stem

__all__ = ["SEQUENCES", "Volume", "VolumeError", "estimate_brain", "sequence_of"]

LOWEST, HIGHEST = -4.0, 6.0  # robust z-scores are clipped to this; air is LOWEST


@dataclass(frozen=True)
class Volume:
    """Sequences of one examination in closest-canonical (RAS+) order.

    images : sequence -> float32 (X, Y, Z), finite everywhere; intensities have no unit.
    brain : bool (X, Y, Z); where the skull is on, an estimate from the head's outline.
    affine : float64 (4, 4), canonical voxels to mm.
    native : image without voxels, of the grid that maps are returned on: its header has shape, affine, form
        codes and units of the input, and nothing else.
    name : of the file that the grid is taken from, without extensions.
    skull : whether the skull seems to be on.
    notes : what a user should know of how the input was read.
    sources : sequence -> path, or words for what was no file.
    """

    images: Mapping[str, np.ndarray]
    brain: np.ndarray
    affine: np.ndarray
    native: nib.Nifti1Image
    name: str
    skull: bool
    notes: tuple[str, ...]
    sources: Mapping[str, str]

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the canonical axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @classmethod
    def read(
        cls,
        source: Any,
        *,
        affine: np.ndarray | None = None,
        sequences: str | Sequence[str] | None = None,
        require: Sequence[str] = (),
        resample: str | bool | None = None,
        check_all: bool = False,
    ) -> Volume:
        """Read a volume from files, nibabel images or arrays.

        Parameters
        ----------
        source : path, list of paths, {sequence: path, image or array}, nibabel image, or array
            Files are NIfTI or MGH. Arrays are (X, Y, Z) and need `affine`.
        affine : (4, 4), optional
            Of the arrays: voxels to mm.
        sequences : str or list of str, optional
            Names ("t1", "t1ce", "t2", "flair") where file names do not tell.
        require : sequences the weights need
        resample : None, True or a sequence
            Bring sequences of different grids onto that of the first required one, or of the one
            named. This does not register them.
        check_all : bool
            Whether the grids of sequences that are not required must agree, too.

        Raises
        ------
        VolumeError
            Naming the file and what to do.
        """
        notes: list[str] = []
        chosen = _by_sequence(input_images(source, affine), _listed(sequences), require, notes)
        if require:
            others = [s for s in chosen if s not in require] if check_all and not resample else []
            chosen = {s: chosen[s] for s in (*require, *others)}
        return cls._assemble(chosen, resample, notes)

    @classmethod
    def from_array(cls, images: Mapping[str, np.ndarray], affine: np.ndarray, name: str = "array") -> Volume:
        """A volume of arrays (X, Y, Z) by sequence, on one grid whose affine (4, 4) gives mm."""
        if not images:
            raise VolumeError(f"{name}: no image given; give at least one")
        chosen = {s: array_image(a, affine, f"{name} ({s})", s) for s, a in images.items()}
        return cls._assemble(chosen, None, [], name)

    @classmethod
    def _assemble(
        cls,
        chosen: dict[str, InputImage],
        resample: str | bool | None,
        notes: list[str],
        name: str | None = None,
    ) -> Volume:
        target = resample if isinstance(resample, str) else next(iter(chosen))
        if target not in chosen:
            raise VolumeError(f"resample is {target!r}; allowed are {', '.join(chosen)}")
        grid, label = chosen[target].geometry, chosen[target].label
        differences = {s: _difference(i.geometry, grid) for s, i in chosen.items()}
        if not resample:
            _refuse_differences(chosen, differences, label)
        orientation = io_orientation(grid.affine)
        canonical = {}
        for s, image in chosen.items():
            values = _intensities(image, notes)
            if (difference := differences[s]) is not None:
                values = _resampled(values, image.geometry.affine, grid.shape, grid.affine)
                notes.append(
                    f"{image.label}: resampled onto the grid of {label} ({difference}); this does not register "
                    "them: a patient who moved between the two is not corrected for"
                )
            canonical[s] = np.ascontiguousarray(apply_orientation(values, orientation))
        labels = {s: image.label for s, image in chosen.items()}
        brain, skull, images = _clean(canonical, labels, notes, grid.affine)
        if skull:
            notes.append(
                f"{label}: the skull seems to be on; results are less reliable outside the brain. Strip it "
                "first (HD-BET or SynthStrip) for better ones"
            )
        return cls(
            images=images,
            brain=brain,
            affine=grid.affine @ inv_ornt_aff(orientation, grid.shape),
            native=grid.native,
            name=name or stem(label),
            skull=skull,
            notes=tuple(notes),
            sources=labels,
        )

    def normalised(self, sequence: str) -> np.ndarray:
        """Robust z-scores float32 (X, Y, Z) of a sequence over the brain, in [LOWEST, HIGHEST].

        Of a stripped brain once more after its bias field is taken away (`ddmd.bias_field`); outside it,
        LOWEST, what air is. Where the skull is on, the brain is a guess, and no field is fitted to it.
        """
        z = self._robust_z_scores(self.images[sequence])
        if not self.skull:
            z = self._robust_z_scores(z - bias_field(z, self.brain))
            z[~self.brain] = LOWEST
        return z

    def _robust_z_scores(self, values: np.ndarray) -> np.ndarray:
        """(x - median) / (interquartile range / 1.349) over the brain, which is a z-score of normal values."""
        inside = values[self.brain]
        low, median, high = np.percentile(inside, (25, 50, 75))
        scale = (high - low) / 1.349 or float(inside.std(dtype=np.float64)) or 1.0
        z: np.ndarray = (values - np.float32(median)) / np.float32(scale)
        clipped: np.ndarray = np.clip(z, LOWEST, HIGHEST).astype(np.float32, copy=False)
        return clipped

    def to_native(self, values: np.ndarray, dtype: Any = np.float32) -> nib.Nifti1Image:
        """A map (X, Y, Z) on the canonical grid, as an image on the input's own grid and in its units.

        Its header has nothing of the input's but the geometry.
        """
        order = io_orientation(self.native.affine)
        inverse = np.empty_like(order)
        for native_axis, (axis, flip) in enumerate(order):
            inverse[int(axis)] = (native_axis, flip)
        data = np.ascontiguousarray(apply_orientation(values, inverse)).astype(dtype)
        header = self.native.header.copy()
        header.set_data_dtype(data.dtype)
        return type(self.native)(data, self.native.affine, header)


def _listed(sequences: str | Sequence[str] | None) -> list[str]:
    if sequences is None:
        return []
    names = [sequences] if isinstance(sequences, str) else sequences
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise VolumeError(f"sequences is {sequences!r}; give a name or a list of names")
    return [n.lower() for n in names]


def _by_sequence(
    images: list[InputImage], names: list[str], require: Sequence[str], notes: list[str]
) -> dict[str, InputImage]:
    """The images by sequence, each with one, and all that are required."""
    if names and len(names) != len(images):
        raise VolumeError(f"{len(images)} images and {len(names)} sequence names; give one name each")
    chosen: dict[str, InputImage] = {}
    for i, image in enumerate(images):
        sequence = names[i] if names else image.sequence
        if sequence is None and image.other_modality:
            raise VolumeError(
                f"{image.label}: its name says that it is none of {', '.join(SEQUENCES)}; give one of them, or "
                "name the sequence if it is one"
            )
        if sequence is None and len(images) == 1 and len(require) == 1:
            sequence = require[0]
            notes.append(f"{image.label}: its name does not say which sequence it is; taken as {sequence}")
        if sequence not in SEQUENCES:
            raise VolumeError(
                f"{image.label}: sequence {sequence or 'not recognised from the name'}; name it as one of "
                f"{', '.join(SEQUENCES)}"
            )
        if sequence in chosen:
            raise VolumeError(
                f"{chosen[sequence].label} and {image.label} both claim to be {sequence}; give one"
            )
        chosen[sequence] = image
    missing = [s for s in require if s not in chosen]
    if missing:
        raise VolumeError(
            f"{', '.join(image.label for image in chosen.values())}: the weights need {', '.join(require)} and "
            f"the input lacks {', '.join(missing)}; add it, or name the sequence if it is there"
        )
    return chosen


def _intensities(image: InputImage, notes: list[str]) -> np.ndarray:
    """float32 (X, Y, Z) on the image's own grid; may hold NaN and Inf."""
    stored = image.stored()
    values, rescaled = intensities_of(stored)
    notes += [*image.geometry.notes, *stored.notes]
    if rescaled:
        notes.append(f"{image.label}: {rescaled}")
    return values


def _refuse_differences(
    chosen: Mapping[str, InputImage], differences: Mapping[str, str | None], label: str
) -> None:
    for s, difference in differences.items():
        if difference is not None:
            raise VolumeError(
                f"{chosen[s].label} and {label} are on different grids: {difference}. Register them, or "
                "pass --resample (resample=True) to bring them onto one grid as they lie in the scanner"
            )


def _difference(one: Geometry, other: Geometry) -> str | None:
    """What two grids differ in, in words; None where they are the same."""
    parts = []
    if one.shape != other.shape:
        parts.append(f"shape {one.shape} against {other.shape}")
    sizes, others = (np.round(np.linalg.norm(g.affine[:3, :3], axis=0), 3).tolist() for g in (one, other))
    if sizes != others:
        parts.append(f"voxels {sizes} mm against {others} mm")
    if not parts:
        gap = grid_gap(one.shape, one.affine, other.affine)
        if gap < GRID_TOLERANCE_MM:
            return None
        parts.append(f"position or orientation, by up to {gap:.1f} mm")
    return ", ".join(parts)


def _resampled(
    values: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray
) -> np.ndarray:
    matrix = np.linalg.inv(affine) @ target
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    resampled: np.ndarray = ndimage.affine_transform(
        finite, matrix[:3, :3], matrix[:3, 3], output_shape=shape[:3], order=1, cval=float(finite.min())
    )
    return resampled.astype(np.float32)


def _clean(
    data: dict[str, np.ndarray], labels: dict[str, str], notes: list[str], affine: np.ndarray
) -> tuple[np.ndarray, bool, dict[str, np.ndarray]]:
    """Brain, whether the skull is on, and images without NaN; refuses what holds no brain."""
    brain: np.ndarray | None = None
    skull = False
    images = {}
    for s, values in data.items():
        finite = np.isfinite(values)
        if not finite.any():
            raise VolumeError(f"{labels[s]}: no voxel is a number; export it again")
        low, high = float(values[finite].min()), float(values[finite].max())
        if low == high:
            what = "all zero" if low == 0 else f"constant ({low:g})"
            raise VolumeError(f"{labels[s]}: the volume is {what}; there is no image in it; export it again")
        background = background_value(values, finite)
        filled = np.where(finite, values, np.float32(background))
        if brain is None:
            brain, skull = estimate_brain(filled, np.linalg.norm(affine[:3, :3], axis=0), background, affine)
            if not brain.any():
                raise VolumeError(f"{labels[s]}: no brain found in the volume; check that it is a head MRI")
        bad = int((~finite & brain).sum())
        if bad:
            raise VolumeError(f"{labels[s]}: {bad} voxels inside the brain are NaN or Inf; export it again")
        if not finite.all():
            notes.append(
                f"{labels[s]}: {int((~finite).sum())} NaN or Inf voxels outside the brain, set to background"
            )
        images[s] = filled
    assert brain is not None
    return brain, skull, images
