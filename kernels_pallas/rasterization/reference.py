"""Blending in plain XLA: the ground truth for tests, and the implementation on CPU.

Each tile's pairs are cut into chunks. A step of the loop works on one chunk in each of up to `LANES` tiles; a lane
whose tile is finished, because its pairs are used up or all its pixels are, takes the next tile of the list, longest
tiles first. A step costs the same whatever it holds, so that the time is the number of chunks that are really needed.

Within a step the exponent of every (pair, pixel) is a polynomial of second degree in the pixel's place in its tile, a
(n, 6) x (6, 256) product; sums over pairs and over pixels are matrix products too. Only the transmittance is recurrent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.rasterization.shapes import CUT, GEOMETRY, PIXELS, STOP, TILE, Blended, Grid, Pairs

LANES = 64
CHUNK = 32


class Queue(NamedTuple):
    """Each lane's place in the list of tiles and its chunk there, and the first tile not yet given out."""

    place: Int[Array, "lanes"]
    chunk: Int[Array, "lanes"]
    next: Int[Array, ""]

    @staticmethod
    def over(tiles: int) -> "Queue":
        """Lanes at the first tiles of the list."""
        lanes = min(LANES, tiles)
        return Queue(jnp.arange(lanes, dtype=jnp.int32), jnp.zeros(lanes, jnp.int32), jnp.int32(lanes))

    def advance(self, finished) -> "Queue":
        """Lanes that are finished take the next tiles, the others their next chunk."""
        fresh = self.next + jnp.cumsum(finished, dtype=jnp.int32) - 1
        place = jnp.where(finished, fresh, self.place)
        return Queue(place, jnp.where(finished, 0, self.chunk + 1), self.next + jnp.sum(finished, dtype=jnp.int32))


