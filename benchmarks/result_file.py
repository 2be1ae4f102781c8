"""A JSON file of results that grows while a benchmark runs, so that a run that is stopped keeps what it measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddmd.io.atomic import write_text
from ddmd.io.text import json_text

ROOT = Path(__file__).parents[1]


def commit(checkout: Path = ROOT) -> str:
    """The short hash of the commit that is checked out, or "unknown" where there is no repository.

    Parameters
    ----------
    checkout : folder of the package
    """
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class ResultFile:
    """The results of one benchmark with one group of settings.

    Every `put` writes the whole file, atomically. A file with the same settings is continued; one with other
    settings is replaced, and a line says so.

    Parameters
    ----------
    path : path of the JSON file
    settings : what the results depend on: machine, versions, options

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.json"
    >>> ResultFile(path, {"threads": 1}).put("read", 0.5)
    >>> ResultFile(path, {"threads": 1}).get("read")  # doctest: +ELLIPSIS
    continues ...results.json
    0.5
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(json_text(dict(settings)))
        wanted = set(self.values)
        if not path.exists():
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        different = [k for k in sorted(wanted) if before.get(k) != self.values[k]]
        if not different:
            self.values = before
            print(f"continues {path}", flush=True)
        else:
            print(f"replaces {path}: other {', '.join(different)}", flush=True)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        """The results under a key."""
        return self.values.get(key, default)

    def put(self, key: str, value: Any) -> None:
        """Set the results under a key, and write the file."""
        self.values[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json_text(self.values))
