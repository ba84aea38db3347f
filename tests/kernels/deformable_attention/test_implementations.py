"""Every implementation against the definition in float64: values, gradients, masks, borders, odd sizes, types, bits."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.deformable_attention import deformable_attention, multiview_deformable_attention, reference
from kernels_pallas.deformable_attention.api import IMPLEMENTATIONS

SIZES = ((7, 5), (4, 9))  # no multiples of anything
NEEDS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}


def all_implementations(*slow):
    """A parameter for each; compiled kernels are skipped where their device is not."""

    def marks(name):
        absent = name in NEEDS and jax.default_backend() != NEEDS[name]
        skip = pytest.mark.skipif(absent, reason=f"{name} needs its device; it is interpreted instead")
        return [skip] + [pytest.mark.slow] * (name in slow)

    return pytest.mark.parametrize("implementation", [pytest.param(n, marks=marks(n)) for n in IMPLEMENTATIONS])


every = all_implementations()
# Where interpreting a kernel takes long.
every_patiently = all_implementations("pallas_gpu_interpret", "pallas_tpu_interpret")


def sample(maps, x, y):
    """Bilinear samples (n, C) of a (H, W, C) map at pixel coordinates (n,), zero outside, cell centres at integers."""
    (height, width, _), total = maps.shape, 0.0
    for row, column in ((i, j) for i in range(height) for j in range(width)):
        total += (np.maximum(0, 1 - abs(y - row)) * np.maximum(0, 1 - abs(x - column)))[:, None] * maps[row, column]
    return total


def scatter(maps, x, y, rows):
    """Derivative of sum(rows * sample(maps, x, y)) by the map: the sample is linear in it."""
    d_maps = np.zeros_like(maps)
    for row, column in np.ndindex(maps.shape[:2]):
        d_maps[row, column] = (np.maximum(0, 1 - abs(y - row)) * np.maximum(0, 1 - abs(x - column))) @ rows
    return d_maps


def define(features, points, offsets, weights, valid, d_out, step=1e-6):
    """Output and gradients of vdot(d_out, output): coordinates by central differences, one view and head at a time."""
    out, d_weights, d_offsets, d_points = (np.zeros(x.shape) for x in (d_out, weights, offsets, points))
    d_features = tuple(np.zeros_like(m) for m in features)
    for b, v, k, level in np.ndindex(*d_out.shape[:2], d_out.shape[3], len(features)):
        maps, (seen,) = features[level][b, v, :, :, k], np.nonzero(valid[b, v])
        size, weight = np.array(maps.shape[1::-1]), weights[b, seen, k, level]
        x, y = (points[b, v, seen][:, None] * size - 0.5 + offsets[b, seen, k, level]).reshape(-1, 2).T
        rows = np.repeat(d_out[b, v, seen, k], weight.shape[1], axis=0)
        found = sample(maps, x, y)
        by_x = (sample(maps, x + step, y) - sample(maps, x - step, y)) / (2 * step)
        by_y = (sample(maps, x, y + step) - sample(maps, x, y - step)) / (2 * step)
        dots, *slopes = ((values * rows).sum(-1).reshape(weight.shape) for values in (found, by_x, by_y))
        d_pixels = np.stack(slopes, axis=-1) * weight[..., None]
        out[b, v, seen, k] += np.einsum("npc,np->nc", found.reshape(*weight.shape, -1), weight)
        d_weights[b, seen, k, level] += dots
        d_offsets[b, seen, k, level] += d_pixels
        d_points[b, v, seen] += d_pixels.sum(1) * size
        d_features[level][b, v, :, :, k] += scatter(maps, x, y, rows * weight.reshape(-1, 1))
    return out, (d_features, d_points, d_offsets, d_weights)


def define_multiview(features, points, offsets, logits, valid, d_out):
    """The same with the softmax over levels and points."""
    weights = np.exp(logits)
    weights /= weights.sum((3, 4), keepdims=True)
    out, (*gradients, d_weights) = define(features, points, offsets, weights, valid, d_out)
    return out, (*gradients, weights * (d_weights - (weights * d_weights).sum((3, 4), keepdims=True)))


def make(rng, *, batch=2, views=3, count=37, heads=2, points=4, channels=24, sizes=SIZES):
    """Arguments in float64; some queries do not count in some views, and have no reference point there."""
    features = tuple(rng.normal(size=(batch, views, *size, heads, channels)) for size in sizes)
    valid = rng.uniform(size=(batch, views, count)) < 0.8
    centers = np.where(valid[..., None], rng.uniform(-0.1, 1.1, (batch, views, count, 2)), np.nan)
    shape = (batch, count, heads, len(sizes), points)
    return features, centers, 2 * rng.normal(size=(*shape, 2)), rng.normal(size=shape), valid


def narrow(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype == bool else dtype), tree)


@functools.partial(jax.jit, static_argnames=("implementation",))
def run(features, points, offsets, logits, valid, d_out, implementation):
    """Output and gradients; both together, so that a case is compiled once."""

    def attend(*arrays):
        ordered = implementation != "xla"
        return multiview_deformable_attention(*arrays, valid, deterministic=ordered, implementation=implementation)

    out, pull = jax.vjp(attend, features, points, offsets, logits)
    return out, pull(d_out.astype(out.dtype))


def close(ours, expected, tolerance):
    """Equal to `tolerance` of the largest number."""
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(initial=1e-30), rtol=0)


def error(ours, expected):
    """Relative L2."""
    ours, expected = (np.asarray(x, np.float64) for x in (ours, expected))
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def compare(rng, implementation, **case):
    arguments = make(rng, **case)
    d_out = rng.normal(size=(*arguments[-1].shape, arguments[2].shape[2], arguments[0][0].shape[-1]))
    close(run(*narrow((*arguments, d_out)), implementation), define_multiview(*arguments, d_out), 1e-5)


@every
@pytest.mark.parametrize("case", [dict(), dict(channels=32, points=1, batch=1, count=33, heads=3, sizes=((6, 11),))])
def test_values_and_gradients_are_those_of_the_definition(rng, implementation, case):
    compare(rng, implementation, **case)


@every_patiently
@pytest.mark.parametrize(
    "case",
    [
        dict(channels=48, points=8, views=1, count=5),
        dict(channels=64, points=16, batch=1, views=2, count=3, heads=1, sizes=((1, 1), (5, 17))),
    ],
)
def test_wider_heads_and_more_points(rng, implementation, case):
    compare(rng, implementation, **case)


@every_patiently
def test_half_precision(rng, implementation):
    arguments = make(rng, batch=1, count=40, channels=48, points=8)
    d_out = rng.normal(size=(*arguments[-1].shape, 2, 48))
    features, *rest = narrow((*arguments, d_out))
    half = narrow(features, jnp.bfloat16)
    out, gradients = run(half, *rest, implementation)
    assert {x.dtype for x in (out, *gradients[0])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in gradients[1:]} == {jnp.dtype("float32")}
    expected, expected_gradients = define_multiview(*arguments, d_out)

    assert error(out, expected) < 1e-2
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        assert error(a, b) < 2e-2


@every_patiently
def test_samples_are_accumulated_in_float32(rng, implementation):
    features, *rest = narrow(make(rng, batch=1, count=40, channels=48, points=8))
    d_out = jnp.zeros((1, 3, 40, 2, 48))
    half = narrow(features, jnp.bfloat16)
    ours, _ = run(half, *rest, d_out, implementation)
    weights = jax.nn.softmax(rest[2], axis=(3, 4))
    rounded = jax.jit(reference.forward)(narrow(half), *rest[:2], weights, rest[3])
    assert error(ours, rounded) < 3e-3  # rounding the result alone makes 1.7e-3, sums in bfloat16 4.0e-3


@every
def test_the_same_input_gives_the_same_bits(rng, implementation):
    arguments = *make(rng), rng.normal(size=(2, 3, 37, 2, 24))
    first, second = (run(*narrow(arguments), implementation) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@every
@pytest.mark.parametrize("garbage", [np.inf, -1e30, 0.5])
def test_views_that_do_not_count_give_zero_whatever_they_hold(rng, implementation, garbage):
    features, points, *rest = narrow((*make(rng), rng.normal(size=(2, 3, 37, 2, 24))))
    valid = rest[2].at[1, 2].set(False)
    rest[2] = valid
    expected = run(features, points, *rest, implementation)
    out, gradients = run(features, jnp.where(valid[..., None], points, garbage), *rest, implementation)
    jax.tree.map(np.testing.assert_array_equal, (out, gradients), expected)
    assert not np.asarray(out)[~valid].any()
    assert not np.asarray(gradients[1])[~valid].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert not any(np.asarray(level[1, 2]).any() for level in gradients[0])


@every
def test_what_does_not_count_may_hold_anything(rng, implementation):
    """The maps of a view that no query sees, and the offsets of a query that no view sees."""
    features, points, offsets, logits, valid, d_out = narrow((*make(rng), rng.normal(size=(2, 3, 37, 2, 24))))
    valid = valid.at[1, 2].set(False).at[:, :, 5].set(False)
    expected = run(features, points, offsets, logits, valid, d_out, implementation)
    features = tuple(maps.at[1, 2].set(np.nan) for maps in features)
    ours = run(features, points, offsets.at[:, 5].set(np.nan), logits, valid, d_out, implementation)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@every
def test_borders(rng, implementation):
    """At every half cell from beyond one border to beyond the other, where floors and masks change."""
    features, points, offsets, logits, valid = make(rng)
    height, width = SIZES[0]
    cells = np.stack(np.meshgrid(np.arange(-1.5, width + 1, 0.5), np.arange(-1.5, height + 1, 0.5)), axis=-1)
    pixels = cells.reshape(-1, 2)[: 2 * 37 * 2 * 2].copy()
    offsets = np.resize(pixels, offsets.shape)
    points, valid = np.zeros_like(points) + 0.5 / np.array([width, height]), np.ones_like(valid)
    d_out = np.zeros((*valid.shape, 2, 24))
    out, _ = run(*narrow((features, points, offsets, logits, valid, d_out)), implementation)
    close(out, define_multiview(features, points, offsets, logits, valid, d_out)[0], 1e-5)


@every
@pytest.mark.parametrize("far", [-1.0, 2.0, 1e8, -1e30, np.inf])
def test_everything_outside_is_zero(rng, implementation, far):
    features, points, offsets, logits, valid = make(rng)
    points, d_out = np.full_like(points, far), rng.normal(size=(*valid.shape, 2, 24))
    out, gradients = run(*narrow((features, points, 0 * offsets, logits, valid, d_out)), implementation)
    assert not np.asarray(out).any()
    assert not any(np.asarray(level).any() for level in gradients[0])
    assert not np.asarray(gradients[3]).any()


@every
def test_a_point_that_is_no_number_stays_with_its_query(rng, implementation):
    features, points, offsets, logits, valid = narrow(make(rng))
    valid, d_out = jnp.ones_like(valid), narrow(rng.normal(size=(*valid.shape, 2, 24)))
    points = jnp.nan_to_num(points).at[0, 1, 5].set(jnp.nan)
    without = run(features, points, offsets, logits, valid.at[0, 1, 5].set(False), d_out, implementation)
    out, (d_features, *_) = run(features, points, offsets, logits, valid, d_out, implementation)
    rest = np.delete(np.arange(37), 5)
    np.testing.assert_array_equal(out[0, 1, rest], without[0][0, 1, rest])
    jax.tree.map(np.testing.assert_array_equal, d_features, without[1][0])


@every
def test_no_queries(rng, implementation):
    features, points, offsets, logits, valid = narrow(make(rng, count=0))
    out, gradients = run(features, points, offsets, logits, valid, jnp.zeros((2, 3, 0, 2, 24)), implementation)
    assert out.shape == (2, 3, 0, 2, 24)
    assert not any(np.asarray(level).any() for level in gradients[0])


def gradients(implementation, *arrays):
    """Of a loss, by everything but the last."""

    def loss(*moved):
        return jnp.sum(multiview_deformable_attention(*moved, arrays[-1], implementation=implementation) ** 2)

    return jax.grad(loss, tuple(range(4)))(*arrays[:-1])


@every_patiently
def test_vmap_is_one_after_the_other(rng, implementation):
    features, points, offsets, logits, valid = narrow(make(rng, batch=4, count=9, points=1, sizes=((6, 4),)))

    def one(features, points, offsets, logits, valid):
        return gradients(implementation, *jax.tree.map(lambda x: x[None], (features, points, offsets, logits, valid)))

    over = jax.vmap(one, (0, 0, None, 0, 0))  # the offsets of one scene for all
    ours = jax.tree.map(lambda x: x[:, 0], jax.jit(over)(features, points, offsets[0], logits, valid))
    offsets = jnp.broadcast_to(offsets[:1], offsets.shape)
    close(ours, jax.jit(functools.partial(gradients, "xla"))(features, points, offsets, logits, valid), 1e-5)


@every_patiently
def test_works_inside_shard_map(rng, implementation):
    arguments = narrow(make(rng, batch=1, count=9, points=1, sizes=((6, 4),)))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.sharding.PartitionSpec("data")
    # What is interpreted does not say over which axes its numbers vary.
    specs = dict(mesh=mesh, in_specs=data, out_specs=data, check_vma=implementation == "xla")
    mapped = jax.shard_map(functools.partial(gradients, implementation), **specs)
    close(jax.jit(mapped)(*arguments), jax.jit(functools.partial(gradients, "xla"))(*arguments), 1e-5)


ON_FOUR_DEVICES = """
import sys
sys.path.insert(0, {folder!r})
from test_implementations import *

