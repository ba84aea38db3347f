"""Self-attention among anchors with 3D RoPE (paper, Eq. 4)."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from geolrm_jax.models.layers import dropout, linear
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import Anchors

CHUNK = 1024  # queries whose scores, for all heads and scenes, an accelerator holds at a time
CACHED_SCORES = 2**20  # scores that a CPU holds at a time: 4 MiB
NOTHING = -1e30  # the score of a key that is not there


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
        scores = _product("bnic,bnjc->bnij", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(dropout(scores, self.dropout, key), axis=-1)
        mixed = jnp.einsum("bnij,bnjc->bnic", weights.astype(v.dtype), v, precision="highest")
        return jnp.swapaxes(mixed, 1, 2).reshape(*mixed.shape[:2], -1)


def attention(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b m k c"],
    values: Float[Array, "b m k c"],
    mask: Bool[Array, "b m"],
) -> Float[Array, "b n k c"]:
    """softmax(q · k / sqrt(c)) v over the keys that `mask` keeps, in at least float32; zero where it keeps none.

    Worked through in blocks whose scores are computed anew in the backward pass (Dao et al. 2022): memory grows with
    N, not with its square.
    """
    heads = queries.shape[2]
    by_head = (rearrange(x, "b n k c -> (b k) n c") for x in (queries, keys, values))
    out = _attend(*by_head, jnp.repeat(mask, heads, axis=0))
    return rearrange(out, "(b k) n c -> b n k c", k=heads)


@jax.custom_vjp
def _attend(queries, keys, values, mask):
    return _attend_forward(queries, keys, values, mask)[0]


def _attend_forward(queries, keys, values, mask):
    out, log_total = _by_platform(_forward, queries, keys, values, mask)
    return out, (queries, keys, values, mask, out, log_total)


def _attend_backward(residuals, d_out):
    *arguments, out, log_total = residuals
    # The derivative of the softmax's denominator: every weight of a row loses the same.
    shared = jnp.sum(full(out) * full(d_out), axis=-1, keepdims=True)
    return *_by_platform(_backward, *arguments, d_out, log_total, shared), None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_platform(function, *arrays):
    """`function(block, *arrays)` with the blocks that suit the platform it is compiled for.

    On CPU the scores of a block must stay in the cache: with 4096 tokens and 16 heads, blocks of one head and 256
    queries took a quarter of the time of all heads and 1024 queries. An accelerator needs blocks that fill it, and a
    batch that is split over devices must not be worked through one row after the other.
    """
    (problems, rows, _), columns = arrays[0].shape, arrays[1].shape[1]
    cached = even_split(rows, max(1, CACHED_SCORES // columns))
    fitting = max(1, CACHED_SCORES // (cached * columns))
    together = max(n for n in range(1, problems + 1) if problems % n == 0 and n <= fitting)
    return jax.lax.platform_dependent(
        *arrays,
        cpu=functools.partial(function, (together, cached)),
        default=functools.partial(function, (problems, even_split(rows, CHUNK))),
    )


def even_split(count: int, largest: int) -> int:
    """Size of the fewest equal parts of `count` that are at most `largest`; the last part may be padded."""
    return -(-count // -(-count // largest))


def _forward(block, queries, keys, values, mask):
    """Output, and the logarithm of the softmax's denominator, (g n c) and (g n 1)."""

    def problem(arrays):
        queries, keys, values, mask = arrays
        some = jnp.any(mask, axis=-1)[:, None, None]

        def rows(queries):
            scores = _scores(queries, keys, mask)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("gnm,gmc->gnc", weights.astype(values.dtype), values) / total
            # Without any key all weights were one: none now, nor in the backward pass.
            out, log_total = jnp.where(some, out, 0.0), jnp.where(some, top + jnp.log(total), -NOTHING)
            return out.astype(values.dtype), log_total

        return jax.lax.map(rows, queries)

    together, size = block
    parts = _split_rows(queries, together, size), *(_split(x, together) for x in (keys, values, mask))
    return tuple(_join_rows(x, queries.shape[1]) for x in jax.lax.map(problem, parts))


def _backward(block, queries, keys, values, mask, d_out, log_total, shared):
    """Gradients by queries, keys and values."""

    def problem(arrays):
        keys, values, mask, *by_row = arrays

        def rows(sums, by_row):
            queries, d_out, log_total, shared = by_row
            weights = jnp.exp(_scores(queries, keys, mask) - log_total)
            d_scores = weights * (_product("gnc,gmc->gnm", d_out, values) - shared) * queries.shape[-1] ** -0.5
            weights, d_scores = weights.astype(d_out.dtype), d_scores.astype(queries.dtype)
            # Channels before keys: as (m c) these two products took six times as long on CPU.
            d_keys = sums[0] + _product("gnc,gnm->gcm", queries, d_scores)
            d_values = sums[1] + _product("gnc,gnm->gcm", d_out, weights)
            return (d_keys, d_values), _product("gnm,gmc->gnc", d_scores, keys).astype(queries.dtype)

        zeros = tuple(jnp.zeros_like(full(x).swapaxes(1, 2)) for x in (keys, values))
        return jax.lax.scan(rows, zeros, tuple(by_row))

    together, size = block
    parts = (
        *(_split(x, together) for x in (keys, values, mask)),
        *(_split_rows(x, together, size) for x in (queries, d_out, log_total, shared)),
    )
    (d_keys, d_values), d_queries = jax.lax.map(problem, parts)
    d_keys, d_values = (rearrange(x, "s g c m -> (s g) m c") for x in (d_keys, d_values))
    return _join_rows(d_queries, queries.shape[1]), d_keys.astype(keys.dtype), d_values.astype(values.dtype)


def _scores(queries, keys, mask):
    scores = _product("gnc,gmc->gnm", queries, keys) * queries.shape[-1] ** -0.5
    return jnp.where(mask[:, None], scores, NOTHING)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=full(x).dtype)


def _split(x, together):
    return rearrange(x, "(s g) ... -> s g ...", g=together)


def _split_rows(x, together, size):
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0)))
    return rearrange(padded, "(s g) (r n) c -> s r g n c", g=together, n=size)


def _join_rows(x, count):
    return rearrange(x, "s r g n c -> (s g) (r n) c")[:, :count]
