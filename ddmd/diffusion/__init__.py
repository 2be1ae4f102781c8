"""The diffusion of lesion masks: noise schedule, samplers, noise coordinates."""

from __future__ import annotations

from typing import Any

from ddmd._moved import moved_name


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
