"""The result of one case as files: maps, JSON sidecars, a table of lesions, a picture, and the JSON that lists them."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ddmd.io.atomic import MAX_NAME_BYTES, BusyError, FileSet, claim, finish_interrupted
from ddmd.io.text import json_text, table_text

SUFFIXES = {
    "mask": "desc-lesion_mask",
    "probability": "desc-lesion_probseg",
    "uncertainty": "desc-lesion_uncertainty",
    "labels": "desc-lesion_dseg",
    "inter_discrepancy": "desc-inter_discrepancy",
    "intra_discrepancy": "desc-intra_discrepancy",
    "draws": "desc-draws_probseg",
}


@dataclass(frozen=True)
class Naming:
    """How the maps of a result are called.

    Parameters
    ----------
    suffixes : key of a map -> what its name has after the stem
    label_table : whether a table of the labels' names lies beside the label map
    meaning_key : under which the JSON of a map says what it means
    """

    suffixes: Mapping[str, str]
    label_table: bool = False
    meaning_key: str = "Meaning"


PLAIN_NAMES = Naming(SUFFIXES)
BIDS_NAMES = Naming(
    {
        "mask": "space-orig_label-L_mask",
        "probability": "space-orig_label-L_probseg",
        "uncertainty": "space-orig_label-L_desc-variance_probseg",
        "labels": "space-orig_desc-lesions_dseg",
        "inter_discrepancy": "space-orig_desc-inter_discrepancy",
        "intra_discrepancy": "space-orig_desc-intra_discrepancy",
        "draws": "space-orig_label-L_desc-draws_probseg",
    },
    label_table=True,
    meaning_key="Description",
)  # of BIDS derivatives
SEG_SUFFIXES = {"mask": "desc-lesion_mask.dcm", "probability": "desc-lesion_probseg.dcm"}  # for DICOM input
MEANING = {
    "mask": "1 in components that meet Threshold and the other criteria of the result's JSON file, and in the outlines of "
    "large ones",
    "probability": "mean over the S drawn masks, smoothed through the plane, in [0, 1]",
    "uncertainty": "variance over the S drawn masks, 1/(S-1), smoothed through the plane",
    "labels": "n in the voxels of the n-th lesion of the table, 0 elsewhere",
    "inter_discrepancy": "X = mean over sequences of |mu_B - mu_A|, in robust z-scores times 0.5",
    "intra_discrepancy": "Y = root mean square deviation of the ensemble trained on normal slices, same unit",
    "draws": "the S drawn masks along the fourth axis: probability times 255, smoothed through the plane; lesion from 128. "
    "0 where a mask marks what is too faint beside its main lesion",
}
_GEOMETRY = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


class OutputError(ValueError):
    """Results that cannot be written where they were asked for; the message says what to do."""


@dataclass(frozen=True)
class CaseResult:
    """What is written of one case.

    Parameters
    ----------
    name : name of the case, for messages
    stem : what the names of its files begin with
    maps : keys of `SUFFIXES` -> image
    description : what the JSON files say; numpy scalars and arrays are welcome
    lesions : rows of the table, each {column: value}
    lesion_columns : names of the columns
    overlay : PNG file, or None for no picture
    naming : how the maps are called
    segs : keys of `SEG_SUFFIXES` -> DICOM Segmentation file
    """

    name: str
    stem: str
    maps: Mapping[str, nib.Nifti1Image]
    description: Mapping[str, Any]
    lesions: Sequence[Mapping[str, object]]
    lesion_columns: Sequence[str]
    overlay: bytes | None = None
    naming: Naming = PLAIN_NAMES
    segs: Mapping[str, bytes] = field(default_factory=dict)


def result_paths(stem: str, folder: str | Path, naming: Naming = PLAIN_NAMES) -> dict[str, Path]:
    """The files of a case's result, by what they hold; each map has a JSON sidecar beside it.

    Parameters
    ----------
    stem : what the names of the case's files begin with; see `file_stem`
    folder : folder of the results
    naming : how the maps are called

    Returns
    -------
    {"mask": path, ..., "mask_seg": DICOM Segmentation, "probability_seg": another, "lesions": table,
    "overlay": picture, "result": the JSON that is written last}
    """
    folder = Path(folder)
    paths = {key: folder / f"{stem}_{suffix}.nii.gz" for key, suffix in naming.suffixes.items()}
    paths |= {f"{key}_seg": folder / f"{stem}_{suffix}" for key, suffix in SEG_SUFFIXES.items()}
    return paths | {
        "lesions": folder / f"{stem}_lesions.tsv",
        "overlay": folder / f"{stem}_overlay.png",
        "result": folder / f"{stem}_result.json",
    }


def sidecar_path(path: Path) -> Path:
    """The JSON beside a map."""
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _label_table_path(path: Path) -> Path:
    """The table beside a label map that names its labels."""
    return path.with_name(path.name.removesuffix(".nii.gz") + ".tsv")


def _all_paths(stem: str, folder: Path, naming: Naming) -> list[Path]:
    paths = result_paths(stem, folder, naming)
    tables = [_label_table_path(paths["labels"])] if naming.label_table else []
    return [*paths.values(), *tables, *(sidecar_path(paths[key]) for key in naming.suffixes)]


def check_output(stem: str, folder: str | Path, overwrite: bool, naming: Naming = PLAIN_NAMES) -> None:
    """Raise OutputError where results could not be written to the folder, before computing them.

    Where an earlier process was killed while it wrote these results, that is completed, or its leftovers are
    removed, first.

    Parameters
    ----------
    stem : what the names of the case's files begin with
    folder : folder of the results; it need not be there
    overwrite : whether earlier results may be replaced
    naming : how the maps are called
    """
    folder = Path(folder)
    finish_interrupted(folder, stem)
    _check_place(stem, folder, overwrite, naming)


def _check_place(stem: str, folder: Path, overwrite: bool, naming: Naming) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder for the results")
    paths = _all_paths(stem, folder, naming)
    longest = max(len(os.fsencode(path.name)) for path in paths)
    if longest > MAX_NAME_BYTES:
        raise OutputError(
            f"{stem[:40]}...: names of result files would have {longest} bytes, and {MAX_NAME_BYTES} are allowed; "
            "shorten the name of the case"
        )
    there = [path for path in paths if os.path.lexists(path)]
    for path in there:
        if path.is_dir() and not path.is_symlink():
            raise OutputError(f"{path}: is a folder where a result is to be; choose another folder")
    if there and not overwrite:
        raise OutputError(
            f"{folder}: holds earlier results ({there[0].name}); pass --overwrite (overwrite=True) or another folder"
        )
    above = folder.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot be written to; choose another folder, or ask for the right to")


def write_result(result: CaseResult, folder: str | Path, overwrite: bool = False) -> dict[str, Path]:
    """Write a case's result: all of it or nothing, by one writer at a time.

    Files of an earlier result are replaced together; a link at one of the names is replaced, never followed.

    Parameters
    ----------
    result : CaseResult
    folder : made if it is not there
    overwrite : whether to replace an earlier result

    Returns
    -------
    {"mask": path, ..., "lesions": path, "result": path} of what was written

    Raises
    ------
    OutputError
        If the folder cannot be written to, holds results of this name and overwrite is False, another process
        writes them at this moment, or a map is not finite.
    """
    folder = Path(folder)
    check_output(result.stem, folder, overwrite, result.naming)
    for key, image in result.maps.items():
        values = np.asanyarray(image.dataobj)
        if values.dtype.kind == "f" and not np.isfinite((values.min(), values.max())).all():  # NaN is both
            wrong = int(np.count_nonzero(~np.isfinite(values)))
            raise OutputError(
                f"{result.name}: {wrong} voxels of the {key} map are NaN or Inf; nothing was written"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with claim(folder, result.stem):
            _check_place(
                result.stem, folder, overwrite, result.naming
            )  # another process may have written them meanwhile
            return _write_set(result, folder)
    except BusyError:
        raise OutputError(
            f"{folder}: another process is writing the results of {result.name}; let it finish, or choose another "
            "folder"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error}); choose another folder") from None


def _write_set(result: CaseResult, folder: Path) -> dict[str, Path]:
    paths = {
        key: path
        for key, path in result_paths(result.stem, folder, result.naming).items()
        if key in result.maps
        or key in ("lesions", "result")
        or (key.endswith("_seg") and key.removesuffix("_seg") in result.segs)
        or (key == "overlay" and result.overlay is not None)
    }
    contents: dict[str, bytes] = {}
    for key in result.maps:
        text = json_text({result.naming.meaning_key: MEANING[key], **result.description})
        contents[sidecar_path(paths[key]).name] = text.encode("ascii")
    contents[paths["lesions"].name] = table_text(result.lesions, result.lesion_columns).encode("utf-8")
    if result.naming.label_table and "labels" in result.maps:
        names = [{"index": 0, "name": "Background"}]
        names += [{"index": n, "name": f"Lesion {n}"} for n in range(1, len(result.lesions) + 1)]
        contents[_label_table_path(paths["labels"]).name] = table_text(names, ("index", "name")).encode(
            "ascii"
        )
    for key, content in result.segs.items():
        contents[paths[f"{key}_seg"].name] = content
    if result.overlay is not None:
        contents[paths["overlay"].name] = result.overlay
    files = FileSet(folder, result.stem)
    try:

        def write_map(key: str) -> tuple[str, bytes]:
            content = compressed(*nifti_parts(result.maps[key]))
            files.add(paths[key].name, content)
            return paths[key].name, content

        with ThreadPoolExecutor(len(SUFFIXES), thread_name_prefix="ddmd-write") as pool:
            contents |= dict(pool.map(write_map, result.maps))
        listed = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
        map_names = {paths[key].name for key in result.maps}
        for name, content in contents.items():
            if name not in map_names:
                files.add(name, content)
        summary = {**result.description, "LesionTable": list(result.lesions), "Files": listed}
        files.add(paths["result"].name, json_text(summary).encode("ascii"))
        files.commit(
            paths["result"].name, [path.name for path in _all_paths(result.stem, folder, result.naming)]
        )
    finally:
        files.discard()
    return paths


def read_result(stem: str, folder: str | Path) -> dict[str, Any] | None:
    """What a case's result says of itself, or None where it is not there, not complete, or was changed.

    Parameters
    ----------
    stem : what the names of the case's files begin with
    folder : folder of the results

    Returns
    -------
    The JSON written last, whose "Files" are all there with the SHA-256 it states; or None
    """
    path = result_paths(stem, folder)["result"]
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return None
        summary = json.loads(path.read_bytes())
        for file, checksum in summary["Files"].items():
            if os.path.basename(file) != file or file_sha256(path.with_name(file)) != checksum:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(summary)


def result_name(stem: str, folder: str | Path) -> str | None:
    """The name of the case whose result is there, or None where none is there or its JSON cannot be read."""
    path = result_paths(stem, folder)["result"]
    try:
        name = json.loads(path.read_bytes())["Name"] if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file, in hexadecimal; OSError where it cannot be read."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nifti_bytes(image: nib.Nifti1Image) -> bytes:
    """An image as an uncompressed NIfTI file whose header holds geometry and units alone; see `nifti_parts`."""
    return b"".join(nifti_parts(image))


def nifti_parts(image: nib.Nifti1Image) -> tuple[bytes, memoryview]:
    """The header and the voxels of a NIfTI file; voxels that lie in the file's order are not copied.

    Parameters
    ----------
    image : of any NIfTI class; free text, extensions and acquisition fields of its header are left out.

    Returns
    -------
    bytes, memoryview
        Of a NIfTI-1 file, or NIfTI-2 where the image is one. Data type, affine, form codes and units stay.
    """
    values = np.asanyarray(image.dataobj)
    kind: Any = nib.Nifti2Image if isinstance(image.header, nib.Nifti2Header) else nib.Nifti1Image
    header = kind(values, image.affine, dtype=values.dtype).header
    for name in _GEOMETRY:
        header[name] = image.header[name]
    header["pixdim"][:4] = image.header["pixdim"][:4]  # the rest is of time
    header.set_slope_inter(1.0, 0.0)
    head = io.BytesIO()
    header.write_to(head)
    head.write(bytes(header.get_data_offset() - head.tell()))  # no extensions
    voxels = np.asarray(values, values.dtype.newbyteorder(header.endianness), order="F")
    return head.getvalue(), voxels.T.reshape(-1).view(np.uint8).data


def compressed(*parts: bytes | memoryview) -> bytes:
    """The parts as one gzip member without name or time: equal content gives equal bytes.

    Only runs of one byte are matched: maps are zeros and noise-like digits, in which a search for other matches
    finds next to nothing. A run depends on nothing but the content, and zlib-ng and zlib write the same stream.
    ISA-L's stream is not always the same for the same content.
    """
    stream = _zlib().compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])


def _zlib() -> Any:
    """zlib-ng, which is several times faster, or Python's zlib where there is no wheel of it."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib
    return zlib_ng
