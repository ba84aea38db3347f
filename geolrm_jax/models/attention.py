"""Self-attention among anchors with 3D RoPE (paper, Eq. 4)."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key

from geolrm_jax.models.layers import dropout, linear
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import Anchors
from kernels_pallas.mesh import CONTEXT, TENSOR, context_shards, free_axes, split_axes
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
        return rearrange(attention_across(q, k, v, anchors.mask), "b n k c -> b n (k c)")


class ReleasedHeadsAttention(SelfAttention):
    """What the released code computes in float32: the head axis stays where it is, so each token attends over its own
    heads, and the result is reshaped as if heads came first. No token sees another, and padding counts."""

    def __init__(self, *args, dropout: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.dropout = dropout

    def mix(self, q, k, v, anchors: Anchors, key: Key[Array, ""] | None) -> Float[Array, "b n d"]:
        """softmax over the heads of one token; output (n, k) is head (n K + k) // N of token (n K + k) % N.

        Raises:
          ValueError: if tokens are split over devices, among which that result would have to be moved.
        """
        if context_shards() > 1:
            raise ValueError(f'self_attention "released_heads" needs mesh.{CONTEXT} 1, got {context_shards()}')
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


def attention_across(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b n k c"],
    values: Float[Array, "b n k c"],
    mask: Bool[Array, "b n"],
) -> Float[Array, "b n k c"]:
    """`attention` of tokens that may be split over mesh axis `CONTEXT`, see `over_context`.

    Each device attends with all tokens for its share of the heads: two exchanges (Jacobs et al. 2023, DeepSpeed
    Ulysses).

    Raises:
      ValueError: if the mesh axes do not divide the heads.
    """
    shards, heads = context_shards(), queries.shape[2]
    if shards == 1:
        return attention(queries, keys, values, mask)
    mesh, free = free_axes()
    local = heads // mesh.shape.get(TENSOR, 1)
    if heads % mesh.shape.get(TENSOR, 1) or local % shards:
        raise ValueError(
            f"mesh axes {CONTEXT!r} of {shards} and {TENSOR!r} of {mesh.shape.get(TENSOR, 1)} devices must together "
            f"divide the {heads} heads of self-attention"
        )

    def attend(queries, keys, values, mask):
        exchange = functools.partial(jax.lax.all_to_all, axis_name=CONTEXT, tiled=True)
        by_head = (exchange(x, split_axis=2, concat_axis=1) for x in (queries, keys, values))
        lengths = jax.lax.psum(jnp.sum(mask, axis=-1, dtype=jnp.int32), CONTEXT)
        return exchange(self_attention(*by_head, lengths), split_axis=1, concat_axis=2)

    if not free:
        return attend(queries, keys, values, mask)
    # The compiler, left alone with the other axes, gathers the rows of all devices before an exchange.
    rows, heads = split_axes(mesh, free, queries.shape[0], heads)
    arrays = P(rows, None, heads)
    mapped = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(arrays, arrays, arrays, P(rows)),
        out_specs=arrays,
        axis_names=frozenset(free),
        check_vma=False,
    )
    return mapped(queries, keys, values, mask)
