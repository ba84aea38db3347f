"""Deformable attention on TPUs: bilinear sampling as matrix products with hat weights, in Pallas for Mosaic.

TPUs read rows by index slowly and multiply matrices fast. For one head of one view and a block of 128 queries, what is
sampled is features (C, cells) times a matrix (cells, queries), whose entry is the sum over the points of weight times
hat(x - column) times hat(y - row), hat(d) = max(0, 1 - |d|). A tile of 16 x 8 cells of that matrix costs the vector
unit two operations per point and register, because queries lie along the lanes: the hat of the columns is one register
per point, that of a row a broadcast of one sublane.

Only the tiles within the bounding box of a block's samples are visited, so queries are first put along a Morton curve,
one order for all views since offsets have no view: two views fix a place in space, seen from which neighbours are
neighbours in every view. Points outside of the map or of invalid views are moved far away, where every hat is zero.

Backward, per tile, with g = d_out (C, queries): the features' gradient is g times the matrix, transposed; the matrix's
gradient is features, transposed, times g, and contracted with the hats and their derivatives. The grid runs head by
head and view by view; sums over queries and views stay in on-chip memory. Nothing is added atomically.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

QUERIES = 128  # of a block: the lanes of a register
ROWS, COLUMNS = 16, 8  # cells of a tile; a register has eight sublanes
FAR = -1e6  # in cells
MORTON_BITS = 8  # of each of three coordinates
MEMORY = 56 * 2**20  # bytes of on-chip memory that a kernel may take; the smallest of v5e, v5p and v6e has 64 MiB


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
    batch, views, count = view_valid.shape
    heads, levels, points = weights.shape[2:]
    channels, dtype = features[0].shape[-1], features[0].dtype
    order = _order(features, reference_points, offsets, view_valid)
    queries = _queries(order, reference_points, offsets, weights, view_valid)
    padded = queries[0].shape[-1]
    tiles = [_tiles(maps) for maps in features]
    out = pl.pallas_call(
        functools.partial(_forward, sizes=_sizes(features)),
        name="deformable_forward",
        grid=(batch, views, heads, padded // QUERIES),
        in_specs=[
            pl.BlockSpec((None, None, 2, QUERIES), lambda b, v, k, n: (b, v, 0, n)),
            pl.BlockSpec((None, None, levels, 2, points, QUERIES), lambda b, v, k, n: (b, k, 0, 0, 0, n)),
            pl.BlockSpec((None, None, levels, points, QUERIES), lambda b, v, k, n: (b, k, 0, 0, n)),
            *(_of_head(maps, lambda b, v, k, n: (b, v, 0, k, 0, 0)) for maps in tiles),
        ],
        out_specs=pl.BlockSpec((None, None, None, channels, QUERIES), lambda b, v, k, n: (b, v, k, 0, n)),
        out_shape=_output((batch, views, heads, channels, padded), dtype, reference_points),
        scratch_shapes=[_hats_of_rows(features, points)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        interpret=interpret,
    )(*queries, *tiles)
    return _by_query(rearrange(out[..., :count], "b v k c n -> b v n k c"), jnp.argsort(order), axis=1)


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
    del deterministic
    batch, views, count = view_valid.shape
    heads, levels, points = weights.shape[2:]
    channels = features[0].shape[-1]
    order = _order(features, reference_points, offsets, view_valid)
    queries = _queries(order, reference_points, offsets, weights, view_valid)
    padded = queries[0].shape[-1]
    d_out = _pad_queries(rearrange(_by_query(d_out, order, axis=1), "b v n k c -> b v k c n"), 0.0)
    tiles = [_tiles(maps) for maps in features]
    of_head = [_of_head(maps, lambda b, k, v, n: (b, v, 0, k, 0, 0)) for maps in tiles]
    # Sums over the views stay on the chip, for all queries of a head.
    d_offsets = pl.BlockSpec((None, None, levels, 2, points, padded), lambda b, k, v, n: (b, k, 0, 0, 0, 0))
    d_weights = pl.BlockSpec((None, None, levels, points, padded), lambda b, k, v, n: (b, k, 0, 0, 0))
    *d_tiles, d_points, d_offsets, d_weights = pl.pallas_call(
        functools.partial(_backward, sizes=_sizes(features)),
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
            *(_output(maps.shape, maps.dtype, reference_points) for maps in tiles),
            _output((batch, views, heads, 2, padded), jnp.float32, reference_points),
            *(_output(x.shape, jnp.float32, reference_points) for x in queries[1:]),
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


def _forward(points_ref, offsets_ref, weights_ref, *refs, sizes):
    *map_refs, out_ref, row_hats = refs
    out = jnp.zeros(out_ref.shape, jnp.float32)
    for level, (size, maps) in enumerate(zip(sizes, map_refs, strict=True)):
        x, y, (left, right, top, bottom) = _place(points_ref, offsets_ref, level, size)
        tiles_across = pl.cdiv(size[1], COLUMNS)

        @pl.loop(top * ROWS, bottom * ROWS)
        def _(row, y=y):
            row_hats[row] = _hat(_convert(row) - y)

        def column(tile_x, out, level=level, x=x, maps=maps, across=tiles_across, top=top, bottom=bottom):
            hats = [_hat(_columns(tile_x) - x[p : p + 1]) * weights_ref[level, p : p + 1] for p in range(x.shape[0])]

            def tile(tile_y, out):
                matrix = [_weighted(row_hats, tile_y * ROWS + row, hats) for row in range(ROWS)]
                matrix = jnp.concatenate(matrix).astype(maps.dtype)
                return out + _product(maps[tile_y * across + tile_x], matrix, ((1,), (0,)))

            return lax.fori_loop(top, bottom, tile, out)

        out = lax.fori_loop(left, right, column, out)
    out_ref[...] = out.astype(out_ref.dtype)


def _backward(points_ref, offsets_ref, weights_ref, d_out_ref, *refs, sizes):
    levels = len(sizes)
    map_refs, d_map_refs, refs = refs[:levels], refs[levels : 2 * levels], refs[2 * levels :]
    d_points_ref, d_offsets_ref, d_weights_ref, *refs = refs
    *sums, row_hats, row_slopes, parts = refs
    view, block = pl.program_id(2), pl.program_id(3)
    here = pl.ds(pl.multiple_of(block * QUERIES, QUERIES), QUERIES)
    d_out = d_out_ref[...]
    d_point = [0.0, 0.0]
    for level, (size, maps, d_sum) in enumerate(zip(sizes, map_refs, sums, strict=True)):
        x, y, (left, right, top, bottom) = _place(points_ref, offsets_ref, level, size)
        across, count = pl.cdiv(size[1], COLUMNS), x.shape[0]
        parts[...] = jnp.zeros(parts.shape, parts.dtype)

        @pl.when(block == 0)
        def _(d_sum=d_sum):
            d_sum[...] = jnp.zeros(d_sum.shape, d_sum.dtype)

        @pl.loop(top * ROWS, bottom * ROWS)
        def _(row, y=y):
            row_hats[row] = _hat(_convert(row) - y)
            row_slopes[row] = _slope(_convert(row) - y)

        @pl.loop(left, right)
        def _(tile_x, level=level, x=x, maps=maps, d_sum=d_sum, across=across, count=count, top=top, bottom=bottom):
            distances = [_columns(tile_x) - x[p : p + 1] for p in range(count)]
            hats = [_hat(d) * weights_ref[level, p : p + 1] for p, d in enumerate(distances)]

            def tile(tile_y, along):
                place = tile_y * across + tile_x
                d_matrix = _product(maps[place], d_out, ((0,), (0,)))
                matrix = []
                for row in range(ROWS):
                    d_row = d_matrix[row * COLUMNS : (row + 1) * COLUMNS]
                    matrix.append(_weighted(row_hats, tile_y * ROWS + row, hats))
                    along = [
                        (
                            hat + row_hats[tile_y * ROWS + row, p : p + 1] * d_row,
                            slope + row_slopes[tile_y * ROWS + row, p : p + 1] * d_row,
                        )
                        for p, (hat, slope) in enumerate(along)
                    ]
                matrix = jnp.concatenate(matrix).astype(maps.dtype)
                d_sum[place] += _product(d_out, matrix, ((1,), (1,)))
                return along

            zero = jnp.zeros((COLUMNS, QUERIES), jnp.float32)
            along = lax.fori_loop(top, bottom, tile, [(zero, zero)] * count)
            for p, (d, hat, (by_hat, by_slope)) in enumerate(zip(distances, hats, along, strict=True)):
                parts[0, p] += _slope(d) * by_hat
                parts[1, p] += hat * by_slope
                parts[2, p] += _hat(d) * by_hat

        d_weight = parts[2].sum(axis=1)
        d_offset = [parts[0].sum(axis=1) * weights_ref[level], parts[1].sum(axis=1)]
        before = view > 0
        d_weights_ref[level, :, here] = d_weight + jnp.where(before, d_weights_ref[level, :, here], 0.0)
        for i in range(2):
            d_offsets_ref[level, i, :, here] = d_offset[i] + jnp.where(before, d_offsets_ref[level, i, :, here], 0.0)
            d_point[i] += d_offset[i].sum(axis=0, keepdims=True) * size[1 - i]
    d_points_ref[...] = jnp.concatenate(d_point)

    @pl.when(block == pl.num_programs(3) - 1)
    def _():
        for d_sum, d_map in zip(sums, d_map_refs, strict=True):
            d_map[...] = d_sum[...].astype(d_map.dtype)


def _place(points_ref, offsets_ref, level: int, size: tuple[int, int]):
    """Columns and rows (P, queries) of the samples, far away if outside, and the range of tiles that they touch."""
    height, width = size
    x = points_ref[0:1] * width - 0.5 + offsets_ref[level, 0]
    y = points_ref[1:2] * height - 0.5 + offsets_ref[level, 1]
    inside = (x >= -1) & (x < width) & (y >= -1) & (y < height)  # what is not a number is not inside
    x, y = jnp.where(inside, x, FAR), jnp.where(inside, y, FAR)
    return x, y, (*_range(x, inside, width, COLUMNS), *_range(y, inside, height, ROWS))


def _range(cells, inside, size: int, tile: int):
    """The first tile that the samples touch along one axis, and one more than the last."""
    low = jnp.min(jnp.where(inside, cells, size))
    high = jnp.max(jnp.where(inside, cells, -2.0))
    first = jnp.maximum(low, 0.0).astype(jnp.int32) // tile
    last = jnp.minimum(high + 1, size - 1.0).astype(jnp.int32) // tile
    return first, jnp.where(high >= low, last + 1, first)


def _columns(tile):
    """Columns of the cells in a tile, one per sublane."""
    cell = lax.broadcasted_iota(jnp.int32, (COLUMNS, QUERIES), 0) + tile * COLUMNS
    return cell.astype(jnp.float32)


def _convert(cell):
    return cell.astype(jnp.float32)


def _hat(distance):
    """Weight of a cell at this distance right of or below the sample."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(distance))


