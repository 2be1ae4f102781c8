"""How near a voxel is to being decided otherwise: highest where the mask ends, and ranked as errors are."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from ddmd.evaluation.case_metrics import case_metrics
from ddmd.inference.decision import decision_uncertainty
from ddmd.inference.detector import Detector
from ddmd.inference.postprocess import LesionCriteria, label_components
from ddmd.io.volume import Volume
from tests.volumes import head, tiny_system

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def written_out(p: float, deciding: float) -> float:
    odds = p / (1 - p) / (deciding / (1 - deciding))
    q = odds / (1 + odds)
    return q * (1 - q)


def test_it_is_highest_at_the_threshold_and_falls_on_both_sides(rng):
    p = np.linspace(0.01, 0.99, 99, dtype=np.float32).reshape(99, 1, 1)
    found = decision_uncertainty(p, p >= 0.7, AFFINE, LesionCriteria(0.7)).ravel()
    assert found == pytest.approx([written_out(float(x), 0.7) for x in p.ravel()], rel=1e-4)
    assert found.argmax() == 69
    assert found.max() == pytest.approx(0.25)
    assert (np.diff(found)[:69] > 0).all()
    assert (np.diff(found)[69:] < 0).all()
    half = decision_uncertainty(p, p >= 0.5, AFFINE, LesionCriteria(0.5))
    assert half == pytest.approx(p * (1 - p), rel=1e-4)
    ends = decision_uncertainty(np.array([[[0.0, 1.0]]], np.float32), p[:1] > 1, AFFINE, LesionCriteria(0.7))
    assert (ends < 1e-5).all()
    assert np.isfinite(ends).all()


def test_near_a_large_lesion_its_outline_decides():
    mask = np.zeros((60, 12, 8), bool)
    mask[8:18, 4:8, 2:6] = mask[50:52, 2:4, 1:3] = True  # 0.96 ml and 0.05 ml
    p = np.where(mask, 0.9, 0.3).astype(np.float32)
    mask[18:20, 4:8, 2:6], p[18:20, 4:8, 2:6] = True, 0.4  # within the outline, below the threshold
    criteria = LesionCriteria(0.7, large_ml=0.9, outline_share=0.5)
    found = decision_uncertainty(p, mask, AFFINE, criteria)
    near = np.zeros_like(mask)
    near[3:23, 2:10, 1:7] = True  # 5, 2 and 1 voxels of 1, 2 and 3 mm beyond what reaches the threshold
    wanted = [written_out(float(x), 0.35 if n else 0.7) for x, n in zip(p.ravel(), near.ravel(), strict=True)]
    assert found.ravel() == pytest.approx(wanted, rel=1e-4)
    plain = [written_out(float(x), 0.7) for x in p.ravel()]
    for other in (LesionCriteria(0.7, large_ml=1.0, outline_share=0.5), LesionCriteria(0.7, large_ml=0.9)):
        assert decision_uncertainty(p, mask, AFFINE, other).ravel() == pytest.approx(plain, rel=1e-4)


def test_what_only_an_outline_took_in_counts_as_accepted():
    p = np.zeros((30, 1, 1), np.float32)
    p[2:6], p[6:9], p[9] = 0.9, 0.4, 0.75  # a lesion, its outline, and a spot that its peak would leave out
    p[10:] = 0.1
    criteria = LesionCriteria(0.7, min_peak=0.8, large_ml=0.003, outline_share=0.5)
    mask = label_components(p, np.eye(4), criteria) > 0
    assert np.flatnonzero(mask).tolist() == list(range(2, 10))
    found = decision_uncertainty(p, mask, np.eye(4), criteria).ravel()
    assert found[14] == pytest.approx(written_out(0.1, 0.35), rel=1e-3)  # 5 mm from the spot
    assert found[15] == pytest.approx(written_out(0.1, 0.7), rel=1e-3)


def test_evaluations_rank_errors_by_it(rng):
    from sklearn.metrics import roc_auc_score

    values, affine = head(rng)
    volume = Volume.from_array({"flair": values}, affine)
    p = rng.random(volume.brain.shape).astype(np.float32) * volume.brain
    truth = (rng.random(p.shape) < p**3) & volume.brain  # the probability is too high; 0.8 decides well
    criteria = LesionCriteria(0.8)
    row = case_metrics("p", "p", volume, p, 0 * p, truth, criteria).row
    inside = volume.search_region | truth
    mask = label_components(p, volume.affine, criteria) > 0
    scores = decision_uncertainty(p, mask, volume.affine, criteria)
    wrong = (mask != truth)[inside]
    assert row["decision_auroc"] == pytest.approx(roc_auc_score(wrong, scores[inside]), abs=0.02)
    assert row["decision_auroc"] > row["bernoulli_auroc"] + 0.05


def test_a_detection_gives_it_on_the_input_grid(rng):
    values, affine = head(rng, (40, 48, 8))
    image = nib.Nifti1Image(values, affine @ np.diag([-1.0, 1.0, 1.0, 1.0]))  # stored from right to left
    detection = Detector(tiny_system()).detect(image, sequences="flair", threshold=0.6)
    found = detection.decision_uncertainty()
    p = np.asarray(detection.probability.dataobj)
    assert np.array_equal(found.affine, image.affine)
    assert found.get_data_dtype() == np.float32
    some = (p > 0.01) & (p < 0.99)
    wanted = [written_out(float(x), 0.6) for x in p[some]]
    assert np.asarray(found.dataobj)[some] == pytest.approx(wanted, rel=1e-3)


def test_a_detection_takes_criteria_and_spacing_from_its_own_record(rng):
    values, affine = head(rng, (40, 48, 8))
    turned = affine[:, [1, 2, 0, 3]]  # stored in another order of axes
    image = nib.Nifti1Image(values.transpose(1, 2, 0), turned)
    detection = Detector(tiny_system()).detect(image, sequences="flair", threshold=0.6)
    mask, p = np.zeros(image.shape, np.uint8), np.full(image.shape, 0.3, np.float32)
    mask[10:20, 2:5, 10:20], p[10:20, 2:5, 10:20] = 1, 0.9
    changed = dataclasses.replace(
        detection,
        mask=nib.Nifti1Image(mask, turned),
        probability=nib.Nifti1Image(p, turned),
        provenance=detection.provenance | {"OutlineShare": 0.5, "LargeLesionMl": 0.5},
    )
    assert np.argmax(nib.affines.voxel_sizes(turned)) == 1
    wanted = decision_uncertainty(p, mask > 0, turned, LesionCriteria(0.6, large_ml=0.5, outline_share=0.5))
    assert (wanted != decision_uncertainty(p, mask > 0, turned, LesionCriteria(0.6))).any()
    assert np.array_equal(np.asarray(changed.decision_uncertainty().dataobj), wanted)
