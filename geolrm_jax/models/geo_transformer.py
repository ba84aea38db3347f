"""The geometry-aware transformer (paper, Sec. 3.3): anchors that look at each other and at the images."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from geolrm_jax.models.attention import SelfAttention
from geolrm_jax.models.deformable_attention import DeformableCrossAttention, Features, look
from geolrm_jax.models.layers import SwiGLU, rms_norm, scan_blocks, stack
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors, Views


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Depth and widths; the defaults are the proposal network's."""

    width: int = 384
    depth: int = 6
    heads: int = 16
    points: int = 8
    """Samples per head, level and view."""
    remat: bool = True
    """Recompute each block's activations in the backward pass."""

    def make(self, channels: int, levels: int, rngs: nnx.Rngs, precision: Precision) -> "GeoTransformer":
        """The module for `levels` feature maps of `channels` each, with fresh parameters."""
        return GeoTransformer(self, channels, levels, rngs=rngs, precision=precision)

    def make_block(self, channels: int, levels: int, rngs: nnx.Rngs, precision: Precision) -> "GeoBlock":
        """One layer; a fork overrides this to swap a part."""
        parts = dict(rngs=rngs, precision=precision)
        return GeoBlock(
            SelfAttention(self.width, self.heads, **parts),
            DeformableCrossAttention(self.width, self.heads, channels, levels, self.points, **parts),
            SwiGLU(self.width, **parts),
            width=self.width,
            **parts,
        )


class GeoBlock(nnx.Module):
    """One layer of the geometry-aware transformer (paper, Eq. 4-6): pre-norm residual parts."""

    def __init__(self, self_attention, cross_attention, mlp, *, width: int, rngs: nnx.Rngs, precision: Precision):
        self.self_attention, self.cross_attention, self.mlp = self_attention, cross_attention, mlp
        self.norm1, self.norm2, self.norm3 = (rms_norm(width, rngs=rngs, precision=precision) for _ in range(3))

    def __call__(self, x: Float[Array, "b n d"], anchors: Anchors, features: Features) -> Float[Array, "b n d"]:
        x = x + self.self_attention(self.norm1(x), anchors)
        x = x + self.cross_attention(self.norm2(x), anchors, features)
        return x + self.mlp(self.norm3(x))


class GeoTransformer(nnx.Module):
    """Tokens of anchors: position and one shared learned vector, then the blocks and a final norm."""

    def __init__(self, config: TransformerConfig, channels: int, levels: int, *, rngs: nnx.Rngs, precision: Precision):
        self.config = config
        self.query = nnx.Param(jax.random.normal(rngs.params(), (config.width - 3,)))
        self.blocks = stack(lambda r: config.make_block(channels, levels, r, precision), config.depth, rngs)
        self.norm = rms_norm(config.width, rngs=rngs, precision=precision)

    def __call__(
        self, anchors: Anchors, views: Views, maps: tuple[Float[Array, "b v _h_l _w_l c"], ...]
    ) -> Float[Array, "b n d"]:
        """Token of each anchor; tokens of padding are finite and mean nothing."""
        shared = jnp.broadcast_to(self.query[...], (*anchors.positions.shape[:2], self.config.width - 3))
        x = jnp.concatenate([anchors.positions, shared.astype(anchors.positions.dtype)], axis=-1)
        x = scan_blocks(self.blocks, x, anchors, look(maps, views, anchors), remat=self.config.remat)
        return self.norm(x)
