"""The folder of a run: its lock, whether it may be used for a configuration, and removal of an earlier run."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddmd.cohort.splits import read_split
from ddmd.training.config import TrainConfig, validate
from ddmd.training.initial_weights import START

LOCK = "lock"  # file in a run's folder that the process which trains there holds
# what a run writes beside its weights, events and config.json
RUN_FILES = (
    "split.json", "*.checkpoint.safetensors", "*.diverged.safetensors", "pseudo_masks_*.npz", START,
)  # fmt: skip


@contextmanager
def locked(out: Path, main: bool) -> Iterator[None]:
    """Hold the folder of a run, so that no second run writes there; nothing in other processes of the run."""
    if not main:
        yield
        return
    import fcntl

    with open(out / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"{out}: another process is training in this folder; wait for it, or choose another folder"
            ) from None
        yield


def check_folder(config: TrainConfig, out: Path) -> None:
    """Refuse a folder that holds a run of another configuration."""
    path = out / "config.json"
    if not path.exists():
        return
    try:
        # what is new since the run began has its default
        known = config_text(validate(json.loads(path.read_text(encoding="utf-8")), str(path)))
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it if the run is of this configuration, and start again"
        ) from None
    if known != config_text(config):
        raise ValueError(
            f"{out} holds a run of another configuration; pass --overwrite (overwrite=True) or another folder"
        )


def earlier_run_name(out: Path) -> str | None:
    """Name of the run that a folder holds, None without a config.json.

    Raises
    ------
    ValueError
        If config.json is not the configuration of a run, so that what is beside it may be anything.
    """
    path = out / "config.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    types = {"name": str, "data": list, "denoiser_stage": dict}
    if not (isinstance(values, dict) and all(isinstance(values.get(k), t) for k, t in types.items())):
        raise ValueError(
            f"{path}: not the configuration of a run, so nothing is overwritten; choose another folder, or delete "
            "yourself what this one holds"
        )
    return str(values["name"])


def remove_run(out: Path) -> None:
    """Remove what an earlier run wrote to its folder, and nothing else; config.json last, which tells a run."""
    name = earlier_run_name(out)
    if name is None:
        return
    shutil.rmtree(out / "events", ignore_errors=True)
    for pattern in RUN_FILES:
        for file in out.glob(pattern):
            file.unlink()
    if name and Path(name).name == name:
        (out / f"{name}.safetensors").unlink(missing_ok=True)
    (out / "config.json").unlink()


def config_text(config: TrainConfig) -> str:
    """What config.json of a run holds."""
    return json.dumps(dataclasses.asdict(config), indent=1, default=str)


def check_split(split: dict[str, str], out: Path) -> None:
    """Refuse a folder whose run was split in another way."""
    path = out / "split.json"
    if not path.exists():
        return
    try:
        known = read_split(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete {path}, and start again") from None
    if known != split:
        raise ValueError(
            f"{path}: its patients are not those of the data now; choose another folder, or undo that"
        )
