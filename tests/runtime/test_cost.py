"""FLOPs counted from the jaxpr against formulas written here, and against XLA's own count where it is right."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec as P

from geolrm_jax.models.attention import attention
from geolrm_jax.models.dinov2 import ViTConfig
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.precision import Precision
from geolrm_jax.runtime.cost import array_bytes, count
from geolrm_jax.scene import Anchors, Cameras, Views


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def xla_flops(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def layers(x, weights):
    def body(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(body, x, weights)[0]


DEPTH, ROWS, WIDTH = 7, 5, 8
STACK = shape(ROWS, WIDTH), shape(DEPTH, WIDTH, WIDTH)
PRODUCTS = 2 * DEPTH * ROWS * WIDTH * WIDTH


def test_a_scan_counts_every_layer_where_xla_counts_one():
    cost = count(layers, *STACK)
    assert cost.matmul == PRODUCTS
    assert cost.other == DEPTH * ROWS * WIDTH  # tanh
    assert cost.convolution == 0 and cost.unknown == ()
    # XLA may unroll short loops one day; then this comparison has to go.
    assert xla_flops(layers, *STACK) < PRODUCTS / (DEPTH - 1)


@pytest.mark.parametrize(("wrap", "rounds"), [(lambda f: f, 3), (jax.checkpoint, 4)])
def test_a_gradient_costs_twice_the_forward_and_remat_once_more(wrap, rounds):
    def loss(x, weights):
        return jnp.sum(jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)[0])

    assert count(jax.grad(loss, (0, 1)), *STACK).matmul == rounds * PRODUCTS


def test_products_without_loops_are_xlas():
    def chain(a, b, c):
        return jnp.einsum("bij,bjk,lk->lbi", a, b, c)

    shapes = shape(3, 4, 5), shape(3, 5, 6), shape(7, 6)
    assert count(chain, *shapes).total == xla_flops(chain, *shapes)


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1, 1), padding="VALID"),
        dict(window_strides=(2, 3), padding="SAME"),
        dict(window_strides=(1, 1), padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)),  # transposed, as the encoder's
        dict(window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 1)),
    ],
)
def test_convolutions_and_their_gradients_are_xlas(options):
    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    def gradients(image, kernel, out):
        return jax.vjp(convolve, image, kernel)[1](out)

    image, kernel = shape(2, 9, 8, 6), shape(4, 4, 6, 5)
    out = jax.eval_shape(convolve, image, kernel)
    assert count(convolve, image, kernel).convolution == xla_flops(convolve, image, kernel)
    # Both gradients pair the same cells, taps and channels as the convolution itself.
    assert count(gradients, image, kernel, out).convolution == 2 * count(convolve, image, kernel).convolution


def test_a_convolution_by_hand():
    # A stride-4 convolution of kernel 4 without padding reads every pixel once.
    low = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(4, 4),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert count(low, shape(3, 28, 28, 9), shape(4, 4, 9, 16)).convolution == 2 * 3 * 28 * 28 * 9 * 16


@pytest.mark.parametrize("count_of_tokens", [64, 2048])
def test_attention_is_two_products_of_all_pairs(count_of_tokens):
    heads, width = 3, 6
    q = shape(2, count_of_tokens, heads, width)
    cost = count(attention, q, q, q, shape(2, count_of_tokens, dtype=bool))
    assert cost.matmul == 2 * (2 * 2 * heads * count_of_tokens**2 * width)


def abstract(make):
    """Parameters of a module as shapes, and the module as a pure function of them."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0), Precision())))
    return nnx.to_pure_dict(state), lambda params, *arguments: nnx.merge(graphdef, params)(*arguments)


def test_a_block_of_the_transformer_by_formula():
    views, tokens, width, heads, points, channels, levels = 3, 128, 48, 4, 2, 20, ((8, 8), (5, 5))
    size = 32

    def inputs():
        cameras = Cameras(jnp.zeros((1, views, 4, 4)), jnp.zeros((1, views, 3, 3)), size, size)
        image = jnp.zeros((1, views, size, size))
        seen = Views(cameras, jnp.zeros((*image.shape, 3)), image, image, jnp.ones((1, views), bool))
        voxels = jnp.zeros((1, tokens, 3), jnp.int32)
        return Anchors(voxels * 0.0, voxels, jnp.ones((1, tokens), bool)), seen

    anchors, seen = jax.eval_shape(inputs)
    maps = tuple(shape(1, views, *level, channels) for level in levels)

    def products(depth):
        config = TransformerConfig(width=width, depth=depth, heads=heads, points=points)
        params, apply = abstract(lambda rngs, precision: config.make(channels, len(levels), rngs, precision))
        return count(apply, params, anchors, seen, maps).matmul

    samples = heads * len(levels) * points
    self_attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    cells = views * sum(math.prod(level) for level in levels)
    cross_attention = (
        tokens * width * 3 * samples + cells * channels * width + views * tokens * width + tokens * width**2
    )
    mlp = 3 * tokens * width * 256
    assert products(5) - products(4) == 2 * (self_attention + cross_attention + mlp)


