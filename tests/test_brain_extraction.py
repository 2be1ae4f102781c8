"""The brain within a head: a made one whose brain is known, one without a skull, and real lesions."""

import numpy as np
import pytest

from ddmd.cohort.discovery import find_cases
from ddmd.inference.slices import SliceGrid, extract, to_grid
from ddmd.io.brain_extraction import brain_within

AIR, BONE, FAT = -2.0, -1.6, 2.2


@pytest.fixture
def head(rng):
    """Image (12, 160, 144), head and brain: scalp and bone around a brain with a fissure, muscle bridged to it below."""
    y, x = np.mgrid[:160, :144]
    image, brain = np.full((12, 160, 144), AIR, np.float32), np.zeros((12, 160, 144), bool)
    for z in range(12):
        grown = 0.55 + 0.45 * np.sin(np.pi * (z + 2) / 15)
        away = np.hypot((y - 80) / 72, (x - 72) / 62)
        image[z][away < grown] = FAT
        image[z][away < grown - 0.08] = BONE
        brain[z] = away < grown - 0.16
        image[z][brain[z]] = rng.normal(0, 0.15, int(brain[z].sum()))
        sulcus = (np.abs(x - 72) < 2) & (y > 80) & brain[z]
        image[z][sulcus] = -1.5
        if z < 3:  # as an orbit lies before the brain: a nerve's width joins them
            image[z][np.hypot(y - 150, x - 72) < 9] = 0.0
            image[z][(np.abs(x - 72) < 3) & (y > 100) & (y < 150)] = 0.0
    return image, image > AIR, brain


def overlap(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("mm", [1.0, 2.0])
def test_the_brain_of_a_head_is_found_without_scalp_and_muscle(head, mm):
    image, inside, brain = (a[:, :: int(mm), :: int(mm)] for a in head)
    found = brain_within(image, inside, mm)
    assert overlap(found, brain) > 0.97
    assert not (found & (image == FAT)).any()
    muscle = np.hypot(*np.mgrid[-150:10, -72:72])[:: int(mm), :: int(mm)] < 9
    assert not (found[:3] & muscle).any()


def test_of_a_brain_alone_nearly_all_is_found(head):
    image, _, brain = head
    found = brain_within(np.where(brain, image, AIR), brain, 1.0)
    assert overlap(found, brain) > 0.98
    assert not (found & ~brain).any()


def test_a_bright_lesion_is_filled(head):
    image, inside, brain = head
    lesion = brain & (np.hypot(*np.mgrid[-80:80, -72 + 25 : 72 + 25]) < 8)
    assert lesion.any()
    found = brain_within(np.where(lesion, 2.5, image), inside, 1.0)
    assert found[2:10][lesion[2:10]].all(), "far from the surface"


def test_where_there_is_nothing_there_is_no_brain():
    empty = np.full((3, 48, 48), AIR, np.float32)
    assert not brain_within(empty, empty > AIR, 1.0).any()
    assert not brain_within(empty + 2.0, empty > AIR, 1.0).any(), "not outside the head"


def test_the_brain_of_real_heads_holds_their_lesions(shared_data):
    covered, searched = [], []
    for case in [c for c in find_cases(shared_data / "lgg") if c.masks is not None][::8]:
        volume = case.volume(("flair",))
        cut = extract(volume, ("flair",), SliceGrid())
        head = cut.brain[:, 0].numpy()
        brain = brain_within(cut.image[:, 0].numpy(), head, 1.0)
        lesion = to_grid(case.lesion(), cut)[:, 0].numpy() > 0.5
        covered.append((brain & lesion).sum() / lesion.sum())
        assert 0.5 * head.sum() < brain.sum() < head.sum(), case.name
        searched.append(volume.search_region[case.lesion()].mean())
    assert min(covered) > 0.95
    assert min(searched) > 0.95, "a lesion is not cut off by the estimate of the brain"
