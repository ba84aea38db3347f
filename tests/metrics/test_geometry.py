import jax
import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from scipy.spatial import cKDTree

from geolrm_jax.metrics.geometry import compare_points, nearest_distances, voxel_counts, voxel_rates

THRESHOLDS = (0.2, 0.05, 0.02)


def sets(rng, n, m):
    """A noisy and a clean sample of a sphere."""
    points = rng.normal(size=(n + m, 3))
    points = 0.4 * points / np.linalg.norm(points, axis=1, keepdims=True)
    points[:n] += rng.normal(scale=0.02, size=(n, 3))
    return points[:n].astype(np.float32), points[n:].astype(np.float32)


def test_nearest_distances_against_a_kd_tree(rng):
    points, others = sets(rng, 700, 411)
    others = np.concatenate([others, points[:10] + np.float32(1e-6)])
    expected, _ = cKDTree(others).query(points)
    np.testing.assert_allclose(nearest_distances(points, others, chunk=128), expected, rtol=1e-5, atol=1e-9)


def test_chamfer_and_fscore_against_a_kd_tree(rng):
    prediction, truth = sets(rng, 500, 300)
    forward, backward = cKDTree(truth).query(prediction)[0], cKDTree(prediction).query(truth)[0]
    chamfer, fscore = compare_points(prediction, truth, THRESHOLDS)
    assert float(chamfer) == pytest.approx((forward.mean() + backward.mean()) / 2, rel=1e-5)
    for limit, score in zip(THRESHOLDS, fscore, strict=True):
        precision, recall = (forward < limit).mean(), (backward < limit).mean()
        assert float(score) == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-5)
    assert 0.05 < fscore[2] < 0.9


def test_padding_changes_nothing(rng):
    prediction, truth = sets(rng, 200, 150)
    plain = compare_points(prediction, truth, THRESHOLDS)
    padding = np.zeros((57, 3), np.float32)
    order = rng.permutation(257)
    padded = np.concatenate([prediction, padding])[order], np.concatenate([truth, padding])
    masks = (np.arange(257) < 200)[order], np.arange(207) < 150
    for a, b in zip(plain, compare_points(*padded, THRESHOLDS, *masks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_an_empty_prediction_is_infinitely_far(rng):
    prediction, truth = sets(rng, 20, 30)
    chamfer, fscore = compare_points(prediction, truth, THRESHOLDS, prediction_mask=np.zeros(20, bool))
    assert np.isinf(chamfer) and np.all(np.asarray(fscore) == 0)


def grids(rng):
    truth = rng.uniform(size=(3, 9, 8, 7)) < 0.05
    truth[:, 0, 0, 0] = truth[:, -1, -1, -1] = True
    prediction = np.roll(truth, 1, axis=1) ^ (rng.uniform(size=truth.shape) < 0.02)
    return prediction, truth


def test_voxel_counts_against_scipy(rng):
    prediction, truth = grids(rng)
    cube = np.ones((3, 3, 3))
    counts = jax.jit(voxel_counts)(prediction, truth)
    for k, (p, t) in enumerate(zip(prediction, truth, strict=True)):
        assert counts.predicted[k] == p.sum() and counts.truth[k] == t.sum() and counts.shared[k] == (p & t).sum()
        assert counts.predicted_near[k] == (p & binary_dilation(t, cube)).sum()
        assert counts.truth_near[k] == (t & binary_dilation(p, cube)).sum()


def test_rates_over_all_objects(rng):
    prediction, truth = grids(rng)
    rates = voxel_rates(voxel_counts(prediction, truth))
    shared = (prediction & truth).sum()
    assert rates["precision"]["exact"] == pytest.approx(shared / prediction.sum())
    assert rates["recall"]["exact"] == pytest.approx(shared / truth.sum())
    assert rates["iou"]["exact"] == pytest.approx(shared / (prediction | truth).sum())
    for name in ("precision", "recall", "iou"):
        assert 1 >= rates[name]["within_one_voxel"] > rates[name]["exact"]


def test_a_shell_one_voxel_off_is_right_within_one_voxel():
    truth = np.zeros((8, 8, 8), bool)
    truth[3] = True
    prediction = np.roll(truth, 1, axis=0)
    rates = voxel_rates(voxel_counts(prediction, truth))
    assert rates["iou"] == {"exact": 0.0, "within_one_voxel": 1.0}


def test_nothing_predicted_scores_zero():
    truth = np.ones((4, 4, 4), bool)
    rates = voxel_rates(voxel_counts(np.zeros_like(truth), truth))
    assert rates["precision"] == rates["recall"] == rates["iou"] == {"exact": 0.0, "within_one_voxel": 0.0}