arguments = narrow(make(np.random.default_rng(0), batch=2, views=2, count=20, points=1, sizes=((6, 4),)))
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
everywhere = jax.device_put(arguments, jax.NamedSharding(mesh, jax.P()))
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    ours = jax.jit(functools.partial(gradients, {implementation!r}))(*everywhere)
assert ours[2].sharding.shard_shape(ours[2].shape) == (1, 20, 1, 1, 1, 2), ours[2].sharding
close(ours, jax.jit(functools.partial(gradients, "xla"))(*arguments), 1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name.endswith("_interpret")])
def test_on_a_mesh_every_device_has_its_scenes_and_heads(implementation):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    program = ON_FOUR_DEVICES.format(folder=str(Path(__file__).parent), implementation=implementation)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


@every_patiently
def test_one_view_with_given_locations_and_weights(rng, implementation):
    features, _, locations, weights, valid = make(rng, batch=6, views=1, count=7)
    locations, sizes = 0.2 * locations + 0.5, np.array(SIZES)[:, None, ::-1]
    d_out = rng.normal(size=(6, 1, 7, 2, 24))
    points, valid = np.zeros((6, 1, 7, 2)), np.ones_like(valid)
    out, (d_features, _, d_pixels, d_weights) = define(features, points, locations * sizes, weights, valid, d_out)

    def split(x):
        """Two leading axes instead of one, and none for the view."""
        return x.reshape(2, 3, *x.shape[1 + (x.shape[1] == 1) :])

    @jax.jit
    def ours(d_out, *arrays):
        out, pull = jax.vjp(functools.partial(deformable_attention, implementation=implementation), *arrays)
        return out, pull(d_out)

    arguments = narrow(jax.tree.map(split, (d_out, features, locations, weights)))
    close(ours(*arguments), jax.tree.map(split, (out, (d_features, d_pixels * sizes, d_weights))), 1e-5)


