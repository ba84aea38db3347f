"""Random objects for training without any download: each a pure function of one integer.

The ideas are those of LRM-Zero's Zeroverse (arXiv:2406.09371: primitives put together, then displaced, carved or turned
into wires) and of MegaSynth (arXiv:2412.14166: how complex objects are, and their light, drawn as a training needs it);
signed distances, textures and numbers are our own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from geolrm_jax.data import sdf
from geolrm_jax.geometry.rotations import matrix_from_quaternion

MAX_PRIMITIVES = 9
LONGEST_SIDE = 0.92
UNSEEN_FAMILY = "star"
SEEN_FAMILIES = tuple(name for name in sdf.PRIMITIVES if name != UNSEEN_FAMILY)
_LIGHT = (0.45, -0.35, 0.82)
_AMBIENT = 0.5
_BOUNDS_GRID = 40


@dataclasses.dataclass(frozen=True)
class Distribution:
    """What random objects are made of: how many primitives, and the probability of each operation on them."""

    primitives: tuple[int, int] = (1, MAX_PRIMITIVES)
    """Fewest and most primitives of an object; all numbers between are equally likely."""
    carved: float = 0.2
    """Of a primitive, but the first, that it is taken away from what stands before it."""
    hollow: float = 0.2
    """Of one that is not taken away: it becomes a shell, open on one side."""
    wire: float = 0.15
    """Of one that is none of these: only ribs along its edges, or its lines of latitude and longitude, stay."""
    displaced: float = 0.3
    """Of one that is no wire: three waves move its surface in and out."""
    lit: float = 0.8
    """Of an object: the light has a random direction, from above, and strength; else all have the same."""

    def __post_init__(self):
        low, high = self.primitives
        if not 1 <= low <= high <= MAX_PRIMITIVES:
            raise ValueError(f"primitives: expected 1 <= fewest <= most <= {MAX_PRIMITIVES}, got {self.primitives}")
        for field in dataclasses.fields(self)[1:]:
            if not 0.0 <= getattr(self, field.name) <= 1.0:
                raise ValueError(f"{field.name} is a probability, got {getattr(self, field.name)}")


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


def _waves(key: Key[Array, ""], size: Float[Array, "p 3"]) -> tuple[Float[Array, "p"], Float[Array, "p 3 4"]]:
    """Relief of every primitive, height and waves: one to four periods across it, the more the lower."""
    k1, k2, k3, k4 = jax.random.split(key, 4)
    across = 2.0 * size.mean(-1)
    frame = matrix_from_quaternion(jax.random.normal(k1, (MAX_PRIMITIVES, 4)))
    periods = jnp.exp(jax.random.uniform(k2, (MAX_PRIMITIVES,), maxval=jnp.log(4.0)))
    unequal = jax.random.uniform(k3, (MAX_PRIMITIVES, 3), minval=0.3, maxval=1.0)
    waves = frame * ((periods / across)[:, None] * unequal)[..., None]
    phases = jax.random.uniform(k4, (MAX_PRIMITIVES, 3, 1))
    return 0.15 * across / periods, jnp.concatenate([waves, phases], axis=-1)


def _light(key: Key[Array, ""], random: Array) -> Float[Array, "4"]:
    """Direction and ambient share: random ones from the upper half, or those that all objects have."""
    k1, k2, k3 = jax.random.split(key, 3)
    turn, height = jax.random.uniform(k1, maxval=2.0 * jnp.pi), jax.random.uniform(k2, minval=0.2, maxval=1.0)
    wide = jnp.sqrt(1.0 - height**2)
    ambient = jax.random.uniform(k3, minval=0.4, maxval=0.65)
    drawn = jnp.stack([wide * jnp.cos(turn), wide * jnp.sin(turn), height, ambient])
    usual = jnp.array([*(np.array(_LIGHT) / np.linalg.norm(_LIGHT)), _AMBIENT])
    return jnp.where(random, drawn, usual)


def draw_object(key: Key[Array, ""], distribution: Distribution, unseen_family: bool) -> sdf.Shapes:
    """An object at its own scale, not yet fitted into the cube."""
    keys = iter(jax.random.split(key, 32))
    n = MAX_PRIMITIVES

    def uniform(low, high, *shape):
        return jax.random.uniform(next(keys), shape or (n,), minval=low, maxval=high)

    def happens(probability: float) -> Bool[Array, "p"]:
        return uniform(0.0, 1.0) < probability

    def choose(options: int) -> Int[Array, "p"]:
        return jax.random.randint(next(keys), (n,), 0, options)

    later = jnp.arange(n) > 0
    size = uniform(0.35, 1.0, n, 3) * jnp.where(later, uniform(0.25, 0.5), 0.55)[:, None]
    carve = later & happens(distribution.carved)
    size = jnp.where(carve[:, None], 0.75 * size, size)
    hollow = ~carve & happens(distribution.hollow)
    stretch = uniform(0.75, 1.25, n, 3)
    turn, shear = (matrix_from_quaternion(jax.random.normal(next(keys), (n, 4))) for _ in range(2))
    local_from_world = jnp.einsum("pji,pj,pkj->pik", shear, 1.0 / stretch, turn)
    centers = _centers(next(keys), size.mean(-1))
    opening = jnp.concatenate([_direction(next(keys), n), 0.35 * size.mean(-1, keepdims=True)], axis=-1)
    fewest, most = distribution.primitives
    drawn = dict(
        count=jax.random.randint(next(keys), (), fewest, most + 1),
        kind=jnp.array([list(sdf.PRIMITIVES).index(name) for name in SEEN_FAMILIES])[choose(len(SEEN_FAMILIES))],
        blend=uniform(0.005, 0.12),
        texture=choose(len(sdf.TEXTURES)),
        colors=_colors(next(keys)),
        pattern=jnp.concatenate([_direction(next(keys), n), uniform(2.0, 5.0)[:, None]], axis=-1),
    )
    wire = ~carve & ~hollow & happens(distribution.wire)
    thickness = uniform(0.05, 0.1) * size.mean(-1)
    displaced = ~wire & happens(distribution.displaced)
    height, waves = _waves(next(keys), size)
    light = _light(next(keys), uniform(0.0, 1.0, 1)[0] < distribution.lit)
    if unseen_family:  # the first primitive, and every other one of the rest
        of_it = ~later | happens(0.5)
        drawn["kind"] = jnp.where(of_it, list(sdf.PRIMITIVES).index(UNSEEN_FAMILY), drawn["kind"])
    return sdf.Shapes(
        **drawn,
        local_from_world=local_from_world,
        offset=-jnp.einsum("pij,pj->pi", local_from_world, centers),
        scale=stretch.min(-1),
        size=size,
        operation=jnp.where(carve, sdf.DIFFERENCE, sdf.UNION),
        shell=jnp.where(hollow, 0.03, 0.0),
        opening=opening,
        wire=jnp.where(wire, thickness, 0.0),
        relief=jnp.where(displaced, height, 0.0),
        waves=waves,
        light=light,
        radius=jnp.float32(jnp.inf),
        branching=jax.default_backend() == "cpu",
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
    reach = 2.5 * shapes.size.max(axis=-1, keepdims=True) + 1.25 * shapes.relief[:, None]
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


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_object(
    key: Key[Array, ""], distribution: Distribution = Distribution(), unseen_family: bool = False
) -> sdf.Shapes:
    """The object of a key, fitted into [-0.5, 0.5]^3.

    Args:
      key: decides everything.
      distribution: what it is drawn from.
      unseen_family: the first primitive, and about half of the others, are of UNSEEN_FAMILY; else none is.
    """
    return _fit(draw_object(key, distribution, unseen_family))
