"""Runs a protocol: reconstructs every object, renders its targets, measures, collects pictures."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from geolrm_jax.data.pipeline import make_example
from geolrm_jax.data.record import Record
from geolrm_jax.evaluation.protocol import Protocol, choose_inputs, nearest_view_baseline, white_baseline
from geolrm_jax.evaluation.results import ImageScores, ObjectResult, Pictures
from geolrm_jax.evaluation.visual_hull import hull_surface
from geolrm_jax.export.pages import depth_map, error_map, to_uint8
from geolrm_jax.geometry.cameras import unproject
from geolrm_jax.inference import Model, reconstruct_batch
from geolrm_jax.losses.lpips import Lpips
from geolrm_jax.metrics.geometry import compare_points, voxel_counts
from geolrm_jax.metrics.image import psnr, ssim
from geolrm_jax.rendering import rasterize
from geolrm_jax.runtime import logging
from geolrm_jax.scene import Batch, Gaussians, Rendering

TIMED_RUNS = 10  # of the first object, for the median


def evaluate_objects(
    model: Model, records: Sequence[Record], protocol: Protocol, *, lpips: Lpips | None, pictures: int
) -> list[ObjectResult]:
    """Results of every record, in order.

    Args:
      model: restored.
      records: decoded one at a time; a damaged one ends the evaluation with an error that names it.
      protocol: views, sizes, thresholds.
      lpips: None leaves the metric out.
      pictures: the first so many objects carry pictures.
    """
    if not len(records):
        raise ValueError("the data set has no objects to evaluate")
    results = []
    with logging.progress("evaluation", len(records), unit="object") as bar:
        for index in range(len(records)):
            runs = TIMED_RUNS if index == 0 else 1
            result = evaluate_object(model, records[index], protocol, lpips=lpips, runs=runs, draw=index < pictures)
            results.append(result)
            mean = float(np.mean([r.prediction.psnr.mean() for r in results]))
            bar.update(index + 1, {"psnr": mean})
    return results


def evaluate_object(
    model: Model, record: Record, protocol: Protocol, *, lpips: Lpips | None, runs: int, draw: bool
) -> ObjectResult:
    """One object, timed over `runs` reconstructions after one that compiles if it must."""
    inputs = choose_inputs(protocol, record.view_ids, record.cameras)
    sizes = ((protocol.input_size,) * 2, (protocol.render_size,) * 2)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], make_example(record, inputs, protocol.targets, *sizes))

    (gaussians, logits), reconstruct_seconds = timed(lambda: reconstruct_batch(model, batch.inputs), runs)
    capacity = exact_capacity(gaussians, batch)
    rendering, render_seconds = timed(lambda: render_targets(gaussians, batch, capacity), 1)

    predicted = jnp.clip(rendering.rgb[0], 0.0, 1.0)
    target = batch.targets.over(1.0)[0]
    candidates = {
        "prediction": predicted,
        "white": white_baseline(batch.targets)[0],
        "nearest_view": nearest_view_baseline(batch.inputs, batch.targets)[0],
    }
    scores = {name: score_images(picture, target, lpips) for name, picture in candidates.items()}
    chamfer, fscores = surface_scores(gaussians, record, protocol)
    hull = hull_surface(batch.inputs, model_grid := logits.shape[-1])
    return ObjectResult(
        name=record.id,
        input_views=inputs,
        target_views=protocol.targets,
        **scores,
        chamfer=chamfer,
        fscores=fscores,
        voxels=jax.device_get(voxel_counts(logits[0] > 0, batch.occupancy[0])),
        hull_voxels=jax.device_get(voxel_counts(hull[0], batch.occupancy[0])),
        anchors=int(gaussians.mask.sum()) // (gaussians.mask.shape[-1] // model.max_anchors),
        gaussians=int(gaussians.mask.sum()),
        reconstruct_seconds=reconstruct_seconds,
        render_seconds=render_seconds,
        pictures=draw_pictures(batch, rendering, predicted, target) if draw else None,
    )


def timed(call, runs: int) -> tuple[Any, float]:
    """The result and the median seconds of `runs` synchronised calls, after one that warms up."""
    result = jax.block_until_ready(call())
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


@jax.jit
def score_images(picture, target, lpips: Lpips | None) -> ImageScores:
    """Scores of pictures (T, H, W, 3) in [0, 1] against the targets."""
    return ImageScores(
        psnr=psnr(picture, target),
        ssim=ssim(picture, target),
        lpips=None if lpips is None else lpips.distance(2 * picture - 1, lpips.target_features(2 * target - 1)),
    )
