"""Made-up DICOM series of a head with a bright block in its left-anterior part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

BLOCK = np.array([[14.0, 42.0], [-58.0, -26.0], [4.0, 32.0]])  # mm LPS: left, anterior, above the middle
PLANES = {
    "axial": np.eye(3)[[0, 1]],
    "sagittal": np.array([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]),
    "coronal": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]),
}
PATIENT = {
    "PatientName": "Doeringer^Zarathustra",
    "PatientID": "HOSP-0815-77",
    "PatientBirthDate": "19610412",
}
FLAIR = {"SeriesDescription": "t2_tirm_tra_dark-fluid", "ScanningSequence": ["SE", "IR"], "InversionTime": 2400.0,
         "EchoTime": 110.0, "RepetitionTime": 9000.0}  # fmt: skip
T1 = {"SeriesDescription": "t1_mprage", "ScanningSequence": "GR", "InversionTime": 900.0, "EchoTime": 3.0,
      "RepetitionTime": 1900.0}  # fmt: skip


def oblique(rng: np.random.Generator) -> np.ndarray:
    """Directions of row and column of a slice turned about all axes."""
    rotation = np.linalg.qr(np.eye(3) + 0.25 * rng.standard_normal((3, 3)))[0]
    rotation *= np.sign(np.diag(rotation))
    return rotation.T[:2]


def scene(points: np.ndarray) -> np.ndarray:
    """Intensities at points (..., 3) in mm LPS: a head with a block of 1000."""
    inside = np.sum((points / np.array([68.0, 82.0, 62.0])) ** 2, axis=-1) < 1
    waves = 300 + 40 * np.sin(points[..., 0] / 11) + 30 * np.cos(points[..., 1] / 9) + points[..., 2] / 3
    return np.where(in_block(points), 1000, np.where(inside, waves, 0)).astype(np.int16)


def in_block(points: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """Whether points (..., 3) in mm LPS are in the block, or so many mm beside it."""
    return np.all((points >= BLOCK[:, 0] - slack) & (points <= BLOCK[:, 1] + slack), axis=-1)


def grid(plane: np.ndarray, spacing: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions (slices, 3) of the first pixels and points (slices, rows, columns, 3), mm LPS."""
    normal = np.cross(plane[0], plane[1])
    rows, columns, slices = int(200 / spacing), int(190 / spacing), int(170 / step)
    centred = [(np.arange(n) - (n - 1) / 2) for n in (slices, rows, columns)]
    k, r, c = np.meshgrid(*centred, indexing="ij")
    axes = (k * step, r * spacing, c * spacing)
    points = sum(a[..., None] * v for a, v in zip(axes, (normal, plane[1], plane[0]), strict=True))
    return points[:, 0, 0], points


def write_series(
    folder: Path,
    plane: np.ndarray,
    tags: dict[str, Any] = FLAIR,
    *,
    spacing: float = 7.0,
    step: float = 8.0,
    reverse: bool = False,
    number: int = 5,
    patient: dict[str, str] = PATIENT,
    study: str | None = None,
    names: str = "IM{:04d}",
) -> list[Path]:
    """Write the scene as a series of single slices; the files, in the order of the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    positions, points = grid(plane, spacing, step)
    study, series, frame = study or generate_uid(), generate_uid(), generate_uid()
    order = range(len(positions))
    paths = []
    for n, k in enumerate(reversed(order) if reverse else order, 1):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / names.format(n)
        image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        fill(image, {
            "SOPClassUID": MRImageStorage, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "Modality": "MR",
            "Manufacturer": "SIEMENS", "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"], **patient,
            "PatientSex": "O", "StudyInstanceUID": study, "SeriesInstanceUID": series, "FrameOfReferenceUID": frame,
            "StudyDate": "20260102", "StudyTime": "101112", "SeriesNumber": number, "InstanceNumber": n,
            "AccessionNumber": "ACC4711", "ReferringPhysicianName": "", "StudyID": "1",
            "PositionReferenceIndicator": "", "MagneticFieldStrength": 3.0, "SliceThickness": step,
            "SpacingBetweenSlices": step, "ImagePositionPatient": [f"{v:.6f}" for v in positions[k]],
            "ImageOrientationPatient": [f"{v:.8f}" for v in plane.ravel()], "PixelSpacing": [spacing, spacing],
            "Rows": points.shape[1], "Columns": points.shape[2], "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
            "PixelRepresentation": 1, **tags,
        })  # fmt: skip
        image.PixelData = scene(points[k]).astype("<i2").tobytes()
        image.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths[::-1] if reverse else paths


def fill(dataset: Dataset, tags: dict[str, Any]) -> None:
    """Set elements by keyword; None removes one."""
    for keyword, value in tags.items():
        if value is None:
            dataset.pop(keyword, None)
        else:
            setattr(dataset, keyword, value)
