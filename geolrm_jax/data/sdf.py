"""Objects as signed distances: primitives under affine maps, displaced, as wires, joined, carved, hollowed, textured.

Points travel as three separate arrays x, y, z: every step is then one fused loop over rays, on a CPU too. An object
loops over its own number of primitives and branches on their kinds, so that a simple object costs what it holds: on
a CPU.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from geolrm_jax.scene import pytree, static_field

UNION, DIFFERENCE = 0, 1
_SIN60 = math.sin(math.radians(60.0))

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
      wire: half thickness, in local units, of the ribs that a wire primitive consists of; 0 for one that is no wire.
      relief: height, in local units, of the waves by which the surface is displaced; 0 for a smooth one.
      waves: three of them, rows (k, phase): k, in periods per local unit, are orthogonal.
      texture: index into TEXTURES.
      colors: the two colours of the texture.
      pattern: (w, f): direction of the texture, and its periods per local unit.
      light: direction towards the light, and the share of the colour that needs no light.
      radius: of a sphere around the origin that holds the object.
      branching: whether only what an object has is evaluated. A CPU gains by that; an accelerator would wait at every
        branch for the host, and evaluates all kinds of P primitives, of which it takes what is meant.
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
    wire: Float[Array, "p"]
    relief: Float[Array, "p"]
    waves: Float[Array, "p 3 4"]
    texture: Int[Array, "p"]
    colors: Float[Array, "p 2 3"]
    pattern: Float[Array, "p 4"]
    light: Float[Array, "4"]
    radius: Float[Array, ""]
    branching: bool = static_field()


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


def _fold_star(q: Points, size: Float[Array, "3"]) -> tuple[Array, Array]:
    """Signed distance to the outline of a five-pointed star in the xy plane, and the distance to its corners.

    Mirrors take every point into the wedge between a tip, on the y axis, and a valley; distances stay what they are.
    """
    tip = size[0]
    valley = 0.3 * tip + 0.45 * jnp.minimum(tip, size[1])
    x, y = jnp.abs(q[0]), q[1]
    for degrees in (18.0, 54.0):  # mirrors through the origin: what lies below is turned up
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        below = jnp.minimum(c * y - s * x, 0.0)
        x, y = jnp.abs(x + 2.0 * s * below), y - 2.0 * c * below
    corner = (valley * math.cos(math.radians(54.0)), valley * math.sin(math.radians(54.0)))
    edge = (corner[0], corner[1] - tip)
    t = jnp.clip((x * edge[0] + (y - tip) * edge[1]) / (edge[0] ** 2 + edge[1] ** 2), 0.0, 1.0)
    apart = _length(x - t * edge[0], y - tip - t * edge[1])
    outline = jnp.where(x * edge[1] - (y - tip) * edge[0] > 0.0, -apart, apart)
    corners = jnp.minimum(_length(x, y - tip), _length(x - corner[0], y - corner[1]))
    return outline, corners


def star(q: Points, size: Float[Array, "3"]) -> Float[Array, "*rays"]:
    """A five-pointed star in the xy plane, tips at size[0], valleys nearer by up to a half; half height size[2]."""
    return _intersection(_fold_star(q, size)[0], jnp.abs(q[2]) - size[2])


PRIMITIVES = {f.__name__: f for f in (ellipsoid, box, cylinder, capsule, cone, torus, star)}


def _meridians(q: Points) -> Array:
    """Distance to the nearest of three planes through the z axis."""
    return functools.reduce(jnp.minimum, (jnp.abs(q[0]), *(jnp.abs(0.5 * q[0] + s * q[1]) for s in (_SIN60, -_SIN60))))


def _rim(height: Array, side: Array) -> Array:
    """Distance, by the larger coordinate, to a line where a flat end meets a side."""
    return jnp.maximum(jnp.abs(height), jnp.abs(side))


def _parallels(q: Points, height: Float[Array, ""]) -> Array:
    """Distance to the nearest of the planes z = 0 and z = +-height."""
    z = jnp.abs(q[2])
    return jnp.minimum(z, jnp.abs(z - height))


def _edges_of_box(q: Points, size: Float[Array, "3"]) -> Array:
    """Near two pairs of faces at the same time is near an edge: the second of three distances."""
    x, y, z = (jnp.abs(jnp.abs(q[i]) - size[i]) for i in range(3))
    return jnp.maximum(jnp.minimum(x, y), jnp.minimum(jnp.maximum(x, y), z))


def _edges_of_cone(q: Points, size: Float[Array, "3"]) -> Array:
    r = _length(q[0], q[1])
    return jnp.minimum(_rim(q[2] + size[2], r - size[0]), _rim(q[2] - size[2], r - size[1] / 3.0))


def _edges_of_star(q: Points, size: Float[Array, "3"]) -> Array:
    outline, corners = _fold_star(q, size)
    return jnp.minimum(_rim(jnp.abs(q[2]) - size[2], outline), corners)


# Where the ribs of a wire primitive run over its surface: its edges, or lines of latitude and longitude, or both.
# Values change no faster than the distance does.
RIBS = {
    "ellipsoid": lambda q, size: jnp.minimum(_meridians(q), _parallels(q, 0.5 * size[2])),
    "box": _edges_of_box,
    "cylinder": lambda q, size: jnp.minimum(
        _meridians(q), _rim(jnp.abs(q[2]) - size[2], _length(q[0], q[1]) - size[0])
    ),
    "capsule": lambda q, size: jnp.minimum(_meridians(q), _parallels(q, size[2])),
    "cone": lambda q, size: jnp.minimum(_meridians(q), _edges_of_cone(q, size)),
    "torus": lambda q, size: jnp.minimum(_meridians(q), jnp.abs(q[2])),
    "star": _edges_of_star,
}


def _ribs(solid: Array, ribs: Array, thickness: Float[Array, ""]) -> Array:
    """Only those parts of a primitive's surface that lie along its ribs, in rods of square section."""
    return jnp.maximum(jnp.abs(solid), ribs) - thickness


