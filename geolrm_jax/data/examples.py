"""From one record to one example: which views are drawn, and how they become arrays for networks and losses."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from geolrm_jax.data.record import PosedImages, Record, find_rows
from geolrm_jax.geometry.images import resize_views
from geolrm_jax.scene import Batch, Views

ViewRule = Literal["paper", "released"]
RING_VIEWS = 4  # of the released rule
_RING = 24


def choose_views(view_ids: np.ndarray, views: int, rule: ViewRule, rng: np.random.Generator, origin: str) -> list[int]:
    """Numbers of the views of one training example; the first ones are its inputs.

    "paper": `views` of the record's views, drawn without replacement. "released": first four views 90 degrees apart on
    the ring 0..23 from a random start, then random others.

    Raises:
      ValueError: naming `origin`, if the record has too few views.
    """
    present = view_ids.tolist()
    if len(present) < views:
        raise ValueError(f"{origin} has {len(present)} views, {views} are to be drawn")
    shuffled = [present[i] for i in rng.permutation(len(present))]
    if rule == "paper":
        return shuffled[:views]
    start = int(rng.integers(_RING))
    ring = [(start + step * _RING // RING_VIEWS) % _RING for step in range(RING_VIEWS)]
    find_rows(view_ids, ring, origin)
    return [*ring, *(view for view in shuffled if view not in ring)][:views]


def premultiply(
    rgba: UInt8[np.ndarray, "v h w 4"],
) -> tuple[Float32[np.ndarray, "v h w 3"], Float32[np.ndarray, "v h w"]]:
    """Colours times alpha, and alpha, both in [0, 1]."""
    rgb, alpha = np.empty((*rgba.shape[:3], 3), np.float32), np.empty(rgba.shape[:3], np.float32)
    unit = np.float32(1 / 255)
    for view, picture in enumerate(rgba):  # one by one: a view's planes stay in the cache
        channels = picture.astype(np.float32)
        np.multiply(channels[..., 3], unit, out=alpha[view])
        factor = alpha[view] * unit
        for channel in range(3):
            np.multiply(channels[..., channel], factor, out=rgb[view, ..., channel])
    return rgb, alpha


def make_views(views: PosedImages, size: tuple[int, int]) -> Views:
    """Decoded views as the model's `Views` (V,), NumPy leaves, resized to `size` (H, W), cameras with them.

    Colours are premultiplied before they are resized: what stands under zero alpha never bleeds in.
    """
    rgb, alpha = premultiply(views.rgba)
    return resize_views(Views(views.cameras, rgb, alpha, views.depth, np.ones(len(rgb), bool)), *size)


def resize_images(images: PosedImages, height: int | None) -> PosedImages:
    """The same views at another height and a width in proportion, back in 8 bits with straight alpha; None: as is."""
    if height in (None, images.cameras.height):
        return images
    width = round(height * images.cameras.width / images.cameras.height)
    views = make_views(images, (height, width))
    rgb = views.rgb / np.maximum(views.alpha, 1e-6)[..., None]
    rgba = np.rint(np.concatenate([rgb, views.alpha[..., None]], axis=-1).clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return PosedImages(images.view_ids, rgba, views.depth, views.cameras)


def make_example(
    record: Record,
    input_ids: Sequence[int],
    target_ids: Sequence[int],
    input_size: tuple[int, int],
    render_size: tuple[int, int],
    index: int = 0,
    change: Callable[[Views], Views] = lambda views: views,
) -> Batch:
    """One object's inputs and targets: a `Batch` without its leading axis, NumPy leaves.

    Args:
      record: the object; only the views named here are decoded.
      input_ids: view numbers the network may see.
      target_ids: view numbers that supervise; may repeat the inputs'.
      input_size, render_size: (H, W) of inputs and targets.
      index: the record's number in its split.
      change: of all views together at their stored size, targets first, then inputs that are no targets.

    Returns:
      The example. Where inputs are targets too, at one size, their arrays may share memory.

    Raises:
      ValueError: if the record lacks a view.
    """
    ids = list(dict.fromkeys(int(view) for view in (*target_ids, *input_ids)))
    views = change(make_views(record.views(ids), record.size))
    sized = {size: resize_views(views, *size) for size in {input_size, render_size}}

    def pick(chosen: Sequence[int], size: tuple[int, int]) -> Views:
        rows = [ids.index(int(view)) for view in chosen]
        # A slice where it will do: it copies nothing.
        which = slice(len(rows)) if rows == list(range(len(rows))) else rows
        return jax.tree.map(lambda x: x[None, which], sized[size])

    inputs, targets = pick(input_ids, input_size), pick(target_ids, render_size)
    batch = Batch(inputs, targets, record.occupancy[None], np.array([index], np.int32))
    return jax.tree.map(lambda x: x[0], batch)
