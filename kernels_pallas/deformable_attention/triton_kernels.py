"""The Triton kernels of pallas_gpu.py: sampling, its gradients by query, and the sums over samples by cell."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

QUERIES, WARPS = 32, 1  # of one program that gathers
CHANNELS = 16  # of a head that are loaded together, at most: a sector of 32 bytes, by two threads
ROWS, COLUMNS, SAMPLES = 2, 8, 32  # cells of one program that sums over samples, and samples at a time
FAR = 1e6  # in cells: beyond it nothing is computed with a coordinate


def forward_kernel(order, seen, points, offsets, weights, *maps_and_out, views, sizes, interpret):
    """Samples of one head of one view, for a block of the queries in `order`; the first `seen` of them count."""
    *maps, out = maps_and_out
    head, image = pl.program_id(1), pl.program_id(2)
    scene = lax.div(image, np.int32(views))
    parts = _parts(out.shape[-1])
    query, exists, there, limit = _queries(order, seen, image, weights.shape[-1])
    point = [_read(points, there, image, query, i) for i in (0, 1)]
    totals = [jnp.zeros((QUERIES, part.size), weights.dtype) for part in parts]
    for level, size in enumerate(sizes):

        def add(p, totals, level=level, size=size):
            place = scene, query, head, level, p
            offset = [_read(offsets, there, *place, i) for i in (0, 1)]
            weight = _read(weights, there, *place)
            corners = _corners(point, offset, size, there)
            for cell, inside, share in zip(corners.cell, corners.inside, corners.shares, strict=True):
                share = _by_query(weight * share, totals[0])
                for i, part in enumerate(parts):
                    rows = _rows(maps[level], inside, image, cell, head * out.shape[-1] + part)
                    totals[i] = _multiply_add(rows, share, totals[i], interpret)
            return totals

        totals = lax.fori_loop(0, limit, add, totals)
    for part, total in zip(parts, totals, strict=True):
        place = out.at[image, query[:, None], head, part[None]]
        plgpu.store(place, total.astype(out.dtype), mask=_by_query(exists, total))


def backward_kernel(view, order, seen, points, offsets, weights, *rest, views, sizes, interpret):
    """Adds one view's part to d_offsets and d_weights and writes its d_points by head, for a block of queries."""
    *maps, d_out, _, _, d_offsets, d_weights, d_points = rest
    head, scene = pl.program_id(1), pl.program_id(2)
    image = scene * views + view[0]
    parts = _parts(d_out.shape[-1])
    query, exists, there, limit = _queries(order, seen, image, weights.shape[-1])
    point = [_read(points, there, image, query, i) for i in (0, 1)]
    d_rows = [_rows(d_out, there, image, query, head, part).astype(weights.dtype) for part in parts]
    zeros = jnp.zeros(QUERIES, weights.dtype)
    d_point = zeros, zeros
    for level, size in enumerate(sizes):

        def add(p, d_pixel, level=level, size=size):
            place = scene, query, head, level, p
            offset = [_read(offsets, there, *place, i) for i in (0, 1)]
            weight = _read(weights, there, *place)
            corners = _corners(point, offset, size, there)
            dots = []  # of the cells' rows and d_out
            for cell, inside in zip(corners.cell, corners.inside, strict=True):
                products = jnp.zeros_like(d_rows[0])
                for part, d_row in zip(parts, d_rows, strict=True):
                    rows = _rows(maps[level], inside, image, cell, head * d_out.shape[-1] + part)
                    products = _multiply_add(rows, d_row, products, interpret)
                dots.append(jnp.sum(products, axis=1))
            d_x, d_y = (weight * slope for slope in corners.slopes(dots))
            d_weight = sum(share * dot for share, dot in zip(corners.shares, dots, strict=True))
            for sums, value, *which in ((d_offsets, d_x, 0), (d_offsets, d_y, 1), (d_weights, d_weight)):
                total = _read(sums, there, *place, *which) + value
                plgpu.store(sums.at[_index(*place, *which)], total, mask=there)
            return d_pixel[0] + d_x, d_pixel[1] + d_y

        d_pixel = lax.fori_loop(0, limit, add, (zeros, zeros))
        d_point = [total + d * n for total, d, n in zip(d_point, d_pixel, size[::-1], strict=True)]
    for i, value in enumerate(d_point):
        plgpu.store(d_points.at[_index(scene, query, head, i)], value, mask=exists)


