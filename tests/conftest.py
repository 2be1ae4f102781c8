"""Fresh random input everywhere, and memory that shows when nobody wrote to it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported anywhere
    os.environ.setdefault("TRITON_INTERPRET", "1")

DATA = Path(os.environ.get("DDMD_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for torch and numpy, printed when the test fails; DDMD_TEST_SEED repeats it."""
    value = int(os.environ.get("DDMD_TEST_SEED") or random.SystemRandom().randrange(2**31))
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002
    print(f"DDMD_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like come back as NaN, so that an output nobody wrote is seen."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args, _plain=plain, **kwargs):
            made = _plain(*args, **kwargs)
            return (
                made.fill_(float("nan")) if made.is_floating_point() and made.device.type != "meta" else made
            )

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real MRI beside the repository, which is not part of it."""
    if not DATA.is_dir():
        pytest.skip(reason="the real MRI for development is not beside this checkout")
    return DATA
