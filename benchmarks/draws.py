"""Draws against the masks of two raters: generalized energy distance beside draws of one step and random thresholds.

`python -m benchmarks.draws DATA [--weights W] [--cases NAME ...] [--steps N] [--rater-mean M] [...]` prints a
table, a figure a row. DATA is a folder of volumes; by default those with masks of two raters are taken. d = 1 - IoU of
whole volumes. Masks without any voxel in common would reach "no overlap": where no distance is below it, the measure
does not tell draws from noise.

With the sampling that ships and all cases it writes benchmarks/results/draws-WEIGHTS-DATE.json, too, from which
`python -m benchmarks.cards` makes a table. `python -m benchmarks.calibrate_draws` chooses the shifts.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ddmd.cohort.discovery import find_cases
from ddmd.evaluation.case_metrics import CaseMetrics
from ddmd.evaluation.evaluate import evaluate_case
from ddmd.evaluation.metrics import calibration_error
from ddmd.inference.detector import Detector
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text
from ddmd.models import checkpoint

RESULTS = Path(__file__).with_name("results")

SETS = {
    "draws": "draws",
    "random_thresholds": "random thresholds of p",
    "random_thresholds_without_faint": "the same without faint components",
    "one_step_draws": "draws of one step",
}
TERMS = {
    "distance": "energy distance",
    "rater_distance": "E d(draw, rater)",
    "diversity": "E d(draw, draw')",
    "best_match_dice": "best-match Dice",
}
OTHERS = {
    "draws_rater_diversity": "raters: E d(rater, rater')",
    "no_overlap": "no overlap: energy distance",
    "draws_between_share": "share of the spread between draws",
    "lesion_ml": "lesion volume (ml)",
    "volume_low_ml": "90 % interval: low (ml)",
    "volume_high_ml": "90 % interval: high (ml)",
    "covered": "covered by the interval",
    "existence_error": "calibration error of existence",
    "draws_contradiction_auroc": "AUROC of draws that contradict the mask of the posterior mean",
    "draws_variance_auroc": "AUROC of the variance of draws, same mask",
    "posterior_mean_bernoulli_auroc": "AUROC of p(1 - p) of the posterior mean, same mask",
    "uncertainty_auroc": "AUROC of the variance of draws, mask of the draws' mean",
    "bernoulli_auroc": "AUROC of p(1 - p), mask of the draws' mean",
}


def figures(metrics: CaseMetrics) -> dict[str, float]:
    """The figures of one case, by their names in the table."""
    assert metrics.draws is not None
    row = metrics.row | {
        "covered": float(metrics.draws.covered),
        "existence_error": calibration_error(metrics.draws.existence),
        "no_overlap": 1 - metrics.row.get("draws_rater_diversity", float("nan")),
    }
    names = {f"{name}_{term}": f"{text}: {TERMS[term]}" for name, text in SETS.items() for term in TERMS}
    return {text: row.get(key, float("nan")) for key, text in (names | OTHERS).items()}


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """A figure a row, a case a column, their mean last; figures that no case has are left out."""
    print("figure", *columns, "mean", sep="\t")
    for text in next(iter(columns.values()), {}):
        values = [column[text] for column in columns.values()]
        if np.isfinite(values).any():
            print(text, *(f"{value:.3f}" for value in (*values, np.nanmean(values))), sep="\t")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--cases", nargs="*", help="names of cases; by default all with two raters")
    parser.add_argument("--quality", default="draws")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--eta", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--stop", type=float)
    shifts = ("rater_mean", "rater_sd")
    for name in shifts:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="see SamplingConfig")
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    config = detector.sampling_config(
        options.samples,
        options.steps,
        options.sampler,
        eta=options.eta,
        stop=options.stop,
        quality=options.quality,
    )
    given = {name: getattr(options, name) for name in shifts}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    print(config)
    cases = [
        case
        for case in find_cases(
            options.data,
            require=detector.description.required_sequences,
            optional=detector.description.optional_sequences,
        )
        if (case.name in options.cases if options.cases else len(case.rater_masks) > 1)
    ]
    columns = {}
    for case in cases:
        columns[case.name] = figures(evaluate_case(detector, case, None, config, draws=True))
        print(f"{case.name} done", flush=True)
    print_table(columns)
    if columns and not options.cases and config == detector.sampling_config(quality="draws"):
        path = checkpoint.find(options.weights)
        result = {
            "weights": detector.description.name,
            "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "cases": columns,
        }
        write_text(
            RESULTS / f"draws-{detector.description.name}-{datetime.date.today()}.json", json_text(result)
        )


if __name__ == "__main__":
    main()
