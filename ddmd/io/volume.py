"""A brain MRI volume: sequences on one canonical grid, checked, with its brain, and the way back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage

from ddmd.io import nifti
from ddmd.io.bias_field import bias_field
from ddmd.io.brain import background_value, estimate_brain
from ddmd.io.nifti import SEQUENCES, VolumeError, sequence_of

__all__ = ["SEQUENCES", "Volume", "VolumeError", "estimate_brain", "sequence_of"]

LOWEST, HIGHEST = -4.0, 6.0  # robust z-scores are clipped to this; air is LOWEST


@dataclass(frozen=True)
class Volume:
    """Sequences of one examination in closest-canonical (RAS+) order.

    images : sequence -> float32 (X, Y, Z), finite everywhere.
    brain : bool (X, Y, Z); where the skull is on, an estimate from the head's outline.
    affine : float64 (4, 4), canonical voxels to mm.
    native : header, with shape and affine, of the grid that maps are returned on.
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
            Arrays are (X, Y, Z) and need `affine`.
        affine : (4, 4), optional
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
        items, names = _items(source, affine), _listed(sequences)
        if names and len(names) != len(items):
            raise VolumeError(f"{len(items)} images and {len(names)} sequence names; give one name each")
        notes: list[str] = []
        chosen: dict[str, tuple[nib.Nifti1Image, str]] = {}
        for i, (said, image, label) in enumerate(items):
            sequence = names[i] if names else said
            if sequence is None and len(items) == 1 and len(require) == 1:
                sequence = require[0]
                notes.append(f"{label}: its name does not say which sequence it is; taken as {sequence}")
            if sequence not in SEQUENCES:
                raise VolumeError(
                    f"{label}: sequence {sequence or 'not recognised from the name'}; name it as one of "
                    f"{', '.join(SEQUENCES)}"
                )
            if sequence in chosen:
                raise VolumeError(f"{chosen[sequence][1]} and {label} both claim to be {sequence}; give one")
            chosen[sequence] = (image, label)
        missing = [s for s in require if s not in chosen]
        if missing:
            raise VolumeError(
                f"{', '.join(label for _, label in chosen.values())}: the weights need {', '.join(require)} and "
                f"the input lacks {', '.join(missing)}; add it, or name the sequence if it is there"
            )
        if require:
            others = [s for s in chosen if s not in require] if check_all and not resample else []
            chosen = {s: chosen[s] for s in (*require, *others)}
        return cls._assemble(chosen, resample, notes)

    @classmethod
    def from_array(cls, images: Mapping[str, np.ndarray], affine: np.ndarray, name: str = "array") -> Volume:
        """A volume of arrays (X, Y, Z) by sequence, on one grid."""
        chosen = {s: (_image(a, affine, f"{name} ({s})"), f"{name} ({s})") for s, a in images.items()}
        return cls._assemble(chosen, None, [], name)

    @classmethod
    def _assemble(
        cls,
        chosen: dict[str, tuple[nib.Nifti1Image, str]],
        resample: str | bool | None,
        notes: list[str],
        name: str | None = None,
    ) -> Volume:
        affines = {s: nifti.affine_of(image, label) for s, (image, label) in chosen.items()}
        data = {s: nifti.voxels(image, label) for s, (image, label) in chosen.items()}
        target = resample if isinstance(resample, str) else next(iter(chosen))
        if target not in chosen:
            raise VolumeError(f"resample is {target!r}; allowed are {', '.join(chosen)}")
        native, label = chosen[target]
        for s in chosen:
            difference = _difference(data[s].shape, affines[s], data[target].shape, affines[target])
            if difference is None:
                continue
            if not resample:
                raise VolumeError(
                    f"{chosen[s][1]} and {label} are on different grids: {difference}. Register them, or "
                    "pass --resample (resample=True) to bring them onto one grid as they lie in the scanner"
                )
            data[s] = _resampled(data[s], affines[s], data[target].shape, affines[target])
            notes.append(
                f"{chosen[s][1]}: resampled onto the grid of {label} ({difference}); this does not register "
                "them: a patient who moved between the two is not corrected for"
            )
        affine = affines[target]
        orientation = io_orientation(affine)
        canonical = {s: np.ascontiguousarray(apply_orientation(d, orientation)) for s, d in data.items()}
        brain, skull, images = _clean(
            canonical, {s: label for s, (_, label) in chosen.items()}, notes, affine
        )
        if skull:
            notes.append(
                f"{label}: the skull seems to be on; results are less reliable outside the brain. Strip it "
                "first (HD-BET or SynthStrip) for better ones"
            )
        return cls(
            images=images,
            brain=brain,
            affine=affine @ inv_ornt_aff(orientation, data[target].shape),
            native=native,
            name=name or nifti.stem(label),
            skull=skull,
            notes=tuple(notes),
            sources={s: label for s, (_, label) in chosen.items()},
        )

    def normalised(self, sequence: str) -> np.ndarray:
        """Robust z-score float32 (X, Y, Z): (x - median) / (IQR / 1.349) over the brain, in [-4, 6].

        Of a stripped brain once more after its bias field is taken away (`ddmd.bias_field`); outside it,
        -4, what air is. Where the skull is on, the brain is a guess, and no field is fitted to it.
        """
        z = self._robust(self.images[sequence])
        if not self.skull:
            z = self._robust(z - bias_field(z, self.brain))
            z[~self.brain] = LOWEST
        return z

    def _robust(self, values: np.ndarray) -> np.ndarray:
        low, median, high = np.percentile(values[self.brain], (25, 50, 75))
        scale = (high - low) / 1.349 or float(values[self.brain].std()) or 1.0
        z = (values - np.float32(median)) / np.float32(scale)
        return np.clip(z, LOWEST, HIGHEST).astype(np.float32, copy=False)

    def to_native(self, values: np.ndarray, dtype: Any = np.float32) -> nib.Nifti1Image:
        """A map (X, Y, Z) on the canonical grid, as an image on the input's own grid and header."""
        order = io_orientation(self.native.affine)
        inverse = np.empty_like(order)
        for native_axis, (axis, flip) in enumerate(order):
            inverse[int(axis)] = (native_axis, flip)
        data = np.ascontiguousarray(apply_orientation(values, inverse)).astype(dtype)
        header = self.native.header.copy()
        header.set_data_dtype(dtype)
        header.set_slope_inter(1, 0)
        header["cal_max"] = header["cal_min"] = 0
        image = type(self.native)(data, self.native.affine, header)
        for kind in ("sform", "qform"):
            matrix, code = getattr(self.native, f"get_{kind}")(coded=True)
            if code:
                getattr(image, f"set_{kind}")(matrix, int(code))
            else:
                getattr(image, f"set_{kind}")(None, 0)
        return image


