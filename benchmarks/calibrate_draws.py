"""Fit the shifts of `--quality draws` to volumes with the masks of two raters.

`python -m benchmarks.calibrate_draws DATA [--weights W] [--means M ...] [--sds SD ...] [--samplers S ...] [--steps N ...]
[--etas ETA ...]`

Prints the generalized energy distance of each volume with each candidate, and beside it that of random thresholds of
the one-step probability; then what each volume reaches with the candidate that the others choose (leave one out); last
the values for `ddmd.diffusion.samplers.QUALITIES`, chosen on all. A candidate of ten steps takes about
eight seconds of a CPU core a volume.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddmd.cohort.discovery import find_cases
from ddmd.diffusion.samplers import SamplingConfig
from ddmd.evaluation.draws import energy_distance, threshold_energy_distance
from ddmd.inference.detector import Detector
from ddmd.inference.draws import DRAW_LEVEL
from ddmd.models import checkpoint

MEANS = (-0.4, 0.0, 0.4)
SDS = (0.8, 1.2, 1.6)


def candidates(config: SamplingConfig, options: Mapping[str, Sequence[Any]]) -> list[SamplingConfig]:
    """The configuration with all combinations of what is given; eta is of the DDIM sampler alone.

    Parameters
    ----------
    config : SamplingConfig
    options : name of a field of SamplingConfig -> its values
    """
    made = [
        replace(config, **dict(zip(options, values, strict=True)))
        for values in itertools.product(*options.values())
    ]
    return list(dict.fromkeys(one if one.sampler == "ddim" else replace(one, eta=0.0) for one in made))


def described(config: SamplingConfig) -> str:
    """A configuration by what may differ."""
    eta = f", eta {config.eta}" if config.sampler == "ddim" else ""
    return f"{config.sampler}{eta}, {config.steps} steps, mean {config.rater_mean}, sd {config.rater_sd}"


def leave_one_out(table: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each column of (candidates, volumes), the row with the lowest mean over the other columns."""
    chosen = [np.delete(table, column, axis=1).mean(1).argmin() for column in range(table.shape[1])]
    return np.array(chosen, dtype=np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--means", nargs="+", type=float, default=MEANS, help="of the shift of a draw")
    parser.add_argument("--sds", nargs="+", type=float, default=SDS, help="of the shift of a draw")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--steps", nargs="+", type=int, help="N; by default that of the quality")
    parser.add_argument("--samplers", nargs="+", help="by default that of the quality")
    parser.add_argument("--etas", nargs="+", type=float, help="of DDIM; by default that of the quality")
    parser.add_argument("--stop", type=float)
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    config = detector.sampling_config(options.samples, stop=options.stop, quality="draws")
    configs = candidates(
        config,
        {
            "sampler": options.samplers or (config.sampler,),
            "eta": options.etas or (config.eta,),
            "steps": options.steps or (config.steps,),
            "rater_mean": options.means,
            "rater_sd": options.sds,
        },
    )
    fast = detector.sampling_config(config.samples, quality="fast")
    needs = detector.description.required_sequences, detector.description.optional_sequences
    cases = [
        c for c in find_cases(options.data, require=needs[0], optional=needs[1]) if len(c.rater_masks) > 1
    ]
    if len(cases) < 2:
        parser.error("fewer than two volumes with two raters; nothing can be left out")
    table, thresholds = np.zeros((len(configs), len(cases))), np.zeros(len(cases))
    for column, case in enumerate(cases):
        prepared = detector.prepare(case.volume(*needs))
        raters = np.stack([prepared.slices.part_of(rater) for rater in case.rater_lesions()])
        probability = detector.to_volume(prepared, detector.maps(prepared, fast)).probability
        mean = prepared.slices.part_of(probability)
        thresholds[column] = threshold_energy_distance(mean, raters, config.samples).distance
        print(f"{case.name}\trandom thresholds\t{thresholds[column]:.3f}", flush=True)
        for row, candidate in enumerate(configs):
            maps = detector.maps(prepared, candidate, keep_draws=True)
            draws = detector.draws(prepared, maps)
            assert draws is not None
            table[row, column] = energy_distance(draws >= DRAW_LEVEL, raters).distance
            print(f"{case.name}\t{described(candidate)}\t{table[row, column]:.3f}", flush=True)
    for column, row in enumerate(leave_one_out(table)):
        print(
            f"{cases[column].name}\tchosen on the others: {described(configs[row])}\t{table[row, column]:.3f}"
        )
    left_out = float(table[leave_one_out(table), np.arange(len(cases))].mean())
    best = int(table.mean(1).argmin())
    print(f"mean: random thresholds {thresholds.mean():.3f}, leave one out {left_out:.3f}, "
          f"chosen on all {table[best].mean():.3f}")  # fmt: skip
    print(f'QUALITIES["draws"]: {described(configs[best])}')


if __name__ == "__main__":
    main()
