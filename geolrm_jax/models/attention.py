"""Self-attention among anchors with 3D RoPE (paper, Eq. 4)."""

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from geolrm_jax.models.layers import linear
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors


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
        y = jax.nn.dot_product_attention(q, k, v, mask=anchors.mask[:, None, None, :])
        return self.out(rearrange(y, "b n k c -> b n (k c)"))
