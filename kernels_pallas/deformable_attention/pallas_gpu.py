"""Deformable attention on NVIDIA GPUs, in Pallas for Triton.

A program samples one head of one view for a block of queries. The queries of a view are visited along a Morton curve,
so that a program's samples fall into a small window of the maps and are found in the processor's first cache: with
queries in any order every corner of every sample would come from the second.

The backward pass works view by view: it adds to the gradients of offsets and weights where they lie, in the order of
the views, and holds what belongs to one view only. The features' gradient is not added up atomically (Pallas has
atomics of the strictest memory order only, a fence before each and an empty cache after it): samples are sorted by the
cell they fall into, and a program sums those around its cells, as a matrix product of hat weights and rows of d_out.
All sums are in a fixed order: the same input gives the same bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.deformable_attention.mesh import on_mesh
from kernels_pallas.deformable_attention.triton_kernels import (
    COLUMNS,
    FAR,
    QUERIES,
    ROWS,
    WARPS,
    backward_kernel,
    forward_kernel,
    sum_kernel,
)
from kernels_pallas.mesh import output_like

MORTON_BITS = 8  # of each coordinate


def forward(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    weights: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
    *,
    interpret: bool = False,
) -> Float[Array, "b v n k c"]:
    """Arguments and result as in reference.py."""
    arrays = features, reference_points, offsets, weights, view_valid
    return on_mesh(functools.partial(_sample, interpret=interpret), weights, arrays, (4, None, 2, 2, None), 3)


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
    arrays = features, reference_points, offsets, weights, view_valid, d_out
    heads_in, heads_out = (4, None, 2, 2, None, 3), (4, None, 2, 2)
    return on_mesh(functools.partial(_differentiate, interpret=interpret), weights, arrays, heads_in, heads_out)


def _sample(axes, features, reference_points, offsets, weights, view_valid, *, interpret):
    """The result, of one device's scenes and heads."""
    del axes
    batch, views, count = view_valid.shape
    heads, channels = features[0].shape[-2:]
    order = _order(reference_points, view_valid)
    points = reference_points.reshape(batch * views, count, 2)
    out = pl.pallas_call(
        functools.partial(forward_kernel, views=views, sizes=_sizes(features), interpret=interpret),
        name="deformable_forward",
        grid=(pl.cdiv(count, QUERIES), heads, batch * views),
        in_specs=[_whole()] * (5 + len(features)),
        out_specs=_whole(),
        out_shape=output_like((batch * views, count, heads, channels), features[0].dtype, points),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )(*order, points, offsets, weights, *_flat(features))
    return out.reshape(batch, views, count, heads, channels)


def _differentiate(axes, features, reference_points, offsets, weights, view_valid, d_out, *, interpret):
    """The gradients, of one device's scenes and heads; `axes` of the mesh split the heads."""
    batch, views, count = view_valid.shape
    heads = weights.shape[2]
    sizes, maps = _sizes(features), _flat(features)
    order = _order(reference_points, view_valid)
    points = reference_points.reshape(batch * views, count, 2)
    d_out = d_out.reshape(batch * views, count, heads, -1)
    gather = pl.pallas_call(
        functools.partial(backward_kernel, views=views, sizes=sizes, interpret=interpret),
        name="deformable_backward",
        grid=(pl.cdiv(count, QUERIES), heads, batch),
        in_specs=[_whole()] * (9 + len(maps)),
        out_specs=[_whole()] * 3,
        out_shape=[
            output_like(offsets.shape, offsets.dtype, points),
            output_like(weights.shape, weights.dtype, points),
            output_like((batch, count, heads, 2), points.dtype, points),
        ],
        input_output_aliases={7 + len(maps): 0, 8 + len(maps): 1},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )

    def one_view(sums, arrays):
        d_maps, d_offsets, d_weights = sums
        view, reference_points, valid = arrays
        view = view.reshape(1)
        d_offsets, d_weights, by_head = gather(
            view, *order, points, offsets, weights, *maps, d_out, d_offsets, d_weights
        )
        d_maps = tuple(
            _sum_by_cell(view, level, size, reference_points, offsets, weights, valid, d_out, d_level, interpret)
            for level, (size, d_level) in enumerate(zip(sizes, d_maps, strict=True))
        )
        return (d_maps, d_offsets, d_weights), by_head.sum(axis=2)

    zeros = jax.tree.map(jnp.zeros_like, (maps, offsets, weights))
    by_view = jnp.arange(views, dtype=jnp.int32), reference_points.swapaxes(0, 1), view_valid.swapaxes(0, 1)
    (d_maps, d_offsets, d_weights), d_points = lax.scan(one_view, zeros, by_view)
    d_features = tuple(d.reshape(m.shape) for d, m in zip(d_maps, features, strict=True))
    d_points = lax.psum(d_points, axes) if axes else d_points
    return d_features, d_points.swapaxes(0, 1), d_offsets, d_weights