def forward(table: Float[Array, "n k"], pairs: Pairs, grid: Grid, max_alpha: float) -> Blended:
    """Blends the splats of every tile front to back.

    Args:
      table: a splat's centre (2), conic (3), log opacity (1) and features (C).
      pairs: see `Pairs`.
      grid: the images and tiles.
      max_alpha: clamp of alpha.
    """
    tiles, dtype, start = grid.tiles, table.dtype, pairs.start
    splat = pairs.splat[pairs.slot]
    length = jnp.diff(start)
    work, busy = _longest_first((length + CHUNK - 1) // CHUNK)

    def step(state):
        queue, out = state
        tile = work[jnp.minimum(queue.place, tiles)]
        place = queue.chunk[:, None] * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
        rows, _, valid = _fetch(table, splat, start, tile, place)
        alpha, _ = _alphas(_polynomials(rows[..., :GEOMETRY], _centres(tile, grid)), valid, max_alpha)

        # A pixel that is finished carries its transmittance with a minus sign.
        def blend_one(i, carry):
            weights, before, last = carry
            one = alpha[:, i]
            after = before * (1 - one)
            drawn = after > STOP
            weights = weights.at[:, i].set(jnp.where(drawn, one * before, 0))
            last = jnp.where(drawn & (one > 0), place[:, i, None] + 1, last)
            return weights, jnp.where(drawn, after, -jnp.abs(before)), last

        carry = (jnp.zeros_like(alpha), out.transmittance[tile], out.last[tile])
        weights, transmittance, last = lax.fori_loop(0, CHUNK, blend_one, carry)
        out = Blended(
            out.sums.at[tile].add(_product("lnc,lnp->lcp", rows[..., GEOMETRY:], weights)),
            out.transmittance.at[tile].set(transmittance),
            out.last.at[tile].set(last),
        )
        finished = (place[:, -1] + 1 >= length[jnp.minimum(tile, tiles - 1)]) | jnp.all(transmittance < 0, axis=-1)
        return queue.advance(finished), out

    # One tile more than there are takes what idle lanes write.
    empty = Blended(
        jnp.zeros((tiles + 1, table.shape[1] - GEOMETRY, PIXELS), dtype),
        jnp.concatenate([_in_image(grid), jnp.zeros((1, PIXELS), bool)]) * 2.0 - jnp.ones((), dtype),
        jnp.zeros((tiles + 1, PIXELS), jnp.int32),
    )
    state = _varying_as(start, (Queue.over(tiles), empty))
    _, out = lax.while_loop(lambda state: jnp.any(state[0].place < busy), step, state)
    out = jax.tree.map(lambda a: a[:-1], out)
    return out._replace(transmittance=jnp.abs(out.transmittance))


def backward(
    table: Float[Array, "n k"],
    pairs: Pairs,
    grid: Grid,
    max_alpha: float,
    transmittance: Float[Array, "tiles px"],
    last: Int[Array, "tiles px"],
    sums_bar: Float[Array, "tiles c px"],
    transmittance_bar: Float[Array, "tiles px"],
) -> Float[Array, "n k"]:
    """Gradient of the table: of every slot, then summed over each splat's slots in order.

    Back to front, with v_i = f_i . sums_bar the value of splat i in a pixel and R_i = sum_{j>i} w_j v_j + T bar(T) what
    lies behind it (T the final transmittance), d loss / d alpha_i = T_i v_i - R_i / (1 - alpha_i). The transmittance
    before i is the one after it divided by 1 - alpha_i.

    Args:
      table, pairs, grid, max_alpha: those of `forward`.
      transmittance, last: from its result.
      sums_bar, transmittance_bar: gradients of its result.
    """
    tiles, start = grid.tiles, pairs.start
    splat = pairs.splat[pairs.slot]
    behind = transmittance * transmittance_bar
    pad = lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])])  # noqa: E731
    transmittance, behind, last, sums_bar = map(pad, (transmittance, behind, last, sums_bar))
    chunks = (jnp.max(last, axis=-1) + CHUNK - 1) // CHUNK
    work, busy = _longest_first(chunks[:-1])

    def step(state):
        queue, transmittance, behind, gradients = state
        tile = work[jnp.minimum(queue.place, tiles)]
        chunk = chunks[tile] - 1 - queue.chunk
        place = chunk[:, None] * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
        rows, offset, valid = _fetch(table, splat, start, tile, place)
        polynomials, pull = jax.vjp(lambda rows: _polynomials(rows, _centres(tile, grid)), rows[..., :GEOMETRY])
        alpha, clamped = _alphas(polynomials, valid, max_alpha)
        drawn = place[..., None] < last[tile][:, None]
        alpha = jnp.where(drawn, alpha, 0)
        value = _product("lnc,lcp->lnp", rows[..., GEOMETRY:], sums_bar[tile])

        def unblend_one(j, carry):
            weights, exponent_bar, after, behind = carry
            i = CHUNK - 1 - j
            one, v = alpha[:, i], value[:, i]
            before = after / (1 - one)
            weight = one * before
            wv = weight * v
            bar = wv - behind * (one / (1 - one))
            return weights.at[:, i].set(weight), exponent_bar.at[:, i].set(bar), before, behind + wv

        carry = (jnp.zeros_like(alpha), jnp.zeros_like(alpha), transmittance[tile], behind[tile])
        weights, exponent_bar, before, now_behind = lax.fori_loop(0, CHUNK, unblend_one, carry)
        exponent_bar = jnp.where(clamped, 0, exponent_bar)
        (geometry_bar,) = pull(_product("lnp,pk->lnk", exponent_bar, _basis(table.dtype)))
        rows_bar = jnp.concatenate([geometry_bar, _product("lnp,lcp->lnc", weights, sums_bar[tile])], axis=-1)
        slot = jnp.where(valid, pairs.slot[offset], pairs.slot.size)  # past the end: dropped
        gradients = gradients.at[slot].set(rows_bar, mode="drop")
        queue = queue.advance(chunk <= 0)
        return queue, transmittance.at[tile].set(before), behind.at[tile].set(now_behind), gradients

    gradients = jnp.zeros((pairs.slot.size, table.shape[1]), table.dtype)
    state = _varying_as(start, (Queue.over(tiles), transmittance, behind, gradients))
    *_, gradients = lax.while_loop(lambda state: jnp.any(state[0].place < busy), step, state)
    return jax.ops.segment_sum(gradients, pairs.splat, table.shape[0], indices_are_sorted=True)


