"""One examination: its files, its image-level labels, its masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation

from ddmd.cohort.errors import DatasetError
from ddmd.cohort.masks import read_mask
from ddmd.cohort.stacks import read_stack
from ddmd.io.dicom import DicomSeries
from ddmd.io.inputs import input_images
from ddmd.io.volume import Volume

__all__ = ["UNKNOWN", "Case", "DatasetError"]

UNKNOWN = "unknown"  # stands for the sequence of an image whose name does not say it
HEAD_MM = 140.0  # top to bottom, to guess the thickness of slices whose table does not say it


@dataclass(frozen=True)
class Case:
    """One examination. `masks` is opened by `lesion` and by nothing else.

    patient : who it is; a split keeps all cases of a patient together.
    name : unique among the cases found together.
    source : name of the data set.
    files : sequence -> one NIfTI, the ordered PNG slices of a stack, or the files of a DICOM series; `UNKNOWN` where the name of a single
        image does not say its sequence.
    masks : the lesion mask, or the PNG slices of one. Several of a volume contradict each other, and
        `lesion` refuses them.
    slice_labels : 1 has a lesion, 0 has none, -1 not known, for every slice from the feet up.
    has_lesion : the label of the whole image; None where it is not known.
    rater_masks : masks of single raters, in the order of their names.
    entities : of a BIDS name: "sub", "ses", "run", ... -> value.
    dicom : sequence -> its DICOM series, where the files are DICOM.
    """

    patient: str
    name: str
    source: str
    files: Mapping[str, tuple[Path, ...]]
    masks: tuple[Path, ...] | None = None
    slice_labels: tuple[int, ...] | None = None
    has_lesion: bool | None = None
    rater_masks: tuple[Path, ...] = ()
    entities: Mapping[str, str] = field(default_factory=dict)
    dicom: Mapping[str, DicomSeries] = field(default_factory=dict)

    @property
    def stack(self) -> bool:
        """Whether this is a stack of PNG slices."""
        return next(iter(self.files.values()))[0].suffix.lower() == ".png"

    @property
    def subject(self) -> str | None:
        """The BIDS subject without "sub-"; None where the files have no BIDS names."""
        return self.entities.get("sub")

    @property
    def session(self) -> str | None:
        """The BIDS session without "ses-"."""
        return self.entities.get("ses")

    @property
    def run(self) -> str | None:
        """The BIDS run without "run-"."""
        return self.entities.get("run")

    def volume(self, sequences: tuple[str, ...], optional: tuple[str, ...] = (), **options: Any) -> Volume:
        """Read sequences of the case.

        A stack gets 1 mm pixels and a guessed thickness (`HEAD_MM` over the number of slices).

        Parameters
        ----------
        sequences : those to read
        optional : those to read where they are there
        options : passed to `Volume.read`; without effect on a stack.

        Returns
        -------
        Volume

        Raises
        ------
        DatasetError
            If the case lacks a sequence.
        VolumeError
            If a file cannot be used.
        """
        unknown = UNKNOWN in self.files and len(sequences) == 1 and not optional
        if unknown:
            volume = Volume.read(self.files[UNKNOWN][0], require=sequences, **options)
            return replace(volume, name=self.name)
        lacking = [s for s in sequences if s not in self.files]
        if lacking:
            named = ", ".join(str(paths[0]) for paths in self.files.values())
            raise DatasetError(
                f"{named}: the weights need {', '.join(sequences)} and the input lacks {', '.join(lacking)}; "
                "add it, or name the sequence if it is there"
            )
        sequences = (*sequences, *(s for s in optional if s in self.files and s not in sequences))
        if not sequences:
            named = ", ".join(str(paths[0]) for paths in self.files.values())
            raise DatasetError(
                f"{named}: the weights take {', '.join(optional)} and the input has none of them"
            )
        if self.stack:
            images = {s: read_stack(self.files[s]) for s in sequences}
            thickness = float(np.clip(HEAD_MM / len(self.files[sequences[0]]), 1.0, 7.0))
            return Volume.from_array(images, np.diag([1.0, 1.0, thickness, 1.0]), self.name)
        others = [s for s in self.files if s not in sequences] if options.get("check_all") else []
        source = {s: self.dicom.get(s, self.files[s][0]) for s in (*sequences, *others)}
        return replace(Volume.read(source, require=sequences, **options), name=self.name)

    def lesion(self) -> np.ndarray:
        """Read the annotator's mask, bool (X, Y, Z) on the canonical grid of `volume`.

        Raises
        ------
        DatasetError
            If the case has no mask or several, or the mask is no mask or lies on another grid than the image.
        """
        if not self.masks:
            raise DatasetError(f"{self.name}: has no lesion mask; only cases with one can be compared with")
        if self.stack:
            return self._stack_mask(self.masks)
        if len(self.masks) > 1:
            raise DatasetError(
                f"{self.masks[0]} and {self.masks[1]} are both lesion masks; keep one, or list the cases in a "
                "cases.csv"
            )
        return read_mask(self.masks[0], self.reference)

    def rater_lesions(self) -> tuple[np.ndarray, ...]:
        """Read the masks of single raters, each bool (X, Y, Z) as `lesion` has it."""
        return tuple(read_mask(path, self.reference) for path in self.rater_masks)

    @property
    def reference(self) -> Path:
        """The image whose grid the masks are on: FLAIR, where there is one."""
        return (self.files.get("flair") or next(iter(self.files.values())))[0]

    def labels(self) -> np.ndarray:
        """Image-level labels int8 (Z,): 1 lesion, 0 none, -1 not known. Opens no mask.

        Raises
        ------
        DatasetError
            If there are more or fewer labels than slices.
        """
        count = self._slices()
        if self.slice_labels is not None:
            if len(self.slice_labels) != count:
                raise DatasetError(
                    f"{self.name}: {len(self.slice_labels)} slice labels for {count} slices; "
                    "correct the table"
                )
            return np.array(self.slice_labels, np.int8)
        return np.full(count, 0 if self.has_lesion is False else -1, np.int8)

    def _stack_mask(self, masks: tuple[Path, ...]) -> np.ndarray:
        mask, image = read_stack(masks) > 0, read_stack(next(iter(self.files.values())))
        if mask.shape != image.shape:
            raise DatasetError(
                f"{masks[0]}: masks of {mask.shape} pixels for images of {image.shape} ({self.name}); "
                "a mask has the size of its image"
            )
        return mask

    def _slices(self) -> int:
        files = next(iter(self.files.values()))
        if self.stack:
            return len(files)
        (image,) = input_images(files[0])
        axes = io_orientation(image.geometry.affine)[:, 0]
        return image.geometry.shape[int(np.flatnonzero(axes == 2)[0])]
