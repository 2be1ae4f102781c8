"""A brain MRI volume: sequences on one canonical grid, checked, with its brain, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from ddmd import validation
from ddmd.io.background import border_values, bounding_box
from ddmd.io.bias_field import BIAS_CHOICES, correct_bias
from ddmd.io.brain import SKULL_CHOICES, estimate_brain
from ddmd.io.clean_images import brain_notes, clean_images, given_brain
from ddmd.io.common_grid import grid_difference, refuse_differences, resampled_to
from ddmd.io.dicom import DicomSeries
from ddmd.io.errors import VolumeError
from ddmd.io.geometry import voxel_sides, voxel_volume_ml
from ddmd.io.input_sequences import images_by_sequence, images_taken, sequence_names
from ddmd.io.inputs import InputImage, array_image, input_images
from ddmd.io.intensities import LOWEST, intensities_of
from ddmd.io.sequences import SEQUENCES, sequence_of, stem
from ddmd.io.strip import stripped

__all__ = ["SEQUENCES", "Volume", "VolumeError", "estimate_brain", "sequence_of"]


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
        return voxel_sides(self.affine)

    @cached_property
    def voxel_volume_ml(self) -> float:
        """Volume of a voxel in ml."""
        return voxel_volume_ml(self.affine)

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
        names = sequence_names(sequences)
        images = input_images(
            source, affine, names or require, named=bool(names), optional=() if names else optional
        )
        chosen = images_by_sequence(images, names, require, notes)
        if require or optional:
            chosen = images_taken(chosen, require, optional, check_all and not resample)
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
        differences = {s: grid_difference(i.geometry, grid) for s, i in chosen.items()}
        if not resample:
            refuse_differences(chosen, differences, label)
        orientation = io_orientation(grid.affine)
        canonical = {}
        for s, image in chosen.items():
            values, raw = _intensities(image, notes)
            if (difference := differences[s]) is not None:
                values = resampled_to(values, image.geometry.affine, grid.shape, grid.affine)
                notes.append(
                    f"{image.label}: resampled onto the grid of {label} ({difference}); this does not register "
                    "them: a patient who moved between the two is not corrected for"
                )
            canonical[s] = np.ascontiguousarray(apply_orientation(values, orientation))
            if np.may_share_memory(canonical[s], raw):  # which may be an array of the caller
                canonical[s] = canonical[s].copy()
        labels = {s: image.label for s, image in chosen.items()}
        mask = None if brain is None else given_brain(brain, grid, label, orientation)
        estimate, images = clean_images(canonical, labels, notes, grid.affine, skull, mask)
        if strip:
            estimate, note = stripped(estimate, images, labels)
            notes.append(note)
        notes += brain_notes(estimate, label)
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
        if sequence not in self._corrected:
            self._corrected[sequence] = correct_bias(
                values, self.brain, self.spacing, self.zero_signal(sequence), method
            )[0]
        return self._corrected[sequence]

    @cached_property
    def _corrected(self) -> dict[str, np.ndarray]:
        """What `bias_corrected` has computed: the slices and the contrast of lesions need it."""
        return {}

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


def _intensities(image: InputImage, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """float32 (X, Y, Z) on the image's own grid, which may hold NaN and Inf; and the voxels that they were made of."""
    stored = image.stored()
    values, rescaled = intensities_of(stored)
    notes += [*image.notes, *image.geometry.notes, *stored.notes]
    if rescaled:
        notes.append(f"{image.label}: {rescaled}")
    return values, stored.raw


def check_choices(skull: str, bias: str) -> None:
    """Raise ValueError where `Volume.read` has no such choice."""
    if skull not in SKULL_CHOICES:
        raise ValueError(f"skull is {skull!r}; allowed are {', '.join(SKULL_CHOICES)}")
    if bias not in BIAS_CHOICES:
        raise ValueError(f"bias is {bias!r}; allowed are {', '.join(BIAS_CHOICES)}")
