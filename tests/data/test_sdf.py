"""Signed distances: the right sign, never more than the distance, and objects that fit the cube."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.data import sdf
from geolrm_jax.data.procedural_shapes import random_object

SIZE = np.array([0.5, 0.3, 0.4], np.float32)
THICKNESS = np.float32(0.05)
HEIGHT = np.float32(0.12)
WAVES = np.array([[1.5, 0.0, 0.0, 0.1], [0.0, 0.6, 0.8, 0.7], [0.0, -1.6, 1.2, 0.4]], np.float32)  # orthogonal


def inside_cone(q):
    radius = SIZE[0] + (SIZE[1] / 3 - SIZE[0]) * (q[:, 2] + SIZE[2]) / (2 * SIZE[2])
    return (np.abs(q[:, 2]) < SIZE[2]) & (np.hypot(q[:, 0], q[:, 1]) < radius)


def inside_torus(q):
    return (np.hypot(q[:, 0], q[:, 1]) - 0.4) ** 2 + q[:, 2] ** 2 < 0.1**2


def inside_star(q):
    """By the definition of a polygon: an odd number of its ten edges cross the ray from the point towards +x."""
    radii = np.where(np.arange(10) % 2, 0.3 * SIZE[0] + 0.45 * min(SIZE[0], SIZE[1]), SIZE[0])
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    corners = np.stack([radii * np.cos(angles), radii * np.sin(angles)], -1)
    inside = np.zeros(len(q), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, 1, 0), strict=True):
        crosses = (y0 > q[:, 1]) != (y1 > q[:, 1])
        inside ^= crosses & (q[:, 0] < x0 + (q[:, 1] - y0) * (x1 - x0) / (y1 - y0))
    return inside & (np.abs(q[:, 2]) < SIZE[2])


INSIDE = {
    "ellipsoid": lambda q: ((q / SIZE) ** 2).sum(-1) < 1,
    "cylinder": lambda q: (np.hypot(q[:, 0], q[:, 1]) < SIZE[0]) & (np.abs(q[:, 2]) < SIZE[2]),
    "capsule": lambda q: np.hypot(np.hypot(q[:, 0], q[:, 1]), np.maximum(np.abs(q[:, 2]) - SIZE[2], 0)) < SIZE[0],
    "cone": inside_cone,
    "torus": inside_torus,
    "star": inside_star,
}


DISTANCE = jax.jit(sdf.distance)


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


def inside_wire_cylinder(q):
    """A hollow cylinder's wall, where it is near one of three planes through the axis, or near a rim."""
    r, z = np.hypot(q[:, 0], q[:, 1]), np.abs(q[:, 2])
    wall = np.hypot(np.maximum(r - SIZE[0], 0), np.maximum(z - SIZE[2], 0)) < THICKNESS
    wall &= ~((r < SIZE[0] - THICKNESS) & (z < SIZE[2] - THICKNESS))
    angles = np.arctan2(q[:, 1], q[:, 0])
    from_planes = np.min([r * np.abs(np.sin(angles - np.pi / 2 - k * np.pi / 3)) for k in range(3)], axis=0)
    rim = (np.abs(r - SIZE[0]) < THICKNESS) & (np.abs(z - SIZE[2]) < THICKNESS)
    return wall & ((from_planes < THICKNESS) | rim)


def inside_displaced_sphere(q):
    """Nearer to the centre than the radius and the mean of three waves at the point."""
    phase = q @ WAVES[:, :3].T + WAVES[:, 3]
    u = 2 * np.abs(phase - np.round(phase))
    return np.linalg.norm(q, axis=-1) < SIZE[0] + HEIGHT * (1 - 2 * (3 * u**2 - 2 * u**3)).mean(-1)


def one_primitive(name, size=SIZE, wire=0.0, relief=0.0):
    """An object of one primitive at the origin, unmoved and unstretched."""
    return dataclasses.replace(
        random_object(jax.random.key(0)),
        count=jnp.int32(1),
        kind=jnp.full(9, list(sdf.PRIMITIVES).index(name)),
        local_from_world=jnp.broadcast_to(jnp.eye(3), (9, 3, 3)),
        offset=jnp.zeros((9, 3)),
        scale=jnp.ones(9),
        size=jnp.broadcast_to(size, (9, 3)),
        operation=jnp.full(9, sdf.UNION),
        shell=jnp.zeros(9),
        wire=jnp.full(9, wire),
        relief=jnp.full(9, relief),
        waves=jnp.broadcast_to(WAVES, (9, 3, 4)),
    )


CHANGED = {"wire": {"wire": float(THICKNESS)}, "relief": {"relief": float(HEIGHT)}}


def test_wires_and_relief_are_negative_exactly_inside(rng):
    points = rng.uniform(-0.7, 0.7, (8000, 3)).astype(np.float32)
    cases = (
        (one_primitive("cylinder", **CHANGED["wire"]), inside_wire_cylinder),
        (one_primitive("ellipsoid", SIZE[[0, 0, 0]], **CHANGED["relief"]), inside_displaced_sphere),
    )
    for shapes, inside in cases:
        value = np.asarray(DISTANCE(shapes, columns(points)))
        np.testing.assert_array_equal((value < 0)[np.abs(value) > 1e-5], inside(points)[np.abs(value) > 1e-5])
        assert 0.02 < (value < 0).mean() < 0.6