def sum_kernel(view, number, start, points, offsets, weights, d_out, _, d_map, *, level, size, views):
    """Writes d_map at a program's cells: the sum over samples of weight (1 - |x - column|)+ (1 - |y - row|)+ times the
    query's row of d_out."""
    height, width = size
    head, scene = pl.program_id(1), pl.program_id(2)
    heads, channels, samples = d_out.shape[2], d_out.shape[3], weights.shape[-1]
    image = scene * views + view[0]
    tile_row, tile_column = _divide(pl.program_id(0), pl.cdiv(width, COLUMNS))
    top, left = tile_row * ROWS, tile_column * COLUMNS
    row, column = _divide(lax.iota(jnp.int32, ROWS * COLUMNS), COLUMNS)
    row, column = top + row, left + column
    # Matrix products want sides of powers of two, of at least 16.
    columns = lax.iota(jnp.int32, max(16, pl.next_power_of_2(channels)))
    wide = (columns < channels)[None]

    def add(place, total, end):
        there = place + lax.iota(jnp.int32, SAMPLES) < end
        query, p = _divide(_read(number, there, place + lax.iota(jnp.int32, SAMPLES)), samples)
        spot = scene, query, head, level, p
        x, y = (
            _read(points, there, scene, query, i) * n - 0.5 + _read(offsets, there, *spot, i)
            for i, n in enumerate((width, height))
        )
        hats = (
            jnp.maximum(0, 1 - jnp.abs(pixel[None] - cell[:, None].astype(pixel.dtype)))
            for pixel, cell in ((x, column), (y, row))
        )
        shares = math.prod(hats) * _read(weights, there, *spot)[None]
        rows = plgpu.load(d_out.at[image, query[:, None], head, columns[None]], mask=there[:, None] & wide, other=0)
        shares = shares.astype(rows.dtype)
        return total + jnp.dot(shares, rows, precision="highest", preferred_element_type=total.dtype)

    total = jnp.zeros((ROWS * COLUMNS, columns.size), weights.dtype)
    first = (scene * heads + head) * (height + 1)
    for i in range(ROWS + 1):  # rows of upper left cells: the samples of a row's stretch are neighbours in the order
        line = (first + jnp.minimum(top + i, height)) * (width + 1)
        begin, end = start[line + left], start[line + jnp.minimum(left + COLUMNS, width) + 1]
        end = jnp.where(top + i <= height, end, begin)
        steps = lax.div(end - begin + SAMPLES - 1, np.int32(SAMPLES))
        total = lax.fori_loop(0, steps, lambda s, t, b=begin, e=end: add(b + s * SAMPLES, t, e), total)
    mask = (row < height) & (column < width)
    cell = jnp.where(mask, row * width + column, height * width)
    place = d_map.at[image, cell[:, None], head * channels + columns[None]]
    plgpu.store(place, total.astype(d_map.dtype), mask=mask[:, None] & wide)


class Corners(NamedTuple):
    """The four cells around the samples of a block of queries: top left, top right, bottom left, bottom right.

    Attributes:
      cell: place in the map, row by row.
      inside: the cell is one of the map's.
      right, bottom: how far the sample lies between the cells, in [0, 1).
    """

    cell: list[Int[Array, "q"]]
    inside: list[Bool[Array, "q"]]
    right: Float[Array, "q"]
    bottom: Float[Array, "q"]

    @property
    def shares(self) -> list[Float[Array, "q"]]:
        """Bilinear weights of the four."""
        left, top = 1 - self.right, 1 - self.bottom
        return [left * top, self.right * top, left * self.bottom, self.right * self.bottom]

    def slopes(self, values: list[Float[Array, "q"]]) -> tuple[Float[Array, "q"], Float[Array, "q"]]:
        """Derivatives by x and y of the sum of shares times the cells' values."""
        top_left, top_right, bottom_left, bottom_right = values
        by_x = (1 - self.bottom) * (top_right - top_left) + self.bottom * (bottom_right - bottom_left)
        by_y = (1 - self.right) * (bottom_left - top_left) + self.right * (bottom_right - top_right)
        return by_x, by_y


