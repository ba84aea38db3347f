"""The readable implementation, in plain XLA: the ground truth of the tests and the path on CPU.

A bilinear sample reads four neighbouring cells, each a row of C numbers of the map as it lies in memory. Tried on CPU
and slower: the four cells side by side in a larger table, so that a sample is one gather (3 times the time); channels
before cells (4 times). Queries are worked through in blocks, so that memory does not grow with the number of samples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

SAMPLES = 2**15  # of one view and level that an accelerator works on at a time
CACHED_SAMPLES = 2**14  # of all views of one level that a CPU works on at a time


def deformable_attention(
    features: tuple[Float[Array, "b _h_l _w_l k c"], ...],
    locations: Float[Array, "b n k l p 2"],
    weights: Float[Array, "b n k l p"],
) -> Float[Array, "b n k c"]:
    """See `api.deformable_attention`; one leading axis."""
    levels = []
    for level, maps in enumerate(features):
        size = jnp.array([maps.shape[2], maps.shape[1]], locations.dtype)
        pixels = locations[..., level, :, :] * size - 0.5
        levels.append(_sample(maps, pixels, weights[..., level, :]))
    return sum(levels).astype(features[0].dtype)


def multiview_deformable_attention(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    logits: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
) -> Float[Array, "b v n k c"]:
    """See `api.multiview_deformable_attention`."""
    batch, views = reference_points.shape[:2]
    shape = logits.shape
    weights = jax.nn.softmax(logits.reshape(*shape[:3], -1), axis=-1).reshape(shape)
    weights = weights[:, None] * view_valid[..., None, None, None]
    # A point behind the camera projects anywhere, NaN included once offsets are added: keep it at the corner.
    reference_points = jnp.where(view_valid[..., None], reference_points, 0.0)
    levels = []
    for level, maps in enumerate(features):
        size = jnp.array([maps.shape[3], maps.shape[2]], reference_points.dtype)
        pixels = (reference_points * size - 0.5)[..., None, None, :] + offsets[:, None, :, :, level]
        flat = (rearrange(x, "b v ... -> (b v) ...") for x in (maps, pixels, weights[..., level, :]))
        levels.append(_sample(*flat))
    return rearrange(sum(levels), "(b v) n k c -> b v n k c", b=batch, v=views).astype(features[0].dtype)


@jax.custom_vjp
def _sample(
    maps: Float[Array, "b h w k c"], pixels: Float[Array, "b n k p 2"], weights: Float[Array, "b n k p"]
) -> Float[Array, "b n k c"]:
    """Sum over p of weight times the bilinear sample at `pixels` (x, y; cell centres at integers; zero outside).

    Between forward and backward nothing of the size of the samples is kept.
    """
    return _by_platform(_forward, maps, pixels, weights)


def _sample_forward(maps, pixels, weights):
    return _sample(maps, pixels, weights), (maps, pixels, weights)


def _sample_backward(arguments, d_out):
    return _by_platform(_backward, *arguments, d_out)


_sample.defvjp(_sample_forward, _sample_backward)


def _by_platform(function, maps, pixels, *arrays):
    """`function(queries, maps, pixels, ...)` with as many queries at a time as suit the platform it is compiled for.

    On CPU the samples of a block should stay in the cache, and far below the 32 MB from which memory is given back to
    the system after every call: the gradient of a small batch took half the time. An accelerator needs blocks that
    fill it, whatever part of the batch it holds.
    """
    batch, count, heads, points = pixels.shape[:4]
    wide = min(count, max(1, SAMPLES // (heads * points)))
    cached = min(count, max(1, CACHED_SAMPLES // (batch * heads * points)))
    return jax.lax.platform_dependent(
        maps, pixels, *arrays, cpu=functools.partial(function, cached), default=functools.partial(function, wide)
    )


def _forward(queries, maps, pixels, weights):
    size = maps.shape[1:3]

    def block(pixels_and_weights):
        index, corner_weights = _corners(*pixels_and_weights, size)
        return jax.vmap(_weighted_rows)(_table(maps), index, corner_weights)

    return _joined(jax.lax.map(block, _in_blocks(queries, pixels, weights)), pixels.shape[1])


def _backward(queries, maps, pixels, weights, d_out):
    size, table = maps.shape[1:3], _table(maps)

    def block(d_table, arrays):
        pixels, weights, d_out = arrays
        corner_weights, pullback, index = jax.vjp(lambda *a: _corners(*a, size)[::-1], pixels, weights, has_aux=True)
        # As one product after the gather: fused into it, the short sums over channels are not vectorised.
        rows = jax.lax.optimization_barrier(jax.vmap(_rows)(table, index))
        d_weights = jnp.einsum("bnkpqc,bnkc->bnkpq", rows.astype(d_out.dtype), d_out, precision="highest")
        d_rows = corner_weights[..., None] * d_out[..., None, None, :]
        d_table = jax.vmap(lambda t, i, d: t.at[i].add(d, mode="promise_in_bounds"))(d_table, index, d_rows)
        return d_table, pullback(d_weights)

    start = jnp.zeros(table.shape, weights.dtype)
    d_table, by_query = jax.lax.scan(block, start, _in_blocks(queries, pixels, weights, d_out))
    d_pixels, d_weights = (_joined(x, pixels.shape[1]) for x in by_query)
    return d_table.reshape(maps.shape).astype(maps.dtype), d_pixels, d_weights


def _in_blocks(queries, *arrays):
    """Blocks (S, B, n, ...) of `queries` queries, the last one padded with zeros, which weigh nothing."""
    padded = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % queries), *((0, 0),) * (x.ndim - 2))) for x in arrays)
    return tuple(rearrange(x, "b (s n) ... -> s b n ...", n=queries) for x in padded)


def _joined(blocks, count):
    """The first `count` queries of blocks (S, B, n, ...), as (B, count, ...)."""
    return rearrange(blocks, "s b n ... -> b (s n) ...")[:, :count]


def _corners(
    pixels: Float[Array, "b n k p 2"], weights: Float[Array, "b n k p"], size: tuple[int, int]
) -> tuple[Int[Array, "b n k p 4"], Float[Array, "b n k p 4"]]:
    """Rows of `_table` of the four cells around each pixel, and their weights: zero for cells outside the map."""
    height, width = size
    # Two cells beyond the border everything is zero: clamping there changes no value and no gradient.
    x, y = (pixels[..., i].clip(-2.0, n + 1.0) for i, n in ((0, width), (1, height)))
    left, top = jnp.floor(x), jnp.floor(y)
    right, bottom = x - left, y - top
    head = jnp.arange(pixels.shape[2], dtype=jnp.int32)[:, None]
    index, corner_weights = [], []
    for row, column, share in (
        (top, left, (1 - right) * (1 - bottom)),
        (top, left + 1, right * (1 - bottom)),
        (top + 1, left, (1 - right) * bottom),
        (top + 1, left + 1, right * bottom),
    ):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        # Clipped as integers: a pixel that is not a number must not read beyond the map either.
        cell = row.astype(jnp.int32).clip(0, height - 1) * width + column.astype(jnp.int32).clip(0, width - 1)
        index.append(cell * pixels.shape[2] + head)
        corner_weights.append(jnp.where(inside, weights * share, 0.0))
    # Without the barrier XLA fuses all of the above into the gathers and computes it anew for every channel.
    return jax.lax.optimization_barrier((jnp.stack(index, axis=-1), jnp.stack(corner_weights, axis=-1)))


def _table(maps: Float[Array, "b h w k c"]) -> Float[Array, "b r c"]:
    """One row of C numbers for each cell and head, as they lie in memory."""
    return rearrange(maps, "b h w k c -> b (h w k) c")


def _weighted_rows(
    table: Float[Array, "r c"], index: Int[Array, "*batch p q"], weights: Float[Array, "*batch p q"]
) -> Float[Array, "*batch c"]:
    """Sum over p and q of weight times `table[index]`, in the weights' dtype.

    Unrolled, so that XLA fuses each gather with its product and sum: gathering all rows first took several times as
    long on CPU.
    """
    out = jnp.zeros((*index.shape[:-2], table.shape[-1]), weights.dtype)
    for point, corner in np.ndindex(index.shape[-2:]):
        rows = _rows(table, index[..., point, corner])
        out += rows.astype(weights.dtype) * weights[..., point, corner, None]
    return out


def _rows(table, index):
    return table.at[index].get(mode="promise_in_bounds")
