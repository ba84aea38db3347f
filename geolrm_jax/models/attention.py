"""Self-attention among anchors with 3D RoPE (paper, Eq. 4)."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from geolrm_jax.models.layers import dropout, linear
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import Anchors
from kernels_pallas.self_attention import self_attention


class SelfAttention(nnx.Module):
    """Full attention of every anchor to every valid anchor, no biases; the softmax runs in float32."""

    def __init__(self, width: int, heads: int, *, rope: bool = True, rngs: nnx.Rngs, precision: Precision):
        self.heads, self.rope = heads, rope
        self.query, self.key, self.value, self.out = (
            linear(width, width, bias=False, rngs=rngs, precision=precision) for _ in range(4)
        )

    def __call__(
        self, x: Float[Array, "b n d"], anchors: Anchors, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b n d"]:
        q, k, v = (rearrange(p(x), "b n (k c) -> b n k c", k=self.heads) for p in (self.query, self.key, self.value))
        if self.rope:
            q, k = rope3d(q, anchors.voxels), rope3d(k, anchors.voxels)
        return self.out(self.mix(q, k, v, anchors, key))

    def mix(self, q, k, v, anchors: Anchors, key: Key[Array, ""] | None) -> Float[Array, "b n d"]:
        """Values (B, N, K, C) mixed among the tokens, heads joined."""
        return rearrange(attention(q, k, v, anchors.mask), "b n k c -> b n (k c)")


class ReleasedHeadsAttention(SelfAttention):
    """What the released code computes in float32: the head axis stays where it is, so each token attends over its own
    heads, and the result is reshaped as if heads came first. No token sees another, and padding counts."""

    def __init__(self, *args, dropout: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.dropout = dropout

    def mix(self, q, k, v, anchors: Anchors, key: Key[Array, ""] | None) -> Float[Array, "b n d"]:
        """softmax over the heads of one token; output (n, k) is head (n K + k) // N of token (n K + k) % N."""
        scores = (
            jnp.einsum("bnic,bnjc->bnij", q, k, precision="highest", preferred_element_type=full(q).dtype)
            * q.shape[-1] ** -0.5
        )
        weights = jax.nn.softmax(dropout(scores, self.dropout, key), axis=-1)
        mixed = jnp.einsum("bnij,bnjc->bnic", weights.astype(v.dtype), v, precision="highest")
        return jnp.swapaxes(mixed, 1, 2).reshape(*mixed.shape[:2], -1)


def attention(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b m k c"],
    values: Float[Array, "b m k c"],
    mask: Bool[Array, "b m"],
) -> Float[Array, "b n k c"]:
    """`self_attention` over the tokens that `mask` keeps, which come first as they do in `Anchors`."""
    return self_attention(queries, keys, values, jnp.sum(mask, axis=-1, dtype=jnp.int32))
