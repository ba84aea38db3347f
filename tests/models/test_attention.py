"""Attention among anchors: what it makes of their mask and their voxels. The operation itself: tests/kernels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from geolrm_jax.models.attention import SelfAttention, attention
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors


def make_anchors(rng, lengths, count):
    voxels = jnp.array(rng.integers(0, 128, (len(lengths), count, 3)), jnp.int32)
    mask = jnp.arange(count) < jnp.array(lengths)[:, None]
    return Anchors(voxels / 127.0 - 0.5, voxels, mask)


def test_the_mask_is_the_number_of_tokens(rng):
    q, k, v = (rng.normal(size=(2, 7, 3, 4)) for _ in range(3))
    lengths = [7, 4]
    mask = make_anchors(rng, lengths, 7).mask
    out = attention(*(jnp.array(x, jnp.float32) for x in (q, k, v)), mask)
    for b, n in enumerate(lengths):
        weights = np.exp(np.einsum("nkc,mkc->knm", q[b, :n], k[b, :n]) / 2)
        expected = np.einsum("knm,mkc->nkc", weights / weights.sum(-1, keepdims=True), v[b, :n])
        np.testing.assert_allclose(out[b, :n], expected, atol=1e-6)
        assert not out[b, n:].any()


def test_padding_is_not_seen_bit_for_bit(rng):
    layer = SelfAttention(24, 2, rngs=nnx.Rngs(0), precision=Precision())
    anchors = make_anchors(rng, [9, 5, 0], 9)
    x = jnp.array(rng.normal(size=(3, 9, 24)), jnp.float32)
    clean = layer(x, anchors)
    kept = anchors.mask[..., None]
    moved = dataclasses.replace(anchors, voxels=jnp.where(kept, anchors.voxels, 3))
    np.testing.assert_array_equal(layer(jnp.where(kept, x, jnp.nan), moved), clean)
    np.testing.assert_array_equal(jnp.where(kept, 0, clean), 0)


def test_rope_scores_depend_on_differences_only(rng):
    q, k = (jnp.array(rng.normal(size=(1, 4, 2, 12)), jnp.float32) for _ in range(2))
    a, b = (jnp.array(rng.integers(0, 60, (1, 4, 3)), jnp.int32) for _ in range(2))
    shift = jnp.array([7, 0, 31], jnp.int32)
    scores = [jnp.einsum("bnkc,bnkc->bnk", rope3d(q, a + s), rope3d(k, b + s)) for s in (0, shift)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(rope3d(q, a), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
