"""The settings that weights ship with: chosen on validation patients, never on test ones.

`python -m ddmd.training.threshold RUN WEIGHTS [--steps N] [--peak P ...] [--contrast C ...] [--outline S ...]
[--training NAME] [--pick highest]` writes them into the weights file: the threshold, the least peak and the least
relative contrast of a lesion, how far large lesions reach, and the N that they are for. All combinations of what is given
are tried. Kinds of lesions count alike: a patient's is the data set, or what kinds.json in the run's folder says,
{patient: kind}. With `--training NAME`, the training patients of that data set choose, too, where training opened no
mask: with image-level labels.

`--leave-one-out FILE` writes what each validation patient reaches with the settings that the others choose, as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import read_split
from ddmd.diffusion.samplers import SamplingConfig
from ddmd.evaluation.case_metrics import THRESHOLDS, counts_by_threshold
from ddmd.evaluation.evaluate import case_truth, case_volume
from ddmd.evaluation.metrics import dice_scores
from ddmd.inference.detector import Detector
from ddmd.inference.lesion_contrast import BrightImage
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text
from ddmd.models import checkpoint
from ddmd.training.config import TrainConfig, read_run
from ddmd.training.run import cases_of

TOLERANCE = (
    0.005  # of Dice: of thresholds with nearly equal Dice, the lowest misses least, the highest marks least
)


class Setting(NamedTuple):
    """What decides with a threshold which components are lesions; see `LesionCriteria`."""

    min_peak: float
    min_relative_contrast: float
    outline_share: float


@dataclass(frozen=True)
class Chosen:
    """The number of a setting, a threshold, and the mean over kinds that both reach."""

    number: int
    threshold: float
    mean: float


PICKS = {"lowest": 0, "highest": -1}


def pick_settings(curves: np.ndarray, pick: str = "lowest") -> Chosen:
    """Of all thresholds that reach nearly the highest mean in any setting the lowest or highest, and the best setting
    for it.

    Parameters
    ----------
    curves : (settings, len(THRESHOLDS)), as `mean_over_kinds` gives them
    pick : "lowest" or "highest", of thresholds with a mean within TOLERANCE of the highest
    """
    near = curves >= curves.max() - TOLERANCE
    column = np.flatnonzero(near.any(axis=0))[PICKS[pick]]
    setting = int(np.argmax(curves[:, column]))
    return Chosen(setting, round(float(THRESHOLDS[column]), 3), float(curves[setting, column]))


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
    counts : of each patient, what `counts_by_threshold` gives.
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
    counts: Sequence[Sequence[np.ndarray]],
    settings: Sequence[Setting],
    kinds: Sequence[str],
    patients: Sequence[str],
    pick: str = "lowest",
) -> dict[str, dict[str, float]]:
    """What each patient reaches with the settings that the other patients choose.

    Parameters
    ----------
    counts : of each setting, of each case, what `counts_by_threshold` gives
    settings : as many as counts
    kinds, patients : of each case
    pick : as `pick_settings` takes it

    Returns
    -------
    patient -> {"threshold", what `Setting` has, "dice"}
        Dice pooled over the cases of the patient. A patient without others is left out of the result.
    """
    result = {}
    for patient in sorted(set(patients)):
        others = [number for number, name in enumerate(patients) if name != patient]
        if not others:
            continue
        own_kinds = [kinds[i] for i in others]
        choice = pick_settings(
            np.stack([mean_over_kinds([of_one[i] for i in others], own_kinds) for of_one in counts]), pick
        )
        of_chosen = counts[choice.number]
        own = dice_scores(
            np.sum([of_chosen[i] for i, name in enumerate(patients) if name == patient], axis=0)
        )
        dice = float(own[np.argmin(np.abs(THRESHOLDS - choice.threshold))])
        result[patient] = {
            "threshold": choice.threshold,
            **settings[choice.number]._asdict(),
            "dice": round(dice, 4),
        }
    return result


def count_case(
    detector: Detector, case: Case, sampling: SamplingConfig, settings: Sequence[Setting]
) -> list[np.ndarray]:
    """Of each setting, what `counts_by_threshold` gives for one case; it is detected once."""
    prepared = detector.prepare(case_volume(detector, case))
    volume = prepared.volume
    truth = case_truth(case, volume)
    probability = detector.to_volume(prepared, detector.maps(prepared, sampling)).probability
    image = BrightImage.of(volume)
    inside = volume.search_region | truth
    counts = []
    for setting in settings:
        criteria = dataclasses.replace(detector.lesion_criteria(), **setting._asdict())
        counts.append(counts_by_threshold(probability, truth, inside, volume.affine, criteria, image))
    return counts


def choose_settings(
    run: Path,
    path: Path,
    steps: int | None = None,
    peaks: Sequence[float] = (),
    contrasts: Sequence[float] = (),
    outlines: Sequence[float] = (),
    training: Sequence[str] = (),
    leave_one_out_path: Path | None = None,
    pick: str = "lowest",
) -> list[tuple[Setting, Chosen]]:
    """The settings with the highest mean over kinds on the patients that choose and have masks.

    Nothing in the weights file changes but its threshold, what `Setting` names, and, where it is given, its N
    (`steps`).

    Parameters
    ----------
    run : folder of the run; its kinds.json, where there is one, says of which kind each patient is.
    path : the weights file.
    steps : optional
    peaks, contrasts, outlines : by default those of the weights
        All combinations are tried: of `Setting.min_peak`, `min_relative_contrast` and `outline_share`.
    training : names of data sets
        Validation patients choose, and the training patients of these sets.
    leave_one_out_path : optional
        A JSON file that gets what `leave_one_out` says of the validation patients.
    pick : as `pick_settings` takes it

    Returns
    -------
    list of (Setting, Chosen)
        First what was chosen, then every setting with the threshold that `pick` takes in it.

    Raises
    ------
    ValueError
        If the folder holds no run, or no validation patient of it has a mask; if kinds.json names a patient that is
        not in the run's data; if training patients are to choose whose masks were trained on; if the JSON file has no
        folder.
    """
    if leave_one_out_path is not None and not leave_one_out_path.parent.is_dir():
        raise ValueError(f"{leave_one_out_path.parent}: no such folder; make it first")
    split = read_split(run / "split.json")
    config, kinds = read_run(run), read_kinds(run / "kinds.json")
    if training and config.labels != "image":
        raise ValueError(f"{run}: its masks were trained on; only validation patients can choose")
    cases = mask_cases(config)
    if unknown := sorted(set(kinds) - {case.patient for case in cases}):
        raise ValueError(
            f"{run / 'kinds.json'}: not among the patients of this run's data: {', '.join(unknown)}"
        )
    chosen = [
        case
        for case in cases
        if case.masks is not None
        and (
            split.get(case.patient) == "validation"
            or (split.get(case.patient) == "train" and case.source in training)
        )
    ]
    if not chosen:
        raise ValueError(f"{run}: no validation patient has a mask; the threshold stays as it is")
    detector = Detector.load(path)
    own = detector.description
    settings = [
        Setting(peak, contrast, outline)
        for peak in peaks or [own.min_peak]
        for contrast in contrasts or [own.min_relative_contrast]
        for outline in outlines or [own.outline_share]
    ]
    for setting in settings:
        dataclasses.replace(own, **setting._asdict())  # refused before the work
    sampling = detector.sampling_config(steps=steps)
    of_cases = [count_case(detector, case, sampling, settings) for case in chosen]
    counts = [[of_one[number] for of_one in of_cases] for number in range(len(settings))]
    own_kinds = [kind_of(case, kinds) for case in chosen]
    curves = np.stack([mean_over_kinds(of_setting, own_kinds) for of_setting in counts])
    choice = pick_settings(curves, pick)
    of_kinds = dice_by_kind(counts[choice.number], own_kinds)
    others = f" and of training patients of {', '.join(training)}" if training else ""
    best = ", ".join(f"{kind} {one.max():.3f}" for kind, one in of_kinds.items())
    description = dataclasses.replace(
        own,
        sampling=own.sampling | {"steps": sampling.steps},
        **settings[choice.number]._asdict(),
        threshold=choice.threshold,
        threshold_chosen=f"{pick} within {TOLERANCE} of the highest Dice, mean over kinds ({choice.mean:.3f}; best of "
        f"each: {best}), on {len(chosen)} cases of validation patients" + others,
    )
    # float16 in the file: read and written without rounding
    system = checkpoint.load(path, precision="float32")
    checkpoint.save(dataclasses.replace(system, description=description), path)
    if leave_one_out_path is not None:
        reached = leave_one_out(counts, settings, own_kinds, [case.patient for case in chosen], pick)
        result = {
            "weights": description.name,
            "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "patients": {k: v for k, v in reached.items() if split.get(k) == "validation"},
        }
        write_text(leave_one_out_path, json_text(result))
    each = [
        (setting, dataclasses.replace(pick_settings(curve[None], pick), number=number))
        for number, (setting, curve) in enumerate(zip(settings, curves, strict=True))
    ]
    return [(settings[choice.number], choice), *each]


def mask_cases(config: TrainConfig) -> list[Case]:
    """The cases of a run with their masks: a table of image-level labels names none, its volumes have some beside them.

    A case of a table without a mask takes that of the case of the same name which the folder of its image has.
    """
    cases_beside: dict[Path, dict[str, Case]] = {}
    cases = []
    for case in cases_of(config):
        if case.masks is None and not case.stack:
            folder = next(iter(case.files.values()))[0].resolve().parent.parent
            if folder not in cases_beside:
                cases_beside[folder] = {other.name: other for other in find_cases(folder)}
            beside = cases_beside[folder].get(case.name)
            case = case if beside is None else dataclasses.replace(case, masks=beside.masks)
        cases.append(case)
    return cases


def _line(setting: Setting, choice: Chosen) -> str:
    return (
        f"peak {setting.min_peak:g}, contrast {setting.min_relative_contrast:g}, outline {setting.outline_share:g}, "
        f"threshold {choice.threshold:.3f}: mean Dice {choice.mean:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--steps", type=int, help="N; by default what the weights say")
    for option, metavar, meaning in (
        ("--peak", "P", "least peaks of a lesion"),
        ("--contrast", "C", "least relative contrasts of a lesion"),
        ("--outline", "S", "shares of the threshold that large lesions reach to"),
    ):
        what = f"{meaning} that are tried; by default that of the weights"
        parser.add_argument(option, type=float, nargs="+", default=[], metavar=metavar, help=what)
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
        help="JSON of what each validation patient reaches with the settings that the others choose",
    )
    parser.add_argument(
        "--pick",
        choices=PICKS,
        default="lowest",
        help="of thresholds with nearly equal Dice; the default: lowest",
    )
    options = parser.parse_args()
    try:
        chosen, *each = choose_settings(
            options.run, options.weights, options.steps, options.peak, options.contrast, options.outline,
            options.training, options.leave_one_out, options.pick,
        )  # fmt: skip
        for setting, choice in each:
            print("tried:", _line(setting, choice))
        print(_line(*chosen))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
