"""Signed distances: the right sign, never more than the distance, and objects that fit the cube."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.data import sdf
from geolrm_jax.data.procedural_shapes import random_object

SIZE = np.array([0.5, 0.3, 0.4], np.float32)


def inside_cone(q):
    radius = SIZE[0] + (SIZE[1] / 3 - SIZE[0]) * (q[:, 2] + SIZE[2]) / (2 * SIZE[2])
    return (np.abs(q[:, 2]) < SIZE[2]) & (np.hypot(q[:, 0], q[:, 1]) < radius)


def inside_torus(q):
    return (np.hypot(q[:, 0], q[:, 1]) - 0.4) ** 2 + q[:, 2] ** 2 < 0.1**2


INSIDE = {
    "ellipsoid": lambda q: ((q / SIZE) ** 2).sum(-1) < 1,
    "cylinder": lambda q: (np.hypot(q[:, 0], q[:, 1]) < SIZE[0]) & (np.abs(q[:, 2]) < SIZE[2]),
    "capsule": lambda q: np.hypot(np.hypot(q[:, 0], q[:, 1]), np.maximum(np.abs(q[:, 2]) - SIZE[2], 0)) < SIZE[0],
    "cone": inside_cone,
    "torus": inside_torus,
}


def columns(points):
    return tuple(jnp.asarray(points[:, axis]) for axis in range(3))


@pytest.mark.parametrize("name", INSIDE)
def test_primitive_is_negative_exactly_inside(name, rng):
    points = rng.uniform(-1, 1, (4000, 3)).astype(np.float32)
    distance = np.asarray(getattr(sdf, name)(columns(points), jnp.asarray(SIZE)))
    clear = np.abs(distance) > 1e-5
    np.testing.assert_array_equal(distance[clear] < 0, INSIDE[name](points)[clear])


def test_box_lies_between_the_box_and_its_rounded_core(rng):
    points = rng.uniform(-1, 1, (4000, 3)).astype(np.float32)
    distance = np.asarray(sdf.box(columns(points), jnp.asarray(SIZE)))
    assert (np.abs(points) < SIZE).all(-1)[distance < 0].all()
    assert (distance[(np.abs(points) < SIZE - 0.03).all(-1)] < 0).all()


def steepest(distance, rng, extent):
    """The largest |f(a) - f(b)| / |a - b|: at most 1 for a value that vanishes on a surface and bounds its distance."""
    a = rng.uniform(-extent, extent, (20000, 3)).astype(np.float32)
    b = a + rng.normal(size=a.shape).astype(np.float32) * np.float32(0.02)
    difference = np.asarray(distance(columns(a))) - np.asarray(distance(columns(b)))
    return np.max(np.abs(difference) / np.linalg.norm(a - b, axis=-1))


@pytest.mark.parametrize("name", sdf.PRIMITIVES)
def test_primitive_never_exceeds_the_distance(name, rng):
    assert steepest(lambda p: sdf.PRIMITIVES[name](p, jnp.asarray(SIZE)), rng, 1.0) < 1.02


def test_objects_never_exceed_the_distance(rng):
    """Marching by the value must not jump over a surface: carved and hollow objects are marched from the inside too."""
    distance = jax.jit(sdf.distance)
    for shapes in objects(12):
        assert steepest(functools.partial(distance, shapes), rng, 0.7) < 1.02


def objects(count):
    return [random_object(jax.random.key(seed)) for seed in range(count)]


def lattice(size, extent):
    axis = np.linspace(-extent, extent, size, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def test_objects_fill_the_cube_and_stay_inside():
    inside_cube = lattice(64, 0.5)
    beyond = lattice(40, 0.7)
    beyond = beyond[np.abs(beyond).max(-1) > 0.48]
    distance = jax.jit(sdf.distance)
    sides = []
    for shapes in objects(12):
        inner = inside_cube[np.asarray(distance(shapes, columns(inside_cube))) < 0]
        sides.append(np.ptp(inner, axis=0).max())
        assert np.linalg.norm(inner, axis=-1).max() < shapes.radius
        assert (np.asarray(distance(shapes, columns(beyond))) > 0).all()
    assert min(sides) > 0.75 and max(sides) < 0.93


def test_gradient_is_the_finite_difference(rng):
    points = rng.uniform(-0.5, 0.5, (500, 3)).astype(np.float32)
    shapes = random_object(jax.random.key(3))
    value, gradient = sdf.distance_and_gradient(shapes, columns(points))
    np.testing.assert_allclose(value, sdf.distance(shapes, columns(points)), atol=1e-6)
    step = 1e-3
    for axis in range(3):
        shift = step * np.eye(3, dtype=np.float32)[axis]
        ahead, behind = (np.asarray(sdf.distance(shapes, columns(points + s))) for s in (shift, -shift))
        error = np.abs((ahead - behind) / (2 * step) - np.asarray(gradient[axis]))
        # Creases of the surface are crossed by a few of the steps.
        assert np.quantile(error, 0.95) < 5e-3


def test_colors_are_in_range_and_vary(rng):
    points = columns(rng.uniform(-0.5, 0.5, (2000, 3)).astype(np.float32))
    colors = np.stack([np.asarray(sdf.color(shapes, points)) for shapes in objects(6)])
    assert colors.min() >= 0 and colors.max() <= 1.0 + 1e-6
    assert colors.std(axis=-1).mean() > 0.03
    assert len({tuple(np.round(c.mean(-1), 3)) for c in colors}) == 6
