"""Where the time of one volume goes, from file to written maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddmd import ops
from ddmd.inference import ensemble, preparing
from ddmd.inference.detector import Detector
from ddmd.inference.session import Session
from ddmd.io.volume import Volume


class Parts:
    """Wall and CPU seconds spent inside named parts; on a GPU each part ends with a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, np.ndarray] = {}  # of wall and CPU
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, np.zeros(2)) + self._now() - begun

    def _now(self) -> np.ndarray:
        self.wait()
        return np.array([time.perf_counter(), time.process_time()])

    @contextmanager
    def inside(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Every call of owner.attribute is the part `name`."""
        with self._replaced(owner, attribute, lambda plain: self._timed(plain, name)):
            yield

    @contextmanager
    def returned(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Every call of what owner.attribute returns is the part `name`."""

        def wrapped(plain: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._timed(plain(*args, **kwargs), name)

        with self._replaced(owner, attribute, wrapped):
            yield

    def _timed(self, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return plain(*args, **kwargs)

        return timed

    @staticmethod
    @contextmanager
    def _replaced(owner: Any, attribute: str, by: Callable[[Any], Any]) -> Iterator[None]:
        plain = getattr(owner, attribute)
        setattr(owner, attribute, by(plain))
        try:
            yield
        finally:
            setattr(owner, attribute, plain)


def split_in_parts(detector: Detector, path: Path, folder: Path) -> dict[str, list[float]]:
    """Wall and CPU seconds of each part of one detection. On a GPU the sampling loop is one graph, and one part."""
    system = detector.system
    parts = Parts(system.device)
    with ExitStack() as loop, parts.part("whole, file to files"):
        with parts.part("read"):
            volume = Volume.read(path, require=detector.description.sequences)
        if system.device.type == "cuda":
            loop.enter_context(parts.inside(Session, "run", "networks, one graph a batch"))
        else:
            loop.enter_context(parts.inside(system.denoiser, "patches", "denoiser"))
            loop.enter_context(parts.inside(ops, "denoise_step", "update"))
        before = dict(parts.seconds)
        with (
            parts.inside(preparing, "extract", "prepare"),
            parts.inside(ensemble, "discrepancies", "auto-encoders, X and Y"),
            parts.inside(system.condition, "forward", "condition network"),
            parts.inside(ops, "ensemble_update", "statistics"),
            parts.part("detect"),
        ):
            detection = detector.detect(volume)
        named = (
            sum(parts.seconds.values(), np.zeros(2))
            - sum(before.values(), np.zeros(2))
            - parts.seconds["detect"]
        )
        with parts.part("write"):
            detection.save(folder, overwrite=True)
            detection.overlay(folder / "overlay.png")
    parts.seconds["everything else"] = parts.seconds.pop("detect") - named
    return {name: [float(value) for value in seconds] for name, seconds in parts.seconds.items()}
