"""The geometry-aware transformer (paper, Sec. 3.3): anchors that look at each other and at the images."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from geolrm_jax.geometry.voxels import released_indices
from geolrm_jax.models.attention import ReleasedHeadsAttention, SelfAttention
from geolrm_jax.models.deformable_attention import (
    Coordinates,
    DeformableCrossAttention,
    Features,
    ProjectedCrossAttention,
    Projection,
    ViewMask,
    look,
)
from geolrm_jax.models.layers import Remat, SwiGLU, dropout, rms_norm, scan_blocks, stack
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors, Views
from kernels_pallas.mesh import CONTEXT, context_shards, over_context


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Depth, widths and rules; the defaults are the proposal network's."""

    width: int = 384
    depth: int = 6
    heads: int = 16
    points: int = 8
    """Samples per head, level and view; 0 reads every level at the anchor's projection alone."""
    remat: Remat = "full"
    """What the backward pass computes again of a block: nothing, all but products with parameters, or all."""
    self_attention: Literal["tokens", "released_heads"] = "tokens"
    """Anchors attend to anchors (paper), or each to its own heads, as the released code does in float32."""
    cross_attention_residual: Literal["stream", "normed"] = "stream"
    """What the cross-attention is added to: the residual stream (paper), or its RMSNorm (released)."""
    rope_index: Literal["voxel", "released", "none"] = "voxel"
    """RoPE turns by the anchor's voxel, by the released float32 rule, or not at all (ablation)."""
    rope_grid: int = 128
    """Voxels per axis of the released rule's grid."""
    rope_scale: float = 0.5
    """Half the side of the cube that the released rule's grid spans; the released inference scripts leave it at 1."""
    view_mask: ViewMask = "visible"
    """Views count where they exist and the anchor is in front of them, or always (released)."""
    projection: Projection = "camera"
    """Anchors are projected by the camera, or with the principal point's x mirrored (released)."""
    coordinates: Coordinates = "full"
    """Projections in at least float32, or each operation rounded to bfloat16, as the released mixed precision does: the
    ablation of benchmarks/bf16.py."""
    dropout: float = 0.0
    """After each of a block's three parts, and on the scores of "released_heads"; in training only."""

    def __post_init__(self):
        if self.rope_index != "released" and self.rope_scale != 0.5:
            raise ValueError(
                f'rope_scale {self.rope_scale} needs rope_index "released": "{self.rope_index}" knows no scale'
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def make(self, channels: int, levels: int, rngs: nnx.Rngs, precision: Precision) -> "GeoTransformer":
        """The module for `levels` feature maps of `channels` each, with fresh parameters."""
        return GeoTransformer(self, channels, levels, rngs=rngs, precision=precision)

    def make_block(self, channels: int, levels: int, rngs: nnx.Rngs, precision: Precision) -> "GeoBlock":
        """One layer; a fork overrides this to swap a part."""
        parts = dict(rngs=rngs, precision=precision)
        return GeoBlock(
            self.make_self_attention(**parts),
            self.make_cross_attention(channels, levels, **parts),
            SwiGLU(self.width, **parts),
            config=self,
            **parts,
        )

    def make_self_attention(self, rngs: nnx.Rngs, precision: Precision) -> SelfAttention:
        """Attention among anchors."""
        parts = dict(rope=self.rope_index != "none", rngs=rngs, precision=precision)
        if self.self_attention == "released_heads":
            return ReleasedHeadsAttention(self.width, self.heads, dropout=self.dropout, **parts)
        return SelfAttention(self.width, self.heads, **parts)

    def make_cross_attention(
        self, channels: int, levels: int, rngs: nnx.Rngs, precision: Precision
    ) -> DeformableCrossAttention:
        """Attention of anchors to feature maps."""
        parts = dict(rngs=rngs, precision=precision)
        if self.points == 0:
            return ProjectedCrossAttention(self.width, self.heads, channels, levels, **parts)
        return DeformableCrossAttention(self.width, self.heads, channels, levels, self.points, **parts)

    def rope_indices(self, anchors: Anchors) -> Anchors:
        """The anchors with the indices that RoPE turns by."""
        if self.rope_index != "released":
            return anchors
        return dataclasses.replace(anchors, voxels=released_indices(anchors.positions, self.rope_grid, self.rope_scale))


class GeoBlock(nnx.Module):
    """One layer of the geometry-aware transformer (paper, Eq. 4-6): pre-norm residual parts."""

    def __init__(
        self, self_attention, cross_attention, mlp, *, config: TransformerConfig, rngs: nnx.Rngs, precision: Precision
    ):
        self.config = config
        self.self_attention, self.cross_attention, self.mlp = self_attention, cross_attention, mlp
        self.norm1, self.norm2, self.norm3 = (rms_norm(config.width, rngs=rngs, precision=precision) for _ in range(3))

    def __call__(
        self, x: Float[Array, "b n d"], anchors: Anchors, features: Features, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b n d"]:
        scores, *keys = jax.random.split(key, 4) if key is not None else [None] * 4
        after_self, after_cross, after_mlp = (lambda y, k=k: dropout(y, self.config.dropout, k) for k in keys)

        x = x + after_self(self.self_attention(self.norm1(x), anchors, scores))
        y = self.norm2(x)
        x = y if self.config.cross_attention_residual == "normed" else x
        x = x + after_cross(self.cross_attention(y, anchors, features))
        return x + after_mlp(self.mlp(self.norm3(x)))


class GeoTransformer(nnx.Module):
    """Tokens of anchors: position and one shared learned vector, then the blocks and a final norm."""

    def __init__(self, config: TransformerConfig, channels: int, levels: int, *, rngs: nnx.Rngs, precision: Precision):
        self.config = config
        self.query = nnx.Param(jax.random.normal(rngs.params(), (config.width - 3,)))
        self.blocks = stack(lambda r: config.make_block(channels, levels, r, precision), config.depth, rngs)
        self.norm = rms_norm(config.width, rngs=rngs, precision=precision)

    def __call__(
        self,
        anchors: Anchors,
        views: Views,
        maps: tuple[Float[Array, "b v _h_l _w_l c"], ...],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b n d"]:
        """Token of each anchor; tokens of padding are finite and mean nothing. A key turns dropout on."""
        config = self.config
        shared = jnp.broadcast_to(self.query[...], (*anchors.positions.shape[:2], config.width - 3))
        x = jnp.concatenate([anchors.positions, shared], axis=-1)
        features = look(maps, views, anchors, config.view_mask, config.projection, config.coordinates)
        keys = jax.random.split(key, config.depth) if key is not None and config.dropout else None
        by_token, by_view = P(None, CONTEXT), P(None, None, CONTEXT)
        seen = jax.tree.map(lambda x: P() if any(x is m for m in maps) else by_view, features)
        x = over_context(
            functools.partial(run_blocks, remat=config.remat),
            (self.blocks, x, config.rope_indices(anchors), features, keys),
            (P(), by_token, by_token, seen, P()),
            by_token,
        )
        return self.norm(x)


def run_blocks(
    blocks: GeoBlock,
    x: Float[Array, "b n d"],
    anchors: Anchors,
    features: Features,
    keys: Key[Array, "depth"] | None,
    *,
    remat: Remat,
) -> Float[Array, "b n d"]:
    """`scan_blocks` on the tokens that this device has, which drop out by keys of their own."""
    if keys is not None and context_shards() > 1:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jax.lax.axis_index(CONTEXT))
    return scan_blocks(blocks, x, anchors, features, remat=remat, keys=keys)
