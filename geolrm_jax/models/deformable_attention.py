"""Deformable cross-attention from anchors to the feature maps of all views (paper, Eq. 5; Zhu et al. 2021)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from geolrm_jax.geometry.cameras import exact, project
from geolrm_jax.models.layers import linear
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import Anchors, Views, pytree
from kernels_pallas.deformable_attention import multiview_deformable_attention
from kernels_pallas.mesh import context_shards

ViewMask = Literal["visible", "none"]
Projection = Literal["camera", "mirrored"]
Coordinates = Literal["full", "bfloat16"]
OUTSIDE = -10.0  # as a fraction of the image
BFLOAT16 = {"exponent_bits": 8, "mantissa_bits": 7}


@pytree
class Features:
    """What anchors look at.

    Attributes:
      maps: one (B, V, H_l, W_l, C) map per level.
      reference_points: the anchors' projections, x and y as fractions of the image.
      view_valid: the view exists and the anchor lies in front of its camera.
    """

    maps: tuple[Float[Array, "b v _h_l _w_l c"], ...]
    reference_points: Float[Array, "b v n 2"]
    view_valid: Bool[Array, "b v n"]


def look(
    maps: tuple[Array, ...],
    views: Views,
    anchors: Anchors,
    view_mask: ViewMask = "visible",
    projection: Projection = "camera",
    coordinates: Coordinates = "full",
) -> Features:
    """Joins feature maps with the anchors' projections, which are the same for all layers.

    Args:
      maps: one per level.
      views: whose cameras project.
      anchors: what is projected.
      view_mask: a view counts where it exists and the anchor is in front of it, or always (released).
      projection: by the camera, or with the principal point's x mirrored (released: x is flipped about the middle of
        the image after a projection along Blender's axes, which is the same where the principal point is centred).
      coordinates: rounded at every operation of the projection to bfloat16, or not.

    Raises:
      ValueError: if all views shall count where the mesh splits them over `context`, which may have padded them.
    """
    if view_mask == "none" and context_shards() > 1:
        raise ValueError('view_mask "none" also counts views that pad a batch: mesh axis context must be 1')
    rounded = functools.partial(jax.lax.reduce_precision, **BFLOAT16) if coordinates == "bfloat16" else exact
    pixels, z = project(views.cameras, anchors.positions, rounded)
    size = jnp.array([views.cameras.width, views.cameras.height], pixels.dtype)
    # The camera of a view that only pads the array may be anything: its points lie outside of every map.
    points = rounded(jnp.where(jnp.isfinite(pixels), pixels / size, OUTSIDE))
    if projection == "mirrored":
        off_center = jnp.asarray(views.cameras.intrinsics)[..., 0, 2] / views.cameras.width - 0.5
        points = points.at[..., 0].add(-2.0 * off_center[..., None])
    visible = (z > 0) & views.valid[..., None]
    return Features(maps, points, jnp.ones_like(visible) if view_mask == "none" else visible)


def masked_softmax(logits: Float[Array, "*batch"], mask: Bool[Array, "*batch"], axis: int) -> Float[Array, "*batch"]:
    """Softmax over the entries that `mask` keeps; zero everywhere if it keeps none."""
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True, initial=-1e30))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
    return weights / jnp.maximum(weights.sum(axis, keepdims=True), 1e-30)


def ring_offsets(heads: int, levels: int, points: int) -> np.ndarray:
    """Initial offsets (K·L·P·2) of Deformable DETR: head k looks in direction 2πk/K, point p at distance p + 1."""
    angles = 2 * np.pi * np.arange(heads) / heads
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(-1, keepdims=True)
    rings = directions[:, None, None, :] * np.arange(1, points + 1)[:, None]
    return np.broadcast_to(rings, (heads, levels, points, 2)).astype(np.float32).reshape(-1)


class DeformableCrossAttention(nnx.Module):
    """Offsets and logits come from the anchor's token once; each view is sampled around the anchor's projection there,
    and views are averaged with weights that depend on what was found in them."""

    def __init__(
        self, width: int, heads: int, channels: int, levels: int, points: int, *, rngs: nnx.Rngs, precision: Precision
    ):
        self.heads, self.levels, self.points = heads, levels, points
        # Sampling coordinates and the weights of samples and views are never below float32.
        wide = Precision(str(precision.wide))
        self.make_sampling(width, rngs, wide)
        zeros, xavier = jax.nn.initializers.zeros, jax.nn.initializers.xavier_uniform()
        self.value = linear(channels, width, kernel_init=xavier, bias_init=zeros, rngs=rngs, precision=precision)
        self.view_logit = linear(width, 1, rngs=rngs, precision=wide)
        self.out = linear(width, width, kernel_init=xavier, bias_init=zeros, rngs=rngs, precision=precision)

    def make_sampling(self, width: int, rngs: nnx.Rngs, precision: Precision) -> None:
        """The layers that say where to look and how much each sample counts."""
        zeros, ring = jax.nn.initializers.zeros, ring_offsets(self.heads, self.levels, self.points)
        samples, parts = self.heads * self.levels * self.points, dict(rngs=rngs, precision=precision)
        self.offsets = linear(
            width, 2 * samples, kernel_init=zeros, bias_init=lambda *_, **__: jnp.array(ring), **parts
        )
        self.logits = linear(width, samples, kernel_init=zeros, bias_init=zeros, **parts)

    def samples(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n k l p 2"], Float[Array, "b n k l p"]]:
        """Offsets in cells of each level's map, and the samples' logits."""
        shape = (*x.shape[:2], self.heads, self.levels, self.points)
        return self.offsets(x).reshape(*shape, 2), self.logits(x).reshape(shape)

    def __call__(self, x: Float[Array, "b n d"], anchors: Anchors, features: Features) -> Float[Array, "b n d"]:
        sampled = self.sampled(x, features)
        weights = masked_softmax(full(self.view_logit(sampled)), features.view_valid[..., None], axis=1)
        return self.out(jnp.sum(full(sampled) * weights, axis=1))

    def sampled(self, x: Float[Array, "b n d"], features: Features) -> Float[Array, "b v n d"]:
        """What each token finds in each view."""
        offsets, logits = self.samples(x)
        sampled = multiview_deformable_attention(
            tuple(rearrange(self.value(m), "b v h w (k c) -> b v h w k c", k=self.heads) for m in features.maps),
            features.reference_points,
            offsets,
            logits,
            features.view_valid,
        )
        return rearrange(sampled, "b v n k c -> b v n (k c)")


class ProjectedCrossAttention(DeformableCrossAttention):
    """Every level is read at the anchor's projection alone: the ablation without sampling points."""

    def __init__(self, width: int, heads: int, channels: int, levels: int, *, rngs: nnx.Rngs, precision: Precision):
        super().__init__(width, heads, channels, levels, 1, rngs=rngs, precision=precision)

    def make_sampling(self, width: int, rngs: nnx.Rngs, precision: Precision) -> None:
        """Nothing is learned of where to look."""

    def samples(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n k l p 2"], Float[Array, "b n k l p"]]:
        """No offset, the same weight for every level."""
        logits = jnp.zeros((*x.shape[:2], self.heads, self.levels, 1), full(x).dtype)
        return jnp.zeros((*logits.shape, 2), logits.dtype), logits
