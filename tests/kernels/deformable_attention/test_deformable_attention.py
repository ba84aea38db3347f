"""Deformable attention against loops in float64, finite differences, and its own masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.deformable_attention import deformable_attention, multiview_deformable_attention, reference


def bilinear(maps, x, y):
    """One sample of a (H, W, C) map at pixel coordinates, zero outside, cell centres at integers."""
    height, width, channels = maps.shape
    total = np.zeros(channels)
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * maps[row, column]
    return total


def by_loops(features, locations, weights):
    """Deformable DETR, Eq. 2, one sample after the other."""
    batch, count, heads = weights.shape[:3]
    out = np.zeros((batch, count, heads, features[0].shape[-1]))
    for b, n, k, level, p in np.ndindex(weights.shape):
        maps = features[level][b, :, :, k]
        x, y = locations[b, n, k, level, p] * (maps.shape[1], maps.shape[0]) - 0.5
        out[b, n, k] += weights[b, n, k, level, p] * bilinear(maps, x, y)
    return out


def make(rng, batch=2, count=5, heads=3, points=4, channels=6, sizes=((7, 5), (4, 9))):
    features = tuple(rng.normal(size=(batch, *size, heads, channels)) for size in sizes)
    shape = (batch, count, heads, len(sizes), points)
    return features, rng.uniform(-0.3, 1.3, (*shape, 2)), rng.uniform(size=shape)


@pytest.mark.parametrize("points", [1, 4, 8])
@pytest.mark.parametrize("channels", [1, 24])
def test_values_are_those_of_loops(rng, points, channels):
    features, locations, weights = make(rng, points=points, channels=channels)
    ours = deformable_attention(*jax.tree.map(lambda x: jnp.array(x, jnp.float32), (features, locations, weights)))
    expected = by_loops(features, locations, weights)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_gradients_are_those_of_finite_differences(rng):
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.array, make(rng))
        direction = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape)), arguments)
        weights = jnp.array(rng.normal(size=(2, 5, 3, 6)))

        def loss(t):
            moved = jax.tree.map(lambda x, d: x + t * d, arguments, direction)
            return jnp.vdot(weights, deformable_attention(*moved))

        step = 1e-6
        expected = (loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(loss)(0.0), expected, rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 24, 48])  # one query at a time, two (the last block is padded), four
def test_blocks_of_queries_change_nothing(rng, samples, monkeypatch):
    features, locations, weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), make(rng))

    def out_and_gradients():
        loss = jax.grad(lambda *arguments: jnp.sum(deformable_attention(*arguments) ** 2), (0, 1, 2))
        return deformable_attention(features, locations, weights), loss(features, locations, weights)

    whole = out_and_gradients()
    monkeypatch.setattr(reference, "SAMPLES", samples)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out_and_gradients(), whole)


def test_works_inside_shard_map(rng):
    arguments = jax.tree.map(lambda x: jnp.array(x, jnp.float32), make(rng))

    def gradients(*arguments):
        return jax.grad(lambda *moved: jnp.sum(deformable_attention(*moved) ** 2), (0, 1, 2))(*arguments)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.sharding.PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=data, out_specs=data))
    jax.tree.map(np.testing.assert_array_equal, mapped(*arguments), jax.jit(gradients)(*arguments))


def make_views(rng, batch=2, views=3, count=5, heads=2, points=3, channels=4):
    features = tuple(rng.normal(size=(batch, views, *s, heads, channels)) for s in ((6, 8), (3, 5)))
    reference = rng.uniform(0.05, 0.95, (batch, views, count, 2))
    shape = (batch, count, heads, 2, points)
    valid = np.ones((batch, views, count), bool)
    return features, reference, rng.normal(size=(*shape, 2)), rng.normal(size=shape), valid


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.array(x, bool if x.dtype == bool else jnp.float32), tree)


def test_the_fused_form_is_the_plain_one_view_by_view(rng):
    features, reference, offsets, logits, valid = make_views(rng)
    ours = multiview_deformable_attention(*as_float32((features, reference, offsets, logits, valid)))
    flat = np.exp(logits).reshape(*logits.shape[:3], -1)
    weights = (flat / flat.sum(-1, keepdims=True)).reshape(logits.shape)
    for view in range(3):
        sizes = np.array([(m.shape[3], m.shape[2]) for m in features])
        locations = reference[:, view, :, None, None, None] + offsets / sizes[:, None, :]
        expected = by_loops(tuple(m[:, view] for m in features), locations, weights)
        np.testing.assert_allclose(ours[:, view], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e9])
def test_invalid_views_give_zero_and_no_gradient_whatever_they_hold(rng, garbage):
    features, reference, offsets, logits, valid = as_float32(make_views(rng))
    valid = valid.at[:, 1].set(False)
    broken = reference.at[:, 1].set(garbage)

    def loss(features, reference, offsets, logits):
        return jnp.sum(multiview_deformable_attention(features, reference, offsets, logits, valid) ** 2)

    out = multiview_deformable_attention(features, broken, offsets, logits, valid)
    np.testing.assert_array_equal(out[:, 1], 0)
    clean, dirty = (jax.grad(loss, (0, 2, 3))(features, r, offsets, logits) for r in (reference, broken))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(not np.asarray(level[:, 1]).any() for level in clean[0])


def test_everything_outside_is_zero(rng):
    features, _, weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), make(rng))
    for far in (-1.0, 2.0, 1e8, -1e8):
        assert not np.asarray(deformable_attention(features, jnp.full((*weights.shape, 2), far), weights)).any()


def test_a_location_that_is_no_number_stays_with_its_query(rng):
    features, locations, weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), make(rng))
    broken = deformable_attention(features, locations.at[:, 2].set(jnp.nan), weights)
    rest = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(broken[:, rest], deformable_attention(features, locations, weights)[:, rest])


def test_bfloat16_features_are_accumulated_in_float32(rng):
    features, locations, weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), make(rng, points=8))
    half = tuple(m.astype(jnp.bfloat16) for m in features)
    ours = deformable_attention(half, locations, weights)
    assert ours.dtype == jnp.bfloat16
    rounded = deformable_attention(tuple(m.astype(jnp.float32) for m in half), locations, weights)
    # The same sums: only the result is rounded.
    np.testing.assert_array_equal(ours, rounded.astype(jnp.bfloat16))


def test_shapes_that_disagree_are_named(rng):
    features, locations, weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), make(rng))
    with pytest.raises(ValueError, match=r"1 maps for 2 levels"):
        deformable_attention(features[:1], locations, weights)
    with pytest.raises(ValueError, match=r"locations \(2, 5, 3, 2, 3, 2\)"):
        deformable_attention(features, locations[..., :3, :], weights)
