"""The kernels of pallas_tpu.py: bilinear sampling as matrix products with hat weights, in Pallas for Mosaic.

For one head of one view and a block of 128 queries, what is sampled is features (C, cells) times a matrix (cells,
queries), whose entry is the sum over the points of weight times hat(x - column) times hat(y - row), with hat(d) =
max(0, 1 - |d|). A tile of 16 x 8 cells of that matrix costs the vector unit two operations per point and register,
because queries lie along the lanes: the hats of the tile's columns are one register per point, that of a row is one
sublane, broadcast. Only tiles within the bounding box of the block's samples are visited.

Backward, with g = d_out (C, queries), the features' gradient is g times the matrix, transposed; the matrix's gradient
is the features, transposed, times g, and is contracted with the hats and their derivatives.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

QUERIES = 128  # of a block: the lanes of a register
ROWS, COLUMNS = 16, 8  # cells of a tile; a register has eight sublanes
FAR = -1e6  # in cells: every hat is zero there

Ref = Any  # an array in the chip's memory


class Samples(NamedTuple):
    """Where a block's samples of one level lie, and which tiles they touch.

    Attributes:
      x, y: in cells, centres at integers; far away where they are outside of the map or do not count.
      left, right, top, bottom: the first tile, and one more than the last, along either axis.
      across: tiles along the map's width.
    """

    x: Float[Array, "p q"]
    y: Float[Array, "p q"]
    left: Int[Array, ""]
    right: Int[Array, ""]
    top: Int[Array, ""]
    bottom: Int[Array, ""]
    across: int


def forward_kernel(points: Ref, offsets: Ref, weights: Ref, *refs: Ref, sizes: tuple[tuple[int, int], ...]) -> None:
    """One block of queries: points (2, Q), offsets (L, 2, P, Q), weights (L, P, Q), a map (tiles, C, cells) per level,
    the result (C, Q), and room for a level's hats of rows (H, P, Q)."""
    *maps, out, row_hats = refs
    total = jnp.zeros(out.shape, jnp.float32)
    for level, size in enumerate(sizes):
        samples = _place(points, offsets, level, size)
        total += _sample(samples, weights.at[level], maps[level], row_hats)
    out[...] = total.astype(out.dtype)


def backward_kernel(
    points: Ref, offsets: Ref, weights: Ref, d_out: Ref, *refs: Ref, sizes: tuple[tuple[int, int], ...]
) -> None:
    """Gradients of one block, the innermost of the grid (B, K, V, blocks).

    After the arguments of the forward pass and d_out (C, Q) come the gradients of the maps, of the points (2, Q), and
    those of offsets (L, 2, P, N) and weights (L, P, N), which stay on the chip for a head's views and blocks. Room: the
    maps' gradients in float32, hats and slopes of rows, and three sums per point, column and query.
    """
    levels = len(sizes)
    maps, d_maps, (d_points, d_offsets, d_weights, *room) = refs[:levels], refs[levels : 2 * levels], refs[2 * levels :]
    sums, of_rows = room[:levels], room[levels:]
    block = pl.program_id(3)

    @pl.when(block == 0)
    def _():
        for d_sum in sums:
            d_sum[...] = jnp.zeros(d_sum.shape, d_sum.dtype)

    @pl.when((pl.program_id(2) == 0) & (block == 0))
    def _():
        for d in (d_offsets, d_weights):
            d[...] = jnp.zeros(d.shape, d.dtype)

    here = pl.ds(pl.multiple_of(block * QUERIES, QUERIES), QUERIES)
    d_point = [jnp.zeros((1, QUERIES), jnp.float32)] * 2
    for level, (height, width) in enumerate(sizes):
        samples = _place(points, offsets, level, (height, width))
        *d_place, d_weight = _gradients(samples, weights.at[level], maps[level], d_out[...], sums[level], *of_rows)
        d_weights[level, :, here] += d_weight
        for axis, (d, length) in enumerate(zip(d_place, (width, height), strict=True)):
            d_offsets[level, axis, :, here] += d
            d_point[axis] += d.sum(axis=0, keepdims=True) * length
    d_points[...] = jnp.concatenate(d_point)

    @pl.when(block == pl.num_programs(3) - 1)
    def _():
        for d_sum, d_map in zip(sums, d_maps, strict=True):
            d_map[...] = d_sum[...].astype(d_map.dtype)


def _sample(samples: Samples, weights: Ref, maps: Ref, row_hats: Ref) -> Float[Array, "c q"]:
    """What a block reads in one level."""
    _each_row(samples, lambda distance: [_hat(distance)], row_hats)

    def add_column(tile_x, total):
        hats = [_hat(d) * weights[p : p + 1] for p, d in enumerate(_distances(samples.x, tile_x))]

        def add_tile(tile_y, total):
            rows = [_weighted(row_hats, tile_y * ROWS + row, hats) for row in range(ROWS)]
            matrix = jnp.concatenate(rows).astype(maps.dtype)
            return total + _product(maps[tile_y * samples.across + tile_x], matrix, (1, 0))

        return lax.fori_loop(samples.top, samples.bottom, add_tile, total)

    nothing = jnp.zeros((maps.shape[1], QUERIES), jnp.float32)
    return lax.fori_loop(samples.left, samples.right, add_column, nothing)


