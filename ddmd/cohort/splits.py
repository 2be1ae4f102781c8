"""Splits by patient: drawing, writing and reading them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddmd.cohort.cases import Case, DatasetError
from ddmd.cohort.tables import read_text
from ddmd.io.atomic import write_text

FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def split_by_patient(
    cases: Iterable[Case], fractions: Mapping[str, float] = FRACTIONS, seed: int = 0
) -> dict[str, str]:
    """patient -> part, drawn source by source so that each part holds some of each.

    Every case of a patient is in one part. Shares are rounded to patients, and what is left over is
    the first part's.

    Raises
    ------
    DatasetError
        If the fractions are negative or do not add to 1.
    """
    if min(fractions.values()) < 0 or not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise DatasetError(f"split: fractions are {dict(fractions)}; give shares from 0 to 1 that add to 1")
    by_source: dict[str, set[str]] = {}
    for case in cases:
        by_source.setdefault(case.source, set()).add(case.patient)
    parts = list(fractions)
    split: dict[str, str] = {}
    for source, patients in sorted(by_source.items()):
        free = sorted(patients - set(split))
        code = sum(source.encode("utf-8", "surrogateescape"))
        order = np.random.default_rng((seed, len(source), code)).permutation(len(free))
        start = 0
        for part in parts[1:]:
            count = round(fractions[part] * len(free))
            split |= {free[i]: part for i in order[start : start + count]}
            start += count
        split |= {free[i]: parts[0] for i in order[start:]}
    return split


def write_split(path: str | Path, split: Mapping[str, str]) -> None:
    """Write patient -> part as JSON, whole or not at all."""
    write_text(path, json.dumps(dict(split), indent=1, sort_keys=True))


def read_split(path: str | Path) -> dict[str, str]:
    """Read patient -> part from the split.json of a training run.

    Raises
    ------
    DatasetError
        If the file cannot be read, or is not such a mapping, with each patient in one known part.
    """
    advice = "give the split.json of a run"
    try:
        text = read_text(Path(path))
    except DatasetError as error:
        raise DatasetError(f"{error}; {advice}") from None
    try:
        split = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise DatasetError(f"{path}: not a readable split ({reason}); {advice}") from None
    if not isinstance(split, dict) or not all(isinstance(part, str) for part in split.values()):
        raise DatasetError(f"{path}: a split is {{patient: part}}; {advice}")
    unknown = sorted(set(split.values()) - set(FRACTIONS))
    if unknown:
        raise DatasetError(
            f"{path}: part {unknown[0]!r} not known; parts are {', '.join(FRACTIONS)}; {advice}"
        )
    return split


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("one patient twice")
    return found
