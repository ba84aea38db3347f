"""Renders against closed forms: a sphere's depth, area and normals; and against dense sampling of any object."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.data import sdf
from geolrm_jax.data.occupancy import unproject_pixels
from geolrm_jax.data.procedural_shapes import random_object
from geolrm_jax.data.sphere_tracing import render
from geolrm_jax.geometry.cameras import orbit, rays

RADIUS = 0.4
CAMERAS = orbit(np.array([0.0, 100.0, 230.0]), np.array([0.0, 30.0, -60.0]), 1.9, 39.6, 52)


@pytest.fixture(scope="module")
def sphere():
    shapes = random_object(jax.random.key(0))
    first = jnp.arange(9) == 0
    return dataclasses.replace(
        shapes,
        count=jnp.int32(1),
        kind=jnp.where(first, 0, shapes.kind),
        local_from_world=jnp.broadcast_to(jnp.eye(3), (9, 3, 3)),
        offset=jnp.zeros((9, 3)),
        scale=jnp.ones(9),
        size=jnp.full((9, 3), RADIUS),
        operation=jnp.zeros(9, jnp.int32),
        shell=jnp.zeros(9),
        radius=jnp.float32(RADIUS),
    )


def test_sphere_has_its_analytic_depth_normals_and_area(sphere):
    rgba, depth, normal = (np.asarray(x) for x in render(sphere, CAMERAS))
    origins, directions = (np.asarray(x, np.float64) for x in rays(CAMERAS))
    along = -(directions @ origins[:, None, :, None])[..., 0]
    discriminant = along**2 - (1.9**2 - RADIUS**2)
    distance = along - np.sqrt(np.maximum(discriminant, 0))
    forward = CAMERAS.world_from_camera[:, None, None, :3, 2]
    z = np.where(discriminant > 0, distance * (directions * forward).sum(-1), 0.0)
    clear = np.abs(discriminant) > 1e-3
    np.testing.assert_allclose(depth[clear], z[clear], atol=5e-5)
    hit = (depth > 0) & clear
    points = origins[:, None, None] + directions * distance[..., None]
    np.testing.assert_allclose(normal[hit], points[hit] / RADIUS, atol=6e-3)
    # The silhouette is a circle around the principal point.
    circle = np.pi * (CAMERAS.intrinsics[0, 0, 0] * RADIUS) ** 2 / (1.9**2 - RADIUS**2)
    np.testing.assert_allclose(rgba[..., 3].sum((1, 2)), circle, rtol=5e-3)
    assert ((rgba[..., 3] > 0) & (rgba[..., 3] < 1)).any()


@pytest.mark.parametrize("seed", [1, 2, 7])
def test_depth_is_the_first_surface_along_the_ray(seed):
    shapes = random_object(jax.random.key(seed))
    rgba, depth, _ = (np.asarray(x) for x in render(shapes, CAMERAS))
    distance = jax.jit(sdf.distance)
    surface = unproject_pixels(depth, CAMERAS).astype(np.float32)
    assert len(surface) > 500
    value = np.abs(np.asarray(distance(shapes, tuple(jnp.asarray(surface.T)))))
    assert value.max() < 1e-3 and np.quantile(value, 0.99) < 1e-4

    # Between the camera and the surface, and along rays that miss, there is nothing. Steps are bounded: a ray along
    # a flat face may be given up, hence not all.
    until = np.where(depth > 0, depth - 2e-3, 2.6).astype(np.float32)
    deepest = np.full(until.size, np.inf)
    for fraction in np.linspace(0.5, 1.0, 120, endpoint=False, dtype=np.float32):
        points = unproject_pixels(until * fraction, CAMERAS).astype(np.float32)
        deepest = np.minimum(deepest, distance(shapes, tuple(jnp.asarray(points.T))))
    assert (deepest < -1e-3).mean() < 1e-4
    assert (rgba[..., 3][depth > 0] > 0).all()


def test_chunks_and_blocks_do_not_change_the_picture():
    shapes = random_object(jax.random.key(4))
    first, second = render(shapes, CAMERAS), render(shapes, CAMERAS, chunk=17, block=333)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_sample_has_the_same_depth_and_normals():
    shapes = random_object(jax.random.key(4))
    (_, depth, normal), (_, alone, normal_alone) = render(shapes, CAMERAS), render(shapes, CAMERAS, samples=1)
    np.testing.assert_array_equal(depth, alone)
    np.testing.assert_array_equal(normal, normal_alone)