def test_gradients_of_the_reference_are_those_of_finite_differences_in_float64(rng):
    with jax.enable_x64(True):
        *arguments, valid = jax.tree.map(jnp.array, make(rng, count=5))
        arguments[1] = jnp.nan_to_num(arguments[1])
        direction = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape)), arguments)
        cotangent = jnp.array(rng.normal(size=(2, 3, 5, 2, 24)))

        @jax.jit
        def loss(t):
            moved = jax.tree.map(lambda x, d: x + t * d, arguments, direction)
            return jnp.vdot(cotangent, multiview_deformable_attention(*moved, valid))

        step = 1e-6
        expected = (loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "samples", [1, 24, 48]
)  # of the reference: one query at a time, some (the last block is padded)
def test_blocks_of_queries_change_nothing(rng, samples, monkeypatch):
    arguments = narrow(make(rng, batch=1, count=5, channels=3))
    whole = jax.jit(functools.partial(gradients, "xla"))(*arguments)
    monkeypatch.setattr(reference, "SAMPLES", samples)
    close(jax.jit(functools.partial(gradients, "xla"))(*arguments), whole, 1e-5)


def test_shapes_that_disagree_are_named(rng):
    (features, *_), weights = narrow(make(rng, views=1)), jnp.zeros((2, 1, 37, 2, 2, 4))
    locations = jnp.zeros((*weights.shape, 2))
    for maps, wrong, message in (
        (features, locations[..., :3, :], r"locations \(2, 1, 37, 2, 2, 3, 2\)"),
        (features[:1], locations, "features: 1 maps for 2 levels"),
        (
            tuple(m[:1] for m in features),
            locations,
            r"features: expected leading axes \(2, 1\) and 2 heads, got \(1, 1,",
        ),
        ((features[0], features[1][..., 1:]), locations, r"one head width and dtype .* \[\(23, 'float32'\), \(24,"),
        ((features[0], narrow(features[1], jnp.bfloat16)), locations, "one head width and dtype at all levels"),
    ):
        with pytest.raises(ValueError, match=message):
            deformable_attention(maps, wrong, weights)
