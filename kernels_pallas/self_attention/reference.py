"""Self-attention in plain XLA: the truth for tests, the path on CPU, and that of every dtype but two."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels_pallas.self_attention.shapes import even_split

CHUNK = 1024  # queries whose scores, for all heads and scenes, an accelerator holds at a time: at most,
FEWEST = 128  # and at least,
HELD_SCORES = 2**28  # where these are more scores than this: 1 GiB
CACHED_SCORES = 2**20  # scores that a CPU holds at a time: 4 MiB
NOTHING = -1e30  # the score of a key that is not there


def attend(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b m k c"],
    values: Float[Array, "b m k c"],
    query_lengths: Int[Array, "b"],
    key_lengths: Int[Array, "b"],
) -> Float[Array, "b n k c"]:
    """softmax(q · k / sqrt(c)) v over the first keys of each scene, in at least float32, whatever the queries' number.

    Worked through in blocks whose scores are computed anew in the backward pass (Dao et al. 2022): memory grows with
    N, not with its square.
    """
    del query_lengths  # rows of padding are computed like any other
    heads = queries.shape[2]
    by_head = (rearrange(x, "b n k c -> (b k) n c") for x in (queries, keys, values))
    lengths = jnp.broadcast_to(key_lengths[:, None], (key_lengths.size, heads)).reshape(-1)
    out = _attend(*by_head, lengths)
    return rearrange(out, "(b k) n c -> b n k c", k=heads)


@jax.custom_vjp
def _attend(queries, keys, values, lengths):
    return _attend_forward(queries, keys, values, lengths)[0]


def _attend_forward(queries, keys, values, lengths):
    out, log_total = _by_platform(_forward, queries, keys, values, lengths)
    return out, (queries, keys, values, lengths, out, log_total)


def _attend_backward(residuals, d_out):
    *arguments, out, log_total = residuals
    # The derivative of the softmax's denominator: every weight of a row loses the same.
    shared = jnp.sum(_full(out) * _full(d_out), axis=-1, keepdims=True)
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
    held = min(CHUNK, max(FEWEST, HELD_SCORES // (problems * columns)))
    return jax.lax.platform_dependent(
        *arrays,
        cpu=functools.partial(function, (together, cached)),
        default=functools.partial(function, (problems, even_split(rows, held))),
    )


def _forward(block, queries, keys, values, lengths):
    """Output, and the logarithm of the softmax's denominator, (g n c) and (g n 1)."""

    def problem(arrays):
        queries, keys, values, lengths = arrays

        def rows(queries):
            scores = _scores(queries, keys, lengths)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("gnm,gmc->gnc", weights.astype(values.dtype), values) / total
            return out.astype(values.dtype), top + jnp.log(total)

        return jax.lax.map(rows, queries)

    together, size = block
    parts = _split_rows(queries, together, size), *(_split(x, together) for x in (keys, values, lengths))
    return tuple(_join_rows(x, queries.shape[1]) for x in jax.lax.map(problem, parts))


def _backward(block, queries, keys, values, lengths, d_out, log_total, shared):
    """Gradients by queries, keys and values."""

    def problem(arrays):
        keys, values, lengths, *by_row = arrays

        def rows(sums, by_row):
            queries, d_out, log_total, shared = by_row
            weights = jnp.exp(_scores(queries, keys, lengths) - log_total)
            d_scores = weights * (_product("gnc,gmc->gnm", d_out, values) - shared) * queries.shape[-1] ** -0.5
            weights, d_scores = weights.astype(d_out.dtype), d_scores.astype(queries.dtype)
            # Channels before keys: as (m c) these two products took six times as long on CPU.
            d_keys = sums[0] + _product("gnc,gnm->gcm", queries, d_scores)
            d_values = sums[1] + _product("gnc,gnm->gcm", d_out, weights)
            return (d_keys, d_values), _product("gnm,gmc->gnc", d_scores, keys).astype(queries.dtype)

        zeros = tuple(jnp.zeros_like(_full(x).swapaxes(1, 2)) for x in (keys, values))
        return jax.lax.scan(rows, zeros, tuple(by_row))

    together, size = block
    parts = (
        *(_split(x, together) for x in (keys, values, lengths)),
        *(_split_rows(x, together, size) for x in (queries, d_out, log_total, shared)),
    )
    (d_keys, d_values), d_queries = jax.lax.map(problem, parts)
    d_keys, d_values = (rearrange(x, "s g c m -> (s g) m c") for x in (d_keys, d_values))
    return _join_rows(d_queries, queries.shape[1]), d_keys.astype(keys.dtype), d_values.astype(values.dtype)


def _scores(queries, keys, lengths):
    scores = _product("gnc,gmc->gnm", queries, keys) * queries.shape[-1] ** -0.5
    there = jnp.arange(keys.shape[1]) < lengths[:, None]
    return jnp.where(there[:, None], scores, NOTHING)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=_full(x).dtype)


def _full(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _split(x, together):
    return rearrange(x, "(s g) ... -> s g ...", g=together)


def _split_rows(x, together, size):
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0)))
    return rearrange(padded, "(s g) (r n) c -> s r g n c", g=together, n=size)


def _join_rows(x, count):
    return rearrange(x, "s r g n c -> (s g) (r n) c")[:, :count]
