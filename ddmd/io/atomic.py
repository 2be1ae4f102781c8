"""Files written whole or not at all, alone or as a set, by one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"  # part of the name of every file that is not complete yet
MAX_NAME_BYTES = 255  # of a file's name, on the file systems in use
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # what file systems without flock say


class BusyError(OSError):
    """Another process, or another thread, writes the same set of files."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`: renamed to it when the block ends, removed when it raises.

    The temporary file is created exclusively under a random name, so that neither a second writer nor a link
    that somebody left at a predictable name is written to. It has the extension of `path`, and the mode that
    the process's umask gives a new file.

    Parameters
    ----------
    path : path of the file to write; its folder exists.

    Raises
    ------
    OSError
        If the folder cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('whole', 1)
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".gz") else path.suffix
    temporary = path.with_name(f"{PARTIAL}-{secrets.token_hex(8)}{suffix}")
    try:
        mode = _create(temporary)
        yield temporary
        os.chmod(temporary, mode)  # writers that make the file anew may have narrowed it
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, content: bytes = b"") -> int:
    """Create a file that must not exist yet; its permission bits."""
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as file:
        file.write(content)
        return os.fstat(file.fileno()).st_mode & 0o777


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text to a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def write_texts(folder: Path, stem: str, contents: Mapping[str, str]) -> None:
    """Write files of UTF-8 text, each whole or not at all, and remove what a killed writer of `stem` left.

    The temporary names hold the machine and the process, so that no lock is needed: what a process of this
    machine left that has ended is removed, and nothing else is.

    Parameters
    ----------
    folder : an existing folder
    stem : what the files are of: the same for every writer of these files
    contents : text of each file by its name

    Raises
    ------
    OSError
        If the folder cannot be written to.
    """
    machine = hashlib.sha256(os.fsencode(platform.node())).hexdigest()[:8]
    prefix = _prefix(f"text of {stem}") + f"{machine}-"
    for leftover in os.listdir(folder):
        if leftover.startswith(prefix) and _has_ended(leftover.removeprefix(prefix).partition("-")[0]):
            (folder / leftover).unlink(missing_ok=True)
    for name, text in contents.items():
        temporary = folder / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            _create(temporary, text.encode(errors="surrogateescape"))
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def _has_ended(process: str) -> bool:
    """Whether the process of this machine with this number is gone."""
    if not process.isdecimal() or not 0 < int(process) < 2**31:
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def claim(folder: Path, stem: str) -> Iterator[None]:
    """The right to write the files of `stem` in `folder`: one holder at a time, over threads and processes.

    The claim is a lock on `.{stem}.lock`, which the kernel takes back when its holder is killed. The file is
    removed at the end. Whatever a killed holder left half done is completed or removed at the beginning.
    A file system without locks gives no claim, and files are still written whole.

    Parameters
    ----------
    folder : an existing folder
    stem : what the names of the files begin with

    Raises
    ------
    BusyError
        If somebody else holds the claim.
    OSError
        If the folder cannot be written to.
    """
    path = folder / f".{stem}.lock"
    descriptor, locked = _lock(path)
    try:
        if locked:
            _recover(folder, stem)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock ends with the descriptor: nobody locks a file that is about to go
        os.close(descriptor)


def finish_interrupted(folder: Path, stem: str) -> None:
    """Complete or remove what a killed writer of `stem` left, if there is one and nobody else is at it."""
    lock = folder / f".{stem}.lock"
    if os.path.lexists(lock) or os.path.lexists(_journal(folder, stem)):
        with suppress(OSError), claim(folder, stem):
            pass


def _lock(path: Path) -> tuple[int, bool]:
    """A descriptor of the lock file, and whether it is locked: not where the file system has no locks."""
    import fcntl

    while True:
        if path.is_symlink():
            path.unlink()
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(path, follow_symlinks=False)
            if os.path.samestat(os.fstat(descriptor), there):
                return descriptor, True
        except BlockingIOError:
            os.close(descriptor)
            raise BusyError(errno.EBUSY, "another process writes the same results", str(path)) from None
        except FileNotFoundError:
            pass  # its holder ended between the two calls, and took the file away
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)


def _prefix(stem: str) -> str:
    """What the temporary names of one set begin with; short, for the longest stem."""
    return f"{PARTIAL}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:12]}-"


class FileSet:
    """Files of one stem that replace earlier ones together. Used under its `claim`.

    Contents are added under temporary names. `commit` first writes a journal of what is to be renamed and
    removed, then does it; a process killed before the journal leaves the old set, one killed after it leaves
    the rest to the next claim of the same stem.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self._prefix = _prefix(stem) + secrets.token_hex(4)
        self._temporary: dict[str, Path] = {}

    def add(self, name: str, content: bytes) -> None:
        """Write a file of the set under its temporary name. Threads may add at once."""
        temporary = self.folder / f"{self._prefix}-{len(self._temporary)}-{secrets.token_hex(2)}"
        self._temporary[name] = temporary
        _create(temporary, content)

    def commit(self, last: str, remove: Sequence[str] = ()) -> None:
        """Give the files their names: `last` goes first and comes last. `remove` names files of an earlier set."""
        names = [name for name in self._temporary if name != last] + [last]
        steps = {name: self._temporary[name].name for name in names}
        gone = [last, *(name for name in remove if name not in steps)]
        journal = self.folder / f"{self._prefix}-journal"
        try:
            _create(journal, json.dumps({"remove": gone, "rename": steps}).encode("ascii"))
            os.replace(journal, _journal(self.folder, self.stem))
        finally:
            journal.unlink(missing_ok=True)
        try:
            _apply(self.folder, gone, steps)
        except BaseException:
            _recover(self.folder, self.stem)  # a signal came: the rest is quick
            raise
        _journal(self.folder, self.stem).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what was not committed."""
        if not _journal(self.folder, self.stem).exists():
            for temporary in list(self._temporary.values()):
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)


def _journal(folder: Path, stem: str) -> Path:
    return folder / f".{stem}.journal"


def _apply(folder: Path, remove: Sequence[str], rename: Mapping[str, str]) -> None:
    for name in remove:
        (folder / name).unlink(missing_ok=True)
    for name, temporary in rename.items():
        os.replace(folder / temporary, folder / name)


def _recover(folder: Path, stem: str) -> None:
    """Complete the set that a killed holder of the claim had committed, and remove what it had not."""
    path, prefix = _journal(folder, stem), _prefix(stem)
    if os.path.lexists(path):
        steps = _read_journal(path, stem, prefix)
        if steps is not None:
            remove, rename = steps
            left = {name: t for name, t in rename.items() if os.path.lexists(folder / t)}
            # what is renamed already stays: it may be the one that is removed first
            _apply(folder, [name for name in remove if name in left or name not in rename], left)
        path.unlink()
    for leftover in os.listdir(folder):
        if leftover.startswith(prefix):
            with suppress(OSError):
                (folder / leftover).unlink()


def _read_journal(path: Path, stem: str, prefix: str) -> tuple[list[str], dict[str, str]] | None:
    """What a journal says, or None for a file that `FileSet.commit` did not write."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            steps = json.loads(file.read(1 << 20))
        remove, rename = list(steps["remove"]), dict(steps["rename"])
        plain = all(os.path.basename(n) == n and n.startswith(stem) for n in (*remove, *rename))
        if plain and all(os.path.basename(t) == t and t.startswith(prefix) for t in rename.values()):
            return remove, rename
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None
