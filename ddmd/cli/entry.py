"""The entry point: signals, exit codes, and one line for whatever goes wrong."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from ddmd.cli import console, startup

SOME_FAILED, BAD_USAGE = 1, 2

P = ParamSpec("P")
R = TypeVar("R")


class Terminated(BaseException):
    """A signal asked the process to end; cleaning up happens on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)  # one is enough: cleaning up must end
    raise Terminated(number)


def _let_signals_end_the_process() -> None:
    """No file is unfinished any more: a signal ends the process at once, where Python might drop it at its end."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) in (_terminate, signal.default_int_handler):
            signal.signal(number, signal.SIG_DFL)


def _open_standard_streams() -> None:
    """Give the process the standard streams that its caller closed, so that no file takes their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def run(app: Callable[[], Any]) -> NoReturn:
    """Run the command line and exit: 0 done, 1 something failed, 2 bad usage, 128 + n ended by signal n."""
    startup.begin()
    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not where nohup has it ignored
            signal.signal(number, _terminate)
    warnings.showwarning = _show_warning
    code: Any = 0
    try:
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        except BrokenPipeError:
            code = 0
        _let_signals_end_the_process()
    except Terminated as ended:
        console.error(f"ended by {signal.Signals(ended.number).name}; unfinished files were removed")
        code = 128 + ended.number
    except KeyboardInterrupt as stopped:
        code = _report_interrupt(stopped)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    startup.end()
    raise SystemExit(code)


def _report_interrupt(stopped: KeyboardInterrupt) -> int:
    """Say in one line what a signal stopped; the exit code is 128 and the number of the signal."""
    console.error(str(stopped) or "interrupted")
    return 128 + int(getattr(stopped, "number", signal.SIGINT))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """A warning of ddmd's own, or of a name that changes, is one line; other warnings are for developers."""
    own = category.__module__.split(".")[0] == "ddmd"
    if own or issubclass(category, FutureWarning) or os.environ.get("DDMD_DEBUG"):
        console.warning(message)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A command that ends in one line and an exit code, whatever is raised in it; --debug shows the traceback."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("debug"):
            os.environ["DDMD_DEBUG"] = "1"
        try:
            return function(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt as stopped:
            raise typer.Exit(_report_interrupt(stopped)) from None
        except Exception as failure:
            console.debug_traceback(failure)
            console.error(console.explain(failure))
            raise typer.Exit(SOME_FAILED) from None

    return guarded


def bad_usage(message: object) -> typer.Exit:
    """Say what is wrong with the options; the exception to raise."""
    console.error(message)
    return typer.Exit(BAD_USAGE)


def require_extra(extra: str, modules: Iterable[str]) -> None:
    """Exit with one line that names the extra to install, where one of its modules cannot be imported."""
    for module in modules:
        try:
            with startup.quick_imports():
                importlib.import_module(module)
        except ImportError as missing:
            raise bad_usage(
                f"this command needs {module.split('.')[0]} ({missing}); install it with: pip install 'ddmd[{extra}]'"
            ) from None
