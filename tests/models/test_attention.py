"""Self-attention: against float64 NumPy, in blocks of every size, masked, differentiated; RoPE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.models import attention as module
from geolrm_jax.models.rope3d import rope3d

BLOCKS = [(1, 1), (2, 5), (3, 4), (6, 13), (6, 1024)]  # problems and queries at a time


def make(rng, count, dtype=jnp.float32):
    q, k, v = (jnp.array(rng.normal(size=(2, count, 3, 6)), dtype) for _ in range(3))
    return q, k, v, jnp.array(rng.uniform(size=(2, count)) < 0.7)


def by_numpy(q, k, v, mask):
    """Output, and the gradient of sum(output * direction) as a function of the direction; all in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bnkc,bmkc->bknm", q, k) * scale
    scores = np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)

    def gradient(direction):
        d_weights = np.einsum("bnkc,bmkc->bknm", direction, v)
        d_scores = weights * (d_weights - np.sum(weights * d_weights, -1, keepdims=True)) * scale
        return (
            np.einsum("bknm,bmkc->bnkc", d_scores, k),
            np.einsum("bknm,bnkc->bmkc", d_scores, q),
            np.einsum("bknm,bnkc->bmkc", weights, direction),
        )

    return np.einsum("bknm,bmkc->bnkc", weights, v), gradient


def in_blocks(monkeypatch, block):
    def chosen(function, *arrays):
        return function((block[0], min(block[1], arrays[0].shape[1])), *arrays)

    monkeypatch.setattr(module, "_by_platform", chosen)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_give_full_attention_and_its_gradient(rng, block, monkeypatch):
    in_blocks(monkeypatch, block)
    *qkv, mask = make(rng, 13)
    direction = rng.normal(size=qkv[0].shape)
    expected, gradient = by_numpy(*qkv, mask)
    out, pullback = jax.vjp(lambda *qkv: module.attention(*qkv, mask), *qkv)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for ours, theirs in zip(pullback(jnp.array(direction, jnp.float32)), gradient(direction), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


def test_as_chosen_for_this_platform(rng, monkeypatch):
    monkeypatch.setattr(module, "CACHED_SCORES", 40)  # one head and three queries at a time
    arguments = make(rng, 13)
    np.testing.assert_allclose(jax.jit(module.attention)(*arguments), by_numpy(*arguments)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("count", "largest", "size"), [(13, 4, 4), (13, 5, 5), (12, 5, 4), (4, 9, 4), (1025, 1024, 513)]
)
def test_even_split(count, largest, size):
    assert module.even_split(count, largest) == size


def test_bfloat16_keeps_scores_and_sums_in_float32(rng):
    *qkv, mask = make(rng, 64, jnp.bfloat16)
    expected, gradient = by_numpy(*qkv, mask)
    out, pullback = jax.vjp(lambda *qkv: module.attention(*qkv, mask), *qkv)
    assert out.dtype == jnp.bfloat16
    # Weights and the result are rounded to 8 bits, the scores are not.
    np.testing.assert_allclose(np.float64(out), expected, atol=2**-7 * np.abs(expected).max())
    direction = jnp.array(rng.normal(size=out.shape), jnp.bfloat16)
    for ours, theirs in zip(pullback(direction), gradient(np.float64(direction)), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(ours), theirs, atol=2**-6 * np.abs(theirs).max())


def test_large_scores_do_not_overflow(rng):
    q, k, v, mask = make(rng, 9)
    arguments = 100.0 * q, 100.0 * k, v, mask
    np.testing.assert_allclose(module.attention(*arguments), by_numpy(*arguments)[0], atol=1e-3)


def test_masked_keys_are_not_seen_bit_for_bit(rng):
    q, k, v, mask = make(rng, 9)
    hidden = ~np.asarray(mask)[..., None, None]

    def out_and_gradients(k, v):
        loss = jax.value_and_grad(lambda *qkv: jnp.sum(module.attention(*qkv, mask) ** 2), (0, 1, 2))
        return module.attention(q, k, v, mask), loss(q, k, v)

    garbage = out_and_gradients(jnp.where(hidden, 1e6, k), jnp.where(hidden, -1e6, v))
    clean = out_and_gradients(k, v)
    jax.tree.map(np.testing.assert_array_equal, garbage, clean)
    for gradient in clean[1][1][1:]:
        assert not np.asarray(gradient)[~np.asarray(mask)].any()


def test_no_key_at_all_gives_zero_and_no_gradient(rng):
    q, k, v, mask = make(rng, 5)
    out, pullback = jax.vjp(functools.partial(module.attention, mask=jnp.zeros_like(mask)), q, k, v)
    for array in (out, *pullback(jnp.ones_like(out))):
        np.testing.assert_array_equal(array, 0.0)


def test_works_inside_shard_map(rng):
    *qkv, mask = make(rng, 5)

    def gradients(*arguments):
        return jax.grad(lambda *qkv: jnp.sum(module.attention(*qkv, arguments[3]) ** 2), (0, 1, 2))(*arguments[:3])

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.sharding.PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=data, out_specs=data))
    jax.tree.map(np.testing.assert_array_equal, mapped(*qkv, mask), jax.jit(gradients)(*qkv, mask))


def test_memory_is_linear_in_the_number_of_tokens():
    def temporaries(count):
        q = jax.ShapeDtypeStruct((1, count, 4, 12), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, count), jnp.bool)
        gradient = jax.grad(lambda *qkv_mask: module.attention(*qkv_mask).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(q, q, q, mask).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 4.5 * temporaries(4096)  # with all scores it would be 16 times


def test_rope_scores_depend_on_differences_only(rng):
    q, k = (jnp.array(rng.normal(size=(1, 4, 2, 12)), jnp.float32) for _ in range(2))
    a, b = (jnp.array(rng.integers(0, 60, (1, 4, 3)), jnp.int32) for _ in range(2))
    shift = jnp.array([7, 0, 31], jnp.int32)
    scores = [jnp.einsum("bnkc,bnkc->bnk", rope3d(q, a + s), rope3d(k, b + s)) for s in (0, shift)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(rope3d(q, a), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
