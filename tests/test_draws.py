"""Figures of draws against the formulas written out voxel by voxel."""

import numpy as np
import pytest

from ddmd.evaluation.draws import (
    between_share,
    draw_metrics,
    energy_distance,
    error_aurocs,
    family_energy_distance,
    intersections,
    iou_distances,
    threshold_energy_distance,
)
from ddmd.evaluation.summary import FIGURES
from ddmd.inference.draws import lesion_existence, volume_interval


def jaccard_distance(a, b):
    union = int((a | b).sum())
    return 1 - int((a & b).sum()) / union if union else 0.0


def dice(a, b):
    return 2 * int((a & b).sum()) / (int(a.sum()) + int(b.sum()))


def test_distances_are_those_of_each_pair(rng):
    a, b = rng.random((4, 5, 6, 7)) < 0.3, rng.random((3, 5, 6, 7)) < 0.2
    a[1] = False
    b[2] = False
    wanted = [[jaccard_distance(x, y) for y in b] for x in a]
    assert iou_distances(a, b) == pytest.approx(np.array(wanted))
    assert iou_distances(a, b)[1, 2] == 0


def test_counts_are_exact_over_many_voxels(rng, monkeypatch):
    import ddmd.evaluation.draws as module

    a, b = rng.random((2, 3, 1000)) < 0.5
    whole = intersections(a, b)
    monkeypatch.setattr(module, "CHUNK_VOXELS", 7)
    assert intersections(a, b).tolist() == whole.tolist()
    assert whole.tolist() == [[int((x & y).sum()) for y in b] for x in a]


def test_energy_distance_is_its_formula(rng):
    draws, raters = rng.random((5, 6, 6, 4)) < 0.4, rng.random((2, 6, 6, 4)) < 0.3
    across = np.mean([jaccard_distance(s, r) for s in draws for r in raters])
    own = np.mean([jaccard_distance(s, t) for s in draws for t in draws])
    theirs = np.mean([jaccard_distance(r, q) for r in raters for q in raters])
    result = energy_distance(draws, raters)
    assert result.distance == pytest.approx(2 * across - own - theirs)
    assert result.rater_distance == pytest.approx(across)
    assert result.diversity == pytest.approx(own)
    assert result.rater_diversity == pytest.approx(theirs)
    assert result.best_match_dice == pytest.approx(np.mean([max(dice(s, r) for s in draws) for r in raters]))


def test_draws_that_are_the_raters_are_at_distance_zero(rng):
    masks = rng.random((3, 4, 4, 4)) < 0.5
    assert energy_distance(masks, masks).distance == pytest.approx(0, abs=1e-12)
    assert energy_distance(masks, masks).best_match_dice == 1
    one = energy_distance(masks[:1], masks[:1] & False)
    assert one.distance == pytest.approx(2)


def test_random_thresholds_are_what_many_sets_of_them_reach_on_average(rng):
    """Against masks that are made one by one, over many sets of random thresholds."""
    raters = np.zeros((2, 8, 8, 4), bool)
    raters[0, 2:6, 2:6, 1:3] = True
    raters[1, 3:7, 2:6, 1:3] = True
    probability = np.clip(raters.mean(0) * 0.8 + rng.normal(0.1, 0.08, raters.shape[1:]), 0, 1)
    probability = probability.astype(np.float32)
    sets = [
        energy_distance(probability > rng.uniform(size=(6, 1, 1, 1)).astype(np.float32), raters)
        for _ in range(3000)
    ]
    result = threshold_energy_distance(probability, raters, 6)
    for name in ("distance", "rater_distance", "diversity", "rater_diversity", "best_match_dice"):
        values = np.array([getattr(one, name) for one in sets])
        error = values.std() / len(values) ** 0.5
        assert getattr(result, name) == pytest.approx(values.mean(), abs=5 * error + 2e-3), name


def test_a_family_of_masks_is_what_sets_of_it_reach_on_average(rng):
    masks, raters = rng.random((5, 6, 6, 4)) < 0.4, rng.random((2, 6, 6, 4)) < 0.3
    assert family_energy_distance(masks, raters, 5).distance == pytest.approx(
        energy_distance(masks, raters).distance
    )
    pairs = [energy_distance(masks[[i, j]], raters) for i in range(5) for j in range(5) if i != j]
    result = family_energy_distance(masks, raters, 2)
    for name in ("distance", "rater_distance", "diversity", "rater_diversity"):
        assert getattr(result, name) == pytest.approx(np.mean([getattr(one, name) for one in pairs])), name
    probability = rng.random((6, 6, 4)).astype(np.float32)
    nested = np.stack([probability >= (level + 0.5) / 200 for level in range(200)])
    ours, theirs = (
        family_energy_distance(nested, raters, 8),
        threshold_energy_distance(probability, raters, 8),
    )
    for name in ("distance", "rater_distance", "diversity", "best_match_dice"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=0.01), name


