"""Fit the scale of volume intervals to validation patients.

`python -m benchmarks.calibrate_intervals DATA ... [--patients split.json] [--weights W]`

Takes the validation patients of a run's split.json, or of the split of TCGA-LGG slices. Prints, of each patient, the
interval of the draws, the annotator's volume and the smallest scale that holds it; then coverage and mean width with
the scale of the other patients (leave one patient out), and the scale of all for `ddmd.inference.draws.INTERVAL_SCALE`:
the conformal quantile, number ceil(0.9 (n + 1)) of the n scales in ascending order, at most the last.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split, split_by_patient
from ddmd.inference.detector import Detector
from ddmd.inference.draws import DRAW_LEVEL, INTERVAL, calibrated_interval, scale_to_cover, volume_interval
from ddmd.inference.session import SamplingConfig
from ddmd.models import checkpoint


@dataclass(frozen=True)
class DrawnVolumes:
    """Lesion volumes (S,) of one case's draws in ml, and that of the annotator."""

    patient: str
    volumes_ml: NDArray[np.float64]
    true_ml: float

    @property
    def scale(self) -> float:
        """The smallest scale whose interval holds the annotator's volume."""
        return scale_to_cover(self.volumes_ml, self.true_ml)


def conformal_quantile(scales: Sequence[float]) -> float:
    """Number ceil(0.9 (n + 1)) of n scales in ascending order, at most the last."""
    return sorted(scales)[min(len(scales), math.ceil(INTERVAL * (len(scales) + 1))) - 1]


def leave_one_out(rows: Sequence[DrawnVolumes]) -> Iterator[tuple[bool, float]]:
    """Of each case, whether the interval with the scale of the other patients holds its volume, and its width in ml."""
    for row in rows:
        scale = conformal_quantile([other.scale for other in rows if other.patient != row.patient])
        low, high = calibrated_interval(row.volumes_ml, scale)
        yield low <= row.true_ml <= high, high - low


def drawn_volumes(detector: Detector, case: Case, config: SamplingConfig) -> DrawnVolumes:
    """Draw masks of one case."""
    prepared = detector.prepare(
        case.volume(detector.description.required_sequences, detector.description.optional_sequences)
    )
    draws = detector.draws(prepared, detector.maps(prepared, config, keep_draws=True))
    assert draws is not None
    voxel_ml = prepared.volume.voxel_volume_ml
    volumes = np.array([np.count_nonzero(draw >= DRAW_LEVEL) * voxel_ml for draw in draws])
    return DrawnVolumes(case.patient, volumes, float(case.lesion().sum()) * voxel_ml)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument(
        "--patients", type=Path, help="split.json of a run; by default the split of the slices"
    )
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--seed", type=int, default=0, help="of the split of the slices, as in the recipes")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    config = detector.sampling_config(steps=options.steps, quality="draws")
    rows = []
    for folder in options.data:
        cases = [case for case in find_cases(folder) if case.masks is not None]
        parts = (
            read_split(options.patients) if options.patients else split_by_patient(cases, seed=options.seed)
        )
        for case in cases:
            if parts.get(case.patient) != "validation":
                continue
            row = drawn_volumes(detector, case, config)
            rows.append(row)
            low, high = volume_interval(row.volumes_ml)
            print(
                f"{case.name}\t{low:.1f} to {high:.1f} ml\ttrue {row.true_ml:.1f} ml\tscale {row.scale:.2f}",
                flush=True,
            )
    if len({row.patient for row in rows}) < 2:
        parser.error("fewer than two validation patients; nothing can be left out")
    covered, widths = zip(*leave_one_out(rows), strict=True)
    unscaled = sum(row.scale <= 1 for row in rows)
    print(f"unscaled intervals hold {unscaled} of {len(rows)}")
    print(f"leave one patient out: hold {sum(covered)} of {len(rows)}, width {np.mean(widths):.1f} ml on average, "
          f"median {np.median(widths):.1f} ml")  # fmt: skip
    print(f"scale of all {conformal_quantile([row.scale for row in rows]):.2f}")


if __name__ == "__main__":
    main()
