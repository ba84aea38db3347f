"""Objects as signed distances: primitives under affine maps, joined, carved and hollowed, with procedural textures.

Points travel as three separate arrays x, y, z: every step is then one fused loop over rays, on a CPU too. An object
loops over its own number of primitives and branches on their kinds, so that a simple object costs what it holds.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from geolrm_jax.scene import pytree

UNION, DIFFERENCE = 0, 1

Points = tuple[Float[Array, "*rays"], Float[Array, "*rays"], Float[Array, "*rays"]]


@pytree
class Shapes:
    """One object: up to P primitives, applied in order to what stands before them.

    Attributes:
      count: how many of the P slots are in use.
      kind: index into PRIMITIVES.
      local_from_world: linear part of the affine map into the primitive's own frame, and `offset`, its translation.
      scale: smallest singular value of the inverse map: a local distance times this never exceeds the world distance.
      size: half extents in the primitive's frame, as each primitive reads them.
      operation: UNION or DIFFERENCE.
      blend: radius of the smooth union or difference, in world units.
      shell: half thickness of a hollow primitive in world units; 0 for a solid one.
      opening: (n, h): a shell keeps only the local half space n.q < h, so that one can look inside.
      texture: index into TEXTURES.
      colors: the two colours of the texture.
      pattern: (w, f): direction of the texture, and its periods per local unit.
      radius: of a sphere around the origin that holds the object.
    """

    count: Int[Array, ""]
    kind: Int[Array, "p"]
    local_from_world: Float[Array, "p 3 3"]
    offset: Float[Array, "p 3"]
    scale: Float[Array, "p"]
    size: Float[Array, "p 3"]
    operation: Int[Array, "p"]
    blend: Float[Array, "p"]
    shell: Float[Array, "p"]
    opening: Float[Array, "p 4"]
    texture: Int[Array, "p"]
    colors: Float[Array, "p 2 3"]
    pattern: Float[Array, "p 4"]
    radius: Float[Array, ""]


def _length(*components: Array) -> Array:
    """Euclidean norm with a finite gradient at zero."""
    return jnp.sqrt(sum(c * c for c in components) + 1e-12)


def _intersection(*slabs: Array) -> Array:
    """Distance to an intersection of orthogonal slabs, given the signed distance to each."""
    inside = jnp.minimum(functools.reduce(jnp.maximum, slabs), 0.0)
    return inside + _length(*(jnp.maximum(d, 0.0) for d in slabs))


def ellipsoid(q: Points, size: Float[Array, "3"]) -> Float[Array, "*rays"]:
    """Half axes `size`; outside exact to first order at the surface, inside a plain bound."""
    scaled = [q[i] / size[i] for i in range(3)]
    k0, k1 = _length(*scaled), _length(*(scaled[i] / size[i] for i in range(3)))
    return (k0 - 1.0) * jnp.where(k0 > 1.0, k0 / k1, size.min())


def box(q: Points, size: Float[Array, "3"]) -> Float[Array, "*rays"]:
    """Half extents `size`, edges rounded by a tenth of the smallest."""
    edge = 0.1 * size.min()
    return _intersection(*(jnp.abs(q[i]) - (size[i] - edge) for i in range(3))) - edge


def cylinder(q: Points, size: Float[Array, "3"]) -> Float[Array, "*rays"]:
    """Radius size[0], half height size[2] along z."""
    return _intersection(_length(q[0], q[1]) - size[0], jnp.abs(q[2]) - size[2])


def capsule(q: Points, size: Float[Array, "3"]) -> Float[Array, "*rays"]:
    """Radius size[0] around a segment of half length size[2] along z."""
    return _length(q[0], q[1], jnp.maximum(jnp.abs(q[2]) - size[2], 0.0)) - size[0]


def cone(q: Points, size: Float[Array, "3"]) -> Float[Array, "*rays"]:
    """Radius size[0] at z = -size[2], a third of size[1] at z = size[2]."""
    low, high, half = size[0], size[1] / 3.0, size[2]
    r, z = _length(q[0], q[1]), q[2]
    cap_r = r - jnp.minimum(r, jnp.where(z < 0.0, low, high))
    cap_z = jnp.abs(z) - half
    slope_r, slope_z = high - low, 2.0 * half
    t = jnp.clip(((high - r) * slope_r + (half - z) * slope_z) / (slope_r**2 + slope_z**2), 0.0, 1.0)
    side_r, side_z = r - high + slope_r * t, z - half + slope_z * t
    sign = jnp.where((side_r < 0.0) & (cap_z < 0.0), -1.0, 1.0)
    return sign * jnp.sqrt(jnp.minimum(cap_r**2 + cap_z**2, side_r**2 + side_z**2) + 1e-12)


def torus(q: Points, size: Float[Array, "3"]) -> Float[Array, "*rays"]:
    """Outer radius size[0] in the xy plane; the ring's radius is a third of size[1], at most a third of the outer."""
    ring = jnp.minimum(size[0], size[1]) / 3.0
    return _length(_length(q[0], q[1]) - (size[0] - ring), q[2]) - ring


PRIMITIVES = {f.__name__: f for f in (ellipsoid, box, cylinder, capsule, cone, torus)}


def local_points(shapes: Shapes, i: Int[Array, ""], points: Points) -> Points:
    """World points in the frame of primitive `i`."""
    m, b = shapes.local_from_world[i], shapes.offset[i]
    x, y, z = points
    return tuple(m[r, 0] * x + m[r, 1] * y + m[r, 2] * z + b[r] for r in range(3))


