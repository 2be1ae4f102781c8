"""Shortcuts of this package that must give exactly what the plain way of numpy, scipy or torch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from ddmd.inference.postprocess import LesionCriteria, find_lesions
from ddmd.io.brain_extraction import filled_slices, largest_body
from ddmd.io.volume import Volume
from ddmd.io.z_scores import robust_z_scores_, statistics_on_device
from tests.volumes import head


def test_filled_slices_are_those_of_scipy(rng):
    for density in (0.1, 0.5, 0.62, 0.9, 1.0):
        mask = rng.random((int(rng.integers(1, 40)), int(rng.integers(1, 40)), 6)) < density
        mask = np.repeat(np.repeat(mask, 2, 0), 2, 1) if density > 0.5 else mask
        mask[..., 0] = False
        expected = np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(mask, 2, 0)], 2)
        assert np.array_equal(filled_slices(mask), expected)
        assert np.array_equal(filled_slices(np.asfortranarray(mask)), expected)
        assert np.array_equal(filled_slices(mask[::-1, :, ::-1]), expected[::-1, :, ::-1])


def test_the_largest_body_is_the_one_with_most_voxels(rng):
    mask = rng.random((20, 21, 22)) < 0.25
    parts, count = ndimage.label(mask)
    sizes = ndimage.sum_labels(mask, parts, np.arange(1, count + 1))
    assert np.array_equal(largest_body(mask), parts == 1 + sizes.argmax())


def test_statistics_without_a_synchronisation_are_those_of_numpy(rng):
    for round_ in range(300):
        size = int(rng.integers(1, 400))
        values = (rng.normal(size=size) * 10 ** rng.uniform(-6, 6)).astype(np.float32)
        if round_ % 3 == 0:
            values = np.round(values)  # ties
        if round_ % 7 == 0:
            values[: int(0.8 * size)] = values[0]  # no interquartile range
        inside = rng.random(size) < 0.6
        inside[rng.integers(size)] = True
        chosen, count = values[inside], int(inside.sum())
        low, median, high = np.percentile(chosen, (25, 50, 75))
        scale = (high - low) / 1.349 or chosen.std(dtype=np.float64) or 1.0
        found = statistics_on_device(torch.from_numpy(values), torch.from_numpy(inside), count)
        assert float(found[0]) == np.float32(median)
        assert float(found[1]) == pytest.approx(np.float32(scale), rel=1e-7)
        expected = np.clip((values - np.float32(median)) / np.float32(scale), -4.0, 6.0)
        z = robust_z_scores_(torch.from_numpy(values.copy()), torch.from_numpy(inside), count).numpy()
        assert np.allclose(z, expected, rtol=0, atol=1e-6)


def test_rows_of_the_table_are_the_labels_of_the_whole_map(rng):
    probability = ndimage.gaussian_filter(rng.random((30, 31, 32)), 1.5)
    probability = ((probability - probability.min()) / np.ptp(probability)).astype(np.float32)
    uncertainty = rng.random(probability.shape).astype(np.float32)
    affine = np.diag((-1.0, 2.0, 1.5, 1.0))
    least, peak = (
        float(q) for q in np.quantile(probability, (0.985, 0.993))
    )  # some 20 components, some left out
    found = find_lesions(probability, uncertainty, affine, LesionCriteria(least, 0.006, peak))
    numbers = np.arange(1, len(found.lesions) + 1)
    assert len(numbers) > 3
    assert found.labels.max() == numbers[-1]
    components, count = ndimage.label(probability >= least, np.ones((3, 3, 3)))
    peaks = ndimage.maximum(probability, components, np.arange(1, count + 1))
    sizes = ndimage.sum_labels(np.ones_like(components), components, np.arange(1, count + 1))
    accepted = 1 + np.flatnonzero((peaks >= peak) & (sizes * 0.003 >= 0.006))
    assert np.array_equal(found.mask, np.isin(components, accepted))
    assert [lesion.peak_probability for lesion in found.lesions] == list(
        ndimage.maximum(probability, found.labels, numbers)
    )
    centres = np.array(ndimage.center_of_mass(found.mask, found.labels, numbers)) @ affine[:3, :3]
    assert np.allclose([lesion.centre_mm for lesion in found.lesions], centres)
    assert sorted(sizes[accepted - 1], reverse=True) == [
        round(lesion.volume_ml / 0.003) for lesion in found.lesions
    ]


def test_images_of_a_volume_share_no_memory_with_the_callers(rng):
    values, affine = head(rng)
    canonical = np.ascontiguousarray(values, dtype=np.float32)
    volume = Volume.from_array({"flair": canonical}, np.diag((*np.abs(np.diag(affine)[:3]), 1.0)))
    before = volume.images["flair"].copy()
    volume.normalised("flair")
    assert np.array_equal(volume.images["flair"], before)
    canonical[:] = 0
    assert np.array_equal(volume.images["flair"], before)
