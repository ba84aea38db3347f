"""Runs a protocol: reconstructs every object, renders its targets, measures, collects pictures."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from geolrm_jax.data.examples import make_example
from geolrm_jax.data.on_demand import Records
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
from geolrm_jax.rendering import Renderer
from geolrm_jax.runtime import hardware, logging
from geolrm_jax.scene import Gaussians, Rendering, Views

TIMED_RUNS = 10  # of the first object
SURFACE = "centres of Gaussians with opacity above 0.5"


def evaluate_objects(
    model: Model,
    records: Records,
    chosen: Sequence[int],
    protocol: Protocol,
    *,
    lpips: Lpips | None,
    pictures: int,
) -> list[ObjectResult]:
    """Results of the chosen records, in order.

    Args:
      model: restored.
      records: decoded one at a time; a damaged one ends the evaluation with an error that names it.
      chosen: their indices.
      protocol: views, sizes, thresholds.
      lpips: None leaves the metric out.
      pictures: the first so many objects carry pictures.
    """
    if not len(chosen):
        raise ValueError("the data set has no objects to evaluate")
    results, render = [], Renderer(background=jnp.ones(3))
    with logging.progress("evaluation", len(chosen), unit="object") as bar:
        for done, index in enumerate(chosen):
            runs = TIMED_RUNS if done == 0 else 1
            result = evaluate_object(
                model, render, records[index], protocol, lpips=lpips, runs=runs, drawn=done < pictures
            )
            results.append(result)
            mean = float(np.mean([r.prediction.psnr.mean() for r in results]))
            bar.update(done + 1, {"psnr": mean})
    return results


def evaluate_object(
    model: Model,
    render: Renderer,
    record: Record,
    protocol: Protocol,
    *,
    lpips: Lpips | None,
    runs: int,
    drawn: bool,
) -> ObjectResult:
    """One object, timed over `runs` reconstructions after one that compiles if it must."""
    everything = record.cameras(range(len(record.view_ids)))
    inputs = choose_inputs(protocol, record.view_ids, everything)
    sizes = ((protocol.input_size,) * 2, (protocol.render_size,) * 2)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], make_example(record, inputs, protocol.targets, *sizes))

    (gaussians, logits), reconstruct_seconds = timed(lambda: reconstruct_batch(model, batch.inputs), runs)
    render.make_room(gaussians, batch.targets.cameras)
    rendering, render_seconds = timed(lambda: render(gaussians, batch.targets.cameras), runs)

    targets = jax.tree.map(lambda x: x[0], batch.targets)
    truth = targets.over(1.0)
    pictures = {
        "prediction": jnp.clip(rendering.rgb[0], 0.0, 1.0),
        "white": white_baseline(targets),
        "nearest_view": nearest_view_baseline(jax.tree.map(lambda x: x[0], batch.inputs), targets),
    }
    chamfer, fscores = score_surface(jax.tree.map(lambda x: x[0], gaussians), record, protocol)
    hull = hull_surface(batch.inputs, logits.shape[-1])
    return ObjectResult(
        name=record.id,
        input_views=inputs,
        target_views=protocol.targets,
        **{name: score_images(picture, truth, lpips) for name, picture in pictures.items()},
        chamfer=chamfer,
        fscores=fscores,
        voxels=jax.device_get(voxel_counts(logits > 0, batch.occupancy)),
        hull_voxels=jax.device_get(voxel_counts(hull, batch.occupancy)),
        anchors=int(min(jnp.sum(logits > 0), model.max_anchors)),
        gaussians=int(gaussians.mask.sum()),
        reconstruct_seconds=reconstruct_seconds,
        render_seconds=render_seconds,
        pictures=draw(batch.inputs, truth, pictures["prediction"], rendering) if drawn else None,
    )


def timed(call: Callable[[], Any], runs: int) -> tuple[Any, float]:
    """The result, and the median seconds of `runs` synchronised calls after one that compiles if it must."""
    result = jax.block_until_ready(call())
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def score_images(pictures: Array, truth: Array, lpips: Lpips | None) -> ImageScores:
    """Image metrics of pictures (T, H, W, 3) in [0, 1]."""
    return ImageScores(*jax.device_get(_image_metrics(pictures, truth, lpips)))


@jax.jit
def _image_metrics(pictures, truth, lpips):
    distance = lpips.distance(2 * pictures - 1, lpips.target_features(2 * truth - 1)) if lpips else None
    return psnr(pictures, truth), ssim(pictures, truth), distance


def score_surface(gaussians: Gaussians, record: Record, protocol: Protocol) -> tuple[float, tuple[float, ...]]:
    """Chamfer distance and F-scores of the centres of solid Gaussians (G, ...) against unprojected depth."""
    views = record.views()
    solid = np.asarray(gaussians.mask & (gaussians.opacities > protocol.surface_opacity))
    truth = np.asarray(unproject(views.cameras, jnp.asarray(views.depth)))[views.depth > 0]
    samples = [
        sample(points * protocol.surface_scale, protocol.surface_points)
        for points in (np.asarray(gaussians.means)[solid], truth)
    ]
    (prediction, prediction_mask), (truth, truth_mask) = samples
    compare = jax.jit(compare_points, static_argnames="thresholds")
    chamfer, fscores = compare(prediction, truth, protocol.fscore_thresholds, prediction_mask, truth_mask)
    return float(chamfer), tuple(np.asarray(fscores).tolist())


def sample(points: Float[np.ndarray, "n 3"], count: int) -> tuple[Float[np.ndarray, "m 3"], Bool[np.ndarray, "m"]]:
    """`count` of the points at random, the same ones every time; of fewer, all, padded, with their mask."""
    chosen = np.random.default_rng(0).permutation(len(points))[:count]
    padded = np.zeros((count, 3), np.float32)
    padded[: len(chosen)] = points[chosen]
    return padded, np.arange(count) < len(chosen)


def draw(inputs: Views, truth: Array, prediction: Array, rendering: Rendering) -> Pictures:
    """The pictures of one object as 8-bit arrays."""
    truth, prediction, alpha, depth = map(np.asarray, (truth, prediction, rendering.alpha[0], rendering.depth[0]))
    return Pictures(
        inputs=to_uint8(np.asarray(inputs.over(1.0)[0])),
        targets=to_uint8(truth),
        predictions=to_uint8(prediction),
        errors=error_map(prediction, truth),
        depths=depth_map(depth / np.maximum(alpha, 1e-6), alpha),
    )


def peak_memory_bytes() -> int:
    """Peak device memory; on a device that does not tell (CPU), the peak resident memory of the process."""
    known = hardware.memory()
    return int(known.get("device_memory", known["host_memory"]))
