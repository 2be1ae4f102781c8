"""The threshold that weights ship with: chosen on validation patients, never on test ones.

`python -m ddmd.training.threshold RUN WEIGHTS [--steps N]` writes it into the weights file, and with it the N that it
is for.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from ddmd import weights
from ddmd.data.datasets import read_split
from ddmd.detector import Detector
from ddmd.evaluation import judge_case
from ddmd.metrics import THRESHOLDS, dices
from ddmd.training.config import read_run
from ddmd.training.run import cases_of


def choose(run: Path, path: Path, steps: int | None = None) -> float:
    """The one of THRESHOLDS of highest pooled Dice on the run's validation patients that have masks.

    Nothing in the weights file changes but what it says of its threshold, and of its N where `steps` is given.

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
    sampling = detector.configured(steps=steps)
    curve = dices(
        np.sum([judge_case(detector, case, sampling=sampling).by_threshold for case in chosen], axis=0)
    )
    threshold = round(float(THRESHOLDS[curve.argmax()]), 3)
    description = dataclasses.replace(
        detector.description,
        sampling=detector.description.sampling | {"steps": sampling.steps},
        threshold=threshold,
        threshold_chosen=f"highest pooled Dice ({curve.max():.3f}) on {len(chosen)} validation patients",
    )
    system = weights.load(path, precision="float32")  # float16 in the file: read and written without rounding
    weights.save(dataclasses.replace(system, description=description), path)
    return threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--steps", type=int, help="N; by default what the weights say")
    options = parser.parse_args()
    try:
        print(f"threshold {choose(options.run, options.weights, options.steps):.3f}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
