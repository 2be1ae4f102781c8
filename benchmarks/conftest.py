"""A benchmark of the ops that is ended by SIGTERM, at a limit of time, writes the figures it has."""

from __future__ import annotations

import signal
from typing import Any

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """From here on SIGTERM ends the session as Ctrl-C does, with all reports."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
