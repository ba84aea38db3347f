"""Distances between point sets (Chamfer, F-score) and agreement of voxel grids."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from geolrm_jax.scene import AnyArray, pytree


def nearest_distances(
    points: Float[AnyArray, "n 3"],
    others: Float[AnyArray, "m 3"],
    others_mask: Bool[AnyArray, "m"] | None = None,
    chunk: int = 128,
) -> Float[Array, "n"]:
    """Euclidean distance of every point to the nearest of `others`, exact, in (chunk, M) pieces.

    Differences are taken before squaring: |a|^2 + |b|^2 - 2ab would lose the small distances that matter.

    Args:
      others_mask: False leaves a point out; with none left the distances are infinite.
      chunk: points compared at once.
    """
    points, others = jnp.asarray(points), jnp.asarray(others)
    if others_mask is not None:
        others = jnp.where(jnp.asarray(others_mask)[:, None], others, jnp.inf)

    def nearest(point):
        return jnp.sqrt(jnp.min(sum((point[axis] - others[:, axis]) ** 2 for axis in range(3)), initial=jnp.inf))

    return jax.lax.map(nearest, points, batch_size=chunk)


def compare_points(
    prediction: Float[AnyArray, "n 3"],
    truth: Float[AnyArray, "m 3"],
    thresholds: Sequence[float],
    prediction_mask: Bool[AnyArray, "n"] | None = None,
    truth_mask: Bool[AnyArray, "m"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "k"]]:
    """Chamfer distance and F-scores of two samples of surfaces, in one frame and unit, without alignment.

    Args:
      thresholds: distances under which a point counts as matched, in the points' unit.
      prediction_mask: False marks padding; likewise `truth_mask`.

    Returns:
      Chamfer distance, the mean of the two directed mean distances, and one F-score a threshold, the harmonic mean of
      precision and recall (Knapitsch et al. 2017). An empty set is infinitely far and scores 0.
    """
    prediction_mask = jnp.ones(prediction.shape[0], bool) if prediction_mask is None else jnp.asarray(prediction_mask)
    truth_mask = jnp.ones(truth.shape[0], bool) if truth_mask is None else jnp.asarray(truth_mask)
    to_truth = nearest_distances(prediction, truth, truth_mask)
    to_prediction = nearest_distances(truth, prediction, prediction_mask)
    limits = jnp.asarray(thresholds)[:, None]
    precision = _masked_mean(to_truth < limits, prediction_mask, empty=0.0)
    recall = _masked_mean(to_prediction < limits, truth_mask, empty=0.0)
    directed = [_masked_mean(to_truth, prediction_mask, jnp.inf), _masked_mean(to_prediction, truth_mask, jnp.inf)]
    return 0.5 * (directed[0] + directed[1]), 2 * precision * recall / jnp.maximum(precision + recall, 1e-12)


def _masked_mean(values: Array, mask: Bool[Array, "n"], empty: float | Array) -> Array:
    count = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask, values, 0.0), axis=-1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, empty)


@pytree
class VoxelCounts:
    """Voxels of two occupancies, one count per grid: what precision, recall and IoU are made of.

    Attributes:
      predicted: occupied in the prediction.
      truth: occupied in the ground truth.
      shared: occupied in both.
      predicted_near: occupied in the prediction, with ground truth among the voxel and its 26 neighbours.
      truth_near: occupied in the ground truth, with prediction among the voxel and its 26 neighbours.
    """

    predicted: Int[AnyArray, "*batch"]
    truth: Int[AnyArray, "*batch"]
    shared: Int[AnyArray, "*batch"]
    predicted_near: Int[AnyArray, "*batch"]
    truth_near: Int[AnyArray, "*batch"]


def voxel_counts(prediction: Bool[AnyArray, "*batch x y z"], truth: Bool[AnyArray, "*batch x y z"]) -> VoxelCounts:
    """Counts of each grid, to be summed over objects and turned into rates by `voxel_rates`."""
    prediction, truth = jnp.asarray(prediction), jnp.asarray(truth)

    def count(occupied):
        return jnp.sum(occupied, axis=(-3, -2, -1), dtype=jnp.int32)

    return VoxelCounts(
        predicted=count(prediction),
        truth=count(truth),
        shared=count(prediction & truth),
        predicted_near=count(prediction & _dilated(truth)),
        truth_near=count(truth & _dilated(prediction)),
    )


def _dilated(occupied: Bool[Array, "*batch x y z"]) -> Bool[Array, "*batch x y z"]:
    """Occupied voxels and their 26 neighbours, one axis after the other."""
    for axis in (-3, -2, -1):
        size = occupied.shape[axis]
        padding = [(0, 0)] * occupied.ndim
        padding[axis] = (1, 1)
        padded = jnp.pad(occupied, padding)
        before, after = (jax.lax.slice_in_dim(padded, k, k + size, axis=occupied.ndim + axis) for k in (0, 2))
        occupied = before | occupied | after
    return occupied


def voxel_rates(counts: VoxelCounts) -> dict[str, dict[str, float]]:
    """Precision, recall and IoU over all grids together, exact and within one voxel.

    Exactly, IoU = 1 / (1/precision + 1/recall - 1); the same formula defines it within one voxel, where the two sides
    count different voxels. A rate without voxels to count is 0.

    Returns:
      `{"precision" | "recall" | "iou": {"exact" | "within_one_voxel": rate}}`.
    """
    total = jax.tree.map(lambda count: int(np.sum(np.asarray(count), dtype=np.int64)), counts)
    hits = {"exact": (total.shared, total.shared), "within_one_voxel": (total.predicted_near, total.truth_near)}
    rates = {"precision": {}, "recall": {}, "iou": {}}
    for name, (predicted, found) in hits.items():
        precision, recall = predicted / max(total.predicted, 1), found / max(total.truth, 1)
        rates["precision"][name], rates["recall"][name] = precision, recall
        rates["iou"][name] = 1 / (1 / precision + 1 / recall - 1) if precision and recall else 0.0
    return rates