def _varying_as(reference: Array, tree):
    """The same numbers, typed inside `shard_map` as varying over the devices, which a loop's carry must be at once."""
    zero = jnp.zeros_like(reference[0])
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _longest_first(chunks: Int[Array, "tiles"]) -> tuple[Int[Array, "tiles_and_one"], Int[Array, ""]]:
    """Tiles by falling number of chunks, and how many have any; the rest of the list is the tile that is too many."""
    tiles = chunks.size
    busy = jnp.sum(chunks > 0, dtype=jnp.int32)
    order = jnp.pad(jnp.argsort(-chunks).astype(jnp.int32), (0, 1), constant_values=tiles)
    return jnp.where(jnp.arange(tiles + 1) < busy, order, tiles), busy


def _fetch(table, splat, start, tile, place) -> tuple[Array, Array, Array]:
    """Rows (lanes, n, k) of the pairs at `place` in each lane's tile, their offsets, and whether they exist."""
    tile = jnp.minimum(tile, start.size - 1)  # the tile that is too many begins and ends where the last one ends
    end = start[jnp.minimum(tile + 1, start.size - 1)]
    offset = start[tile][:, None] + place
    valid = (offset < end[:, None]) & (place >= 0)
    offset = jnp.where(valid, offset, 0)
    return table[splat[offset]], offset, valid


def _centres(tile: Int[Array, "lanes"], grid: Grid) -> Int[Array, "lanes 1 2"]:
    """Centres of the tiles in pixels."""
    row, column = tile // grid.columns % grid.rows, tile % grid.columns
    return (jnp.stack([column, row], axis=-1) * TILE + TILE // 2)[:, None]


def _basis(dtype) -> Float[Array, "px 6"]:
    """1, x, y, x^2, xy, y^2 of a tile's pixel centres, measured from the tile's centre."""
    y, x = (np.indices((TILE, TILE)) + 0.5 - TILE / 2).reshape(2, PIXELS)
    return jnp.asarray(np.stack([np.ones(PIXELS), x, y, x * x, x * y, y * y], axis=-1), dtype)


def _polynomials(geometry: Float[Array, "lanes n 6"], centres: Int[Array, "lanes 1 2"]) -> Float[Array, "lanes n 6"]:
    """Coefficients of log(alpha) = log o - (p - m)^T Q (p - m) / 2 over `_basis`."""
    x, y = jnp.moveaxis(geometry[..., :2] - centres, -1, 0)
    a, b, c, log_opacity = jnp.moveaxis(geometry[..., 2:], -1, 0)
    slope_x, slope_y = a * x + b * y, b * x + c * y
    constant = log_opacity - 0.5 * (slope_x * x + slope_y * y)
    return jnp.stack([constant, slope_x, slope_y, -0.5 * a, -b, -0.5 * c], axis=-1)


def _alphas(polynomials: Float[Array, "lanes n 6"], valid, max_alpha: float) -> tuple[Array, Array]:
    """Alpha of every (pair, pixel) of a chunk, zero below the cut, and where it is clamped."""
    polynomials = jnp.where(valid[..., None], polynomials, jnp.array([-100.0, 0, 0, 0, 0, 0], polynomials.dtype))
    alpha = jnp.exp(_product("lnk,pk->lnp", polynomials, _basis(polynomials.dtype)))
    return jnp.where(alpha >= CUT, jnp.minimum(alpha, max_alpha), 0), alpha > max_alpha


def _in_image(grid: Grid) -> Bool[Array, "tiles px"]:
    """Which pixels of the tiles (tiles, px) lie in the image."""
    y, x = np.indices((grid.rows * TILE, grid.columns * TILE))
    inside = ((y < grid.height) & (x < grid.width)).reshape(grid.rows, TILE, grid.columns, TILE)
    inside = inside.transpose(0, 2, 1, 3).reshape(-1, PIXELS)
    return jnp.tile(inside, (grid.images, 1))


def _product(equation: str, a: Array, b: Array) -> Array:
    """einsum in full precision on every device."""
    return jnp.einsum(equation, a, b, precision="highest")
