"""Random objects for training without any download: each a pure function of one integer."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from geolrm_jax.data import sdf
from geolrm_jax.geometry.rotations import matrix_from_quaternion

MAX_PRIMITIVES = 9
LONGEST_SIDE = 0.92
_BOUNDS_GRID = 40


def _direction(key: Key[Array, ""], *shape: int) -> Float[Array, "..."]:
    """Random unit vectors."""
    v = jax.random.normal(key, (*shape, 3))
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


def _colors(key: Key[Array, ""]) -> Float[Array, "p 2 3"]:
    """Two saturated colours for each primitive: random hues, the second one turned away from the first."""
    k1, k2, k3, k4 = jax.random.split(key, 4)
    hue = jax.random.uniform(k1, (MAX_PRIMITIVES, 1)) + jnp.array([0.0, 1.0]) * jax.random.uniform(
        k2, (MAX_PRIMITIVES, 1), minval=0.15, maxval=0.85
    )
    saturation = jax.random.uniform(k3, (MAX_PRIMITIVES, 2), minval=0.55, maxval=1.0)
    value = jax.random.uniform(k4, (MAX_PRIMITIVES, 2), minval=0.6, maxval=1.0)
    ramp = jnp.abs((hue[..., None] + jnp.array([1.0, 2.0 / 3.0, 1.0 / 3.0])) % 1.0 * 6.0 - 3.0) - 1.0
    return value[..., None] * (1.0 + saturation[..., None] * (jnp.clip(ramp, 0.0, 1.0) - 1.0))


def _centers(key: Key[Array, ""], sizes: Float[Array, "p"]) -> Float[Array, "p 3"]:
    """Primitive i sits near the surface of a random earlier one, so that the object hangs together."""
    k1, k2 = jax.random.split(key)
    steps = _direction(k1, MAX_PRIMITIVES)
    draws = jax.random.uniform(k2, (MAX_PRIMITIVES,))
    centers = jnp.zeros((MAX_PRIMITIVES, 3))
    for i in range(1, MAX_PRIMITIVES):
        parent = (draws[i] * i).astype(jnp.int32)
        centers = centers.at[i].set(centers[parent] + steps[i] * (0.7 * sizes[parent] + 0.2 * sizes[i]))
    return centers


def _draw(key: Key[Array, ""]) -> sdf.Shapes:
    """An object at its own scale, not yet fitted into the cube."""
    keys = iter(jax.random.split(key, 20))
    n = MAX_PRIMITIVES

    def uniform(low, high, *shape):
        return jax.random.uniform(next(keys), shape or (n,), minval=low, maxval=high)

    def choose(options: int) -> Int[Array, "p"]:
        return jax.random.randint(next(keys), (n,), 0, options)

    later = jnp.arange(n) > 0
    size = uniform(0.35, 1.0, n, 3) * jnp.where(later, uniform(0.25, 0.5), 0.55)[:, None]
    carve = later & (uniform(0.0, 1.0) < 0.2)
    size = jnp.where(carve[:, None], 0.75 * size, size)
    hollow = ~carve & (uniform(0.0, 1.0) < 0.2)
    stretch = uniform(0.75, 1.25, n, 3)
    turn, shear = (matrix_from_quaternion(jax.random.normal(next(keys), (n, 4))) for _ in range(2))
    local_from_world = jnp.einsum("pji,pj,pkj->pik", shear, 1.0 / stretch, turn)
    centers = _centers(next(keys), size.mean(-1))
    opening = jnp.concatenate([_direction(next(keys), n), 0.35 * size.mean(-1, keepdims=True)], axis=-1)
    return sdf.Shapes(
        count=jax.random.randint(next(keys), (), 1, n + 1),
        kind=choose(len(sdf.PRIMITIVES)),
        local_from_world=local_from_world,
        offset=-jnp.einsum("pij,pj->pi", local_from_world, centers),
        scale=stretch.min(-1),
        size=size,
        operation=jnp.where(carve, sdf.DIFFERENCE, sdf.UNION),
        blend=uniform(0.005, 0.12),
        shell=jnp.where(hollow, 0.03, 0.0),
        opening=opening,
        texture=choose(len(sdf.TEXTURES)),
        colors=_colors(next(keys)),
        pattern=jnp.concatenate([_direction(next(keys), n), uniform(2.0, 5.0)[:, None]], axis=-1),
        radius=jnp.float32(jnp.inf),
    )


def _bounds(shapes: sdf.Shapes, low: Float[Array, "3"], high: Float[Array, "3"]):
    """A box (low, high) around the object, found on a lattice over [low, high], and a sphere around the box's centre.

    A lattice point further from the surface than half a cell's diagonal has no surface in its cell, since
    `sdf.distance` never exceeds the distance.
    """
    step = (high - low) / (_BOUNDS_GRID - 1)
    axes = [low[a] + step[a] * jnp.arange(_BOUNDS_GRID) for a in range(3)]
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    reach = 0.5 * jnp.linalg.norm(step)
    touched = sdf.distance(shapes, tuple(points)) <= reach
    low = jnp.where(touched, points, jnp.inf).min(axis=1) - 0.5 * step
    high = jnp.where(touched, points, -jnp.inf).max(axis=1) + 0.5 * step
    from_center = jnp.linalg.norm(points - 0.5 * (low + high)[:, None], axis=0)
    return low, high, jnp.where(touched, from_center, 0.0).max() + reach


def _fit(shapes: sdf.Shapes) -> sdf.Shapes:
    """The object moved and scaled into the cube: centred, its longest side just below LONGEST_SIDE."""
    centers = -jnp.linalg.solve(shapes.local_from_world, shapes.offset[..., None])[..., 0]
    reach = 2.5 * shapes.size.max(axis=-1, keepdims=True)
    used = (jnp.arange(MAX_PRIMITIVES) < shapes.count)[:, None]
    low = jnp.where(used, centers - reach, jnp.inf).min(axis=0)
    high = jnp.where(used, centers + reach, -jnp.inf).max(axis=0)
    low, high, _ = _bounds(shapes, low, high)
    low, high, radius = _bounds(shapes, low, high)
    center, scale = 0.5 * (low + high), LONGEST_SIDE / (high - low).max()
    return dataclasses.replace(
        shapes,
        local_from_world=shapes.local_from_world / scale,
        offset=shapes.offset + shapes.local_from_world @ center,
        scale=shapes.scale * scale,
        blend=shapes.blend * scale,
        shell=shapes.shell * scale,
        radius=radius * scale,
    )


@jax.jit
def random_object(key: Key[Array, ""]) -> sdf.Shapes:
    """The object of a key: 1 to 9 primitives, fitted into [-0.5, 0.5]^3."""
    return _fit(_draw(key))
