"""Which slices training samples are made from: by kind of sample, source, patient and place in the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ddmd.training.config import TrainConfig
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.sample_random import SampleRandom, pick

SAMPLE_KINDS = ("normal", "painted", "transplanted", "painted_beside", "masked")
NORMAL, PAINTED, TRANSPLANTED, PAINTED_BESIDE, MASKED = range(len(SAMPLE_KINDS))
NEAR_MM = 25.0  # normal slices this far from a positive one are half as likely to be painted on
WIDE_GAP = 0.3  # chance that the neighbouring slices are farther away
WIDE_GAP_MM = (5.0, 9.0)
THICK = 0.5  # chance that slices far apart are thick, too: the mean of what lies within their thickness
THICKNESS = (0.6, 1.0)  # of thick slices, as a share of the distance between them


@dataclass(frozen=True)
class Neighbours:
    """Slices around those of N samples: rows of `DeviceSlices`.

    rows : (N, P) each slice between its neighbours.
    below, above : (N, P) slices that each is averaged with, where it is thick; else the same.
    gap_mm, thickness_mm : (N,) between slices, and of a slice.
    """

    rows: np.ndarray
    below: np.ndarray
    above: np.ndarray
    gap_mm: np.ndarray
    thickness_mm: np.ndarray


class SliceChoice:
    """Draws slices, their neighbours and their sequences for samples.

    Parameters
    ----------
    slices : DeviceSlices
    config : TrainConfig
    weights : source -> share of the samples
    context : int
        Neighbours on either side.

    Attributes
    ----------
    label, case : (M,) of every slice, its image-level label and the number of its case.
    masked : (M,) bool, which slices have a mask.
    """

    def __init__(
        self, slices: DeviceSlices, config: TrainConfig, weights: Mapping[str, float], context: int
    ) -> None:
        self.slices, self.config, self.weights, self.context = slices, config, dict(weights), context
        self.label = np.concatenate([case.label for case in slices.cases])
        self.case = np.repeat(np.arange(len(slices.cases)), np.diff(slices.first))
        self._slice_mm = np.array([case.offset_mm / case.offset for case in slices.cases])
        self._offset = np.array([case.offset for case in slices.cases])
        nearness = [
            case_nearness(case.brain, case.label, mm)
            for case, mm in zip(slices.cases, self._slice_mm, strict=True)
        ]
        self._nearness = np.concatenate(nearness)
        self.update_masks()

    def update_masks(self) -> None:
        """Take note of which slices have a mask, after `DeviceSlices.update_masks`."""
        masked = [
            np.zeros(len(case.image), bool) if case.mask is None else case.mask.any(axis=(1, 2))
            for case in self.slices.cases
        ]
        self.masked = np.concatenate(masked)
        everything = np.ones(len(self.label), bool)
        # as bags, positive slices without a mask are drawn, too
        bags = self.config.labels == "image" and self.config.denoiser_stage.bag_weight > 0
        positive = self.label == 1
        self._tables = {
            "all": self._table(everything),
            "normal": self._table(self.label == 0),
            "paintable": self._table(self.label == 0, self._nearness),
            "positive": self._table(positive),
            "masked": self._table(self.masked),
            "bags": self._table(positive if bags else self.masked),
        }
        self._kind_tables = ("normal", "paintable", "paintable", "positive", "bags")

    def _table(self, usable: np.ndarray, chance: np.ndarray | None = None) -> np.ndarray | None:
        """Cumulative chance of each slice: by source, then by case, then by `chance`; None without any."""
        if not usable.any():
            return None
        own = np.where(usable, 1.0 if chance is None else chance, 0.0)
        per_case = np.bincount(self.case, own, len(self.slices.cases))
        there = per_case > 0
        sources = [case.case.source for case in self.slices.cases]
        counts: dict[str, int] = {}
        for source, used in zip(sources, there, strict=True):
            counts[source] = counts.get(source, 0) + int(used)
        share = np.array(
            [self.weights[s] / counts[s] if used else 0.0 for s, used in zip(sources, there, strict=True)]
        )
        chances = own * (share / np.where(there, per_case, 1.0))[self.case]
        return np.cumsum(chances) if chances.any() else None

    def shares(self) -> np.ndarray:
        """(5,) shares of `SAMPLE_KINDS` among the samples, 0 of those that no slice is there for.

        Raises
        ------
        ValueError
            If all are 0.
        """
        stage = self.config.denoiser_stage
        shares = np.array(
            [
                stage.share_normal, stage.share_painted, stage.share_transplanted,
                stage.share_painted_beside, stage.share_masked,
            ]
        )  # fmt: skip
        there = np.array([self._tables[name] is not None for name in self._kind_tables])
        there[[TRANSPLANTED, MASKED]] &= self._tables["masked"] is not None
        shares = np.where(there, shares, 0.0)
        if not shares.any():
            raise ValueError(
                "no slice is there for any share of a batch above 0; check the image-level labels and the shares: "
                "before the first round of pseudo-masks there are no masked and no transplanted slices"
            )
        return shares

    def rows(self, random: SampleRandom, normal: bool) -> np.ndarray:
        """(N,) slices of A, those known to be normal, or of B, all of them.

        Raises
        ------
        ValueError
            If there is none.
        """
        table = self._tables["normal" if normal else "all"]
        if table is None:
            raise ValueError("the training data has no normal slice; check its image-level labels")
        return pick(table, random.unit())

    def samples(self, random: SampleRandom) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each sample for the denoiser its kind, its slice, and the slice that a lesion may come from, (N,) each."""
        kind = random.choice(self.shares())
        unit, donor_unit = random.unit(), random.unit()
        row = np.zeros(len(random), np.int64)
        for number, name in enumerate(self._kind_tables):
            table = self._tables[name]
            if table is not None:
                row = np.where(kind == number, pick(table, unit), row)
        masked = self._tables["masked"]
        return kind, row, row if masked is None else pick(masked, donor_unit)

    def neighbours(self, random: SampleRandom, row: np.ndarray) -> Neighbours:
        """What lies around each slice."""
        case = self.case[row]
        slice_mm = self._slice_mm[case]
        wide = np.maximum(1, np.round(random.uniform(*WIDE_GAP_MM) / slice_mm)).astype(np.int64)
        far = random.chance(WIDE_GAP)
        offset = np.where(far, wide, self._offset[case])
        gap_mm = offset * slice_mm
        thick = far & random.chance(THICK)
        thickness_mm = np.where(thick, np.maximum(slice_mm, gap_mm * random.uniform(*THICKNESS)), slice_mm)
        apart = np.where(thick, np.round(thickness_mm / 3 / slice_mm), 0).astype(np.int64)
        around = row[:, None] + offset[:, None] * np.arange(-self.context, self.context + 1)
        low, high = self.slices.first[case][:, None], self.slices.first[case + 1][:, None] - 1
        below, above = (np.clip(around + way * apart[:, None], low, high) for way in (-1, 1))
        return Neighbours(np.clip(around, low, high), below, above, gap_mm, thickness_mm)

    def one_sequence(self, random: SampleRandom, row: np.ndarray) -> np.ndarray:
        """(N,) one of the sequences that there are of each slice."""
        count = np.cumsum(self.slices.present[self.case[row]], axis=1)
        chosen = np.floor(random.unit() * count[:, -1]) + 1
        return np.asarray((count < chosen[:, None]).sum(axis=1))

    def sequences(
        self, random: SampleRandom, row: np.ndarray, donor: np.ndarray, transplanted: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Which sequences each sample shows: what there is, the first alone, or some of it.

        A transplanted lesion shows on the sequences that both patients have; without one, none is transplanted.
        """
        stage = self.config.denoiser_stage
        present, donor_present = (self.slices.present[self.case[rows]] for rows in (row, donor))
        shared = present & donor_present & transplanted[:, None]
        available = np.where(shared.any(axis=1)[:, None], shared, present)
        choice = random.choice(
            (
                stage.share_complete,
                stage.share_first_alone,
                1 - stage.share_complete - stage.share_first_alone,
            )
        )
        first = available & (np.cumsum(available, axis=1) == 1)
        subset = available & random.chance(0.5, available.shape[1])
        order = np.where(available, random.unit(available.shape[1]), 2.0)
        single = order == order.min(axis=1, keepdims=True)
        subset = np.where(subset.any(axis=1)[:, None], subset, single)
        shown = np.choose(choice[:, None], (available, first, subset)).astype(bool)
        return {"present": shown, "both": present & donor_present}


def case_nearness(brain: np.ndarray, label: np.ndarray, slice_mm: float) -> np.ndarray:
    """(Z,) how much anatomy a slice shares with those that have lesions: brain area, and closeness.

    Lesion-free slices of patients lie mostly at the ends of the head, lesions do not.
    """
    area: np.ndarray = brain.sum(axis=(1, 2)).astype(np.float64) + 1.0
    positive = np.flatnonzero(label == 1)
    if not len(positive):
        return area
    apart = np.abs(np.arange(len(label))[:, None] - positive).min(axis=1)
    return np.asarray(area / (1.0 + (apart * slice_mm / NEAR_MM) ** 2))
