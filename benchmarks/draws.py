"""Draws against the masks of two raters: generalized energy distance beside draws of one step and random thresholds.

`python -m benchmarks.draws DATA [--weights W] [--cases NAME ...] [--quality draws] [--steps N] [--eta E] [--sampler S]`

DATA is a folder of volumes with masks of single raters, as those of ms-isbi. d = 1 - IoU of whole volumes. The last
column is what masks without any voxel in common would reach, 1 - E d(rater, rater'): where no distance is below it,
the measure does not tell draws from noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ddmd.cohort.discovery import find_cases
from ddmd.evaluation.evaluate import evaluate_case
from ddmd.inference.detector import Detector

COLUMNS = ("draws_distance", "random_thresholds_distance", "one_step_draws_distance", "draws_diversity",
           "draws_best_match_dice", "random_thresholds_best_match_dice", "draws_between_share", "volume_low_ml",
           "volume_high_ml", "lesion_ml", "uncertainty_auroc", "bernoulli_auroc", "no_overlap_distance")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default="flair-image-labels")
    parser.add_argument("--cases", nargs="*", help="names of cases; by default all with two raters")
    parser.add_argument("--quality", default="draws")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--eta", type=float)
    parser.add_argument("--sampler")
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    config = detector.sampling_config(
        options.samples, options.steps, options.sampler, eta=options.eta, quality=options.quality
    )
    print(config)
    print("case", *COLUMNS, sep="\t")
    rows = []
    for case in find_cases(
        options.data,
        require=detector.description.required_sequences,
        optional=detector.description.optional_sequences,
    ):
        if len(case.rater_masks) < 2 or (options.cases and case.name not in options.cases):
            continue
        row = evaluate_case(detector, case, None, config, draws=True).row
        row["no_overlap_distance"] = 1 - row["draws_rater_diversity"]
        rows.append([row[name] for name in COLUMNS])
        print(case.name, *(f"{value:.3f}" for value in rows[-1]), sep="\t", flush=True)
    if rows:
        print("mean", *(f"{value:.3f}" for value in np.mean(rows, axis=0)), sep="\t")


if __name__ == "__main__":
    main()
