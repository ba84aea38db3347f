"""Losses against the released code's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.losses.depth import edge_aware_log_l1, total_variation
from geolrm_jax.losses.occupancy import affinity, cross_entropy


@pytest.fixture(scope="module")
def vectors(parity):
    return np.load(parity / "geolrm_released.npz")


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


def test_occupancy(vectors):
    logits, target = jnp.array(vectors["loss/occ_logits"]), jnp.array(vectors["loss/occ_target"]) > 0.5
    np.testing.assert_allclose(cross_entropy(logits, target), vectors["loss/bce"], rtol=1e-5)
    np.testing.assert_allclose(affinity(logits, target, "batch"), vectors["loss/geo_scal"], rtol=1e-5)
    gradient = jax.grad(lambda x: cross_entropy(x, target) + affinity(x, target, "batch"))(logits)
    assert relative(gradient, vectors["loss/occ_grad"]) < 1e-4


def test_depth(vectors):
    depth, target = (jnp.array(vectors[f"loss/depth_{k}"])[:, :, 0] for k in ("pred", "gt"))
    image = jnp.moveaxis(jnp.array(vectors["loss/rgb"]), 2, -1)
    mask = jnp.array(vectors["loss/mask"])[:, :, 0]
    valid = jnp.ones(depth.shape[:2], bool)

    def loss(depth):
        return edge_aware_log_l1(depth, target, image, mask, valid)

    np.testing.assert_allclose(loss(depth), vectors["loss/edge_logl1_masked"], rtol=1e-5)
    assert relative(jax.grad(loss)(depth), vectors["loss/edge_logl1_masked_grad"][:, :, 0]) < 1e-4
    everywhere = edge_aware_log_l1(depth, target, image, jnp.ones_like(mask), valid)
    np.testing.assert_allclose(everywhere, vectors["loss/edge_logl1_nomask"], rtol=1e-5)
    np.testing.assert_allclose(total_variation(depth, valid), vectors["loss/tv"], rtol=1e-5)