def _primitive_distance(shapes: Shapes, i: Int[Array, ""], q: Points) -> Float[Array, "*rays"]:
    """World-distance bound of primitive `i` alone, hollow if it is a shell, at points of its own frame."""
    solid = shapes.scale[i] * jax.lax.switch(shapes.kind[i], tuple(PRIMITIVES.values()), q, shapes.size[i])
    shell, opening = shapes.shell[i], shapes.opening[i]
    cut = shapes.scale[i] * (opening[0] * q[0] + opening[1] * q[1] + opening[2] * q[2] - opening[3])
    return jnp.where(shell > 0.0, jnp.maximum(jnp.abs(solid) - shell, cut), solid)


def _combine(shapes: Shapes, i: Int[Array, ""], total: Array, part: Array) -> Array:
    """Smooth union, or smooth difference, by the quadratic smooth minimum."""
    sign = jnp.where(shapes.operation[i] == DIFFERENCE, -1.0, 1.0)
    total, blend = sign * total, shapes.blend[i]
    overlap = jnp.maximum(blend - jnp.abs(total - part), 0.0)
    return sign * (jnp.minimum(total, part) - 0.25 * overlap * overlap / blend)


def distance(shapes: Shapes, points: Points) -> Float[Array, "*rays"]:
    """A signed value that never exceeds the distance to the object's surface, zero on it."""

    def add(i, total):
        return _combine(shapes, i, total, _primitive_distance(shapes, i, local_points(shapes, i, points)))

    return jax.lax.fori_loop(0, shapes.count, add, jnp.full(points[0].shape, 1e3, points[0].dtype))


def distance_and_gradient(shapes: Shapes, points: Points) -> tuple[Float[Array, "*rays"], Points]:
    """`distance` and its three derivatives."""
    one, zero = jnp.ones_like(points[0]), jnp.zeros_like(points[0])
    value, derivative = jax.linearize(lambda *p: distance(shapes, p), *points)
    return value, (derivative(one, zero, zero), derivative(zero, one, zero), derivative(zero, zero, one))


def _hash(x: Array, y: Array, z: Array) -> Array:
    """A number in [0, 1) of every lattice point (integer coordinates)."""
    x, y, z = (c.astype(jnp.uint32) for c in (x, y, z))
    h = x * jnp.uint32(0x8DA6B343) + y * jnp.uint32(0xD8163841) + z * jnp.uint32(0xCB1AB31F)
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    return ((h ^ (h >> 13)) >> 8).astype(jnp.float32) * 2.0**-24


def _value_noise(q: Points) -> Array:
    """Smooth noise in [0, 1]: random values on the integer lattice, interpolated with a Hermite weight."""
    floors = [jnp.floor(c) for c in q]
    cells = [f.astype(jnp.int32) for f in floors]
    weights = [(c - f) ** 2 * (3.0 - 2.0 * (c - f)) for c, f in zip(q, floors, strict=True)]
    total = 0.0
    for corner in range(8):
        bits = [(corner >> axis) & 1 for axis in range(3)]
        weight = jnp.ones_like(q[0])
        for w, bit in zip(weights, bits, strict=True):
            weight = weight * (w if bit else 1.0 - w)
        total = total + weight * _hash(*(c + bit for c, bit in zip(cells, bits, strict=True)))
    return total


def _soft(value: Array) -> Array:
    """A step from 0 to 1 a quarter wide."""
    return jnp.clip(4.0 * value + 0.5, 0.0, 1.0)


# A texture mixes two colours by a weight in [0, 1], at a point in periods and its position along a direction.
TEXTURES = {
    "gradient": lambda p, along: 0.5 + 0.5 * jnp.sin(along),
    "checks": lambda p, along: sum(jnp.floor(c) for c in p) % 2.0,
    "stripes": lambda p, along: _soft(jnp.sin(2.0 * jnp.pi * along)),
    "noise": lambda p, along: _soft(_value_noise(tuple(2.0 * c for c in p)) - 0.5),
    "spots": lambda p, along: _soft(0.36 - _length(*(c - jnp.floor(c) - 0.5 for c in p))),
    "marble": lambda p, along: 0.5 + 0.5 * jnp.sin(2.0 * jnp.pi * (along + 1.5 * _value_noise(p))),
}


def color(shapes: Shapes, points: Points) -> Float[Array, "3 *rays"]:
    """Surface colour: the textures of all primitives, weighted by how near each one's own surface is."""

    def add(i, carry):
        weights, total = carry
        q = local_points(shapes, i, points)
        weight = jnp.exp(-jnp.abs(_primitive_distance(shapes, i, q)) / 0.004) + 1e-20
        direction, frequency = shapes.pattern[i, :3], shapes.pattern[i, 3]
        p = tuple(c * frequency for c in q)
        along = direction[0] * p[0] + direction[1] * p[1] + direction[2] * p[2]
        mix = jax.lax.switch(shapes.texture[i], tuple(TEXTURES.values()), p, along)
        first, second = shapes.colors[i]
        shade = [first[c] + mix * (second[c] - first[c]) for c in range(3)]
        return weights + weight, tuple(t + weight * s for t, s in zip(total, shade, strict=True))

    zero = jnp.zeros_like(points[0])
    weights, total = jax.lax.fori_loop(0, shapes.count, add, (zero, (zero, zero, zero)))
    return jnp.stack(total) / weights
