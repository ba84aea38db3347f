"""From built records to batches: random access, view choice, decoding, batching and prefetching, by Grain.

A dataset is a pure function of (seed, position): position p of the endless, per-epoch shuffled order of records, and a
random number drawn for it. Both are fixed before the order is dealt out to processes, so that any number of processes
together sees the same sequence, and a restored iterator goes on exactly where it was saved.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Float32, UInt8
from PIL import Image

from geolrm_jax.data.builders.records import DataConfig, build
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.data.reader import RecordSource, open_split
from geolrm_jax.data.record import Encoding, PosedImages, Record, find_rows
from geolrm_jax.geometry.cameras import resize
from geolrm_jax.scene import Batch, Cameras, Views

__all__ = [
    "RING_VIEWS",
    "DataConfig",
    "Encoding",
    "FolderSource",
    "PosedImages",
    "ProceduralSource",
    "Record",
    "RecordSource",
    "ViewRule",
    "build",
    "choose_views",
    "make_example",
    "make_views",
    "open_split",
    "training_dataset",
]

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


def _resize_channels(image: Float32[np.ndarray, "h w c"], height: int, width: int) -> Float32[np.ndarray, "h2 w2 c"]:
    """Antialiased bilinear resizing (a triangle filter as wide as the larger pixel), in floating point."""
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
    resized = [channel.resize((width, height), Image.Resampling.BILINEAR) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


def _resize_picture(rgba: UInt8[np.ndarray, "h w 4"], height: int, width: int) -> Float32[np.ndarray, "h2 w2 4"]:
    """Premultiplied colour and alpha at another size; what stands under zero alpha never bleeds in."""
    picture = rgba.astype(np.float32) / 255.0
    picture[..., :3] *= picture[..., 3:]
    return picture if picture.shape[:2] == (height, width) else _resize_channels(picture, height, width)


def _resize_depth(depth: Float32[np.ndarray, "h w"], height: int, width: int) -> Float32[np.ndarray, "h2 w2"]:
    """The depth of the nearest pixel."""
    rows = ((np.arange(height) + 0.5) * depth.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * depth.shape[1] / width).astype(int)
    return depth[rows[:, None], columns]


def make_views(views: PosedImages, size: tuple[int, int]) -> Views:
    """Decoded views as the model's `Views` (V,), NumPy leaves, resized to `size` (H, W), cameras with them."""
    pictures = np.stack([_resize_picture(rgba, *size) for rgba in views.rgba])
    depth = np.stack([_resize_depth(depth, *size) for depth in views.depth])
    cameras = resize(views.cameras, *size)
    return Views(cameras, pictures[..., :3], pictures[..., 3], depth, np.ones(len(views.view_ids), bool))


def make_example(
    record: Record,
    input_ids: Sequence[int],
    target_ids: Sequence[int],
    input_size: tuple[int, int],
    render_size: tuple[int, int],
    index: int = 0,
) -> Batch:
    """One object's inputs and targets: a `Batch` without its leading axis, NumPy leaves.

    Args:
      record: the object; only the views named here are decoded.
      input_ids: view numbers the network may see.
      target_ids: view numbers that supervise; may repeat the inputs'.
      input_size, render_size: (H, W) of inputs and targets.
      index: the record's number in its split.

    Raises:
      ValueError: if the record lacks a view.
    """
    wanted = sorted({int(view) for view in (*input_ids, *target_ids)})
    decoded = record.views(wanted)

    def pick(ids: Sequence[int], size: tuple[int, int]) -> Views:
        rows = [wanted.index(int(view)) for view in ids]
        cameras = decoded.cameras
        chosen = Cameras(cameras.world_from_camera[rows], cameras.intrinsics[rows], cameras.height, cameras.width)
        return make_views(PosedImages(decoded.view_ids[rows], decoded.rgba[rows], decoded.depth[rows], chosen), size)

    inputs, targets = pick(input_ids, input_size), pick(target_ids, render_size)
    batch = Batch(_stack([inputs]), _stack([targets]), record.occupancy[None], np.array([index], np.int32))
    return jax.tree.map(lambda x: x[0], batch)


def _stack(trees: Sequence[Any]) -> Any:
    """Pytrees of NumPy arrays with a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


class _Draw(grain.transforms.RandomMap):
    """A record's number becomes (number, random number for the choice of its views)."""

    def random_map(self, element: int, rng: np.random.Generator) -> tuple[int, int]:
        return element, int(rng.integers(2**63))


@dataclasses.dataclass(frozen=True)
class _Decode(grain.transforms.Map):
    """Reads a record, chooses its views and decodes them."""

    source: RecordSource
    views: int
    inputs: int
    input_size: tuple[int, int]
    render_size: tuple[int, int]
    view_rule: ViewRule

    def map(self, element: tuple[int, int]) -> Batch:
        index, choice = element
        record = self.source[index]
        rng = np.random.default_rng(choice)
        ids = choose_views(record.view_ids, self.views, self.view_rule, rng, record.id)
        return make_example(record, ids[: self.inputs], ids, self.input_size, self.render_size, index)


def training_dataset(
    source: RecordSource,
    *,
    batch: int,
    views: int,
    inputs: int,
    input_size: tuple[int, int],
    render_size: tuple[int, int],
    seed: int,
    shard: tuple[int, int] = (0, 1),
    view_rule: ViewRule = "paper",
    threads: int = 2,
    processes: int = 0,
) -> grain.IterDataset:
    """Endless batches of one process.

    Args:
      source: a split's records.
      batch: objects in a batch of this process; step k of all processes together holds the next objects in order.
      views: views drawn of each object; all are targets.
      inputs: how many of them are inputs too, the first ones.
      input_size, render_size: (H, W) of inputs and targets.
      seed: of order and view choice.
      shard: (index, count) of this process; the global order does not depend on the count.
      view_rule: see `choose_views`.
      threads: that decode ahead, in this process or in each worker process.
      processes: worker processes; 0 decodes in this one, which is enough where steps are slow.

    Returns:
      A Grain dataset of `Batch` (B leading, NumPy leaves); its iterator has `get_state` and `set_state`.

    Raises:
      ValueError: if there are fewer views than inputs, or no records.
    """
    if not 0 < inputs <= views:
        raise ValueError(f"expected 0 < inputs <= views, got inputs={inputs}, views={views}")
    if len(source) == 0:
        raise ValueError(f"{source!r} is empty")
    index, count = shard
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    decode = _Decode(source, views, inputs, input_size, render_size, view_rule)
    # The draw stands before the slice: after it, every process would draw the same numbers for different records.
    examples = order.random_map(_Draw())[index::count].map(decode).batch(batch, drop_remainder=True, batch_fn=_stack)
    dataset = examples.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which a program without absl never parses.
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes))
    return dataset
