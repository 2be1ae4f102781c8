"""The threshold that weights ship with: chosen on validation patients, never on test ones.

`python -m ddmd.training.threshold RUN WEIGHTS [--steps N] [--peak P] [--training NAME] [--pick highest]` writes it
into the weights file, and with it the N and the least peak of a lesion that it is for. Patients of every kind count
alike: a kind is a data set, or what the run's folder says in kinds.json, {patient: kind}. With `--training NAME`, the
training patients of that data set choose, too, where training opened no mask: with image-level labels.

`--leave-one-out FILE` writes what each validation patient reaches with the threshold that the others choose, as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.evaluation.case_metrics import THRESHOLDS
from ddmd.evaluation.evaluate import evaluate_case
from ddmd.evaluation.metrics import dice_scores
from ddmd.inference.detector import Detector
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text
from ddmd.models import checkpoint
from ddmd.training.config import TrainConfig, read_run
from ddmd.training.run import cases_of

TOLERANCE = (
    0.005  # of Dice: of thresholds with nearly equal Dice, the lowest misses least, the highest marks least
)


def lowest(curve: np.ndarray) -> float:
    """Of THRESHOLDS the first whose Dice on the curve is within TOLERANCE of the highest."""
    return round(float(THRESHOLDS[np.argmax(curve >= curve.max() - TOLERANCE)]), 3)


def highest(curve: np.ndarray) -> float:
    """Of THRESHOLDS the last whose Dice on the curve is within TOLERANCE of the highest."""
    return round(float(THRESHOLDS[np.flatnonzero(curve >= curve.max() - TOLERANCE)[-1]]), 3)


PICKS = {"lowest": lowest, "highest": highest}


def kind_of(case: Case, kinds: Mapping[str, str]) -> str:
    """The kind of lesion of a patient: what `kinds` says, by default the data set."""
    return kinds.get(case.patient, case.source)


def read_kinds(path: Path) -> dict[str, str]:
    """{patient: kind} of a JSON file; empty where there is none.

    Raises
    ------
    ValueError
        If the file is not such a table.
    """
    if not path.exists():
        return {}
    try:
        kinds = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}); write {{patient: kind}} as JSON") from None
    if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
        raise ValueError(f"{path}: not a table of kinds; write {{patient: kind}} as JSON")
    return kinds


def dice_by_kind(counts: Sequence[np.ndarray], kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each kind, the Dice at every threshold: half pooled over its patients, half their mean.

    Pooled Dice alone may be that of the one patient with the largest lesion, and their mean that of the smallest
    ones.

    Parameters
    ----------
    counts : of each patient, what `evaluate_case` gives as `by_threshold`.
    kinds : of each patient.

    Returns
    -------
    kind -> (len(THRESHOLDS),) float64
    """
    curves = {}
    for kind in sorted(set(kinds)):
        own = [count for count, other in zip(counts, kinds, strict=True) if other == kind]
        pooled = dice_scores(np.sum(own, axis=0))
        curves[kind] = 0.5 * (pooled + np.mean([dice_scores(one) for one in own], axis=0))
    return curves


def mean_over_kinds(counts: Sequence[np.ndarray], kinds: Sequence[str]) -> np.ndarray:
    """(len(THRESHOLDS),) the mean of the curves of `dice_by_kind`."""
    curve: np.ndarray = np.mean(list(dice_by_kind(counts, kinds).values()), axis=0)
    return curve


def leave_one_out(
    counts: Sequence[np.ndarray], kinds: Sequence[str], patients: Sequence[str], pick: str = "lowest"
) -> dict[str, dict[str, float]]:
    """What each patient reaches with the threshold that the other patients choose.

    Parameters
    ----------
    counts, kinds : as `dice_by_kind` takes them
    patients : the patient of each case
    pick : "lowest" or "highest", of thresholds with nearly equal Dice

    Returns
    -------
    patient -> {"threshold", "dice"}
        Dice pooled over the cases of the patient. A patient without others is left out of the result.
    """
    result = {}
    for patient in sorted(set(patients)):
        others = [number for number, name in enumerate(patients) if name != patient]
        if not others:
            continue
        threshold = PICKS[pick](mean_over_kinds([counts[i] for i in others], [kinds[i] for i in others]))
        own = dice_scores(np.sum([counts[i] for i, name in enumerate(patients) if name == patient], axis=0))
        dice = float(own[np.argmin(np.abs(THRESHOLDS - threshold))])
        result[patient] = {"threshold": threshold, "dice": round(dice, 4)}
    return result


