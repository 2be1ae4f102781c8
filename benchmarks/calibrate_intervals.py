"""Fit the scale of volume intervals to validation patients: `python -m benchmarks.calibrate_intervals DATA [--weights W]`.

DATA holds TCGA-LGG slices. Prints, of each validation patient, the interval of the draws, the annotator's volume and
the smallest scale that holds it, and the scale for `ddmd.inference.draws.INTERVAL_SCALE`: the conformal quantile,
number ceil(0.9 (n + 1)) of the n scales in ascending order, at most the last.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import split_by_patient
from ddmd.inference.detector import Detector
from ddmd.inference.draws import DRAW_LEVEL, INTERVAL, scale_to_cover, volume_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default="flair-image-labels")
    parser.add_argument("--seed", type=int, default=0, help="of the split, as in the recipes")
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    config = detector.sampling_config(quality="draws")
    cases = find_cases(options.data, name="lgg")
    parts, scales = split_by_patient(cases, seed=options.seed), []
    for case in cases:
        if parts[case.patient] != "validation":
            continue
        prepared = detector.prepare(
            case.volume(detector.description.required_sequences, detector.description.optional_sequences)
        )
        draws = detector.draws(prepared, detector.maps(prepared, config, keep_draws=True))
        assert draws is not None
        voxel_ml = float(np.prod(prepared.volume.spacing)) / 1000
        volumes = np.array([np.count_nonzero(draw >= DRAW_LEVEL) * voxel_ml for draw in draws])
        true_ml = float(case.lesion().sum()) * voxel_ml
        scales.append(scale_to_cover(volumes, true_ml))
        low, high = volume_interval(volumes)
        print(
            f"{case.patient}\t{low:.1f} to {high:.1f} ml\ttrue {true_ml:.1f} ml\tscale {scales[-1]:.2f}",
            flush=True,
        )
    rank = min(len(scales), math.ceil(INTERVAL * (len(scales) + 1)))
    covered = sum(scale <= 1 for scale in scales)
    print(f"unscaled intervals hold {covered} of {len(scales)}; scale {sorted(scales)[rank - 1]:.2f}")


if __name__ == "__main__":
    main()
