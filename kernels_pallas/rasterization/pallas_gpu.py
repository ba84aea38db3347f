"""Blending on NVIDIA GPUs, in Pallas for Triton: one program per tile walks the tile's pairs one after the other.

All 256 pixels of the tile are worked on at once, by so few warps that a thread holds four or eight of them: what is the
same for all pixels, a splat's row of the table, is then loaded once for many, and the sums over the pixels that the
gradient needs are first taken inside threads, last within one warp, without shared memory and barriers. A few pairs are
loaded together, so that their loads overlap, and the numbers of the next few meanwhile; whether any pixel is unfinished
is asked once for them all.

No matrix products here. The six terms of the exponent, padded to the 16 that Triton's products want, cost 16 multiply-
adds per pair and pixel in float32, which no tensor core has, or 3 x 16 in split TF32, which on an H200 take a tensor
core as long as 6 take the other units. Written about the splat's centre with what depends on dx alone apart, the
exponent is two multiply-adds per pixel, since a thread's pixels stand above each other; and it does not cancel.

Nothing is added atomically: a pair's gradient goes to its own slot, and a second kernel adds a splat's slots in order.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.mesh import output_like
from kernels_pallas.rasterization.shapes import CUT, GEOMETRY, PIXELS, STOP, TILE, Blended, Grid, Pairs

FORWARD_UNROLL, BACKWARD_UNROLL = 4, 2  # the backward pass needs more registers
SPLATS = 32  # of one program that sums over pairs
FEW_FEATURES = 16  # with more, a thread holds half as many pixels, or its registers would not suffice
LOG2E = math.log2(math.e)


def forward(
    table: Float[Array, "n k"], pairs: Pairs, grid: Grid, max_alpha: float, *, interpret: bool = False
) -> Blended:
    """Blends the splats of every tile front to back; arguments and result as in reference.py."""
    features = table.shape[1] - GEOMETRY
    shapes = (grid.tiles, features, PIXELS), (grid.tiles, PIXELS), (grid.tiles, PIXELS)
    outputs = pl.pallas_call(
        functools.partial(_forward, _arithmetic(table.dtype, interpret), grid=grid, max_alpha=max_alpha),
        name="blend_forward",
        grid=(grid.tiles,),
        in_specs=[_whole()] * 4,
        out_specs=[_of_tile(shape) for shape in shapes],
        out_shape=[
            output_like(s, d, table) for s, d in zip(shapes, (table.dtype, table.dtype, jnp.int32), strict=True)
        ],
        compiler_params=_compiled(2, features),
        interpret=interpret,
    )(table, pairs.splat, pairs.slot, pairs.start)
    return Blended(*outputs)


def backward(
    table: Float[Array, "n k"],
    pairs: Pairs,
    grid: Grid,
    max_alpha: float,
    transmittance: Float[Array, "tiles px"],
    last: Int[Array, "tiles px"],
    sums_bar: Float[Array, "tiles c px"],
    transmittance_bar: Float[Array, "tiles px"],
    *,
    interpret: bool = False,
) -> Float[Array, "n k"]:
    """Gradient of the table; arguments, result and equations as in reference.py.

    Pairs behind the last that is drawn in their tile, usually most of them, have no gradient and no row: nothing is
    written, or read, but a byte each that says so.
    """
    of_tile = [transmittance, last, sums_bar, transmittance_bar]
    slots, splats, columns = pairs.slot.size, *table.shape
    inputs = [table, pairs.splat, pairs.slot, pairs.start, *of_tile, jnp.zeros(slots, jnp.int8)]
    rows, written = pl.pallas_call(
        functools.partial(_backward, _arithmetic(table.dtype, interpret), grid=grid, max_alpha=max_alpha),
        name="blend_backward",
        grid=(grid.tiles,),
        in_specs=[_whole()] * 4 + [_of_tile(a.shape) for a in of_tile] + [_whole()],
        out_specs=[_whole()] * 2,
        out_shape=[output_like((slots, columns), table.dtype, table), output_like((slots,), jnp.int8, table)],
        input_output_aliases={len(inputs) - 1: 1},
        compiler_params=_compiled(1, columns - GEOMETRY),
        interpret=interpret,
    )(*inputs)
    return pl.pallas_call(
        _sum_by_splat,
        name="sum_by_splat",
        grid=(pl.cdiv(splats, SPLATS),),
        in_specs=[_whole()] * 3,
        out_specs=_whole(),
        out_shape=output_like(table.shape, table.dtype, table),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(pairs.first, rows, written)


class Arithmetic(NamedTuple):
    """Elementwise operations on (256,) pixels that PTX has and XLA's Triton does not make of what JAX has."""

    multiply_add: Callable[[Array, Array, Array], Array]
    exp2: Callable[[Array], Array]
    reciprocal: Callable[[Array], Array]