def _gradients(
    samples: Samples,
    weights: Ref,
    maps: Ref,
    d_out: Float[Array, "c q"],
    d_map: Ref,
    row_hats: Ref,
    row_slopes: Ref,
    sums: Ref,
) -> tuple[Float[Array, "p q"], Float[Array, "p q"], Float[Array, "p q"]]:
    """Gradients of one level by x, y and weight of a block's samples; what the block adds to the map's goes there."""
    _each_row(samples, lambda distance: [_hat(distance), _slope(distance)], row_hats, row_slopes)
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

    @pl.loop(samples.left, samples.right)
    def _(tile_x):
        distances = _distances(samples.x, tile_x)
        hats = [_hat(d) * weights[p : p + 1] for p, d in enumerate(distances)]

        def tile(tile_y, by_point):
            place = tile_y * samples.across + tile_x
            d_matrix = _product(maps[place], d_out, (0, 0))
            rows = []
            for i in range(ROWS):
                row, d_row = tile_y * ROWS + i, d_matrix[i * COLUMNS : (i + 1) * COLUMNS]
                rows.append(_weighted(row_hats, row, hats))
                by_point = [
                    (hat + row_hats[row, p : p + 1] * d_row, slope + row_slopes[row, p : p + 1] * d_row)
                    for p, (hat, slope) in enumerate(by_point)
                ]
            d_map[place] += _product(d_out, jnp.concatenate(rows).astype(maps.dtype), (1, 1))
            return by_point

        nothing = jnp.zeros((COLUMNS, QUERIES), jnp.float32)
        by_point = lax.fori_loop(samples.top, samples.bottom, tile, [(nothing, nothing)] * len(hats))
        for p, (distance, hat, (by_hat, by_slope)) in enumerate(zip(distances, hats, by_point, strict=True)):
            sums[0, p] += _slope(distance) * by_hat
            sums[1, p] += hat * by_slope
            sums[2, p] += _hat(distance) * by_hat

    d_x, d_y, d_weight = (sums[i].sum(axis=1) for i in range(3))
    return d_x * weights[...], d_y, d_weight


def _place(points: Ref, offsets: Ref, level: int, size: tuple[int, int]) -> Samples:
    height, width = size
    x = points[0:1] * width - 0.5 + offsets[level, 0]
    y = points[1:2] * height - 0.5 + offsets[level, 1]
    inside = (x >= -1) & (x < width) & (y >= -1) & (y < height)  # what is not a number is not inside
    columns, rows = _range(x, inside, width, COLUMNS), _range(y, inside, height, ROWS)
    x, y = jnp.where(inside, x, FAR), jnp.where(inside, y, FAR)
    return Samples(x, y, *columns, *rows, pl.cdiv(width, COLUMNS))


def _range(cells, inside, size: int, tile: int):
    """The first tile that the samples touch along one axis, and one more than the last."""
    low = jnp.min(jnp.where(inside, cells, size))
    high = jnp.max(jnp.where(inside, cells, -2.0))
    # Not `//`: jax lowers its sign by the generation of the TPU, which a program for none in particular does not know.
    first, last = (
        lax.div(x.astype(jnp.int32), tile) for x in (jnp.maximum(low, 0.0), jnp.minimum(high + 1, size - 1.0))
    )
    return first, jnp.where(high >= low, last + 1, first)


def _each_row(samples: Samples, functions_of, *into: Ref) -> None:
    """Functions of the distance (P, Q) of a row from the samples, for all rows of the tiles that are visited."""

    @pl.loop(samples.top, samples.bottom)
    def _(tile_y):
        for row in (tile_y * ROWS + i for i in range(ROWS)):
            for ref, value in zip(into, functions_of(row.astype(jnp.float32) - samples.y), strict=True):
                ref[row] = value


def _distances(x: Float[Array, "p q"], tile) -> list[Float[Array, "columns q"]]:
    """Of a tile's columns, one per sublane, from each point."""
    cell = lax.broadcasted_iota(jnp.int32, (COLUMNS, QUERIES), 0) + tile * COLUMNS
    return [cell.astype(jnp.float32) - x[p : p + 1] for p in range(x.shape[0])]


def _hat(distance):
    """Weight of a cell at this distance right of or below the sample."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(distance))


def _slope(distance):
    """Derivative of the hat by the sample's coordinate; where it jumps, that of the cells that `floor` chooses."""
    return jnp.where((distance > -1) & (distance <= 1), jnp.where(distance > 0, 1.0, -1.0), 0.0)


def _weighted(row_hats: Ref, row, hats):
    """One row of cells of the matrix: sum over the points of the row's hat and the columns' weighted hats."""
    total = row_hats[row, 0:1] * hats[0]
    for p in range(1, len(hats)):
        total += row_hats[row, p : p + 1] * hats[p]
    return total


def _product(a, b, contract: tuple[int, int]):
    """Accumulated in float32; factors of float32 are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
