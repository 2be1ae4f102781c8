"""Draws against the masks of two raters: generalized energy distance beside draws of one step and random thresholds.

`python -m benchmarks.draws DATA [--weights W] [--cases NAME ...] [--steps N] [--rater-shift MEAN:SD] [...]` prints a
table, a figure a row. DATA is a folder of volumes; by default those with masks of two raters are taken. d = 1 - IoU of
whole volumes. Masks without any voxel in common would reach "no overlap": where no distance is below it, the measure
does not tell draws from noise.

`--choose MEAN:SD MEAN:SD ...` tries shifts of the logits, and chooses for each volume the one with the lowest mean
distance on the other volumes (leave one out).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.evaluation.case_metrics import CaseMetrics
from ddmd.evaluation.draws import energy_distance
from ddmd.evaluation.evaluate import evaluate_case
from ddmd.evaluation.metrics import calibration_error
from ddmd.inference.detector import Detector
from ddmd.inference.draws import DRAW_LEVEL
from ddmd.inference.session import SamplingConfig
from ddmd.models import checkpoint

SETS = {
    "draws": "draws",
    "random_thresholds": "random thresholds of p",
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


def distances(detector: Detector, cases: Sequence[Case], configs: Sequence[SamplingConfig]) -> np.ndarray:
    """(configurations, cases): energy distance of the draws to the raters."""
    table = np.zeros((len(configs), len(cases)))
    for column, case in enumerate(cases):
        prepared = detector.prepare(
            case.volume(detector.description.required_sequences, detector.description.optional_sequences)
        )
        raters = np.stack([prepared.slices.part_of(rater) for rater in case.rater_lesions()])
        for row, config in enumerate(configs):
            draws = detector.draws(prepared, detector.maps(prepared, config, keep_draws=True))
            assert draws is not None
            table[row, column] = energy_distance(draws >= DRAW_LEVEL, raters).distance
            print(f"{case.name}\t{shift_text(config)}\t{table[row, column]:.3f}", flush=True)
    return table


def shift_text(config: SamplingConfig) -> str:
    """MEAN:SD of the shift of the logits."""
    return f"{config.rater_mean:g}:{config.rater_sd:g}"


def leave_one_out(table: np.ndarray) -> np.ndarray:
    """For each column of (configurations, cases), the row with the lowest mean over the other columns."""
    chosen = [np.delete(table, column, axis=1).mean(1).argmin() for column in range(table.shape[1])]
    return np.array(chosen)


def shifted(config: SamplingConfig, text: str) -> SamplingConfig:
    """The configuration with MEAN:SD as the shift of its logits."""
    mean, sd = (float(part) for part in text.split(":"))
    return replace(config, rater_mean=mean, rater_sd=sd)


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
    parser.add_argument("--rater-shift", metavar="MEAN:SD", help="of the logits of a draw")
    parser.add_argument("--choose", nargs="+", metavar="MEAN:SD", help="leave one volume out")
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    config = detector.sampling_config(
        options.samples, options.steps, options.sampler, eta=options.eta, quality=options.quality
    )
    if options.rater_shift:
        config = shifted(config, options.rater_shift)
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
    if options.choose:
        cases = [case for case in cases if len(case.rater_masks) > 1]
        configs = [shifted(config, text) for text in options.choose]
        table = distances(detector, cases, configs)
        chosen = leave_one_out(table)
        for case, row, value in zip(cases, chosen, table[chosen, range(len(cases))], strict=True):
            print(f"{case.name}\tchosen on the others {shift_text(configs[row])}\t{value:.3f}")
        best = int(table.mean(1).argmin())
        print(
            f"mean {table[chosen, range(len(cases))].mean():.3f}; lowest on all {shift_text(configs[best])}"
        )
        return
    columns = {}
    for case in cases:
        columns[case.name] = figures(evaluate_case(detector, case, None, config, draws=True))
        print(f"{case.name} done", flush=True)
    print_table(columns)


if __name__ == "__main__":
    main()
