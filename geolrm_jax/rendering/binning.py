"""Which Gaussian touches which tile: (splat, tile) pairs in tile order, front to back within a tile.

Order is exact, without a 64-bit key. Splats are first ordered by the bits of their depth, view by view; pairs are then
laid out in that order, so that a stable sort by the tile's number alone leaves every tile front to back (equal depths:
the lower index first).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from geolrm_jax.rendering.projection import Projected
from kernels_pallas.rasterization.shapes import CUT, TILE, Grid, Pairs

# The pixel test decides what is drawn; the tile test only must not lose anything to rounding.
REACH_SLACK = 1e-3
SLOT_MULTIPLE = 256  # arrays of slots of an odd length take XLA half as long again


def stable_order(keys: Integer[Array, "*batch n"], bits: int) -> Int[Array, "*batch n"]:
    """Indices that sort `bits`-bit integers without a sign along the last axis, equal keys in place.

    A least-significant-digit radix sort whose passes sort one 32-bit word, digit above position: on CPU XLA's sort of a
    single integer operand is several times faster than one that carries a second along, and on GPU it is CUB's.
    """
    n = keys.shape[-1]
    position_bits = max(1, (n - 1).bit_length())
    digit_bits = 32 - position_bits
    position = jnp.arange(n, dtype=jnp.uint32)
    order, keys = jnp.broadcast_to(position, keys.shape), keys.astype(jnp.uint32)
    for shift in range(0, bits, digit_bits):
        digit = (jnp.take_along_axis(keys, order, -1) >> shift) & ((1 << digit_bits) - 1)
        packed = lax.sort((digit << position_bits) | position)
        order = jnp.take_along_axis(order, packed & ((1 << position_bits) - 1), -1)
    return order.astype(jnp.int32)


def depth_order(depth: Float[Array, "m g"], visible: Bool[Array, "m g"]) -> Int[Array, "m g"]:
    """Indices of each view's splats from near to far, the invisible last."""
    words = lax.bitcast_convert_type(depth, jnp.uint32)  # of positive floats: ordered as they are
    last = jnp.iinfo(jnp.int32).max
    if depth.dtype == jnp.float32:
        return stable_order(jnp.where(visible, words, last), 31)
    low, high = words[..., 0], jnp.where(visible, words[..., 1], last)  # of float64
    order = stable_order(low, 32)
    return jnp.take_along_axis(order, stable_order(jnp.take_along_axis(high, order, -1), 31), -1)


class Footprint(NamedTuple):
    """Where the alpha of projected Gaussians is above the cut: ellipses, and the tile rows that they span. All (N,).

    A pixel at (dx, dy) from the centre is inside if its squared Mahalanobis distance is at most `reach`. On the line
    at height dy, the inside is an interval about `shear` dy of half width sqrt((reach - dy^2 / yy) spread).
    """

    x: Array
    y: Array
    yy: Array
    reach: Array
    shear: Array
    spread: Array
    lean: Array  # height of the rightmost point; the leftmost is opposite
    half_height: Array
    first_row: Array
    rows: Array


def footprints(projected: Projected, opacities: Array, grid: Grid) -> Footprint:
    """Ellipses of Gaussians (N,) whose alpha reaches `CUT`: opacity o reaches sqrt(2 ln(o / CUT)) sigmas."""
    p = projected
    reach = 2 * jnp.log(jnp.maximum(opacities, CUT) / CUT) + REACH_SLACK
    half_width, half_height = jnp.sqrt(reach * p.xx), jnp.sqrt(reach * p.yy)
    drawn = p.visible & (opacities >= CUT) & (p.x + half_width >= 0) & (p.x - half_width <= grid.width)
    first_row, last_row = _tiles_between(p.y - half_height, p.y + half_height, grid.rows)
    rows = jnp.where(drawn, jnp.maximum(last_row - first_row + 1, 0), 0)
    lean, shear, spread = p.xy * jnp.sqrt(reach / p.xx), p.xy / p.yy, p.determinant / p.yy
    return Footprint(p.x, p.y, p.yy, reach, shear, spread, lean, half_height, first_row, rows)


