"""The threshold that weights ship with: chosen on validation patients, never on test ones.

`python -m ddmd.training.threshold RUN WEIGHTS [--steps N] [--peak P]` writes it into the weights file, and with it the N
and the least peak of a lesion that it is for.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from ddmd.cohort.splits import read_split
from ddmd.evaluation.case_metrics import THRESHOLDS
from ddmd.evaluation.evaluate import evaluate_case
from ddmd.evaluation.metrics import dice_scores
from ddmd.inference.detector import Detector
from ddmd.models import checkpoint
from ddmd.training.config import read_run
from ddmd.training.run import cases_of

TOLERANCE = 0.005  # of Dice: of thresholds hardly told apart, the lowest misses least


def lowest(curve: np.ndarray) -> float:
    """Of THRESHOLDS the first whose Dice on the curve is within TOLERANCE of the highest."""
    return round(float(THRESHOLDS[np.argmax(curve >= curve.max() - TOLERANCE)]), 3)


def choose(run: Path, path: Path, steps: int | None = None, peak: float | None = None) -> float:
    """The `lowest` threshold by Dice on the validation patients that have masks.

    Pooled Dice alone may be that of the one patient with the largest lesion, and their mean that of the smallest
    ones: the curve is the mean of both.

    Nothing in the weights file changes but what it says of its threshold, and, where they are given, of its N
    (`steps`) and of the probability that a lesion reaches somewhere (`peak`).

    Raises
    ------
    ValueError
        If the folder holds no run, or no validation patient of it has a mask.
    """
    split = read_split(run / "split.json")
    cases = cases_of(read_run(run))
    chosen = [c for c in cases if split.get(c.patient) == "validation" and c.masks is not None]
    if not chosen:
        raise ValueError(f"{run}: no validation patient has a mask; the threshold stays as it is")
    detector = Detector.load(path)
    if peak is not None:
        told = dataclasses.replace(detector.description, min_peak=peak)
        detector = Detector(dataclasses.replace(detector.system, description=told))
    sampling = detector.sampling_config(steps=steps)
    found = [evaluate_case(detector, case, sampling=sampling).by_threshold for case in chosen]
    curve = 0.5 * (dice_scores(np.sum(found, axis=0)) + np.mean([dice_scores(one) for one in found], axis=0))
    threshold = lowest(curve)
    description = dataclasses.replace(
        detector.description,
        sampling=detector.description.sampling | {"steps": sampling.steps},
        threshold=threshold,
        threshold_chosen=f"lowest within {TOLERANCE} of the highest Dice, pooled and mean ({curve.max():.3f}), on {len(chosen)} validation patients",
    )
    system = checkpoint.load(
        path, precision="float32"
    )  # float16 in the file: read and written without rounding
    checkpoint.save(dataclasses.replace(system, description=description), path)
    return threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--steps", type=int, help="N; by default what the weights say")
    parser.add_argument("--peak", type=float, help="least peak of a lesion; by default what the weights say")
    options = parser.parse_args()
    try:
        print(f"threshold {choose(options.run, options.weights, options.steps, options.peak):.3f}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
