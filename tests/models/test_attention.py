"""Self-attention: chunks, masks, RoPE."""

import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.models import attention as module
from geolrm_jax.models.rope3d import rope3d


def make(rng, count):
    q, k, v = (jnp.array(rng.normal(size=(2, count, 3, 6)), jnp.float32) for _ in range(3))
    return q, k, v, jnp.array(rng.uniform(size=(2, count)) < 0.7)


def by_numpy(q, k, v, mask):
    scores = np.einsum("bnkc,bmkc->bknm", np.float64(q), np.float64(k)) / np.sqrt(q.shape[-1])
    scores = np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bknm,bmkc->bnkc", weights / weights.sum(-1, keepdims=True), np.float64(v))


@pytest.mark.parametrize("chunk", [4, 5, 1024])
def test_chunks_give_full_attention(rng, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    arguments = make(rng, 13)
    np.testing.assert_allclose(module.attention(*arguments), by_numpy(*arguments), atol=1e-5)


def test_masked_keys_are_not_seen_bit_for_bit(rng):
    q, k, v, mask = make(rng, 9)
    hidden = ~np.asarray(mask)[..., None, None]
    garbage = module.attention(q, jnp.where(hidden, 1e6, k), jnp.where(hidden, -1e6, v), mask)
    np.testing.assert_array_equal(garbage, module.attention(q, k, v, mask))


def test_no_key_at_all_stays_finite(rng):
    q, k, v, mask = make(rng, 5)
    assert np.isfinite(module.attention(q, k, v, jnp.zeros_like(mask))).all()


def test_rope_scores_depend_on_differences_only(rng):
    q, k = (jnp.array(rng.normal(size=(1, 4, 2, 12)), jnp.float32) for _ in range(2))
    a, b = (jnp.array(rng.integers(0, 60, (1, 4, 3)), jnp.int32) for _ in range(2))
    shift = jnp.array([7, 0, 31], jnp.int32)
    scores = [jnp.einsum("bnkc,bnkc->bnk", rope3d(q, a + s), rope3d(k, b + s)) for s in (0, shift)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(rope3d(q, a), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
