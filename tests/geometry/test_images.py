"""Resizing of views, compared with JAX's resizing and with the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.geometry.cameras import orbit, rays
from geolrm_jax.geometry.images import resize_views
from geolrm_jax.scene import Cameras, Views


def random_views(rng, lead, height, width):
    cameras = orbit([10.0, 50.0], [0.0, 20.0], 1.9, 39.6, 64)
    cameras = jax.tree.map(lambda x: np.broadcast_to(x[: lead[-1]], (*lead, *x.shape[1:])), cameras)
    cameras = Cameras(cameras.world_from_camera, cameras.intrinsics, height, width)
    image = [rng.random((*lead, height, width, *c)).astype(np.float32) for c in ((3,), (), ())]
    return Views(cameras, *image, np.ones(lead, bool))


@pytest.mark.parametrize("lead, old, new", [((2,), (32, 32), (28, 28)), ((2, 1), (12, 20), (30, 7))])
def test_agrees_with_jaxs_resizing(rng, lead, old, new):
    views = random_views(rng, lead, *old)
    resized = resize_views(views, *new)
    for name, method in (("rgb", "linear"), ("alpha", "linear"), ("depth", "nearest")):
        before = getattr(views, name)
        shape = (*lead, *new, *before.shape[len(lead) + 2 :])
        np.testing.assert_allclose(getattr(resized, name), jax.image.resize(before, shape, method), atol=2e-6)
    assert (resized.cameras.height, resized.cameras.width) == new
    # The corners of the picture are seen along the same rays.
    first, again = (np.asarray(rays(v.cameras)[1]).mean((-2, -3)) for v in (views, resized))
    np.testing.assert_allclose(first / np.linalg.norm(first), again / np.linalg.norm(again), atol=2e-3)


def test_views_that_fit_are_left_alone(rng):
    views = jax.tree.map(jnp.asarray, random_views(rng, (2,), 16, 24))
    assert resize_views(views, 16, 24) is views
