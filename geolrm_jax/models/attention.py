"""Self-attention among anchors with 3D RoPE (paper, Eq. 4)."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from geolrm_jax.models.layers import linear
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import Anchors

CHUNK = 1024  # queries whose scores are held at a time


class SelfAttention(nnx.Module):
    """Full attention of every anchor to every valid anchor, no biases; the softmax runs in float32."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, precision: Precision):
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            linear(width, width, bias=False, rngs=rngs, precision=precision) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "b n d"], anchors: Anchors) -> Float[Array, "b n d"]:
        q, k, v = (rearrange(p(x), "b n (k c) -> b n k c", k=self.heads) for p in (self.query, self.key, self.value))
        q, k = rope3d(q, anchors.voxels), rope3d(k, anchors.voxels)
        return self.out(rearrange(attention(q, k, v, anchors.mask), "b n k c -> b n (k c)"))


def attention(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b m k c"],
    values: Float[Array, "b m k c"],
    mask: Bool[Array, "b m"],
) -> Float[Array, "b n k c"]:
    """softmax(q · k / sqrt(c)) v over the keys that `mask` keeps, in at least float32; finite where it keeps none.

    Queries are worked through in chunks whose scores are recomputed for the backward pass: memory grows with N, not
    with its square.
    """
    count = queries.shape[1]
    chunks = -(-count // CHUNK)
    size = -(-count // chunks)
    scale = queries.shape[-1] ** -0.5

    @jax.checkpoint
    def rows(chunk):
        scores = (
            jnp.einsum("bnkc,bmkc->bknm", chunk, keys, precision="highest", preferred_element_type=full(chunk).dtype)
            * scale
        )
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
        return jnp.einsum("bknm,bmkc->bnkc", weights.astype(values.dtype), values, precision="highest")

    if chunks == 1:
        return rows(queries)
    padded = jnp.pad(queries, ((0, 0), (0, chunks * size - count), (0, 0), (0, 0)))
    out = jax.lax.map(rows, rearrange(padded, "b (s n) k c -> s b n k c", s=chunks))
    return rearrange(out, "s b n k c -> b (s n) k c")[:, :count]
