"""Self-attention on TPUs by JAX's splash attention: Pallas kernels that hold one block of scores at a time."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas.mesh import free_axes, split_axes
from kernels_pallas.self_attention.shapes import even_split

LANES = 128  # blocks are multiples of this
# Queries, and keys, of a block at most. Compiled for v5e, v5p and v6e, blocks of 1024 take 1 to 10 % fewer instructions
# per score than blocks of 512, a quarter of the steps and half the reads of keys; on v5p 2048 queries do not fit.
BLOCK = 1024


def attend(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b m k c"],
    values: Float[Array, "b m k c"],
    query_lengths: Int[Array, "b"],
    key_lengths: Int[Array, "b"],
    *,
    interpret: bool = False,
) -> Float[Array, "b n k c"]:
    """softmax(q · k / sqrt(c)) v over the first keys of each scene; rows from `query_lengths` on mean nothing.

    On an ambient mesh every device attends for its own scenes and heads: XLA cannot split a kernel's call by itself.
    """
    mesh, free = free_axes()
    local = functools.partial(_attend, interpret=interpret)
    arguments = queries, keys, values, query_lengths, key_lengths
    if not free:
        return local(*arguments)
    scenes, heads = split_axes(mesh, free, queries.shape[0], queries.shape[2])
    arrays, lengths = P(scenes, None, heads), P(scenes)
    specs = arrays, arrays, arrays, lengths, lengths
    # The kernels' results do not say over which axes they vary.
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=arrays, axis_names=frozenset(free), check_vma=False
    )
    return mapped(*arguments)


def _attend(queries, keys, values, query_lengths, key_lengths, *, interpret):
    rows, columns = queries.shape[1], keys.shape[1]
    scaled = (queries.astype(jnp.float32) * queries.shape[-1] ** -0.5).astype(queries.dtype)
    by_head = (_by_head(x) for x in (scaled, keys, values))
    # Padding is a segment of its own: it attends to itself, and nothing else does.
    segments = splash.SegmentIds(
        *(
            (jnp.arange(_padded(length)) < lengths[:, None]).astype(jnp.int32)
            for length, lengths in ((rows, query_lengths), (columns, key_lengths))
        )
    )
    out = _kernel(queries.shape[2], *(segment.shape[1] for segment in segments), interpret)(*by_head, segments)
    return rearrange(out[:, :, :rows], "b k n c -> b n k c")


def _by_head(x):
    padded = jnp.pad(x, ((0, 0), (0, _padded(x.shape[1]) - x.shape[1]), (0, 0), (0, 0)))
    return rearrange(padded, "b n k c -> b k n c")


def _padded(count: int) -> int:
    """The least number that is a multiple of its block and not below `count`."""
    return count + -count % _block(count)


def _block(count: int) -> int:
    """Tokens of a block."""
    return LANES * even_split(-(-count // LANES), BLOCK // LANES)


def _kernel(heads: int, rows: int, columns: int, interpret: bool):
    """Splash attention of queries (B, K, N, C), keys and values (B, K, M, C), and segments."""
    q, kv = _block(rows), _block(columns)
    # Two kernels for the backward pass: the fused one holds gradients of the queries for every block of keys.
    blocks = splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    mask = splash.MultiHeadMask([splash.FullMask((rows, columns))] * heads)  # a shape, not an array
    return jax.vmap(splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret))