def test_random_thresholds_of_no_probability_are_empty_masks():
    raters = np.zeros((2, 3, 3, 3), bool)
    raters[:, 1, 1, 1] = True
    result = threshold_energy_distance(np.zeros((3, 3, 3), np.float32), raters, 4)
    assert result.rater_distance == pytest.approx(1.0, abs=2e-3)
    assert result.best_match_dice == pytest.approx(0.0, abs=2e-2)


def test_the_spread_is_split_into_between_and_inside(rng):
    crisp = rng.random((6, 5, 5, 3)) < 0.5
    assert between_share(crisp.astype(np.float32)) == pytest.approx(1.0)
    same = np.repeat(rng.random((1, 5, 5, 3), np.float32), 6, axis=0)
    assert between_share(same) == pytest.approx(0.0, abs=1e-9)
    draws = rng.random((6, 5, 5, 3), np.float32)
    mean = draws.astype(float).mean(0)
    wanted = draws.astype(float).var(0).sum() / (mean * (1 - mean)).sum()
    assert between_share(draws) == pytest.approx(wanted)
    assert np.isnan(between_share(np.zeros((3, 2, 2, 2), np.float32)))


def test_a_lesion_exists_as_often_as_draws_mark_it():
    labels = np.zeros((8, 3, 3), np.int32)
    labels[1:3, 0, 0], labels[5, 1, 1], labels[7, 2, 2] = 1, 2, 3
    draws = np.zeros((4, 8, 3, 3), bool)
    draws[:3, 1, 0, 0] = True
    draws[3, 5, 1, 1] = True
    draws[:, 0, 2, 2] = True  # beside every lesion
    assert lesion_existence(labels, draws).tolist() == [0.75, 0.25, 0.0]
    assert lesion_existence(labels * 0, draws).tolist() == []


def test_the_interval_holds_nine_of_ten_volumes(rng):
    volumes = rng.standard_normal(200_000)
    low, high = volume_interval(volumes)
    assert (low, high) == pytest.approx((-1.645, 1.645), abs=0.03)


def test_three_maps_rank_the_errors_of_one_mask(rng):
    from sklearn.metrics import roc_auc_score

    probability = rng.random(4000).astype(np.float32)
    mask = probability >= 0.5
    truth = rng.random(4000) < probability**3  # the probability is too high
    draws = (rng.random((12, 4000)) < probability**3).astype(np.uint8) * 255
    result = error_aurocs(draws, probability, mask, truth)
    share = (draws > 0).mean(0)
    wrong = mask != truth
    wanted = {
        "draws_contradiction_auroc": ((draws > 0) != mask).mean(0)
        + np.where(mask, 1 - probability, probability),
        "draws_variance_auroc": share * (1 - share),
        "posterior_mean_bernoulli_auroc": probability * (1 - probability),
    }
    for name, score in wanted.items():
        assert result[name] == pytest.approx(roc_auc_score(wrong, score), abs=5e-3), name
    assert result["draws_contradiction_auroc"] > result["posterior_mean_bernoulli_auroc"] + 0.05


