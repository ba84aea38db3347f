"""All implementations against the definition in float64 NumPy: values, gradients, padding, types, transformations.

cuDNN cannot be called without a GPU: it joins where there is one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.self_attention import reference, self_attention, splash

IMPLEMENTATIONS = ["xla", "splash_interpret"]
ON_GPU = pytest.param("cudnn", marks=pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"))
SCENES, TOKENS, HEADS, WIDTH = 4, 200, 2, 24
LENGTHS = np.array([200, 131, 1, 0])  # the last block full, cut, empty; no key at all


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    """Several blocks of keys and of queries, the last one padded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splash, "BLOCK", 128)
        patch.setattr(reference, "CACHED_SCORES", 60 * TOKENS)
        yield


def make(rng, dtype=jnp.float32, tokens=TOKENS, keys=None, width=WIDTH):
    """Queries, keys, values and a cotangent of the result."""
    counts = tokens, keys or tokens, keys or tokens, tokens
    return tuple(jnp.array(rng.normal(size=(SCENES, n, HEADS, width)), dtype) for n in counts)


@functools.partial(jax.jit, static_argnums=0)
def out_and_gradients(implementation, queries, keys, values, d_out, lengths):
    def attend(*arrays):
        return self_attention(*arrays, lengths, implementation=implementation)

    out, pullback = jax.vjp(attend, queries, keys, values)
    return out, *pullback(d_out)


