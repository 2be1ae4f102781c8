"""Files as streams of bytes, decompressed by what they hold, with bounds on time and memory."""

from __future__ import annotations

import bz2
import gzip
import importlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ddmd.io.errors import VolumeError

CHUNK = 1 << 22  # bytes read at once
SURPLUS = 1 << 20  # bytes behind the voxels that are read, to reach the checksum at the end of the file
MAX_GZIP_RATIO = 1040  # deflate cannot expand further
HEAD = 512  # bytes by which a file is recognised

_MAGIC = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd"))
_ZSTD_MODULES = (
    "compression.zstd",
    "backports.zstd",
    "pyzstd",
    "zstandard",
)  # the first is Python 3.14's own

# what a file is that is no NIfTI file: bytes at the beginning, and what to do
_STRANGERS = (
    (b"NRRD", "an NRRD file, which is not read; convert it to .nii.gz, with 3D Slicer or SimpleITK"),
    (
        b"ObjectType",
        "a MetaImage file, which is not read; convert it to .nii.gz, with 3D Slicer or SimpleITK",
    ),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"\xfd7zXZ", "compressed by xz; unpack it, with xz -d"),
    (b"\x89HDF", "an HDF5 file (MINC 2?); convert it to .nii.gz, with mnc2nii for MINC"),
    (b"CDF", "a NetCDF file (MINC 1?); convert it to .nii.gz, with mnc2nii for MINC"),
    (b"\x89PNG", "a PNG picture; give the volume it was made from"),
    (b"version https://git-lfs", "a Git LFS pointer without its content; run: git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer without its content; run: git annex get"),
)


@dataclass(frozen=True)
class FileState:
    """What tells whether a file was changed: device, inode, size and time."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_file(path: Path) -> FileState:
    """The state of a regular file that is there and not empty.

    Raises
    ------
    VolumeError
        If it is missing, a folder, a device or empty, or a link whose content was not fetched.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise VolumeError(f"{path}: {_absent(path, error)}") from None
    if stat.S_ISDIR(status.st_mode):
        raise VolumeError(f"{path}: is a folder; name the NIfTI files in it")
    if not stat.S_ISREG(status.st_mode):
        raise VolumeError(f"{path}: is no regular file; copy the volume to one")
    if status.st_size == 0:
        raise VolumeError(f"{path}: the file is empty; copy or export it again")
    return FileState.of(status)


def _absent(path: Path, error: OSError | ValueError) -> str:
    try:
        if path.is_symlink():
            target = os.readlink(path)
            if "annex/objects" in target.replace("\\", "/"):
                return f"a git-annex link without its content; run: git annex get {path.name}"
            return f"a link to {target}, which is not there; copy the file itself"
    except (OSError, ValueError):
        pass
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file; check the path"
    return (
        f"cannot be opened ({getattr(error, 'strerror', None) or error}); check the path and its permissions"
    )


@contextmanager
def opened(path: Path, expected: FileState | None = None) -> Iterator[tuple[IO[bytes], FileState]]:
    """A stream of a file's decompressed bytes, and the file's state.

    Parameters
    ----------
    path : file to read
    expected : state that the file had when it was opened first

    Raises
    ------
    VolumeError
        If the file cannot be opened, or another one lies there than expected.
    """
    check_file(path)
    try:
        file = open(path, "rb")  # noqa: SIM115, closed below
    except OSError as error:
        raise VolumeError(f"{path}: {_absent(path, error)}") from None
    with file:
        state = FileState.of(os.fstat(file.fileno()))
        if expected is not None and state != expected:
            raise changed(path)
        head = file.read(HEAD)
        file.seek(0)
        try:
            yield _decompressed(file, head, path), state
        except Exception:  # where another program writes the file, that is the cause
            _check_unchanged(file, state, path)
            raise
        _check_unchanged(file, state, path)


def _check_unchanged(file: IO[bytes], state: FileState, path: Path) -> None:
    if FileState.of(os.fstat(file.fileno())) != state:
        raise changed(path)


def changed(path: Path) -> VolumeError:
    """The error of a file that another program writes."""
    return VolumeError(f"{path}: the file was changed while it was read; read it again when it is complete")


def _decompressed(file: IO[bytes], head: bytes, path: Path) -> IO[bytes]:
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if kind == "gzip":
        return _gzip_reader()(fileobj=file, mode="rb")
    if kind == "bzip2":
        return bz2.BZ2File(file)
    if kind == "zstd":
        return _zstd_reader(path)(file)
    refuse_stranger(path, head)
    return file