def _ptx(instruction: str) -> Callable[..., Array]:
    """A PTX instruction of float32 numbers, for each pixel."""

    def run(*operands):
        operands = [jnp.broadcast_to(a, PIXELS) for a in operands]
        places = ", ".join(f"${i}" for i in range(len(operands) + 1))
        (result,) = plgpu.elementwise_inline_asm(
            f"{instruction} {places};",
            args=operands,
            constraints=",".join(["=f"] + ["f"] * len(operands)),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct((PIXELS,), jnp.float32)],
        )
        return result

    return run


PLAIN = Arithmetic(lambda x, y, z: x * y + z, jnp.exp2, lambda x: 1 / x)
PTX = Arithmetic(_ptx("fma.rn.f32"), _ptx("ex2.approx.ftz.f32"), _ptx("rcp.approx.ftz.f32"))


class Splat(NamedTuple):
    """A row of the table, in scalars."""

    x: Array
    y: Array
    a: Array
    b: Array
    c: Array
    log_opacity: Array
    features: list[Array]


class Drawn(NamedTuple):
    """A splat in the pixels of a tile: offsets from its centre, and its alpha, zero below the cut and unclamped."""

    dx: Float[Array, "px"]
    dy: Float[Array, "px"]
    alpha: Float[Array, "px"]


def _forward(arithmetic, table, splat, slot, start, sums_out, transmittance_out, last_out, *, grid, max_alpha):
    tile = pl.program_id(0)
    begin, end = start[tile], start[tile + 1]
    x, y, inside = _pixels(tile, grid, table.dtype)
    features = table.shape[1] - GEOMETRY

    def numbers_from(place):
        return [splat[slot[jnp.maximum(jnp.minimum(place + i, end - 1), 0)]] for i in range(FORWARD_UNROLL)]

    def unfinished(state):
        place, _, transmittance, _, _ = state
        return (place < end) & (jnp.max(transmittance) > 0)

    # A pixel that is finished carries its transmittance with a minus sign.
    def blend_some(state):
        place, numbers, transmittance, last, sums = state
        splats = [_load(table, n, place + i < end) for i, n in enumerate(numbers)]
        next_numbers = numbers_from(place + FORWARD_UNROLL)
        for i, s in enumerate(splats):
            alpha = jnp.minimum(_draw(arithmetic, s, x, y).alpha, max_alpha)
            weight = alpha * transmittance
            after = transmittance - weight
            unstopped = after > STOP
            drawn = unstopped & (alpha > 0)
            weight = jnp.where(drawn, weight, 0)
            transmittance = jnp.where(unstopped, after, -jnp.abs(transmittance))
            last = jnp.where(drawn, place + i + 1 - begin, last)
            sums = [arithmetic.multiply_add(weight, f, total) for total, f in zip(sums, s.features, strict=True)]
        return place + FORWARD_UNROLL, next_numbers, transmittance, last, sums

    zeros = jnp.zeros(PIXELS, table.dtype)
    transmittance, last = jnp.where(inside, 1, zeros - 1), jnp.zeros(PIXELS, jnp.int32)
    state = begin, numbers_from(begin), transmittance, last, [zeros] * features
    _, _, transmittance, last, sums = lax.while_loop(unfinished, blend_some, state)
    transmittance_out[0, :] = jnp.abs(transmittance)
    last_out[0, :] = last
    for k in range(features):
        sums_out[0, k, :] = sums[k]


def _backward(arithmetic, table, splat, slot, start, *references, grid, max_alpha):
    transmittance, last, sums_bar, transmittance_bar, _, rows_out, written = references
    tile = pl.program_id(0)
    begin = start[tile]
    x, y, _ = _pixels(tile, grid, table.dtype)
    last = last[0, :]
    sums_bar = [sums_bar[0, k, :] for k in range(sums_bar.shape[1])]
    zeros = jnp.zeros(PIXELS, table.dtype)

    def slots_from(place):
        return [slot[jnp.minimum(jnp.maximum(place - i, begin), slot.size - 1)] for i in range(BACKWARD_UNROLL)]

    def unblend_some(state):
        place, slots, numbers, after, behind = state
        splats = [_load(table, n, place - i >= begin) for i, n in enumerate(numbers)]
        next_slots = slots_from(place - BACKWARD_UNROLL)
        next_numbers = [splat[n] for n in next_slots]
        rows = []
        for i, s in enumerate(splats):
            dx, dy, alpha = _draw(arithmetic, s, x, y)
            alpha = jnp.where(place - i - begin < last, alpha, 0)
            clamped = alpha > max_alpha
            alpha = jnp.minimum(alpha, max_alpha)
            value = zeros
            for f, feature_bar in zip(s.features, sums_bar, strict=True):
                value = arithmetic.multiply_add(f, feature_bar, value)
            inverse = arithmetic.reciprocal(1 - alpha)
            after = after * inverse
            weight = alpha * after
            shown = weight * value
            bar = jnp.where(clamped, 0, arithmetic.multiply_add(-behind, alpha * inverse, shown))
            behind = arithmetic.multiply_add(weight, value, behind)
            rows.append(_row_gradient(s, dx, dy, bar) + [jnp.sum(weight * bar) for bar in sums_bar])
        for i, (n, row) in enumerate(zip(slots, rows, strict=True)):
            there = place - i >= begin
            plgpu.store(written.at[n], jnp.ones((), jnp.int8), mask=there)
            for k, value in enumerate(row):
                plgpu.store(rows_out.at[n, np.int32(k)], value, mask=there)
        return place - BACKWARD_UNROLL, next_slots, next_numbers, after, behind

    place, final = begin + jnp.max(last) - 1, transmittance[0, :]
    slots = slots_from(place)
    state = place, slots, [splat[n] for n in slots], final, final * transmittance_bar[0, :]
    lax.while_loop(lambda state: state[0] >= begin, unblend_some, state)