def _queries(order, seen, image, samples):
    """A program's queries, whether they exist and count, and the samples to visit: none if no query counts."""
    begin = pl.program_id(0) * QUERIES
    place = begin + lax.iota(jnp.int32, QUERIES)
    exists, there = place < order.shape[1], place < seen[image]
    limit = jnp.where(begin < seen[image], np.int32(samples), 0)
    return plgpu.load(order.at[image, place], mask=exists, other=order.shape[1]), exists, there, limit


def _corners(point, offset, size, there) -> Corners:
    """The cells around point (as fractions of the map) plus offset (in cells)."""
    x, y = (p * n - 0.5 + o for p, o, n in zip(point, offset, size[::-1], strict=True))
    # What does not count, is far outside or not a number lies outside.
    x, y = (jnp.where(there & (jnp.abs(u) < FAR), u, -2) for u in (x, y))
    left, top = jnp.floor(x), jnp.floor(y)
    column, row = left.astype(jnp.int32), top.astype(jnp.int32)
    in_column, in_row = ([(i + j >= 0) & (i + j < n) for j in (0, 1)] for i, n in ((column, size[1]), (row, size[0])))
    cell = row * size[1] + column
    cells = [cell + i * size[1] + j for i in (0, 1) for j in (0, 1)]
    return Corners(cells, [in_row[i] & in_column[j] for i in (0, 1) for j in (0, 1)], x - left, y - top)


def _rows(ref, mask, image, row, *place):
    """One row for each query, of the last of `place`; zero where `mask` is not set."""
    *place, columns = place
    mask = jnp.broadcast_to(mask[:, None], (row.size, columns.size))
    return plgpu.load(ref.at[(image, row[:, None], *place, columns[None])], mask=mask, other=0)


def _by_query(x: Array, rows: Array) -> Array:
    """Numbers of queries, each along its row."""
    return jnp.broadcast_to(x[:, None], rows.shape)


def _multiply_add(rows: Array, scale: Array, total: Array, interpret: bool) -> Array:
    """total + scale * rows as the PTX instruction that XLA's Triton does not make of a product and a sum."""
    if interpret:
        return total + scale * rows.astype(total.dtype)
    if rows.dtype == jnp.bfloat16:  # two in a register
        code = """{
            .reg .b32 low, high;
            shl.b32 low, $2, 16;
            and.b32 high, $2, 0xffff0000;
            fma.rn.f32 $0, low, $3, $5;
            fma.rn.f32 $1, high, $4, $6;
        }"""
        constraints, pack = "=f,=f,r,f,f,f,f", 2
    else:
        rows = rows.astype(total.dtype)
        code, constraints, pack = "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1
    result = jax.ShapeDtypeStruct(total.shape, total.dtype)
    arguments = dict(constraints=constraints, pack=pack, result_shape_dtypes=[result])
    return plgpu.elementwise_inline_asm(code, args=[rows, scale, total], **arguments)[0]


def _parts(channels: int) -> list[Int[Array, "c"]]:
    """Channels of a head in equal blocks of a power of two."""
    size = math.gcd(channels, CHANNELS)
    return [first + lax.iota(jnp.int32, size) for first in range(0, channels, size)]


def _read(ref, mask, *place):
    """One number for each query; zero where `mask` is not set."""
    return plgpu.load(ref.at[_index(*place)], mask=mask, other=0)


def _index(*place):
    return tuple(np.int32(i) if isinstance(i, int) else i for i in place)


def _divide(n: Int[Array, "*shape"], by: int) -> tuple[Array, Array]:
    """Quotient and remainder of what is not negative."""
    by = lax.full_like(n, by)
    return lax.div(n, by), lax.rem(n, by)
