"""What a detection found: maps on the input's own grid, a score, a table of lesions, files, a picture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ddmd import validation
from ddmd.inference.decision import decision_uncertainty
from ddmd.inference.postprocess import UNCERTAIN, Lesion, LesionCriteria
from ddmd.io.atomic import atomic_path
from ddmd.io.dicom import DicomSeries
from ddmd.io.geometry import voxel_volume_ml
from ddmd.io.naming import file_stem
from ddmd.io.results import (
    PLAIN_NAMES,
    SEG_SUFFIXES,
    SUFFIXES,
    CaseResult,
    Naming,
    OutputError,
    check_output,
    write_result,
)

__all__ = ["Detection", "OutputError", "check_output"]

# What the ends of `Detection.lesion_ml_interval` are, as the JSON says it
DRAWS_INTERVAL = "90 % of the drawn masks"
PROBABILITY_INTERVAL = "probability from 0.75 to 0.25"
_FROM_DRAWS = ("existence", "volume_interval_ml")  # fields of lesions where draws were kept
_COLUMNS = (
    "lesion", "x_mm", "y_mm", "z_mm", *(f.name for f in fields(Lesion) if f.name not in ("centre_mm", *_FROM_DRAWS)),
)  # fmt: skip
_DRAW_COLUMNS = ("existence", "volume_low_ml", "volume_high_ml")


@dataclass(frozen=True)
class Detection:
    """The result of `ddmd.detect`. Images are on the input's grid, with its affine and form codes.

    Parameters
    ----------
    mask : uint8 image
        1 in lesions, 0 elsewhere.
    probability : float32 image in [0, 1]
    uncertainty : float32 image
        Variance over the samples.
    inter_discrepancy, intra_discrepancy : float32 images
        The paper's X and Y.
    image : the sequence that the picture shows
    score : float in [0, 1]
        How probable it is that there is a lesion at all.
    lesions : tuple of Lesion
        Largest first.
    notes : tuple of str
        What the user should know.
    provenance : mapping
        What made the result: weights, sampling, threshold, sources.
    name : str
        Name of the case.
    labels : integer image, optional
        n in the voxels of the n-th lesion.
    dicom : DicomSeries, optional
        The DICOM series that the input was read from.
    draws : uint8 image (X, Y, Z, S), optional
        The drawn masks: probability times 255, so lesion from 128. Where they were asked for.
    volume_interval_ml : (low, high), optional
        90 % interval of the lesion volume over the draws, where they were measured; `lesion_ml_interval` then
        is this one.
    """

    mask: nib.Nifti1Image
    probability: nib.Nifti1Image
    uncertainty: nib.Nifti1Image
    inter_discrepancy: nib.Nifti1Image
    intra_discrepancy: nib.Nifti1Image
    image: nib.Nifti1Image
    score: float
    lesions: tuple[Lesion, ...]
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]
    name: str
    labels: nib.Nifti1Image | None = None
    dicom: DicomSeries | None = None
    draws: nib.Nifti1Image | None = None
    volume_interval_ml: tuple[float, float] | None = None

    @property
    def how(self) -> Mapping[str, Any]:
        """The old name of `provenance`."""
        warnings.warn(
            "Detection.how is now called provenance; the old name goes in the next release",
            FutureWarning,
            stacklevel=2,
        )
        return self.provenance

    @property
    def lesion_ml(self) -> float:
        """Volume of all lesions in ml."""
        return float(sum(lesion.volume_ml for lesion in self.lesions))

    @property
    def lesion_ml_interval(self) -> tuple[float, float]:
        """Lowest and highest lesion volume in ml that the result leaves possible.

        Where the drawn masks were measured, their 90 % interval. Elsewhere the lower end counts voxels of the
        mask with a probability of at least 0.75, the upper end the mask and all voxels with at least 0.25.
        `LesionMlIntervalKind` in the JSON says which.
        """
        if self.volume_interval_ml is not None:
            return self.volume_interval_ml
        possible, sure = UNCERTAIN
        mask = np.asanyarray(self.mask.dataobj) > 0
        probability = np.asanyarray(self.probability.dataobj)
        low = int(np.count_nonzero(mask & (probability >= sure)))
        high = int(np.count_nonzero(mask | (probability >= possible)))
        voxel_ml = voxel_volume_ml(self.mask.affine)
        return low * voxel_ml, high * voxel_ml

    def decision_uncertainty(self) -> nib.Nifti1Image:
        """How near each voxel is to being decided otherwise, float32 image in [0, 0.25]; see `ddmd.inference.decision`.

        With `flair-image-labels` it ranks the errors of a mask better on average than `uncertainty` and p (1 - p) do,
        above all along large lesions (docs/quality.md).
        """
        made = self.provenance
        criteria = LesionCriteria(
            made["Threshold"], large_ml=made["LargeLesionMl"], outline_share=made["OutlineShare"]
        )
        mask = np.asanyarray(self.mask.dataobj) > 0
        probability = np.asanyarray(self.probability.dataobj)
        values = decision_uncertainty(probability, mask, self.mask.affine, criteria)
        return type(self.probability)(values, self.probability.affine, self.probability.header)

    @property
    def summary(self) -> str:
        """One line: how many lesions, their volume, the score."""
        count = len(self.lesions)
        return f"{count} lesion{'' if count == 1 else 's'}, {self.lesion_ml:.1f} ml, score {self.score:.2f}"

    def description(self) -> dict[str, Any]:
        """What each JSON file says: name, score, lesions, provenance and notes."""
        return {
            "Name": self.name,
            "Score": float(self.score),
            "Lesions": len(self.lesions),
            "LesionMl": self.lesion_ml,
            "LesionMlInterval": [float(f"{ml:.4g}") for ml in self.lesion_ml_interval],
            "LesionMlIntervalKind": PROBABILITY_INTERVAL
            if self.volume_interval_ml is None
            else DRAWS_INTERVAL,
            **self._from_draws(),
            **self.provenance,
            "Notes": list(self.notes),
        }

    def _from_draws(self) -> dict[str, Any]:
        if self.volume_interval_ml is None:
            return {}
        return {"Existence": [lesion.existence for lesion in self.lesions]}

    def lesion_rows(self) -> list[dict[str, object]]:
        """The table of lesions: one row a lesion, its number, centre in mm and figures."""
        rows: list[dict[str, object]] = []
        for number, lesion in enumerate(self.lesions, 1):
            values = asdict(lesion)
            centre = {
                f"{axis}_mm": round(float(v), 1)
                for axis, v in zip("xyz", values.pop("centre_mm"), strict=True)
            }
            low_high = values.pop("volume_interval_ml")
            if low_high is not None:
                values["volume_low_ml"], values["volume_high_ml"] = low_high
            known = {k: float(f"{v:.4g}") for k, v in values.items() if v is not None}
            rows.append({"lesion": number, **centre, **known})
        return rows

    def save(
        self,
        folder: str | Path,
        overwrite: bool = False,
        maps: Iterable[str] | None = None,
        overlay: bool = False,
        extra: Mapping[str, Any] | None = None,
        stem: str | None = None,
        naming: Naming = PLAIN_NAMES,
        dicom_seg: bool | None = None,
    ) -> dict[str, Path]:
        """Write the maps, a JSON sidecar each, the table of lesions, and a JSON that lists them.

        All files get their names together, when all are complete.

        Parameters
        ----------
        folder : made if it is not there
        overwrite : whether an earlier result of this name is replaced
        maps : names among "mask", "probability", "uncertainty", "labels", "inter_discrepancy",
            "intra_discrepancy" and "draws"; by default all there are.
        overlay : whether the picture is written, too
        extra : further keys of the JSON files
        stem : what the names of the files begin with; by default the name, without what no file system takes
        naming : how the maps are called; by default the simple names
        dicom_seg : whether the mask and the probability are written as DICOM Segmentations, too, which
            name the patient as the source does; by default where the input was DICOM.

        Returns
        -------
        {"mask": path, "probability": path, ..., "lesions": path, "result": path}

        Raises
        ------
        OutputError
            If the folder cannot be written to, holds results of this name and overwrite is False, another
            process is writing them, or a map is not finite.
        ValueError
            If there is no map of a name, or a flag is neither True nor False.
        """
        overwrite, overlay = validation.flag("overwrite", overwrite), validation.flag("overlay", overlay)
        if dicom_seg is not None:
            dicom_seg = validation.flag("dicom_seg", dicom_seg)
        there = {key: getattr(self, key) for key in SUFFIXES if getattr(self, key) is not None}
        wanted = tuple(there) if maps is None else check_maps(maps)
        if dicom_seg or (dicom_seg is None and self.dicom is not None):
            segs = {kind: self._seg_bytes(kind) for kind in SEG_SUFFIXES if kind in wanted}
        else:
            segs = {}
        result = CaseResult(
            name=self.name,
            stem=stem or file_stem(self.name),
            maps={key: image for key, image in there.items() if key in wanted},
            description={**{k: v for k, v in self.description().items() if k != "Seconds"}, **(extra or {})},
            lesions=self.lesion_rows(),
            lesion_columns=_COLUMNS if self.volume_interval_ml is None else _COLUMNS + _DRAW_COLUMNS,
            overlay=self.overlay_png() if overlay else None,
            naming=naming,
            segs=segs,
        )
        return write_result(result, folder, overwrite)

    def save_dicom_seg(self, folder: str | Path, overwrite: bool = False) -> dict[str, Path]:
        """Write DICOM Segmentations: the mask as a binary one, the probability as a fractional one.

        They refer to the images of the input, and name the patient and the study as these do.

        Parameters
        ----------
        folder : made if it is not there
        overwrite : whether earlier files are replaced

        Returns
        -------
        {"mask": path, "probability": path}

        Raises
        ------
        OutputError
            If the input was no DICOM, or the folder cannot be written to or holds these files.
        VolumeError
            If the files of the input are gone or have changed, or a package is missing.
        """
        contents = {kind: self._seg_bytes(kind) for kind in SEG_SUFFIXES}
        folder, stem = Path(folder), file_stem(self.name)
        paths = {kind: folder / f"{stem}_{suffix}" for kind, suffix in SEG_SUFFIXES.items()}
        there = [path for path in paths.values() if os.path.lexists(path)]
        if there and not overwrite:
            raise OutputError(
                f"{folder}: holds earlier results ({there[0].name}); pass overwrite=True or another folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for kind, path in paths.items():
                with atomic_path(path) as temporary:
                    temporary.write_bytes(contents[kind])
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written to ({error}); choose another folder") from None
        return paths

    def _seg_bytes(self, kind: str) -> bytes:
        if self.dicom is None:
            raise OutputError(
                f"{self.name}: the input was no DICOM, and a DICOM Segmentation refers to its images; detect in a "
                "DICOM folder"
            )
        from ddmd.io.dicom_seg import seg_bytes

        return seg_bytes(self.dicom, self.mask if kind == "mask" else self.probability, kind)

    def overlay_png(self) -> bytes:
        """The picture as a PNG file: axial slices, the mask's outline in red, the uncertainty in colour below."""
        from ddmd.io.overlay import draw_overlay

        canonical = nib.as_closest_canonical(self.image)
        mask, probability, uncertainty = (
            np.asanyarray(nib.as_closest_canonical(i).dataobj)
            for i in (self.mask, self.probability, self.uncertainty)
        )
        x, y, z = (float(v) for v in canonical.header.get_zooms()[:3])
        return draw_overlay(
            np.asanyarray(canonical.dataobj),
            mask,
            probability,
            uncertainty,
            (x, y, z),
            f"{self.name}: {self.summary}",
        )

    def overlay(self, path: str | Path) -> Path:
        """Write the picture to a PNG file; its folder is made if it is not there.

        Parameters
        ----------
        path : of the PNG file

        Returns
        -------
        The path.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        path, picture = Path(path), self.overlay_png()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_bytes(picture)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written to ({error}); choose another place") from None
        return path


def check_maps(maps: Iterable[str] | None) -> tuple[str, ...]:
    """The names of maps to write, or all but the draws; raise ValueError for a name that is none."""
    wanted = tuple(key for key in SUFFIXES if key != "draws") if maps is None else tuple(maps)
    for name in wanted:
        if name not in SUFFIXES:
            raise ValueError(f"maps has {name!r}; allowed are {', '.join(SUFFIXES)}")
    return wanted
