"""Deformable attention on TPUs, which read rows by index slowly and multiply matrices fast: see hat_matrix.py.

The kernels visit the part of a map that a block of 128 queries looks at, so queries are first put along a Morton curve:
one order for all views, since offsets have no view. Two views fix a place in space, and neighbours in space are
neighbours in every view. Here is what surrounds the kernels: that order, and the layouts.

The grid runs head by head and view by view; sums over queries and views stay in on-chip memory, in a fixed order: the
same input gives the same bits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.deformable_attention import reference
from kernels_pallas.deformable_attention.hat_matrix import COLUMNS, QUERIES, ROWS, backward_kernel, forward_kernel
from kernels_pallas.deformable_attention.mesh import on_mesh
from kernels_pallas.mesh import output_like
from kernels_pallas.platforms import warn_once

MORTON_BITS = 8  # of each of three coordinates
MEMORY = 56 * 2**20  # bytes of on-chip memory that a kernel may take; v5e, v5p and v6e have at least 64 MiB


def forward(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    weights: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
    *,
    interpret: bool = False,
) -> Float[Array, "b v n k c"]:
    """Arguments and result as in reference.py; features are bfloat16 or float32, the rest is float32."""
    arrays = features, reference_points, offsets, weights, view_valid
    if obstacle := _obstacle(features):
        if jax.local_devices()[0].platform == "tpu":  # elsewhere this is a branch that is not taken
            warn_once(f"features are sampled in plain XLA, not by the kernel for TPUs: {obstacle}")
        return reference.forward(*arrays)
    return on_mesh(functools.partial(_forward, interpret=interpret), weights, arrays, (4, None, 2, 2, None), 3)


def backward(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    weights: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
    d_out: Float[Array, "b v n k c"],
    *,
    deterministic: bool,
    interpret: bool = False,
) -> tuple[tuple[Array, ...], Array, Array, Array]:
    """Arguments and result as in reference.py; deterministic in any case."""
    arrays = features, reference_points, offsets, weights, view_valid, d_out
    if _obstacle(features):
        return reference.backward(*arrays, deterministic=deterministic)
    heads_in, heads_out = (4, None, 2, 2, None, 3), (4, None, 2, 2)
    return on_mesh(functools.partial(_backward_in_turns, interpret=interpret), weights, arrays, heads_in, heads_out)


def _obstacle(features) -> str:
    """Why the kernels cannot take these maps; empty if they can.

    The maps of a head, their gradients in two types and copies under way must leave room on the chip.
    """
    if features[0].dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, and these are {features[0].dtype}"
    cells = sum(pl.cdiv(height, ROWS) * pl.cdiv(width, COLUMNS) * ROWS * COLUMNS for height, width in _sizes(features))
    need = cells * features[0].shape[-1] * (4 * features[0].dtype.itemsize + 4)
    return f"a head's maps need {need} bytes on the chip, of {MEMORY // 2}" if need > MEMORY // 2 else ""


def _forward(axes, features, reference_points, offsets, weights, view_valid, *, interpret):
    """The result, of one device's scenes and heads."""
    del axes
    batch, views, count = view_valid.shape
    heads, levels, points = weights.shape[2:]
    channels, dtype = features[0].shape[-1], features[0].dtype
    order = _order(features, reference_points, offsets, view_valid)
    queries = _queries(order, reference_points, offsets, weights, view_valid)
    padded = queries[0].shape[-1]
    tiles = [_tiles(maps) for maps in features]
    out = pl.pallas_call(
        functools.partial(forward_kernel, sizes=_sizes(features)),
        name="deformable_forward",
        grid=(batch, views, heads, padded // QUERIES),
        in_specs=[
            pl.BlockSpec((None, None, 2, QUERIES), lambda b, v, k, n: (b, v, 0, n)),
            pl.BlockSpec((None, None, levels, 2, points, QUERIES), lambda b, v, k, n: (b, k, 0, 0, 0, n)),
            pl.BlockSpec((None, None, levels, points, QUERIES), lambda b, v, k, n: (b, k, 0, 0, n)),
            *(_of_head(maps, lambda b, v, k, n: (b, v, 0, k, 0, 0)) for maps in tiles),
        ],
        out_specs=pl.BlockSpec((None, None, None, channels, QUERIES), lambda b, v, k, n: (b, v, k, 0, n)),
        out_shape=output_like((batch, views, heads, channels, padded), dtype, reference_points),
        scratch_shapes=[_hats_of_rows(features, points)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        interpret=interpret,
    )(*queries, *tiles)
    # Heads and channels are one axis while rows move, or each head would take the room of whole registers.
    out = _by_query(rearrange(out[..., :count], "b v k c n -> b v n (k c)"), jnp.argsort(order), axis=1)
    return rearrange(out, "b v n (k c) -> b v n k c", k=heads)


def _backward_in_turns(axes, features, points, offsets, weights, valid, d_out, *, interpret):
    """Gradients of one device's scenes and heads, by so many queries at a time that sums over views have room."""
    samples = math.prod(weights.shape[3:])
    at_once = MEMORY // 2 // (2 * 3 * 4 * samples) // QUERIES * QUERIES
    turns = [slice(i, i + at_once) for i in range(0, max(weights.shape[1], 1), at_once)]
    d_features, d_points, d_offsets, d_weights = zip(
        *(
            _backward(
                features, points[:, :, s], offsets[:, s], weights[:, s], valid[:, :, s], d_out[:, :, s], interpret
            )
            for s in turns
        ),
        strict=True,
    )
    d_features = tuple(sum(x.astype(jnp.float32) for x in d).astype(d[0].dtype) for d in zip(*d_features, strict=True))
    d_points = lax.psum(jnp.concatenate(d_points, axis=2), axes)
    return d_features, d_points, jnp.concatenate(d_offsets, 1), jnp.concatenate(d_weights, 1)


def _backward(features, reference_points, offsets, weights, view_valid, d_out, interpret):
    batch, views, count = view_valid.shape
    heads, levels, points = weights.shape[2:]
    channels = features[0].shape[-1]
    order = _order(features, reference_points, offsets, view_valid)
    queries = _queries(order, reference_points, offsets, weights, view_valid)
    padded = queries[0].shape[-1]
    d_out = _by_query(rearrange(d_out, "b v n k c -> b v n (k c)"), order, axis=1)
    d_out = _pad_queries(rearrange(d_out, "b v n (k c) -> b v k c n", k=heads), 0.0)
    tiles = [_tiles(maps) for maps in features]
    of_head = [_of_head(maps, lambda b, k, v, n: (b, v, 0, k, 0, 0)) for maps in tiles]
    # Sums over the views stay on the chip, for all queries of a head.
    d_offsets = pl.BlockSpec((None, None, levels, 2, points, padded), lambda b, k, v, n: (b, k, 0, 0, 0, 0))
    d_weights = pl.BlockSpec((None, None, levels, points, padded), lambda b, k, v, n: (b, k, 0, 0, 0))
    *d_tiles, d_points, d_offsets, d_weights = pl.pallas_call(
        functools.partial(backward_kernel, sizes=_sizes(features)),
        name="deformable_backward",
        grid=(batch, heads, views, padded // QUERIES),
        in_specs=[
            pl.BlockSpec((None, None, 2, QUERIES), lambda b, k, v, n: (b, v, 0, n)),
            pl.BlockSpec((None, None, levels, 2, points, QUERIES), lambda b, k, v, n: (b, k, 0, 0, 0, n)),
            pl.BlockSpec((None, None, levels, points, QUERIES), lambda b, k, v, n: (b, k, 0, 0, n)),
            pl.BlockSpec((None, None, None, channels, QUERIES), lambda b, k, v, n: (b, v, k, 0, n)),
            *of_head,
        ],
        out_specs=[
            *of_head,
            pl.BlockSpec((None, None, None, 2, QUERIES), lambda b, k, v, n: (b, v, k, 0, n)),
            d_offsets,
            d_weights,
        ],
        out_shape=[
            *(output_like(maps.shape, maps.dtype, reference_points) for maps in tiles),
            output_like((batch, views, heads, 2, padded), jnp.float32, reference_points),
            *(output_like(x.shape, jnp.float32, reference_points) for x in queries[1:]),
        ],
        scratch_shapes=[
            *(pltpu.VMEM((maps.shape[2], channels, ROWS * COLUMNS), jnp.float32) for maps in tiles),
            _hats_of_rows(features, points),
            _hats_of_rows(features, points),
            pltpu.VMEM((3, points, COLUMNS, QUERIES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        interpret=interpret,
    )(*queries, d_out, *tiles)
    back = jnp.argsort(order)
    return (
        tuple(_untile(d, size) for d, size in zip(d_tiles, _sizes(features), strict=True)),
        _by_query(rearrange(d_points.sum(axis=2)[..., :count], "b v i n -> b v n i"), back, axis=1),
        _by_query(rearrange(d_offsets[..., :count], "b k l i p n -> b n k l p i"), back),
        _by_query(rearrange(d_weights[..., :count], "b k l p n -> b n k l p"), back),
    )


def _order(
    features, points: Float[Array, "b v n 2"], offsets: Float[Array, "b n k l p 2"], valid: Bool[Array, "b v n"]
) -> Int[Array, "b n"]:
    """Queries along a Morton curve through the middle of their samples: x, y in the first view, x in another."""
    sizes = jnp.array([(width, height) for height, width in _sizes(features)], offsets.dtype)
    middle = points + (offsets / sizes[:, None]).mean(axis=(2, 3, 4))[:, None]
    side = 2**MORTON_BITS
    cell = (jnp.where(valid[..., None], middle, 0.0) * side).clip(0, side - 1).astype(jnp.uint32)
    other = points.shape[1] // 4  # views of an orbit: a quarter turn on
    for shift, mask in ((8, 0x300F00F), (4, 0x30C30C3), (2, 0x9249249)):  # moves the bits apart
        cell = (cell | cell << shift) & mask
    return jnp.argsort(cell[:, 0, :, 0] | cell[:, 0, :, 1] << 1 | cell[:, other, :, 0] << 2)


def _by_query(x: Array, order: Int[Array, "b n"], axis: int = 0) -> Array:
    """The queries, which are along this axis of each scene, in this order."""
    return jax.vmap(lambda x, order: x.take(order, axis=axis, mode="clip"))(x, order)


def _queries(order, reference_points, offsets, weights, view_valid):
    """The arrays in this order, queries along the last axis in whole blocks; what does not count is at infinity."""
    points = _by_query(jnp.where(view_valid[..., None], reference_points, jnp.inf), order, axis=1)
    return (
        _pad_queries(rearrange(points, "b v n i -> b v i n"), jnp.inf),
        _pad_queries(rearrange(_by_query(offsets, order), "b n k l p i -> b k l i p n"), 0.0),
        _pad_queries(rearrange(_by_query(weights, order), "b n k l p -> b k l p n"), 0.0),
    )


def _pad_queries(x, value: float):
    """In whole blocks of queries, at least one."""
    count = x.shape[-1]
    missing = max(pl.cdiv(count, QUERIES), 1) * QUERIES - count
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, missing)), constant_values=value)


def _tiles(maps: Float[Array, "b v h w k c"]) -> Float[Array, "b v t k c cells"]:
    """The map in tiles of cells, row by row of tiles, with cells along the last axis; zero beyond the border."""
    height, width, heads = maps.shape[2:5]
    # In steps that each keep a long last axis: cells into tiles, then a transposition of each tile.
    maps = rearrange(maps, "b v h w k c -> b v h w (k c)")
    maps = jnp.pad(maps, (*((0, 0),) * 2, (0, -height % ROWS), (0, -width % COLUMNS), (0, 0)))
    maps = rearrange(maps, "b v (y i) (x j) kc -> b v (y x) (i j) kc", i=ROWS, j=COLUMNS)
    return rearrange(rearrange(maps, "b v t cell kc -> b v t kc cell"), "b v t (k c) cell -> b v t k c cell", k=heads)


def _untile(tiles: Float[Array, "b v t k c cells"], size: tuple[int, int]) -> Float[Array, "b v h w k c"]:
    """The inverse of `_tiles`, for a map of this size."""
    heads, across = tiles.shape[3], pl.cdiv(size[1], COLUMNS)
    maps = rearrange(rearrange(tiles, "b v t k c cell -> b v t (k c) cell"), "b v t kc cell -> b v t cell kc")
    maps = rearrange(maps, "b v (y x) (i j) kc -> b v (y i) (x j) kc", x=across, i=ROWS)
    return rearrange(maps[:, :, : size[0], : size[1]], "b v h w (k c) -> b v h w k c", k=heads)


def _sizes(features) -> tuple[tuple[int, int], ...]:
    return tuple(maps.shape[2:4] for maps in features)


def _hats_of_rows(features, points: int):
    """Room for a number per row of the largest map, point and query of a block."""
    rows = max(pl.cdiv(height, ROWS) * ROWS for height, _ in _sizes(features))
    return pltpu.VMEM((rows, points, QUERIES), jnp.float32)


def _of_head(tiles, place):
    """One head of one view: all of its tiles."""
    return pl.BlockSpec((None, None, tiles.shape[2], None, *tiles.shape[4:]), place)