def refuse_stranger(path: Path, head: bytes) -> None:
    """Raise VolumeError where the first bytes of a file are those of a known other format."""
    if head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".ima"):
        raise VolumeError(
            f"{path}: a DICOM file; give its folder, which is read by dcm2niix with pip install 'ddmd[dicom]'"
        )
    for magic, what in _STRANGERS:
        if head.startswith(magic):
            raise VolumeError(f"{path}: {what}")


def _gzip_reader() -> Callable[..., IO[bytes]]:
    try:
        from zlib_ng import gzip_ng
    except ImportError:  # no wheel for this machine: slower, the same bytes
        return cast(Callable[..., IO[bytes]], gzip.GzipFile)
    return cast(Callable[..., IO[bytes]], gzip_ng.GzipNGFile)


def _zstd_reader(path: Path) -> Callable[[IO[bytes]], IO[bytes]]:
    for name in _ZSTD_MODULES:
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue
        if name == "zstandard":
            return lambda file: cast(
                IO[bytes], module.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            )
        return cast(Callable[[IO[bytes]], IO[bytes]], module.ZstdFile)
    raise VolumeError(
        f"{path}: compressed by zstd, which this Python does not read; unpack it, with zstd -d, or "
        "pip install backports.zstd"
    )


def is_compressed(path: Path) -> bool:
    """Whether a file's first bytes are those of a compressed one."""
    with _readable(path), open(path, "rb") as file:
        head = file.read(HEAD)
    return any(head.startswith(magic) for magic, _ in _MAGIC)


def read_head(path: Path, size: int) -> tuple[bytes, FileState]:
    """The first `size` decompressed bytes of a file, fewer where it is shorter, and the file's state."""
    with _readable(path), opened(path) as (stream, state):
        return stream.read(size), state


def read_bytes(path: Path, offset: int, size: int, expected: FileState) -> tuple[np.ndarray, int]:
    """`size` decompressed bytes of a file from `offset` on, in memory of their own.

    The file is decompressed once, to its end where that is near, so that its checksum is verified. No more
    than SURPLUS bytes are read behind those asked for: a file cannot expand without bound.

    Parameters
    ----------
    path : file to read
    offset : decompressed bytes before the first one wanted
    size : number of bytes
    expected : state of the file when its header was read

    Returns
    -------
    uint8 (size,), and the number of bytes behind them, up to SURPLUS.

    Raises
    ------
    VolumeError
        If the file is damaged, shorter, or not the one that was opened first.
    """
    with _readable(path), opened(path, expected) as (stream, state):
        most = state.size * MAX_GZIP_RATIO if isinstance(stream, _gzip_types()) else None
        if most is None and type(stream).__module__ in ("_io", "io"):
            most = state.size
        if most is not None and most < offset + size:
            raise short(path, offset + size, min(most, state.size))
        left = offset
        while left:
            skipped = len(stream.read(min(left, CHUNK)))
            if not skipped:
                raise short(path, offset + size, offset - left)
            left -= skipped
        data = np.empty(size, np.uint8)
        view, done = memoryview(data.data), 0
        while done < size:
            piece = stream.read(min(CHUNK, size - done))
            if not piece:
                raise short(path, offset + size, offset + done)
            view[done : done + len(piece)] = piece
            done += len(piece)
        surplus = 0
        while surplus < SURPLUS and (piece := stream.read(SURPLUS - surplus)):
            surplus += len(piece)
        return data, surplus


def _gzip_types() -> tuple[type, ...]:
    return (gzip.GzipFile, cast(type, _gzip_reader()))


def short(path: Path, needed: int, held: int) -> VolumeError:
    """The error of a file that holds fewer bytes than its header says."""
    return VolumeError(
        f"{path}: the header claims {needed} bytes and the file holds {held}; it is truncated or its header is "
        "wrong; copy or export it again"
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Every error of a decompressor or file system as one of the file."""
    try:
        yield
    except VolumeError:
        raise
    except MemoryError:
        raise VolumeError(
            f"{path}: there is not enough memory to read it; free some, or resample it"
        ) from None
    except Exception as error:  # each decompressor has kinds of its own
        try:
            with open(path, "rb") as file:
                compressed = file.read(2) == b"\x1f\x8b"
        except OSError:
            compressed = False
        what = "the gz is damaged or truncated" if compressed else "the file is damaged or truncated"
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VolumeError(f"{path}: {what} ({said}); copy it again") from None
