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
from ddmd.evaluation import BINS, judge_case
from ddmd.training.config import DataEntry, TrainConfig
from ddmd.training.run import cases_of


def choose(run: Path, path: Path) -> float:
    """The threshold of highest pooled Dice on the run's validation patients that have masks."""
    config = json.loads((run / "config.json").read_text())
    entries = tuple(DataEntry(**entry) for entry in config["data"])
    split = json.loads((run / "split.json").read_text())
    cases = cases_of(TrainConfig(data=entries, sequences=tuple(config["sequences"])))
    chosen = [c for c in cases if split[c.patient] == "validation" and c.masks is not None]
    if not chosen:
        raise ValueError(f"{run}: no validation patient has a mask; the threshold stays as it is")
    detector = Detector.load(path)
    patients = [judge_case(detector, case) for case in chosen]
    counts = sum((p.probability for p in patients[1:]), patients[0].probability)
    curve, threshold = counts.dice_curve(), float(np.clip(counts.best() / (BINS - 1), 0.01, 0.99))
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
