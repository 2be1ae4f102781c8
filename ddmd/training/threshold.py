"""The threshold that weights ship with: chosen on validation patients, never on test ones.

`python -m ddmd.training.threshold RUN WEIGHTS` writes it into the weights file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from ddmd import weights
from ddmd.detector import Detector
from ddmd.evaluation import judge_case
from ddmd.metrics import THRESHOLDS, dices
from ddmd.training.config import read_run
from ddmd.training.run import cases_of


def choose(run: Path, path: Path) -> float:
    """The one of THRESHOLDS of highest pooled Dice on the run's validation patients that have masks."""
    split = json.loads((run / "split.json").read_text())
    chosen = [c for c in cases_of(read_run(run)) if split[c.patient] == "validation" and c.masks is not None]
    if not chosen:
        raise ValueError(f"{run}: no validation patient has a mask; the threshold stays as it is")
    detector = Detector.load(path)
    curve = dices(np.sum([judge_case(detector, case).by_threshold for case in chosen], axis=0))
    threshold = round(float(THRESHOLDS[curve.argmax()]), 3)
    description = dataclasses.replace(
        detector.description,
        threshold=threshold,
        threshold_chosen=f"highest pooled Dice ({curve.max():.3f}) on {len(chosen)} validation patients",
    )
    weights.save(dataclasses.replace(weights.load(path), description=description), path)
    return threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=Path)
    options = parser.parse_args()
    print(f"threshold {choose(options.run, options.weights):.3f}")


if __name__ == "__main__":
    main()