def test_everything_of_one_case(rng):
    truth = np.zeros((10, 10, 5), bool)
    truth[2:6, 2:6, 1:4] = True
    labels = truth.astype(np.int32)
    labels[8, 8, 2] = 2  # found, and not there
    draws = np.zeros((8, 10, 10, 5), np.float32)
    for number, draw in enumerate(draws):
        draw[2:6, 2 : 5 + number % 2, 1:4] = 0.9
        draw[8, 8, 2] = 0.6 if number == 0 else 0.4
    raters = np.stack([truth, np.roll(truth, 1, axis=0)])
    one_step = np.repeat(draws[:1], 8, axis=0)
    probability = np.linspace(0, 1, truth.size, dtype=np.float32).reshape(truth.shape)
    result = draw_metrics(draws, labels, truth, 0.1, raters, one_step, probability, scale=1.0)
    volumes = [(draw >= 0.5).sum() * 0.1 for draw in draws]
    assert result.row["volume_low_ml"] == pytest.approx(np.quantile(volumes, 0.05))
    assert result.row["volume_interval_ml"] == pytest.approx(
        np.quantile(volumes, 0.95) - np.quantile(volumes, 0.05)
    )
    assert result.covered == (np.quantile(volumes, 0.05) <= 4.8 <= np.quantile(volumes, 0.95))
    assert result.existence[9].tolist() == [1, 1.0, 1], "the lesion that every draw marks is there"
    assert result.existence[1].tolist() == [1, 0.125, 0], "the one that a draw of eight marks is not"
    assert result.row["draws_distance"] == pytest.approx(energy_distance(draws >= 0.5, raters).distance)
    assert result.row["one_step_draws_diversity"] == 0
    thresholds = threshold_energy_distance(probability, raters, 8)
    family = np.stack([probability >= 0.3, probability >= 0.7])
    both = draw_metrics(draws, labels, truth, 0.1, raters, one_step, probability, family)
    wanted = family_energy_distance(family, raters, 8).distance
    assert both.row["random_thresholds_without_faint_distance"] == pytest.approx(wanted)
    measured = {name for name in both.row if name.startswith(("draws_", "random_", "one_step_"))}
    assert len(measured) > 12
    said_once = {name for name in measured if name.endswith("_rater_diversity")} - {"draws_rater_diversity"}
    assert measured - said_once <= set(FIGURES), "reports have them"
    assert result.row["random_thresholds_distance"] == pytest.approx(thresholds.distance)
    alone = draw_metrics(draws, labels, truth, 0.1)
    assert not any("distance" in name for name in alone.row), "one annotator has no spread to compare with"


def test_figures_of_draws_are_pooled(rng):
    from ddmd.evaluation.case_metrics import case_metrics
    from ddmd.evaluation.summary import summarise
    from ddmd.inference.postprocess import LesionCriteria
    from ddmd.io.volume import Volume
    from tests.volumes import head

    pytest.importorskip("monai", reason="the extra ddmd[evaluate] is not installed")
    values, affine = head(rng)
    volume, truth = Volume.from_array({"flair": values}, affine), values > 180
    draws = np.stack([np.roll(truth, shift, axis=0) for shift in (-1, 0, 0, 1)]).astype(np.float32)
    draws *= volume.brain
    probability = draws.mean(0)
    one = draw_metrics(draws, truth.astype(np.int32), truth, 0.096, np.stack([truth, truth]))
    case = case_metrics("p", "p", volume, probability, draws.var(0), truth, LesionCriteria(0.5), one)
    report = summarise([case, case], {"weights": "w", "threshold": 0.5})
    assert report.pooled["volume_interval_coverage"] == float(one.covered)
    assert report.intervals["draws_between_share"][0] == pytest.approx(one.row["draws_between_share"])
    assert report.intervals["draws_distance"][0] == pytest.approx(one.row["draws_distance"])
    assert "generalized energy distance of the draws to raters" in report.table().columns[0]._cells


def test_a_shift_is_chosen_on_the_other_cases_alone():
    from benchmarks.calibrate_draws import leave_one_out

    table = np.array([[0.1, 0.9, 0.9], [0.4, 0.4, 0.4], [0.9, 0.2, 0.5]])  # (configurations, cases)
    assert leave_one_out(table).tolist() == [2, 1, 1]


def test_an_interval_is_scaled_by_the_other_patients(rng):
    from benchmarks.calibrate_intervals import DrawnVolumes, conformal_quantile, leave_one_out

    assert conformal_quantile(list(range(1, 20))) == 18, "number ceil(0.9 * 20) of 19"
    assert conformal_quantile([3.0, 1.0]) == 3.0, "of few, the largest"
    drawn = [np.exp(rng.standard_normal(40) * 0.3) * 10 for _ in range(4)]
    rows = [DrawnVolumes(f"p{i}", volumes, 10.0) for i, volumes in enumerate(drawn[:3])]
    rows.append(DrawnVolumes("far", drawn[3], 1000.0))
    held = [covered for covered, _ in leave_one_out(rows)]
    assert held == [True, True, True, False], "the others know nothing of the far one"


def test_the_threshold_of_a_system_is_the_validation_patients():
    from benchmarks.shipped_ablation import figures
    from ddmd.evaluation.metrics import Histogram

    truth = np.array([True, True, False, False])
    validation = Histogram.count(np.array([0.9, 0.8, 0.6, 0.1]), truth, 0.0, 1.0)
    test = Histogram.count(np.array([0.9, 0.3, 0.2, 0.1]), truth, 0.0, 1.0)
    row = figures([validation], ["a"], [test, validation], ["a", "b"])
    assert 0.6 < row["threshold"] <= 0.8
    assert row["dice"]["a"] == pytest.approx(2 / 3), "one of two voxels is above it"
    assert row["dice_oracle"]["a"] == 1.0
    assert row["dice"]["b"] == 1.0
