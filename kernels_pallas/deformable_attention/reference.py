"""The readable implementation, in plain XLA: the ground truth of the tests and the path on CPU.

A bilinear sample reads four neighbouring cells, each a row of C numbers of the map as it lies in memory. Tried on CPU
and slower: the four cells side by side in a larger table, so that a sample is one gather (3 times the time); channels
before cells (4 times); the forward pass in blocks of queries (twice: what writes a loop's result runs on one thread).
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

SAMPLES = 2**15  # of one view and level whose rows the backward pass holds at a time


def forward(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    weights: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
) -> Float[Array, "b v n k c"]:
    """Sum over levels and points of weight times the bilinear sample, per query, view and head.

    Arguments as of `api.multiview_deformable_attention`, but for `weights`, the softmax of its logits; coordinates and
    weights are of one dtype, at least float32. The result is in the features' dtype.
    """
    batch, views = reference_points.shape[:2]
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


def backward(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    weights: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
    d_out: Float[Array, "b v n k c"],
    *,
    deterministic: bool,
) -> tuple[tuple[Array, ...], Array, Array, Array]:
    """Gradients of vdot(d_out, forward(...)) by features, reference points, offsets and weights, in their dtypes.

    `deterministic` asks for sums in a fixed order: how XLA's scatter adds is not decided here.
    """
    del deterministic
    arrays = features, reference_points, offsets, weights
    return jax.vjp(lambda *arrays: forward(*arrays, view_valid), *arrays)[1](d_out)


@jax.checkpoint
def _sample(
    maps: Float[Array, "b h w k c"], pixels: Float[Array, "b n k p 2"], weights: Float[Array, "b n k p"]
) -> Float[Array, "b n k c"]:
    """Sum over p of weight times the bilinear sample at `pixels` (x, y; cell centres at integers; zero outside).

    Rematerialised: between forward and backward nothing is kept but the arguments.
    """
    index, corner_weights = _corners(pixels, weights, maps.shape[1:3])
    return _weighted_rows(rearrange(maps, "b h w k c -> b (h w k) c"), index, corner_weights)


def _corners(
    pixels: Float[Array, "b n k p 2"], weights: Float[Array, "b n k p"], size: tuple[int, int]
) -> tuple[Int[Array, "b n k p 4"], Float[Array, "b n k p 4"]]:
    """The four cells around each pixel, as rows of a table (h w k), and their weights: zero outside the map."""
    height, width = size
    heads = pixels.shape[2]
    pixels = jnp.where(jnp.isnan(pixels), -2.0, pixels)  # what is not a number lies outside
    # Two cells beyond the border everything is zero: clamping there changes no value and no gradient.
    x, y = (pixels[..., i].clip(-2.0, n + 1.0) for i, n in ((0, width), (1, height)))
    left, top = jnp.floor(x), jnp.floor(y)
    right, bottom = x - left, y - top
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
        index.append(cell * heads + jnp.arange(heads, dtype=jnp.int32)[:, None])
        corner_weights.append(jnp.where(inside, weights * share, 0.0))
    return jnp.stack(index, axis=-1), jnp.stack(corner_weights, axis=-1)


@jax.custom_vjp
def _weighted_rows(
    table: Float[Array, "b r c"], index: Int[Array, "b n k p q"], weights: Float[Array, "b n k p q"]
) -> Float[Array, "b n k c"]:
    """Sum over p and q of weight times the table's row, in the weights' dtype.

    On CPU a gather that is fused with its product and sum takes a fraction of the time of rows gathered first. XLA
    fuses so within a loop; the result of straight code it may compute in each of its consumers, from gathered rows.
    """

    def add_points(out, index_and_weights):
        index, weights = index_and_weights
        for corner in range(index.shape[-1]):
            weight = weights[..., corner, None]
            # Selected, not only multiplied: what does not count may hold NaN.
            out += jnp.where(weight == 0, 0.0, _rows(table, index[..., corner]).astype(out.dtype) * weight)
        return out, None

    by_point = tuple(jnp.moveaxis(x, 3, 0) for x in (index, weights))
    out = jnp.repeat(jnp.zeros_like(weights[..., 0, :1]), table.shape[-1], axis=-1)
    return jax.lax.scan(add_points, out, by_point, unroll=2 if len(by_point[0]) > 2 else 1)[0]


@jax.vmap
def _rows(table, index):
    return table.at[index].get(mode="promise_in_bounds")


@jax.vmap
def _add_rows(table, index, rows):
    return table.at[index].add(rows, mode="promise_in_bounds")


def _weighted_rows_forward(table, index, weights):
    return _weighted_rows(table, index, weights), (table, index, weights)


def _weighted_rows_backward(residuals, d_out):
    """Works through blocks of queries, so that no more than a block's rows are held."""
    table, index, weights = residuals
    count, *samples = index.shape[1:4]
    queries = min(count, max(1, SAMPLES // math.prod(samples)))

    def block(d_table, arrays):
        index, weights, d_out = arrays
        rows = _rows(table, index).astype(d_out.dtype)
        d_weights = jnp.einsum("bnkpqc,bnkc->bnkpq", rows, d_out, precision="highest")
        d_weights = jnp.where((weights == 0) & ~jnp.isfinite(d_weights), 0.0, d_weights)
        return _add_rows(d_table, index, weights[..., None] * d_out[..., None, None, :]), d_weights

    def split(x):
        padded = jnp.pad(x, ((0, 0), (0, -count % queries), *((0, 0),) * (x.ndim - 2)))  # zeros weigh nothing
        return rearrange(padded, "b (s n) ... -> s b n ...", n=queries)

    start = jnp.zeros_like(table, weights.dtype)
    d_table, d_weights = jax.lax.scan(block, start, (split(index), split(weights), split(d_out)))
    return d_table.astype(table.dtype), None, rearrange(d_weights, "s b n ... -> b (s n) ...")[:, :count]


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)
