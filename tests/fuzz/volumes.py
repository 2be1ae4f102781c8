"""Mutants of image files: fields of headers, payloads, compression, names."""

from __future__ import annotations

import bz2
import gzip
import random
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ddmd.io.volume import Volume
from tests.fuzz.mutants import FLOATS, NUMBERS, Mutant, changed_bytes
from tests.volumes import head

SHAPE = (20, 24, 8)
DATA_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8")
EXTENSIONS = (
    "nii",
    "nii",
    "nii.gz",
    "nii.gz",
    "nii.bz2",
    "nii.zst",
    "hdr",
    "img.gz",
    "mgz",
    "mgh",
    "nrrd",
    "dcm",
    "txt",
)


@cache
def _original(kind: str, dtype: str) -> bytes:
    values, affine = head(np.random.default_rng(5), SHAPE, (8.0, 8.0, 8.0))
    header_kind: Any = {"nifti1": nib.Nifti1Header, "nifti2": nib.Nifti2Header}[kind]
    header = header_kind()
    header.set_data_dtype(dtype)
    header.set_data_shape(SHAPE)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352 if kind == "nifti1" else 544
    header["scl_slope"] = 1
    return bytes(header.binaryblock + b"\0" * 4 + np.clip(values, 0, 127).astype(dtype).tobytes(order="F"))


def _changed_fields(rng: random.Random, raw: bytes, kind: str) -> tuple[bytes, str]:
    header_kind: Any = {"nifti1": nib.Nifti1Header, "nifti2": nib.Nifti2Header}[kind]
    block = header_kind.template_dtype
    header = np.frombuffer(raw[: block.itemsize], block).copy()
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(block.names)
        field = header[name]
        at = rng.randrange(field.size)
        with np.errstate(all="ignore"):
            if field.dtype.kind == "f":
                field.flat[at] = rng.choice(FLOATS)
            elif field.dtype.kind in "iu":
                bits = 8 * field.dtype.itemsize
                value = rng.choice(NUMBERS) % (1 << bits)
                signed = value - (1 << bits) if field.dtype.kind == "i" and value >> (bits - 1) else value
                field.flat[at] = signed
            else:
                header[name] = rng.randbytes(8)
            if name == "datatype" and rng.random() < 0.5:
                header["bitpix"] = rng.choice((1, 8, 16, 24, 32, 64, 96, 128, 256))
        names.append(name)
    return header.tobytes() + raw[block.itemsize :], "fields " + ", ".join(names)


def _changed_payload(rng: random.Random, raw: bytes, dtype: str) -> tuple[bytes, str]:
    start = len(raw) - int(np.prod(SHAPE)) * np.dtype(dtype).itemsize
    values = np.frombuffer(raw[start:], dtype).copy()
    share = rng.choice((1e-3, 0.1, 0.5, 1.0))
    where = np.random.default_rng(rng.randrange(2**31)).random(values.size) < share
    special = rng.choice(FLOATS)
    with np.errstate(all="ignore"):
        if values.dtype.kind == "f" and rng.random() < 0.3:
            values = values * np.asarray(special, values.dtype)
        elif values.dtype.kind in "fc":
            values[where] = special
        else:
            values[where] = rng.choice((np.iinfo(dtype).min, np.iinfo(dtype).max, 0))
    return raw[:start] + values.tobytes(), f"payload {special} in {share}"


def _use(name: str) -> Any:
    def use(folder: Path) -> None:
        volume = Volume.read(folder / name, require=("flair",))
        z = volume.normalised("flair")
        assert np.isfinite(z).all()
        assert np.isfinite(volume.images["flair"]).all()
        back = volume.to_native(z)
        assert back.shape == volume.native.shape
        assert np.isfinite(back.affine).all()
        back.to_bytes()

    return use


def mutant(rng: random.Random) -> Mutant:
    """A volume with one kind of damage."""
    kind, dtype = rng.choice(("nifti1", "nifti1", "nifti2")), rng.choice(DATA_TYPES)
    raw = _original(kind, dtype)
    extension = rng.choice(EXTENSIONS)
    choice = rng.random()
    if choice < 0.5:
        raw, what = _changed_fields(rng, raw, kind)
    elif choice < 0.7:
        raw, what = changed_bytes(rng, raw, 352 if kind == "nifti1" else 544), "bytes of the header"
    elif choice < 0.85:
        raw, what = _changed_payload(rng, raw, dtype)
    else:
        what = "bytes of the file"
    if extension in ("mgz", "mgh"):
        values, affine = head(np.random.default_rng(5), SHAPE, (8.0, 8.0, 8.0))
        raw = changed_bytes(rng, nib.MGHImage(values, affine).to_bytes(), 90)
        extension, what = rng.choice(("mgz", "mgh")), "bytes of an MGH header"
    content = raw
    if extension.endswith(".gz") or extension == "mgz":
        content = gzip.compress(raw, 1, mtime=0)
    elif extension.endswith(".bz2"):
        content = bz2.compress(raw, 1)
    if what == "bytes of the file":
        content = changed_bytes(rng, content)
    files = {f"x_flair.{extension}": content}
    if extension == "hdr":
        pair = bytearray(raw)
        pair[344:348] = b"ni1\0"
        size = int(np.prod(SHAPE)) * np.dtype(dtype).itemsize
        files = {"x_flair.hdr": bytes(pair[:352]), "x_flair.img": raw[-size:]}
    return Mutant(files, f"{kind} {dtype} .{extension}: {what}", _use(f"x_flair.{extension}"))
