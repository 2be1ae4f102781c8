"""Printing: plain lines that any terminal, pipe and encoding takes, with user strings made safe."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from ddmd.io.text import json_line, printable

RED, YELLOW, RESET = "\x1b[31m", "\x1b[33m", "\x1b[0m"


def say(text: object = "") -> None:
    """Print one line to standard output."""
    _write(sys.stdout, printable(text))


def note(text: object) -> None:
    """Print what the user should know, to standard output."""
    _write(sys.stdout, f"{_coloured(sys.stdout, 'note', YELLOW)}: {printable(text)}")


def error(text: object) -> None:
    """Print one line about what failed, to standard error."""
    _write(sys.stderr, f"{_coloured(sys.stderr, 'error', RED)}: {printable(text)}")


def warning(text: object) -> None:
    """Print one line to standard error."""
    _write(sys.stderr, f"{_coloured(sys.stderr, 'warning', YELLOW)}: {printable(text)}")


def json_value(value: object) -> None:
    """Print a value as one line of JSON."""
    _write(sys.stdout, json_line(value))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: columns of equal width, two blanks between them, nothing drawn."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        _write(
            sys.stdout, "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def explain(failure: BaseException) -> str:
    """An exception as one line: its own words if it is one of ddmd's, else its type, too."""
    if type(failure).__module__.split(".")[0] == "ddmd":
        return str(failure)
    words = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    if isinstance(failure, MemoryError) and not words:
        words = "out of memory"
    return f"{type(failure).__name__}{f': {words}' if words else ''}"


def debug_traceback(failure: BaseException) -> None:
    """Print the traceback where DDMD_DEBUG is set, as --debug sets it."""
    debug_text("".join(traceback.format_exception(failure)))


def debug_text(text: str) -> None:
    """Print lines for developers where DDMD_DEBUG is set."""
    if os.environ.get("DDMD_DEBUG", "") not in ("", "0"):
        for line in text.splitlines():
            _write(sys.stderr, printable(line))


@contextmanager
def progress(shown: bool) -> Iterator[ProgressBar]:
    """Bars of the slices done, on standard error where it is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield ProgressBar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as bars:
        yield ProgressBar(bars)


class ProgressBar:
    """One bar for the case at work; nothing where there is no terminal."""

    def __init__(self, bars: object) -> None:
        from typing import Any

        self._bars: Any = bars
        self._task: Any = None

    def start(self, name: str) -> None:
        """Show the bar of a case."""
        if self._bars is not None:
            self.stop()
            self._task = self._bars.add_task(printable(name), total=None)

    def update(self, done: int, total: int) -> None:
        """Show how many slices are done."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def _coloured(stream: TextIO, word: str, colour: str) -> str:
    plain = not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return word if plain else f"{colour}{word}{RESET}"


def _write(stream: TextIO, line: str) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:  # its reader has seen enough; the work goes on
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass  # the terminal is gone, or the stream is closed: results are in files