def by_definition(queries, keys, values, d_out, lengths):
    """The same in float64, scene by scene, head by head, with all scores at once."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (queries, keys, values, d_out))
    results = [np.zeros_like(x) for x in (q, q, k, v)]
    for b, length in enumerate(np.asarray(lengths)):
        rows = length if q.shape[1] == k.shape[1] else q.shape[1]
        for h in range(q.shape[2] if length else 0):
            qs, ks, vs, ds = q[b, :rows, h], k[b, :length, h], v[b, :length, h], d_out[b, :rows, h]
            weights = np.exp(qs @ ks.T / np.sqrt(q.shape[-1]))
            weights /= weights.sum(-1, keepdims=True)
            d_weights = ds @ vs.T
            d_scores = weights * (d_weights - np.sum(weights * d_weights, -1, keepdims=True)) / np.sqrt(q.shape[-1])
            parts = weights @ vs, d_scores @ ks, d_scores.T @ qs, weights.T @ ds
            for result, part, n in zip(results, parts, (rows, rows, length, length), strict=True):
                result[b, :n, h] = part
    return tuple(results)


def assert_near(found, expected, relative):
    """Every array to within `relative` of its largest number."""
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.float64(ours), theirs, atol=relative * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32(rng, implementation):
    arrays = make(rng)
    found = out_and_gradients(implementation, *arrays, LENGTHS)
    assert_near(found, by_definition(*arrays, LENGTHS), 2e-6)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, ON_GPU])
def test_bfloat16_keeps_scores_and_sums_in_float32(rng, implementation):
    arrays = make(rng, jnp.bfloat16)
    found = out_and_gradients(implementation, *arrays, LENGTHS)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    # Weights and results are rounded to 8 bits; scores rounded to 8 bits would be ten times as far off.
    assert_near(found[:1], by_definition(*arrays, LENGTHS)[:1], 2**-7)
    assert_near(found[1:], by_definition(*arrays, LENGTHS)[1:], 2**-6)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, ON_GPU])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e4])
def test_padding_changes_nothing_bit_for_bit(rng, implementation, garbage):
    arrays = make(rng, jnp.bfloat16 if implementation == "cudnn" else jnp.float32)
    padding = (np.arange(TOKENS) >= LENGTHS[:, None])[..., None, None]
    clean = out_and_gradients(implementation, *arrays, LENGTHS)
    dirty = out_and_gradients(implementation, *(jnp.where(padding, garbage, x) for x in arrays), LENGTHS)
    for ours in dirty:
        assert not np.where(padding, np.float32(ours), 0).any()
    for ours, theirs in zip(dirty[: 1 if implementation == "cudnn" else 4], clean, strict=False):
        np.testing.assert_array_equal(np.float32(ours), np.float32(theirs))
    if implementation == "cudnn":  # adds up gradients in any order
        assert_near(dirty, [np.float64(x) for x in clean], 2**-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(rng, implementation):
    q, k, v, d_out = make(rng)
    # A row's largest weight is almost one: expected by shifting the scores, which `by_definition` does not.
    found, *gradients = out_and_gradients(implementation, 100 * q, 100 * k, v, d_out, LENGTHS)
    best = np.einsum("nkc,mkc->knm", np.float64(q[0]), np.float64(k[0])).argmax(-1)
    expected = np.stack([np.asarray(v[0, best[h], h]) for h in range(HEADS)], axis=1)
    assert np.isfinite(found).all() and all(np.isfinite(g).all() for g in gradients)
    assert np.mean(np.abs(found[0] - expected).max(-1) < 1e-3) > 0.99  # but for near ties


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "keys", "width"), [(9, 140, 48), (140, 9, 64)])
def test_other_numbers_of_queries_than_of_keys(rng, implementation, tokens, keys, width):
    arrays, lengths = make(rng, tokens=tokens, keys=keys, width=width), np.array([9, 5, 1, 0])
    assert_near(out_and_gradients(implementation, *arrays, lengths), by_definition(*arrays, lengths), 2e-6)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_vmap(rng, implementation):
    arrays = make(rng, tokens=40)
    lengths = jnp.array([[40, 3], [7, 0]])
    stacked = tuple(x.reshape(2, 2, *x.shape[1:]) for x in arrays)
    mapped = jax.vmap(functools.partial(out_and_gradients, implementation))(*stacked, lengths)
    expected = by_definition(*arrays, lengths.reshape(-1))
    assert_near([x.reshape(SCENES, *x.shape[2:]) for x in mapped], expected, 2e-6)


@pytest.mark.parametrize("implementation", ["auto", "splash_interpret"])
def test_inside_shard_map(rng, implementation):
    arrays, lengths = make(rng, tokens=40), jnp.array([40, 3, 7, 0])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        functools.partial(out_and_gradients, implementation),
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("data"),
        out_specs=jax.sharding.PartitionSpec("data"),
        check_vma=implementation == "auto",
    )
    assert_near(jax.jit(mapped)(*arrays, lengths), by_definition(*arrays, lengths), 2e-6)


def test_xla_against_central_differences_in_float64(rng):
    with jax.enable_x64(True):
        arrays, step = make(rng, jnp.float64, tokens=30), 1e-5
        *qkv, d_out = arrays
        out, *gradients = out_and_gradients("xla", *arrays, np.array([30, 17, 1, 0]))
        assert out.dtype == jnp.float64
        for i, gradient in enumerate(gradients):
            direction = jnp.array(rng.normal(size=gradient.shape))

            def along(t, i=i, direction=direction):
                moved = [x + t * direction if j == i else x for j, x in enumerate(qkv)]
                return jnp.sum(out_and_gradients("xla", *moved, d_out, np.array([30, 17, 1, 0]))[0] * d_out)

            slope = (along(step) - along(-step)) / (2 * step)
            np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-8)


@pytest.mark.parametrize("block", [(1, 1), (2, 5), (8, 64)])  # problems and queries at a time
def test_xla_in_blocks_of_every_size(rng, block, monkeypatch):
    monkeypatch.setattr(reference, "_by_platform", lambda function, *arrays: function(block, *arrays))
    arrays, lengths = make(rng, tokens=13), np.array([13, 5, 1, 0])
    jax.clear_caches()  # the traces with other blocks
    assert_near(out_and_gradients("xla", *arrays, lengths), by_definition(*arrays, lengths), 2e-6)
    jax.clear_caches()


def test_no_tokens():
    none = jnp.zeros((2, 0, 3, 8))
    assert self_attention(none, none, none, jnp.zeros(2, jnp.int32)).shape == none.shape


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((2, 5, 3, 8), (2, 5, 3, 8), (2, 4, 3, 8), (2,)), "fffi", r"got queries \(2, 5, 3, 8\)"),
        (((2, 5, 3, 8), (2, 5, 1, 8), (2, 5, 1, 8), (2,)), "fffi", r"keys \(2, 5, 1, 8\)"),
        (((2, 5, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8), (3,)), "fffi", "key_lengths must be 2 integers"),
        (((2, 5, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8), (2,)), "ffff", "key_lengths must be 2 integers"),
        (((2, 5, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8), (2,)), "fefi", "one floating dtype"),
    ],
)
def test_what_does_not_fit_together(shapes, dtypes, message):
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    # The message, not that of the tests' own shape checks.
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(self_attention.__wrapped__, *inputs)
