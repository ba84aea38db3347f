"""The released GeoLRM checkpoint: its names and layout, in and out."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geolrm_jax.inference import abstract_model
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.precision import Precision
from geolrm_jax.runtime.streamed import Streamed
from geolrm_jax.weights.dinov2_names import OLD_BY_NEW, VIT
from geolrm_jax.weights.files import write_tensors
from geolrm_jax.weights.names import (
    BATCH_NORM,
    CONV,
    CONV_TRANSPOSED,
    LINEAR,
    NORM,
    TWO_LEADING,
    Leaf,
    Row,
    check,
    collapse,
    match,
    nest,
    renamed,
    under,
)

BLOCK: tuple[Row, ...] = (
    ("self_attention_norm", "norm1", NORM),
    ("self_attention.wq", "self_attention.query", LINEAR),
    ("self_attention.wk", "self_attention.key", LINEAR),
    ("self_attention.wv", "self_attention.value", LINEAR),
    ("self_attention.wo", "self_attention.out", LINEAR),
    ("cross_attention_norm", "norm2", NORM),
    ("cross_attention.deformable_attention.sampling_offsets", "cross_attention.offsets", LINEAR),
    ("cross_attention.deformable_attention.attention_weights", "cross_attention.logits", LINEAR),
    ("cross_attention.deformable_attention.value_proj", "cross_attention.value", LINEAR),
    ("cross_attention.cross_view_weight", "cross_attention.view_logit", LINEAR),
    ("cross_attention.output_proj", "cross_attention.out", LINEAR),
    ("ffn_norm", "norm3", NORM),
    ("feed_forward.w1", "mlp.w1", LINEAR),
    ("feed_forward.w2", "mlp.w2", LINEAR),
    ("feed_forward.w3", "mlp.w3", LINEAR),
)
ENCODER: tuple[Row, ...] = (
    *under("model", "vit", VIT),
    ("deconv.0", "upsample", CONV_TRANSPOSED),
    ("deconv.1", "high_norm", BATCH_NORM),
    ("low_level_encoder.0", "low", CONV),
    ("low_level_encoder.1", "low_norm", BATCH_NORM),
)
TRANSFORMER: tuple[Row, ...] = (
    ("query_token", "query", TWO_LEADING),
    *under("layers.{n}", "blocks", BLOCK),
    ("norm", "norm", NORM),
)
NETWORK: tuple[Row, ...] = (*under("encoder", "encoder", ENCODER), *under("transformer", "transformer", TRANSFORMER))
RELEASED: tuple[Row, ...] = (
    *under("serializer", "proposal", NETWORK),
    ("serializer.upsample", "proposal.upsample", LINEAR),
    *under("lrm_generator", "reconstruction", NETWORK),
    ("lrm_generator.renderer.latent_decoder.0", "reconstruction.decoder.hidden", LINEAR),
    ("lrm_generator.renderer.latent_decoder.2", "reconstruction.decoder.out", LINEAR),
)
IGNORED = "lpips."  # the loss's weights, which training had beside the model's

Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a released checkpoint becomes our variables.

    Attributes:
      leaves: every array of the model.
      names: the file's key by the table's, which has the older names of Hugging Face.
      ignored: keys of the file that are no part of the model.
    """

    leaves: tuple[Leaf, ...]
    names: Mapping[str, str]
    ignored: tuple[str, ...]

    def load(self, leaf: Leaf, read: Read) -> np.ndarray:
        """One of our arrays; `read` gets the file's keys."""
        return leaf.load(lambda key: read(self.names[key]))

    @property
    def consumed(self) -> int:
        """Keys of the file that the model takes."""
        return sum(len(leaf.keys) for leaf in self.leaves)

    def check_types(self, dtypes: Mapping[str, np.dtype], where: str) -> tuple[str, ...]:
        """Raises a ValueError if integers stand for floats or the other way; returns keys that lose bits here."""
        ours = {self.names[key]: leaf.dtype for leaf in self.leaves for key in leaf.keys}
        wrong = [f"{key} is {dtypes[key]}" for key, dtype in ours.items() if dtypes[key].kind != dtype.kind]
        if wrong:
            raise ValueError(f"{where}: of another type than the model's: {', '.join(collapse(wrong))}")
        return tuple(key for key, dtype in ours.items() if dtype.kind == "f" and dtypes[key].itemsize > dtype.itemsize)

    def streamed(self, read: Read, written: Callable[[int], None]) -> dict[str, Any]:
        """`params` and `batch_stats` for `save_streamed`; `written` is told how many arrays were loaded."""
        counter = itertools.count(1)

        def load(leaf: Leaf) -> np.ndarray:
            array = self.load(leaf, read)
            written(next(counter))
            return array

        return nest(self.leaves, lambda leaf: Streamed(leaf.shape, leaf.dtype, functools.partial(load, leaf)))

    def parts(self) -> dict[str, int]:
        """Parameters of each part, by its path."""
        counts: dict[str, int] = {}
        for leaf in self.leaves:
            if leaf.collection == "params":
                part = ".".join(leaf.path.split(".")[:2])
                counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
        return counts


def plan(shapes: Mapping[str, tuple[int, ...]], config: GeoLRMConfig, *, where: str = "the checkpoint") -> Plan:
    """Decides where each array comes from, before anything is read.

    Args:
      shapes: of the checkpoint's tensors, by the released names or with the newer ones of Hugging Face.
      config: of the model; all sizes come from it.
      where: the checkpoint's name, for messages.

    Raises:
      ValueError: if keys are missing, unexpected (`lpips.*` is ignored) or of another shape; it lists them all.
    """
    leaves = tuple(released_leaves(config))
    ignored = tuple(key for key in shapes if key.startswith(IGNORED))
    names = renamed([key for key in shapes if not key.startswith(IGNORED)], OLD_BY_NEW)
    check(leaves, {name: tuple(shapes[key]) for name, key in names.items()}, where)
    return Plan(leaves, names, ignored)


def released_leaves(config: GeoLRMConfig) -> list[Leaf]:
    """Every array of a model with its released names.

    Raises:
      ValueError: if the model has arrays that the released layout has no name for.
    """
    return match(RELEASED, abstract_model(config, Precision())[1])


def convert(shapes: Mapping[str, tuple[int, ...]], read: Read, config: GeoLRMConfig) -> dict[str, Any]:
    """A released checkpoint as `params` and `batch_stats`, all in memory; raises as `plan` does.

    Args:
      shapes: of its tensors.
      read: the tensor of a key; a dict's `__getitem__` will do.
      config: of the model.
    """
    planned = plan(shapes, config)
    return nest(planned.leaves, lambda leaf: planned.load(leaf, read))


def export(path: Path | str, config: GeoLRMConfig, read: Callable[[str, str], np.ndarray]) -> int:
    """Writes a model as safetensors with the released names, whole or not at all; returns the number of keys.

    Args:
      path: of the file.
      config: of the model.
      read: one of our arrays, by collection and path; it is asked once for each.

    Raises:
      ValueError: if the model has arrays that the released layout has no name for.
    """
    leaf_of = {key: leaf for leaf in released_leaves(config) for key in leaf.keys}
    read_leaf = functools.lru_cache(maxsize=1)(lambda leaf: read(leaf.collection, leaf.path))
    write_tensors(
        path,
        {key: leaf.there_shape for key, leaf in leaf_of.items()},
        {key: np.dtype(np.int64) if leaf.dtype.kind == "i" else leaf.dtype for key, leaf in leaf_of.items()},
        lambda key: leaf_of[key].store(read_leaf(leaf_of[key]), key),
    )
    return len(leaf_of)