def test_dinov2_by_formula():
    config, size = ViTConfig(width=24, depth=3, heads=2, pretrained_grid=4), 56
    params, apply = abstract(config.make)
    cost = count(apply, params, shape(2, size, size, 3))
    tokens, width = 1 + (size // 14) ** 2, config.width
    block = 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 4 * width)
    assert cost.convolution == 2 * 2 * size**2 * 3 * width  # patches
    assert cost.matmul == 2 * config.depth * block


def test_control_flow():
    square = shape(4, 4)
    product = 2 * 4**3

    def branches(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x + 1.0, x)

    def known(x):
        return jax.lax.while_loop(lambda s: s[0] < 10, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]

    def unknown(x):
        return jax.lax.while_loop(lambda x: x.sum() < 10.0, lambda x: x @ x, x)

    assert count(branches, shape(dtype=bool), square).matmul == 2 * product
    assert count(known, square).matmul == 10 * product
    assert count(known, square).unknown == ()
    cost = count(unknown, square)
    assert cost.matmul == product
    assert len(cost.unknown) == 1 and "test_cost.py" in cost.unknown[0]
    assert count(jnp.linalg.cholesky, square).unknown == ("cholesky",)


def test_a_shard_map_counts_on_every_device():
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"), axis_types=automatic)

    def local(x, w):
        return x @ w

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(None, "model")), out_specs=P("data", "model"))
    assert count(mapped, shape(8, 6), shape(6, 10)).matmul == 2 * 8 * 6 * 10


def test_a_kernel_counts_in_every_cell_of_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    call = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)),
        out_shape=shape(32, 16),
    )
    assert count(call, shape(32, 16), shape(16, 16)).matmul == 2 * 32 * 16 * 16


def test_what_a_kernel_loads_and_stores_is_not_computed():
    """However large the array in memory: 8 elements are added to 8, and 8 added atomically, in each of 4 programs."""

    def kernel(x, table, out):
        start = pl.program_id(0) * 8
        rows = table.at[pl.ds(start, 8)]
        plgpu.store(out.at[pl.ds(start, 8)], plgpu.load(x.at[pl.ds(start, 8)]) + plgpu.load(rows))
        plgpu.atomic_add(table, (pl.ds(start, 8),), x[pl.ds(start, 8)])

    call = pl.pallas_call(kernel, grid=(4,), out_shape=shape(32))
    assert count(call, shape(32), shape(1000)).total == 4 * (8 + 8)


def test_of_what_depends_on_the_platform_the_default_counts():
    def chosen(x):
        return jax.lax.platform_dependent(x, cuda=lambda x: x * 2 + 1, default=lambda x: x * 2)

    assert count(chosen, shape(7)).other == 7


def test_calls_with_their_own_derivative_are_walked():
    @jax.custom_vjp
    def product(x, y):
        return x @ y

    product.defvjp(lambda x, y: (x @ y, (x, y)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    x, y = shape(2, 3), shape(3, 5)
    assert count(jax.jit(product), x, y).matmul == 2 * 2 * 3 * 5
    assert count(jax.grad(lambda x, y: jnp.sin(product(x, y)).sum(), (0, 1)), x, y).matmul == 3 * 2 * 2 * 3 * 5
    assert count(jax.nn.relu, shape(7)).other == 7


def test_elements():
    assert count(lambda x: x.reshape(6, 2).T[:3].astype(jnp.bfloat16), shape(12)).total == 0
    assert count(lambda x: x.sum(0), shape(4, 5)).other == 20
    assert count(lambda x, y: x + y, shape(4, 1), shape(1, 5)).other == 20
    assert count(lambda x, i: x[i], shape(1000, 3), shape(6, dtype=jnp.int32)).other == 18
    assert count(lambda x, i: x.at[i].add(1.0), shape(1000, 3), shape(6, dtype=jnp.int32)).other == 18
    assert count(lambda n: n * 3 + n, shape(9, dtype=jnp.int32)).total == 0  # no floating-point numbers
    # What nobody reads is not computed.
    assert count(lambda x: (jnp.exp(x) @ x, x + 1.0)[1], shape(4, 4)).total == 16


def test_bytes():
    tree = {"a": shape(3, 5), "b": (shape(7, dtype=jnp.bfloat16), np.zeros(2, np.int8))}
    assert array_bytes(tree) == 60 + 14 + 2