def _sum_by_splat(first, rows, written, sums):
    splats, columns = sums.shape
    padded = pl.next_power_of_2(columns)
    splat = pl.program_id(0) * SPLATS + lax.iota(jnp.int32, SPLATS)
    begin, end = (plgpu.load(first.at[splat + i], mask=splat < splats, other=0) for i in range(2))
    column = lax.broadcasted_iota(jnp.int32, (SPLATS, padded), 1)

    def add(i, total):
        slot = begin + i
        drawn = plgpu.load(written.at[slot], mask=slot < end, other=0) > 0
        return total + plgpu.load(rows.at[slot[:, None], column], mask=drawn[:, None] & (column < columns), other=0)

    total = lax.fori_loop(0, jnp.max(end - begin), add, jnp.zeros((SPLATS, padded), rows.dtype))
    plgpu.store(sums.at[splat[:, None], column], total, mask=(splat < splats)[:, None] & (column < columns))


def _load(table, number: Int[Array, ""], there: Bool[Array, ""]) -> Splat:
    """A splat of the table; one that is not there gets no opacity."""
    row = [table[number, k] for k in range(table.shape[1])]
    log_opacity = jnp.where(there, row[GEOMETRY - 1], jnp.asarray(-1e4, table.dtype))
    return Splat(*row[: GEOMETRY - 1], log_opacity, row[GEOMETRY:])


def _draw(arithmetic: Arithmetic, s: Splat, x: Array, y: Array) -> Drawn:
    """Alpha of the splat: exp(log o - (a dx^2 + 2 b dx dy + c dy^2) / 2)."""
    multiply_add = arithmetic.multiply_add
    a, b, c = -0.5 * LOG2E * s.a, -LOG2E * s.b, -0.5 * LOG2E * s.c
    dx, dy = x - s.x, y - s.y
    of_dx = multiply_add(a * dx, dx, LOG2E * s.log_opacity)
    alpha = arithmetic.exp2(multiply_add(dy, multiply_add(c, dy, b * dx), of_dx))
    return Drawn(dx, dy, jnp.where(alpha >= CUT, alpha, 0))


def _row_gradient(s: Splat, dx: Array, dy: Array, exponent_bar: Array) -> list[Array]:
    """Gradient of a splat's centre, conic and log opacity, given that of its exponent in every pixel."""
    bar_x, bar_y = exponent_bar * dx, exponent_bar * dy
    x, y, xx, xy, yy = (jnp.sum(v) for v in (bar_x, bar_y, bar_x * dx, bar_x * dy, bar_y * dy))
    return [s.a * x + s.b * y, s.b * x + s.c * y, -0.5 * xx, -xy, -0.5 * yy, jnp.sum(exponent_bar)]


def _pixels(tile: Int[Array, ""], grid: Grid, dtype) -> tuple[Array, Array, Array]:
    """Centres x, y of a tile's pixels (256,) in the image's coordinates, and whether they lie in the image."""
    row, column = _divide(tile, grid.columns)
    _, row = _divide(row, grid.rows)
    y, x = _divide(lax.iota(jnp.int32, PIXELS), TILE)
    x, y = column * TILE + x, row * TILE + y
    return x.astype(dtype) + 0.5, y.astype(dtype) + 0.5, (x < grid.width) & (y < grid.height)


def _divide(n: Int[Array, "*shape"], by: int) -> tuple[Array, Array]:
    """Quotient and remainder of what is not negative."""
    by = lax.full_like(n, by)
    return lax.div(n, by), lax.rem(n, by)


def _arithmetic(dtype, interpret: bool) -> Arithmetic:
    """That of the hardware where it runs."""
    return PTX if dtype == jnp.float32 and not interpret else PLAIN


def _compiled(warps: int, features: int) -> plgpu.CompilerParams:
    """Explicit in both numbers, and by its type: jax then takes Triton whatever its default is."""
    return plgpu.CompilerParams(num_warps=warps if features <= FEW_FEATURES else 2 * warps, num_stages=1)


def _whole() -> pl.BlockSpec:
    """An array that every program may index anywhere."""
    return pl.BlockSpec(memory_space=pl.ANY)


def _of_tile(shape: tuple[int, ...]) -> pl.BlockSpec:
    """The part of an array that belongs to a program's tile."""
    return pl.BlockSpec((1, *shape[1:]), lambda tile: (tile, *[0] * (len(shape) - 1)))