def steepest(distance, rng, extent):
    """The largest |f(a) - f(b)| / |a - b|: at most 1 for a value that vanishes on a surface and bounds its distance."""
    a = rng.uniform(-extent, extent, (20000, 3)).astype(np.float32)
    b = a + rng.normal(size=a.shape).astype(np.float32) * np.float32(0.02)
    difference = np.asarray(distance(columns(a))) - np.asarray(distance(columns(b)))
    return np.max(np.abs(difference) / np.linalg.norm(a - b, axis=-1))


@pytest.mark.parametrize("change", [None, *CHANGED])
@pytest.mark.parametrize("name", sdf.PRIMITIVES)
def test_primitive_never_exceeds_the_distance(name, change, rng):
    shapes = one_primitive(name, **CHANGED.get(change, {}))
    assert steepest(functools.partial(DISTANCE, shapes), rng, 1.0) < 1.02


def test_objects_never_exceed_the_distance(rng):
    """Marching by the value must not jump over a surface: carved and hollow objects are marched from the inside too."""
    for shapes in objects(12):
        assert steepest(functools.partial(DISTANCE, shapes), rng, 0.7) < 1.02


def test_no_surface_lies_nearer_than_the_value_says(rng):
    """Of a fine lattice, no point on the other side of the surface lies in the ball that is said to be free."""
    points = lattice(56, 0.5)
    asked = rng.permutation(len(points))[:60]
    kinds, operations = set(), set()
    for shapes in [*objects(10), *objects(4, unseen_family=True)]:
        value = np.asarray(DISTANCE(shapes, columns(points)))
        apart = np.linalg.norm(points[asked, None] - points, axis=-1)
        nearest = np.where((value[asked, None] > 0) != (value > 0), apart, np.inf).min(-1)
        assert (np.abs(value[asked]) <= nearest + 1e-5).all()
        used = np.arange(9) < shapes.count
        kinds |= set(np.asarray(shapes.kind)[used].tolist())
        operations |= {
            name for name in ("wire", "relief", "shell") if (np.asarray(getattr(shapes, name))[used] > 0).any()
        }
    assert len(kinds) == len(sdf.PRIMITIVES) and len(operations) == 3


def objects(count, unseen_family=False):
    return [random_object(jax.random.key(seed), unseen_family=unseen_family) for seed in range(count)]


def lattice(size, extent):
    axis = np.linspace(-extent, extent, size, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def test_objects_fill_the_cube_and_stay_inside():
    inside_cube = lattice(64, 0.5)
    beyond = lattice(40, 0.7)
    beyond = beyond[np.abs(beyond).max(-1) > 0.48]
    sides = []
    for shapes in objects(12):
        inner = inside_cube[np.asarray(DISTANCE(shapes, columns(inside_cube))) < 0]
        sides.append(np.ptp(inner, axis=0).max())
        assert np.linalg.norm(inner, axis=-1).max() < shapes.radius
        assert (np.asarray(DISTANCE(shapes, columns(beyond))) > 0).all()
    assert min(sides) > 0.75 and max(sides) < 0.93


def test_gradient_is_the_finite_difference(rng):
    points = rng.uniform(-0.5, 0.5, (500, 3)).astype(np.float32)
    shapes = random_object(jax.random.key(3))
    value, gradient = jax.jit(sdf.distance_and_gradient)(shapes, columns(points))
    np.testing.assert_allclose(value, DISTANCE(shapes, columns(points)), atol=1e-6)
    step = 1e-3
    for axis in range(3):
        shift = step * np.eye(3, dtype=np.float32)[axis]
        ahead, behind = (np.asarray(DISTANCE(shapes, columns(points + s))) for s in (shift, -shift))
        error = np.abs((ahead - behind) / (2 * step) - np.asarray(gradient[axis]))
        # Creases of the surface are crossed by a few of the steps.
        assert np.quantile(error, 0.95) < 5e-3


def test_colors_are_in_range_and_vary(rng):
    points = columns(rng.uniform(-0.5, 0.5, (2000, 3)).astype(np.float32))
    color = jax.jit(sdf.color)
    colors = np.stack([np.asarray(color(shapes, points)) for shapes in objects(6)])
    assert colors.min() >= 0 and colors.max() <= 1.0 + 1e-6
    assert colors.std(axis=-1).mean() > 0.03
    assert len({tuple(np.round(c.mean(-1), 3)) for c in colors}) == 6


def test_an_accelerator_finds_the_same_without_branches(rng):
    points = columns(rng.uniform(-0.5, 0.5, (500, 3)).astype(np.float32))
    both = jax.jit(lambda shapes: (sdf.distance(shapes, points), sdf.color(shapes, points)))
    for shapes in objects(6, unseen_family=True):
        assert shapes.branching
        flat = dataclasses.replace(shapes, branching=False)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), both(shapes), both(flat))