def _wave(phase: Array) -> Array:
    """Between -1 and 1 with period 1, like a cosine: two cubic steps, no steeper than 6, at a fifth of its cost."""
    u = 2.0 * jnp.abs(phase - jnp.round(phase))
    return 1.0 - 2.0 * u * u * (3.0 - 2.0 * u)


def _displaced(solid: Array, q: Points, height: Float[Array, ""], waves: Float[Array, "3 4"]) -> Array:
    """The surface moved outwards by `height` times the mean of three waves, or inwards where that is negative.

    As the k are orthogonal, that mean is no steeper than twice the norm of all of them: the quotient changes no faster
    than the distance. Neither does the other value, which bounds all that the displaced surface may reach and is the
    larger one far away: rays lose nothing there.
    """
    total = sum(_wave(sum(k * c for k, c in zip(wave, (*q, 1.0), strict=True))) for wave in waves)
    slope = 2.0 * height * jnp.linalg.norm(waves[:, :3])
    return jnp.maximum(solid - height, (solid - height / 3.0 * total) / (1.0 + slope))


def local_points(shapes: Shapes, i: Int[Array, ""], points: Points) -> Points:
    """World points in the frame of primitive `i`."""
    m, b = shapes.local_from_world[i], shapes.offset[i]
    x, y, z = points
    return tuple(m[r, 0] * x + m[r, 1] * y + m[r, 2] * z + b[r] for r in range(3))


def _one_of(shapes: Shapes, which: Int[Array, ""], functions: Iterable[Callable[..., Array]], *arguments) -> Array:
    """What the function of a number gives."""
    if shapes.branching:
        return jax.lax.switch(which, tuple(functions), *arguments)
    return jax.lax.select_n(which, *(function(*arguments) for function in functions))


def _if(shapes: Shapes, condition: Bool[Array, ""], function: Callable[[Array], Array], value: Array) -> Array:
    """The value itself, or what a function makes of it."""
    if shapes.branching:
        return jax.lax.cond(condition, function, lambda same: same, value)
    return jnp.where(condition, function(value), value)


def _over_primitives(shapes: Shapes, add: Callable[[Int[Array, ""], Any], Any], start: Any) -> Any:
    """`add(i, carry)` for every primitive that is in use."""
    if shapes.branching:
        return jax.lax.fori_loop(0, shapes.count, add, start)

    def add_if_used(i, carry):
        return jax.tree.map(lambda new, old: jnp.where(i < shapes.count, new, old), add(i, carry), carry)

    return jax.lax.fori_loop(0, len(shapes.kind), add_if_used, start)


def _primitive_distance(shapes: Shapes, i: Int[Array, ""], q: Points) -> Float[Array, "*rays"]:
    """World-distance bound of primitive `i` alone, in relief, as a wire or a shell, at points of its own frame."""
    kind, size = shapes.kind[i], shapes.size[i]
    height, waves, thickness = shapes.relief[i], shapes.waves[i], shapes.wire[i]

    def along_ribs(solid):
        return _ribs(solid, _one_of(shapes, kind, [RIBS[name] for name in PRIMITIVES], q, size), thickness)

    solid = _one_of(shapes, kind, PRIMITIVES.values(), q, size)
    solid = _if(shapes, height > 0.0, lambda d: _displaced(d, q, height, waves), solid)
    solid = shapes.scale[i] * _if(shapes, thickness > 0.0, along_ribs, solid)
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

    return _over_primitives(shapes, add, jnp.full(points[0].shape, 1e3, points[0].dtype))


def distance_and_gradient(shapes: Shapes, points: Points) -> tuple[Float[Array, "*rays"], Points]:
    """`distance` and its three derivatives, forward through the loop over primitives: nothing is kept of its turns."""

    def along(axis: Array) -> tuple[Array, Array]:
        tangents = tuple(jnp.full_like(x, axis[i]) for i, x in enumerate(points))
        return jax.jvp(lambda *p: distance(shapes, p), points, tangents)

    value, gradient = jax.vmap(along, out_axes=(None, 0))(jnp.eye(3, dtype=points[0].dtype))
    return value, tuple(gradient)


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
        mix = _one_of(shapes, shapes.texture[i], TEXTURES.values(), p, along)
        first, second = shapes.colors[i]
        shade = [first[c] + mix * (second[c] - first[c]) for c in range(3)]
        return weights + weight, tuple(t + weight * s for t, s in zip(total, shade, strict=True))

    zero = jnp.zeros_like(points[0])
    weights, total = _over_primitives(shapes, add, (zero, (zero, zero, zero)))
    return jnp.stack(total) / weights