def columns(footprint: Footprint, row: Int[Array, "n"], grid: Grid) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """First column and number of columns of tiles with a pixel centre in the ellipse's part in a row of tiles."""
    f = footprint
    top = row * TILE + 0.5 - f.y
    top, bottom = (jnp.clip(edge, -f.half_height, f.half_height) for edge in (top, top + (TILE - 1)))

    def edge(dy, side):
        return f.x + f.shear * dy + side * jnp.sqrt(jnp.maximum(f.reach - dy**2 / f.yy, 0) * f.spread)

    left, right = edge(jnp.clip(-f.lean, top, bottom), -1), edge(jnp.clip(f.lean, top, bottom), 1)
    first, last = _tiles_between(left, right, grid.columns)
    return first, jnp.maximum(last - first + 1, 0)


def _tiles_between(low: Array, high: Array, count: int) -> tuple[Array, Array]:
    """First and last of `count` tiles in a line with a pixel centre in [low, high]; last < first if there is none."""
    first = jnp.clip(jnp.ceil((low - (TILE - 0.5)) / TILE), 0, count)
    last = jnp.clip(jnp.floor((high - 0.5) / TILE), -1, count - 1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


def tile_counts(footprint: Footprint, grid: Grid) -> Int[Array, "n"]:
    """Number of tiles that each Gaussian touches."""

    def add_row(r, total):
        return total + jnp.where(r < footprint.rows, columns(footprint, footprint.first_row + r, grid)[1], 0)

    return lax.fori_loop(0, jnp.max(footprint.rows), add_row, jnp.zeros_like(footprint.rows))


def _nth_tile(footprint: Footprint, n: Int[Array, "p"], grid: Grid) -> Int[Array, "p"]:
    """The n-th tile of each Gaussian, row by row, as row * columns + column; -1 if it has fewer."""

    def step(r, state):
        left, tile = state  # tiles of this Gaussian still to be counted off
        row = footprint.first_row + r
        first, count = columns(footprint, row, grid)
        return left - count, jnp.where((left >= 0) & (left < count), row * grid.columns + first + left, tile)

    return lax.fori_loop(0, jnp.max(footprint.rows), step, (n, jnp.full_like(n, -1)))[1]


def make_pairs(
    projected: Projected, opacities: Float[Array, "m g"], grid: Grid, capacity: int
) -> tuple[Pairs, Int[Array, "n"], Int[Array, ""]]:
    """(splat, tile) pairs of all views.

    Args:
      projected: arrays (M, G), M = `grid.images`.
      opacities: zero for what must not be drawn.
      grid: the tiles.
      capacity: pairs that are kept, over all views; the first in the order of views and depth.

    Returns:
      The pairs, whose splats are numbered by view and depth; for each splat its index in the flattened input (M G,);
      and the number of pairs that did not fit.
    """
    footprint = footprints(*jax.tree.map(jnp.ravel, (projected, opacities)), grid)
    counts, fits = countable(tile_counts(footprint, grid))
    order = depth_order(projected.depth, projected.visible)
    gaussian = (order + jnp.arange(order.shape[0], dtype=jnp.int32)[:, None] * order.shape[1]).ravel()
    counts = counts[gaussian]
    ends = jnp.cumsum(counts)
    slots = jnp.arange(-(-capacity // SLOT_MULTIPLE) * SLOT_MULTIPLE, dtype=jnp.int32)
    splat = jnp.repeat(jnp.arange(counts.size, dtype=jnp.int32), counts, total_repeat_length=slots.size)

    tile = _nth_tile(jax.tree.map(lambda a: a[gaussian[splat]], footprint), slots - (ends - counts)[splat], grid)
    exists = (slots < jnp.minimum(ends[-1], capacity)) & (tile >= 0)
    tile = jnp.where(exists, tile + splat // order.shape[1] * (grid.rows * grid.columns), grid.tiles)
    slot = stable_order(tile, grid.tiles.bit_length())
    start = jnp.searchsorted(tile[slot], jnp.arange(grid.tiles + 1, dtype=jnp.int32)).astype(jnp.int32)
    overflow = jnp.where(fits, jnp.maximum(ends[-1] - capacity, 0), jnp.iinfo(jnp.int32).max)
    first = jnp.pad(jnp.minimum(ends, capacity), (1, 0))
    return Pairs(splat, slot, start, first), gaussian, overflow


def countable(counts: Int[Array, "n"]) -> tuple[Int[Array, "n"], Bool[Array, ""]]:
    """The counts and whether their sum fits 32 bits; if not, zeros, so that nothing wraps around."""
    fits = jnp.sum(counts.astype(jnp.float32)) < 2.0**31 - 2.0**20
    return jnp.where(fits, counts, 0), fits