def _slope(distance):
    """Derivative of the hat by the sample's coordinate; where it jumps, that of the cells that `floor` chooses."""
    return jnp.where((distance > -1) & (distance <= 1), jnp.where(distance > 0, 1.0, -1.0), 0.0)


def _weighted(row_hats, row, hats):
    """One row of the matrix's tile: sum over the points of the row's hat and the columns' weighted hats."""
    total = row_hats[row, 0:1] * hats[0]
    for p in range(1, len(hats)):
        total += row_hats[row, p : p + 1] * hats[p]
    return total


def _product(a, b, contract):
    """Accumulated in float32; factors of float32 are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (contract, ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _order(
    features, points: Float[Array, "b v n 2"], offsets: Float[Array, "b n k l p 2"], valid: Bool[Array, "b v n"]
) -> Int[Array, "b n"]:
    """Queries along a Morton curve through the middle of their samples: x, y in the first view, x in another."""
    sizes = jnp.array([(width, height) for height, width in _sizes(features)], offsets.dtype)
    middle = points + (offsets / sizes[:, None]).mean(axis=(2, 3, 4))[:, None]
    side = 2**MORTON_BITS
    cell = (jnp.where(valid[..., None], middle, 0.0) * side).clip(0, side - 1).astype(jnp.uint32)
    other = points.shape[1] // 4  # views of an orbit: a quarter turn on
    for shift, mask in ((16, 0x30000FF), (8, 0x300F00F), (4, 0x30C30C3), (2, 0x9249249)):  # moves the bits apart
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


def _output(shape: tuple[int, ...], dtype, like: Array) -> jax.ShapeDtypeStruct:
    """An output that, inside `shard_map`, varies over the devices as the inputs do."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