def _listed(sequences: str | Sequence[str] | None) -> list[str]:
    if sequences is None:
        return []
    return [sequences] if isinstance(sequences, str) else list(sequences)


def _image(values: np.ndarray, affine: np.ndarray, name: str) -> nib.Nifti1Image:
    affine = np.asarray(affine, dtype=np.float64)
    nifti.check_affine(affine, name)
    values = np.asarray(values)
    if values.dtype.kind not in "iufb":
        raise VolumeError(f"{name}: voxels are {values.dtype}; give real numbers")
    return nib.Nifti1Image(values.astype(np.float32, copy=False), affine)


def _items(source: Any, affine: np.ndarray | None) -> list[tuple[str | None, nib.Nifti1Image, str]]:
    """(sequence or None, image, label) of everything the caller gave."""
    if isinstance(source, Mapping):
        return [(str(s).lower(), *_one(v, affine)) for s, v in source.items()]
    if isinstance(source, list | tuple):
        if not source:
            raise VolumeError("no image given; give at least one")
        return [item for part in source for item in _items(part, affine)]
    image, label = _one(source, affine)
    return [(sequence_of(label) if isinstance(source, str | os.PathLike) else None, image, label)]


def _one(value: Any, affine: np.ndarray | None) -> tuple[nib.Nifti1Image, str]:
    if isinstance(value, str | os.PathLike):
        return nifti.open_image(value), str(Path(value))
    if isinstance(value, np.ndarray):
        if affine is None:
            raise VolumeError("array: an array needs its affine; pass affine=, 4x4, voxels to mm")
        return _image(value, affine, "array"), "array"
    if isinstance(value, nib.Nifti1Pair):  # the base of every NIfTI image
        image: nib.Nifti1Image = value  # type: ignore[assignment]
        return image, value.get_filename() or "image"
    raise VolumeError(f"{type(value).__name__}: give a path, a NIfTI image, or an array with its affine")


def _difference(
    shape: tuple[int, ...], affine: np.ndarray, other_shape: tuple[int, ...], other: np.ndarray
) -> str | None:
    parts = []
    if shape != other_shape:
        parts.append(f"shape {shape} against {other_shape}")
    sizes, others = (np.round(np.linalg.norm(a[:3, :3], axis=0), 3).tolist() for a in (affine, other))
    if sizes != others:
        parts.append(f"voxels {sizes} mm against {others} mm")
    if not parts:
        gap = nifti.grid_gap(shape, affine, other)
        if gap < nifti.GRID_TOLERANCE_MM:
            return None
        parts.append(f"position or orientation, by up to {gap:.1f} mm")
    return ", ".join(parts)


def _resampled(
    values: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray
) -> np.ndarray:
    matrix = np.linalg.inv(affine) @ target
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return ndimage.affine_transform(
        finite, matrix[:3, :3], matrix[:3, 3], output_shape=shape[:3], order=1, cval=float(finite.min())
    ).astype(np.float32)


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
