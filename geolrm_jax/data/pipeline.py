"""From built records to batches: random access, view choice, decoding, batching and prefetching, by Grain.

A dataset is a pure function of (seed, position): position p of the endless, per-epoch shuffled order of records, and a
random number drawn for it. Both are fixed before the order is dealt out to processes, so that any number of processes
together sees the same sequence, and a restored iterator goes on exactly where it was saved.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import grain.python as grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, UInt8
from PIL import Image

from geolrm_jax.data.builders.records import DataConfig, build, from_features, read_config
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.data.record import Encoding, PosedImages, Record, find_rows
from geolrm_jax.geometry.cameras import resize
from geolrm_jax.scene import Batch, Cameras, Views

__all__ = [
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
_RING = 24


class RecordSource:
    """Random access to the records of one split; picklable."""

    def __init__(self, directory: Path | str, split: str):
        read_config(directory)
        [features_file] = Path(directory).glob("*/*/features.json")
        self.directory, self.split = Path(directory), split
        builder = tfds.builder_from_directory(features_file.parent)
        if split not in builder.info.splits:
            raise ValueError(f"{directory} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        self._records = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return from_features(self._records[int(index)])

    def __repr__(self) -> str:
        return f"RecordSource({self.directory}, {self.split})"

    def __reduce__(self):
        return RecordSource, (self.directory, self.split)


def open_split(directory: Path | str, split: str) -> RecordSource:
    """The records of a split ("train" or "test") of a built set.

    Raises:
      FileNotFoundError: if the directory holds no finished set.
      ValueError: if the set has no such split or another format version.
    """
    return RecordSource(directory, split)


def choose_views(
    view_ids: np.ndarray, views: int, inputs: int, rule: ViewRule, rng: np.random.Generator, origin: str
) -> list[int]:
    """Numbers of the views of one training example; the first `inputs` of them are its inputs.

    "paper": `views` of the record's views, drawn without replacement. "released": four views 90 degrees apart on the
    ring 0..23 from a random start, then random others; inputs alternate between the two groups, starting with the
    ring, so that any leading number of them holds at least as many ring views as others.

    Raises:
      ValueError: naming `origin`, if the record has too few views.
    """
    present = view_ids.tolist()
    if len(present) < views:
        raise ValueError(f"{origin} has {len(present)} views, {views} are to be drawn")
    if rule == "paper":
        return [present[i] for i in rng.permutation(len(present))[:views]]
    start = int(rng.integers(_RING))
    ring = [(start + 6 * i) % _RING for i in rng.permutation(4)]
    find_rows(view_ids, ring, origin)
    others = [present[i] for i in rng.permutation(len(present)) if present[i] not in ring][: max(views - 4, 0)]
    mixed = [view for pair in zip(ring, others, strict=False) for view in pair]
    return (mixed + ring[len(others) :] + others[4:])[:views]


def _resize_channels(image: Float32[np.ndarray, "h w c"], height: int, width: int) -> Float32[np.ndarray, "h2 w2 c"]:
    """Antialiased bilinear resizing (a triangle filter as wide as the larger pixel), in floating point."""
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
    resized = [channel.resize((width, height), Image.Resampling.BILINEAR) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


def _resize_picture(rgba: UInt8[np.ndarray, "h w 4"], height: int, width: int) -> Float32[np.ndarray, "h2 w2 4"]:
    """Premultiplied colour and alpha at another size: colour is weighted by coverage, background colour never bleeds."""
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

    return _unchecked_batch(
        pick(input_ids, input_size), pick(target_ids, render_size), record.occupancy, np.int32(index)
    )
