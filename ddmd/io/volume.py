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

from ddmd import validation
from ddmd.io.background import background_value, border_values, bounding_box
from ddmd.io.bias_field import BIAS_CHOICES, correct_bias
from ddmd.io.brain import SKULL_CHOICES, BrainEstimate, estimate_brain
from ddmd.io.dicom import DicomSeries
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import GRID_TOLERANCE_MM, Geometry, grid_gap
from ddmd.io.inputs import InputImage, array_image, input_images
from ddmd.io.intensities import LOWEST, intensities_of
from ddmd.io.sequences import SEQUENCES, sequence_of, stem
from ddmd.io.strip import stripped

__all__ = ["SEQUENCES", "Volume", "VolumeError", "estimate_brain", "sequence_of"]

SURE = 0.9  # less sure than this whether the skull is on, a note says so
MIN_VALUES = 8  # different intensities in the brain; a mask or a label map has fewer


@dataclass(frozen=True)
class Volume:
    """Sequences of one examination in closest-canonical (RAS+) order.

    images : sequence -> float32 (X, Y, Z), finite everywhere; intensities have no unit.
    brain : bool (X, Y, Z); where the skull is on, an estimate from the head's outline.
    affine : float64 (4, 4), canonical voxels to mm.
    native : image without voxels, of the grid that maps are returned on: its header has shape, affine, form
        codes and units of the input, and nothing else.
    name : of the file that the grid is taken from, without extensions.
    skull : whether the skull seems to be on, or was said to be.
    notes : what a user should know of how the input was read.
    sources : sequence -> path, or words for what was no file.
    skull_confidence : float in [0.5, 1], how sure `skull` is; 1 where the caller said it or gave the brain.
    bias : "auto", "off", "on" or "n4", what `normalised` does to bias fields; see `correct_bias`.
    dicom : the DICOM series whose grid this is; None for other input.
    reference : bool (X, Y, Z) or None, what `normalised` takes its statistics over; None: the brain. See
        `search_region`, too.
    """

    images: Mapping[str, np.ndarray]
    brain: np.ndarray
    affine: np.ndarray
    native: nib.Nifti1Image
    name: str
    skull: bool
    notes: tuple[str, ...]
    sources: Mapping[str, str]
    skull_confidence: float = 1.0
    bias: str = "auto"
    dicom: DicomSeries | None = None
    reference: np.ndarray | None = None

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
        optional: Sequence[str] = (),
        resample: str | bool | None = None,
        check_all: bool = False,
        skull: str = "auto",
        brain: Any = None,
        bias: str = "auto",
        strip: bool = False,
    ) -> Volume:
        """Read a volume from files, nibabel images or arrays.

        Parameters
        ----------
        source : path, list of paths, {sequence: path, image or array}, nibabel image, or array
            Files are NIfTI or MGH, and folders hold DICOM files. Arrays are (X, Y, Z) and need `affine`.
        affine : (4, 4), optional
            Of the arrays: voxels to mm.
        sequences : str or list of str, optional
            Names ("t1", "t1ce", "t2", "flair") where file names do not tell.
        require : sequences the weights need
        optional : sequences the weights take where they are there; where none is required, at least one is
        resample : None, True or a sequence
            Bring sequences of different grids onto that of the first required one, or of the one
            named. This does not register them.
        check_all : bool
            Whether the grids of sequences that are not required must agree, too.
        skull : "auto", "on" or "off"
            Whether the skull is on; auto estimates it.
        brain : path, nibabel image or array (X, Y, Z), optional
            A brain mask on the image's grid, of any stripper; what is outside it is taken away.
        bias : "auto", "off", "on" or "n4"
            Whether bias fields are corrected; auto corrects those with clear evidence.
        strip : bool
            Whether the skull is stripped, by deepbet, where it is on.

        Returns
        -------
        Volume

        Raises
        ------
        VolumeError
            Naming the file and what to do.
        ValueError
            If `skull` or `bias` is none of its choices, or a flag is neither True nor False.
        """
        check_choices(skull, bias)
        strip = validation.flag("strip", strip)
        if resample is not None and not isinstance(resample, str):
            resample = validation.flag("resample", resample)
        notes: list[str] = []
        names = _listed(sequences)
        images = input_images(
            source, affine, names or require, named=bool(names), optional=() if names else optional
        )
        chosen = _by_sequence(images, names, require, notes)
        if require or optional:
            chosen = _taken(chosen, require, optional, check_all and not resample)
        return cls._assemble(chosen, resample, notes, skull=skull, brain=brain, bias=bias, strip=strip)

    @classmethod
    def from_array(
        cls,
        images: Mapping[str, np.ndarray],
        affine: np.ndarray,
        name: str = "array",
        *,
        skull: str = "auto",
        brain: Any = None,
        bias: str = "auto",
        strip: bool = False,
    ) -> Volume:
        """A volume of arrays by sequence, on one grid.

        Parameters
        ----------
        images : sequence -> (X, Y, Z)
            Real numbers of any type; intensities have no unit.
        affine : (4, 4)
            Voxels to mm.
        name : of the volume, for messages and files
        skull, brain, bias, strip
            As `read` takes them.

        Returns
        -------
        Volume

        Raises
        ------
        VolumeError
            If an array is no head MRI, naming its sequence.
        """
        check_choices(skull, bias)
        strip = validation.flag("strip", strip)
        if not isinstance(images, Mapping) or not all(isinstance(s, str) for s in images):
            raise VolumeError(f"{name}: images is a {type(images).__name__}; give {{sequence: array}}")
        if not images:
            raise VolumeError(f"{name}: no image given; give at least one")
        chosen = {s: array_image(a, affine, f"{name} ({s})", s) for s, a in images.items()}
        return cls._assemble(chosen, None, [], name, skull=skull, brain=brain, bias=bias, strip=strip)

    @classmethod
    def _assemble(
        cls,
        chosen: dict[str, InputImage],
        resample: str | bool | None,
        notes: list[str],
        name: str | None = None,
        *,
        skull: str,
        brain: Any,
        bias: str,
        strip: bool,
    ) -> Volume:
        target = resample if isinstance(resample, str) else next(iter(chosen))
        if target not in chosen:
            raise VolumeError(f"resample is {target!r}; allowed are {', '.join(chosen)}")
        grid, label, dicom = chosen[target].geometry, chosen[target].label, chosen[target].dicom
        differences = {s: _difference(i.geometry, grid) for s, i in chosen.items()}
        if not resample:
            _refuse_differences(chosen, differences, label)
        orientation = io_orientation(grid.affine)
        canonical = {}
        for s, image in chosen.items():
            values, raw = _intensities(image, notes)
            if (difference := differences[s]) is not None:
                values = _resampled(values, image.geometry.affine, grid.shape, grid.affine)
                notes.append(
                    f"{image.label}: resampled onto the grid of {label} ({difference}); this does not register "
                    "them: a patient who moved between the two is not corrected for"
                )
            canonical[s] = np.ascontiguousarray(apply_orientation(values, orientation))
            if np.may_share_memory(canonical[s], raw):  # which may be an array of the caller
                canonical[s] = canonical[s].copy()
        labels = {s: image.label for s, image in chosen.items()}
        mask = None if brain is None else _brain_mask(brain, grid, label, orientation)
        estimate, images = _clean(canonical, labels, notes, grid.affine, skull, mask)
        if strip:
            estimate, note = stripped(estimate, images, labels)
            notes.append(note)
        notes += _brain_notes(estimate, label)
        return cls(
            images=images,
            brain=estimate.mask,
            affine=grid.affine @ inv_ornt_aff(orientation, grid.shape),
            native=grid.native,
            name=name or (dicom.name if dicom is not None else stem(label)),
            skull=estimate.skull_on,
            notes=tuple(notes),
            sources=labels,
            skull_confidence=estimate.confidence,
            reference=estimate.reference,
            bias=bias,
            dicom=dicom,
        )

    def bias_corrected(self, sequence: str) -> np.ndarray:
        """A sequence without its bias field, as `bias` says; the image itself where none is taken away.

        Where the skull is on, the brain is a guess, and "auto" fits no field to it.

        Parameters
        ----------
        sequence : one of `images`

        Returns
        -------
        (X, Y, Z) float32, in the image's own intensities

        Raises
        ------
        VolumeError
            If there is no such sequence.
        """
        if sequence not in self.images:
            raise VolumeError(f"{self.name}: has no {sequence}; there are {', '.join(self.images)}")
        values = self.images[sequence]
        method = "off" if self.skull and self.bias == "auto" else self.bias
        if method == "off":
            return values
        return correct_bias(values, self.brain, self.spacing, self.zero_signal(sequence), method)[0]

    def normalised(self, sequence: str) -> np.ndarray:
        """Robust z-scores float32 (X, Y, Z) of a sequence over the brain, in [LOWEST, HIGHEST].

        Without the bias field; see `bias_corrected`. Outside a stripped brain, LOWEST, what air is.

        Parameters
        ----------
        sequence : one of `images`

        Returns
        -------
        (X, Y, Z) float32

        Raises
        ------
        VolumeError
            If there is no such sequence.
        """
        import torch

        from ddmd.io.z_scores import robust_z_scores_

        z, inside = (
            self.bias_corrected(sequence).copy(),
            self.brain if self.reference is None else self.reference,
        )
        robust_z_scores_(torch.from_numpy(z), torch.from_numpy(inside), int(np.count_nonzero(inside)))
        if not self.skull:
            z[~self.brain] = LOWEST
        return z

    @cached_property
    def search_region(self) -> np.ndarray:
        """Where lesions are looked for, bool (X, Y, Z): the brain.

        Where the skull is on, also what lies a scalp's width inside the head: the estimate of the brain may
        leave out a very bright lesion.
        """
        return self.brain if self.reference is None else self.brain | self.reference

    def zero_signal(self, sequence: str) -> float:
        """What no signal is in a sequence: the median beside the brain, or the lowest value if all is brain.

        Where the skull is on, the median of the faces of the volume, which is air.

        Parameters
        ----------
        sequence : one of `images`

        Returns
        -------
        float, in the image's own intensities
        """
        values = self.images[sequence]
        if self.skull:
            return float(np.median(border_values(values)))
        box = bounding_box(self.brain)
        beside = values[box][~self.brain[box]]
        return (
            float(np.median(beside[:: max(1, len(beside) // 100_000)]))
            if len(beside)
            else float(values.min())
        )

    def empty_map(self) -> np.ndarray:
        """Zeros float32 (X, Y, Z), which lie in memory as the input's own grid does: `to_native` need not copy."""
        native = np.zeros(self.native.shape, np.float32, order="F")
        canonical: np.ndarray = apply_orientation(native, io_orientation(self.native.affine))
        return canonical

    def to_native(self, values: np.ndarray, dtype: Any = np.float32, copy: bool = True) -> nib.Nifti1Image:
        """A map (X, Y, Z) on the canonical grid, as an image on the input's own grid and in its units.

        Its header has nothing of the input's but the geometry.

        Parameters
        ----------
        values : (X, Y, Z)
        dtype : numpy type of the voxels
        copy : bool
            False: the image may share its voxels with `values`.

        Returns
        -------
        nibabel image
        """
        order = io_orientation(self.native.affine)
        inverse = np.empty_like(order)
        for native_axis, (axis, flip) in enumerate(order):
            inverse[int(axis)] = (native_axis, flip)
        data = np.asarray(apply_orientation(values, inverse), dtype=dtype, order="F")
        if copy and np.may_share_memory(data, values):
            data = data.copy(order="F")
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


def _taken(
    chosen: dict[str, InputImage], require: Sequence[str], optional: Sequence[str], others_too: bool
) -> dict[str, InputImage]:
    """The images that weights take, in the order in which they take them; the others after them if asked for."""
    taken = [s for s in dict.fromkeys((*require, *optional)) if s in chosen]
    if not taken:
        raise VolumeError(
            f"{', '.join(image.label for image in chosen.values())}: the weights take {', '.join(optional)} and the "
            f"input has {', '.join(chosen)}; add one of them"
        )
    others = [s for s in chosen if s not in taken] if others_too else []
    return {s: chosen[s] for s in (*taken, *others)}


def _intensities(image: InputImage, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """float32 (X, Y, Z) on the image's own grid, which may hold NaN and Inf; and the voxels that they were made of."""
    stored = image.stored()
    values, rescaled = intensities_of(stored)
    notes += [*image.notes, *image.geometry.notes, *stored.notes]
    if rescaled:
        notes.append(f"{image.label}: {rescaled}")
    return values, stored.raw


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
    """Values on another grid, by linear interpolation; NaN where a voxel that is no number takes part."""
    matrix = np.linalg.inv(affine) @ target

    def interpolated(image: np.ndarray, outside: float) -> np.ndarray:
        result: np.ndarray = ndimage.affine_transform(
            image, matrix[:3, :3], matrix[:3, 3], output_shape=shape[:3], order=1, cval=outside
        )
        return result

    finite = np.isfinite(values)
    if not finite.any():
        return np.full(shape[:3], np.nan, np.float32)
    filled = np.where(finite, values, np.float32(0))
    resampled = interpolated(filled, float(filled.min())).astype(np.float32)
    if not finite.all():
        resampled[interpolated((~finite).astype(np.float32), 0.0) > 0] = np.nan
    return resampled


def check_choices(skull: str, bias: str) -> None:
    """Raise ValueError where `Volume.read` has no such choice."""
    if skull not in SKULL_CHOICES:
        raise ValueError(f"skull is {skull!r}; allowed are {', '.join(SKULL_CHOICES)}")
    if bias not in BIAS_CHOICES:
        raise ValueError(f"bias is {bias!r}; allowed are {', '.join(BIAS_CHOICES)}")


def _brain_mask(brain: Any, grid: Geometry, label: str, orientation: np.ndarray) -> np.ndarray:
    """A given brain mask as bool (X, Y, Z) in canonical order; refused where it is on another grid or empty."""
    if isinstance(brain, np.ndarray):
        image = array_image(brain, grid.affine, "brain mask")
    else:
        (image,) = input_images(brain)
    difference = _difference(image.geometry, grid)
    if difference is not None:
        raise VolumeError(
            f"{image.label}: the brain mask and {label} are on different grids: {difference}; resample the mask "
            "onto the image"
        )
    mask = np.nan_to_num(intensities_of(image.stored())[0]) > 0
    if not mask.any():
        raise VolumeError(f"{image.label}: the brain mask is empty; give one whose brain is above 0")
    canonical: np.ndarray = np.ascontiguousarray(apply_orientation(mask, orientation))
    return canonical


def _brain_notes(estimate: BrainEstimate, label: str) -> list[str]:
    """What a user should know of the brain: nothing where it was surely stripped."""
    if estimate.skull_on and estimate.confidence == 1.0:
        return [f"{label}: {estimate.describe()}; results are less reliable outside the brain"]
    if estimate.skull_on:
        return [
            f"{label}: the skull seems to be on ({estimate.confidence:.0%} sure); results are less reliable "
            "outside the brain. Pass --strip (strip=True) or a brain mask for better ones, or --skull off "
            "(skull='off') if it is off"
        ]
    if estimate.confidence < SURE:
        return [
            f"{label}: the skull seems to be off ({estimate.confidence:.0%} sure); pass --skull on (skull='on') "
            "if it is on"
        ]
    return []


def _check_contrast(inside: np.ndarray, label: str) -> None:
    """Raise VolumeError where the values in the brain are those of a mask or a label map."""
    found = len(np.unique(inside[:: max(1, len(inside) // 50_000)]))
    if found < MIN_VALUES:
        raise VolumeError(
            f"{label}: the brain holds {found} different value{'s' if found > 1 else ''}; this is a mask or a "
            "label map; give the image"
        )


def _clean(
    data: dict[str, np.ndarray],
    labels: dict[str, str],
    notes: list[str],
    affine: np.ndarray,
    skull: str,
    mask: np.ndarray | None,
) -> tuple[BrainEstimate, dict[str, np.ndarray]]:
    """The brain and images without NaN; refuses what holds no brain."""
    estimate: BrainEstimate | None = None
    images = {}
    for s, values in data.items():
        low, high = float(values.min()), float(values.max())
        whole = bool(
            np.isfinite((low, high)).all()
        )  # NaN is the least and the greatest value, where there is one
        finite = np.ones(values.shape, bool) if whole else np.isfinite(values)
        if not finite.any():
            raise VolumeError(f"{labels[s]}: no voxel is a number; export it again")
        if not whole:
            low, high = float(values[finite].min()), float(values[finite].max())
        if low == high:
            what = "all zero" if low == 0 else f"constant ({low:g})"
            raise VolumeError(f"{labels[s]}: the volume is {what}; there is no image in it; export it again")
        background = background_value(values, finite)
        filled = values if whole else np.where(finite, values, np.float32(background))
        if estimate is None:
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            estimate = estimate_brain(filled, spacing, background, skull=skull, mask=mask)
            if not estimate.mask.any():
                raise VolumeError(f"{labels[s]}: no brain found in the volume; check that it is a head MRI")
        _check_contrast(filled[estimate.mask], labels[s])
        bad = 0 if whole else int((~finite & estimate.mask).sum())
        if bad:
            raise VolumeError(f"{labels[s]}: {bad} voxels inside the brain are NaN or Inf; export it again")
        if not whole:
            notes.append(
                f"{labels[s]}: {int((~finite).sum())} NaN or Inf voxels outside the brain, set to background"
            )
        images[s] = filled
    assert estimate is not None
    return estimate, images