def choose(
    run: Path,
    path: Path,
    steps: int | None = None,
    peak: float | None = None,
    training: Sequence[str] = (),
    leave_one_out_path: Path | None = None,
    pick: str = "lowest",
) -> float:
    """The `lowest` or `highest` threshold by Dice on the patients that choose and have masks, the mean over kinds.

    Nothing in the weights file changes but what it says of its threshold, and, where they are given, of its N
    (`steps`) and of the probability that a lesion reaches somewhere (`peak`).

    Parameters
    ----------
    run : folder of the run; its kinds.json, where there is one, says of which kind each patient is.
    path : the weights file.
    steps, peak : optional
    training : names of data sets
        Validation patients choose, and the training patients of these sets.
    leave_one_out_path : optional
        A JSON file that gets what `leave_one_out` says of the validation patients.
    pick : "lowest" or "highest", of thresholds with nearly equal Dice

    Raises
    ------
    ValueError
        If the folder holds no run, or no validation patient of it has a mask; if training patients are to choose
        whose masks were trained on; if the JSON file has no folder.
    """
    if leave_one_out_path is not None and not leave_one_out_path.parent.is_dir():
        raise ValueError(f"{leave_one_out_path.parent}: no such folder; make it first")
    split = read_split(run / "split.json")
    config, kinds = read_run(run), read_kinds(run / "kinds.json")
    if training and config.labels != "image":
        raise ValueError(f"{run}: its masks were trained on; only validation patients can choose")
    chosen = [
        case
        for case in mask_cases(config)
        if case.masks is not None
        and (
            split.get(case.patient) == "validation"
            or (split.get(case.patient) == "train" and case.source in training)
        )
    ]
    if not chosen:
        raise ValueError(f"{run}: no validation patient has a mask; the threshold stays as it is")
    detector = Detector.load(path)
    if peak is not None:
        description = dataclasses.replace(detector.description, min_peak=peak)
        detector = Detector(dataclasses.replace(detector.system, description=description))
    sampling = detector.sampling_config(steps=steps)
    counts = [evaluate_case(detector, case, sampling=sampling).by_threshold for case in chosen]
    own_kinds = [kind_of(case, kinds) for case in chosen]
    curves = dice_by_kind(counts, own_kinds)
    curve = mean_over_kinds(counts, own_kinds)
    threshold = PICKS[pick](curve)
    others = f" and of training patients of {', '.join(training)}" if training else ""
    best = ", ".join(f"{kind} {one.max():.3f}" for kind, one in curves.items())
    description = dataclasses.replace(
        detector.description,
        sampling=detector.description.sampling | {"steps": sampling.steps},
        threshold=threshold,
        threshold_chosen=f"{pick} within {TOLERANCE} of the highest Dice, mean over kinds ({curve.max():.3f}; best of "
        f"each: {best}), on {len(chosen)} cases of validation patients" + others,
    )
    # float16 in the file: read and written without rounding
    system = checkpoint.load(path, precision="float32")
    checkpoint.save(dataclasses.replace(system, description=description), path)
    if leave_one_out_path is not None:
        reached = leave_one_out(counts, own_kinds, [case.patient for case in chosen], pick)
        result = {
            "weights": description.name,
            "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "patients": {k: v for k, v in reached.items() if split.get(k) == "validation"},
        }
        write_text(leave_one_out_path, json_text(result))
    return threshold


def mask_cases(config: TrainConfig) -> list[Case]:
    """The cases of a run with their masks: a table of image-level labels names none, its volumes have some beside them.

    A case of a table without a mask takes that of the case of the same name which the folder of its image has.
    """
    found: dict[Path, dict[str, Case]] = {}
    cases = []
    for case in cases_of(config):
        if case.masks is None and not case.stack:
            folder = next(iter(case.files.values()))[0].resolve().parent.parent
            if folder not in found:
                found[folder] = {other.name: other for other in find_cases(folder)}
            beside = found[folder].get(case.name)
            case = case if beside is None else dataclasses.replace(case, masks=beside.masks)
        cases.append(case)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--steps", type=int, help="N; by default what the weights say")
    parser.add_argument("--peak", type=float, help="least peak of a lesion; by default what the weights say")
    parser.add_argument(
        "--training",
        nargs="+",
        default=[],
        metavar="NAME",
        help="data sets whose training patients choose, too",
    )
    parser.add_argument(
        "--leave-one-out",
        type=Path,
        metavar="FILE",
        help="JSON of what each validation patient reaches with the threshold that the others choose",
    )
    parser.add_argument(
        "--pick",
        choices=PICKS,
        default="lowest",
        help="of thresholds with nearly equal Dice; the default: lowest",
    )
    options = parser.parse_args()
    try:
        chosen = choose(
            options.run, options.weights, options.steps, options.peak, options.training, options.leave_one_out,
            options.pick,
        )  # fmt: skip
        print(f"threshold {chosen:.3f}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