def _order(points: Float[Array, "b v n 2"], valid: Bool[Array, "b v n"]) -> tuple[Int[Array, "bv n"], Int[Array, "bv"]]:
    """Queries of each view along a Morton curve, those that count before the others, and how many count."""
    batch, views, count = valid.shape
    images = batch * views
    # One sort of one word: the image's number is in the upper bits, then one that says whether the query counts.
    bits = min(MORTON_BITS, (31 - images.bit_length()) // 2)
    side = 2**bits
    cell = jnp.where(valid[..., None], points * side, 0).clip(0, side - 1).astype(jnp.uint32)
    for shift, mask in ((4, 0x0F0F), (2, 0x3333), (1, 0x5555)):  # moves the bits apart
        cell = (cell | cell << shift) & mask
    code = jnp.where(valid, cell[..., 0] | cell[..., 1] << 1, side**2).reshape(images, count)
    key = (code | jnp.arange(images, dtype=jnp.uint32)[:, None] << (2 * bits + 1)).reshape(-1)
    query = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (images, count)).reshape(-1)
    _, query = lax.sort((key, query), num_keys=1)
    return query.reshape(images, count), valid.reshape(images, count).sum(-1, dtype=jnp.int32)


def _sum_by_cell(view, level, size, points, offsets, weights, valid, d_out, d_map, interpret):
    """Writes the gradient of one level's map in one view, d_map[scene * V + view], for all scenes."""
    batch, count, heads, _, samples = weights.shape
    height, width = size
    # The cell at the upper left of each sample, with a row above the map and a column before it.
    bases = (height + 1) * (width + 1)
    if batch * heads * bases >= 2**31:
        raise ValueError(f"features: expected scenes x heads x cells below 2^31, got {batch} x {heads} x {bases}")
    pixels = points[:, :, None, None] * jnp.array([width, height], points.dtype) - 0.5 + offsets[:, :, :, level]
    pixels = jnp.where(valid[:, :, None, None, None] & (jnp.abs(pixels) < FAR), pixels, -2)
    column, row = (jnp.floor(pixels[..., i]).astype(jnp.int32) + 1 for i in (0, 1))
    inside = (column >= 0) & (column <= width) & (row >= 0) & (row <= height)
    first = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, 1, heads, 1) * bases
    key = jnp.where(inside, first + row * (width + 1) + column, batch * heads * bases)
    number = jnp.arange(count * samples, dtype=jnp.int32).reshape(1, count, 1, samples)
    key, number = lax.sort((key.reshape(-1), jnp.broadcast_to(number, key.shape).reshape(-1)), num_keys=1)
    start = jnp.searchsorted(key, jnp.arange(batch * heads * bases + 1, dtype=key.dtype), method="scan_unrolled")
    return pl.pallas_call(
        functools.partial(sum_kernel, level=level, size=size, views=d_map.shape[0] // batch),
        name="deformable_sum_by_cell",
        grid=(pl.cdiv(height, ROWS) * pl.cdiv(width, COLUMNS), heads, batch),
        in_specs=[_whole()] * 8,
        out_specs=_whole(),
        out_shape=output_like(d_map.shape, d_map.dtype, d_map),
        input_output_aliases={7: 0},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
    )(view, number, start.astype(jnp.int32), points, offsets, weights, d_out, d_map)


def _sizes(features: tuple[Array, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(maps.shape[2:4] for maps in features)


def _flat(features: tuple[Array, ...]) -> tuple[Float[Array, "bv hw kc"], ...]:
    """Maps as rows of cells with the channels of all heads."""
    return tuple(m.reshape(m.shape[0] * m.shape[1], m.shape[2] * m.shape[3], -1) for m in features)


def _whole() -> pl.BlockSpec:
    """An array that every program may index anywhere."""
    return pl.BlockSpec(memory_space=pl.ANY)
