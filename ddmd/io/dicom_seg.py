"""DICOM Segmentation objects of a result, which refer to the images they were made from."""

from __future__ import annotations

import io
import warnings
from typing import Any

import nibabel as nib
import numpy as np

import ddmd
from ddmd.io.dicom import DicomSeries
from ddmd.io.dicom_convert import on_series
from ddmd.io.dicom_headers import require_dicom
from ddmd.io.errors import VolumeError

LEVELS = 255  # of a fractional segmentation: probability 1
SERIES_NUMBERS = {"mask": 9001, "probability": 9002}
_TITLES = {"mask": "Lesions (ddmd)", "probability": "Lesion probability (ddmd)"}


def seg_bytes(series: DicomSeries, image: nib.Nifti1Image, kind: str) -> bytes:
    """A map as a DICOM Segmentation file: binary for a mask, fractional for a probability.

    Patient and study are those of the source, as DICOM asks.

    Parameters
    ----------
    series : the source, whose files are read again
    image : on the grid of the series, in [0, 1]
    kind : "mask" or "probability"

    Raises
    ------
    VolumeError
        If the source files are gone or have changed, or the map is not on their grid.
    """
    require_dicom(series.label)
    import highdicom as hd
    import pydicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    frames = on_series(series, image)
    sources = []
    for header in series.headers:
        try:
            source = pydicom.dcmread(header.path, stop_before_pixels=True, force=True)
        except OSError as error:
            raise VolumeError(f"{header.path}: the source of the result cannot be read ({error})") from None
        if str(source.get("SOPInstanceUID")) != header.instance:
            raise VolumeError(f"{header.path}: is another image than the result was made from; detect again")
        sources.append(_completed(source))
    algorithm = hd.AlgorithmIdentificationSequence(
        name="ddmd", version=ddmd.__version__, family=codes.DCM.ArtificialIntelligence
    )
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Lesion",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    if kind == "mask":
        segmentation_type, pixels = "BINARY", (frames > 0).astype(np.uint8)
    else:
        segmentation_type, pixels = "FRACTIONAL", np.clip(frames, 0.0, 1.0).astype(np.float32)
    if len(series.headers) == 1:  # a multi-frame file: its frames are in its own order
        pixels = pixels[np.argsort(series.frame_order)]
    with warnings.catch_warnings(action="ignore"):
        made: Any = hd.seg.Segmentation(
            source_images=sources,
            pixel_array=pixels,
            segmentation_type=segmentation_type,
            segment_descriptions=[segment],
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBERS[kind],
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="ddmd",
            manufacturer_model_name="ddmd",
            software_versions=ddmd.__version__,
            device_serial_number="0",
            fractional_type="PROBABILITY",
            max_fractional_value=LEVELS,
            content_label="LESION",
            series_description=_TITLES[kind],
            omit_empty_frames=bool(pixels.any()),
        )
        content = io.BytesIO()
        made.save_as(content, enforce_file_format=True)
    return content.getvalue()


def _completed(source: Any) -> Any:
    """The header with the elements that DICOM wants and exports often lack, empty."""
    from pydicom.uid import generate_uid

    for keyword in (
        "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
        "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator",
    ):  # fmt: skip
        if keyword not in source:
            setattr(source, keyword, "")
    if not source.get("FrameOfReferenceUID"):  # the same for all slices of a series
        source.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(source.get("SeriesInstanceUID"))])
    return source
