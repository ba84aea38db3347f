"""DINOv2's published weights into `models/dinov2.py`: Hugging Face's files of either generation, and Meta's own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from geolrm_jax.models.dinov2 import ViTConfig
from geolrm_jax.precision import Precision
from geolrm_jax.runtime import logging
from geolrm_jax.weights.dinov2_names import OLD_BY_NEW, VIT
from geolrm_jax.weights.files import TensorFile, open_tensors
from geolrm_jax.weights.names import (
    CONV,
    LINEAR,
    NORM,
    ONE_LEADING,
    SAME,
    TWO_LEADING,
    Row,
    check,
    match,
    nest,
    renamed,
)

# Meta's names; query, key and value are the thirds of `attn.qkv`, which `_thirds` takes apart.
META: tuple[Row, ...] = (
    ("cls_token", "class_token", TWO_LEADING),
    ("mask_token", "mask_token", ONE_LEADING),
    ("pos_embed", "positions", ONE_LEADING),
    ("register_tokens", "registers", ONE_LEADING),
    ("patch_embed.proj", "patches", CONV),
    ("blocks.{n}.norm1", "blocks.norm1", NORM),
    ("blocks.{n}.attn.qkv.query", "blocks.query", LINEAR),
    ("blocks.{n}.attn.qkv.key", "blocks.key", LINEAR),
    ("blocks.{n}.attn.qkv.value", "blocks.value", LINEAR),
    ("blocks.{n}.attn.proj", "blocks.out", LINEAR),
    ("blocks.{n}.ls1.gamma", "blocks.scale1", SAME),
    ("blocks.{n}.norm2", "blocks.norm2", NORM),
    ("blocks.{n}.mlp.fc1", "blocks.fc1", LINEAR),
    ("blocks.{n}.mlp.fc2", "blocks.fc2", LINEAR),
    ("blocks.{n}.ls2.gamma", "blocks.scale2", SAME),
    ("norm", "norm", NORM),
)
THIRDS = ("query", "key", "value")

# What files carry besides the transformer: linear classifiers, poolers, and the parts of depth and segmentation models.
IGNORED = ("classifier.", "pooler.", "head.", "linear_head.", "neck.")

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


def load_dinov2(path: Path | str, config: ViTConfig) -> tuple[dict[str, Any], str]:
    """The parameters of a ViT, as NumPy arrays in its tree, and the file's SHA-256.

    Args:
      path: safetensors or a torch checkpoint with the names of `Dinov2Model` or `Dinov2Backbone`, of transformers
        before or from 5 on, or with Meta's own; all of them may stand behind a prefix such as `dinov2.`.
      config: of the model that they are for; the file does not tell the number of heads.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not readable, or does not fit: every key that is missing, unexpected or of another shape is
        listed. Classifiers and other heads (`IGNORED`) are left out, which a notice says.
    """
    file = open_tensors(path)
    rows, prefix = _layout_of(file)
    ignored = [key for key in file.shapes if key.removeprefix(prefix).startswith(IGNORED)]
    if ignored:
        logging.notice(f"{path}: {len(ignored)} tensors of heads are ignored: {', '.join(ignored)}")
    names = renamed([key for key in file.shapes if key not in ignored], OLD_BY_NEW)
    shapes, read = _thirds({name: file.shapes[key] for name, key in names.items()}, lambda name: file.read(names[name]))
    leaves = match([(prefix + theirs, ours, kind) for theirs, ours, kind in rows], {"params": _abstract(config)})
    check(leaves, shapes, str(path))
    return nest(leaves, lambda leaf: leaf.load(read))["params"], file.sha256


def init_from_dinov2(params: Mapping[str, Any], path: Path | str, config: ViTConfig) -> tuple[dict[str, Any], str]:
    """`params` with DINOv2's weights in the image encoder of every network, and the file's SHA-256.

    Args:
      params: `{"proposal": …, "reconstruction": …}` or one of them; not changed, shared where it stays.
      path: as in `load_dinov2`.
      config: of the encoders' ViT.

    Raises:
      FileNotFoundError, ValueError: as `load_dinov2`.
    """
    vit, digest = load_dinov2(path, config)
    return {name: {**net, "encoder": {**net["encoder"], "vit": vit}} for name, net in params.items()}, digest


def _layout_of(file: TensorFile) -> tuple[tuple[Row, ...], str]:
    """Whose names a file has, and what stands before them, told by the class token."""
    for rows in (VIT, META):
        token = rows[0][0]
        found = [key for key in file.shapes if key == token or key.endswith(f".{token}")]
        if len(found) > 1:
            raise ValueError(f"{file.path}: holds several vision transformers, with {', '.join(found)}; expected one")
        if found:
            return rows, found[0].removesuffix(token)
    some = ", ".join(list(file.shapes)[:5])
    raise ValueError(
        f"{file.path}: no weights of DINOv2, expected a key {VIT[0][0]} or {META[0][0]}; it has {some}"
        + (", …" if len(file.shapes) > 5 else "")
    )


def _thirds(shapes: Shapes, read: Read) -> tuple[Shapes, Read]:
    """The same tensors with every `attn.qkv` seen as three, each a third of its rows."""
    sources: dict[str, tuple[str, int]] = {}
    split: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module, _, tensor = name.rpartition(".")
        if module.endswith(".attn.qkv") and shape[0] % 3 == 0:
            for third, part in enumerate(THIRDS):
                sources[f"{module}.{part}.{tensor}"] = name, third
                split[f"{module}.{part}.{tensor}"] = (shape[0] // 3, *shape[1:])
        else:
            split[name] = shape

    def read_part(name: str) -> np.ndarray:
        if name not in sources:
            return read(name)
        whole, third = sources[name]
        return np.split(read(whole), 3)[third]

    return split, read_part


def _abstract(config: ViTConfig) -> dict[str, Any]:
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0), Precision()))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
