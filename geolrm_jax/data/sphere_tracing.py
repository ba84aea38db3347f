"""Pictures of signed-distance objects: cone marching down from tiles to pixels to samples, in JAX on any device.

Three levels, each starting where the one above stopped: a cone for a tile of 8 x 8 pixels, a cone for a pixel, a ray
for each of five samples in it. Tiles whose cone misses the object are never worked on; the others are taken in chunks,
and within a chunk only rays that are still under way: shapes stay static, work follows the object.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from geolrm_jax.data import sdf
from geolrm_jax.scene import Cameras

TILE = 8
# Sample positions in a pixel: its centre, whose depth and normal are returned, and a rotated grid of four.
SAMPLES = np.array([[0.5, 0.5], [0.375, 0.125], [0.875, 0.375], [0.125, 0.625], [0.625, 0.875]], np.float32)
_HALF_DIAGONAL = 0.5 * 2.0**0.5
_TOLERANCE = 2e-4
_ROUNDS, _STEPS, _LATE_STEPS = 8, 6, 40

Rays = tuple[Float[Array, "3 n"], Float[Array, "3 n"]]


def _rays(cameras: Cameras, views: Int[Array, "t"], pixels: Float[Array, "t p 2"]) -> Rays:
    """Origins and directions (camera z one) through pixel positions of the given views, flat over (t, p)."""
    poses, k = cameras.world_from_camera[views], cameras.intrinsics[views]
    x = (pixels[..., 0] - k[:, 0, 2, None]) / k[:, 0, 0, None]
    y = (pixels[..., 1] - k[:, 1, 2, None]) / k[:, 1, 1, None]
    directions = [poses[:, a, 0, None] * x + poses[:, a, 1, None] * y + poses[:, a, 2, None] for a in range(3)]
    origins = [jnp.broadcast_to(poses[:, a, 3, None], x.shape) for a in range(3)]
    return jnp.stack(origins).reshape(3, -1), jnp.stack(directions).reshape(3, -1)


def _at(rays: Rays, z: Float[Array, "n"]) -> sdf.Points:
    """Points of depth z."""
    origins, directions = rays
    return tuple(origins[a] + z * directions[a] for a in range(3))


def _pick(tree, indices: Int[Array, "m"]):
    """The given entries of every array's last axis."""
    return jax.tree.map(lambda x: x.at[..., indices].get(mode="clip"), tree)


def _for_selected(selected: Bool[Array, "n"], body, carry, block: int):
    """Runs `body(indices, carry)` over the selected indices, `block` at a time; the last block is padded with n."""
    n = selected.shape[0]
    indices = jnp.nonzero(selected, size=n + block, fill_value=n)[0]

    def run(i, carry):
        return body(jax.lax.dynamic_slice_in_dim(indices, i * block, block), carry)

    return jax.lax.fori_loop(0, -(-selected.sum() // block), run, carry)


def _march(shapes: sdf.Shapes, rays: Rays, z, far, spread, block: int) -> Float[Array, "n"]:
    """Depth at which each cone, `spread` wide at depth one, first comes near the surface, or a depth beyond `far`.

    A ball of radius D around the axis point at z holds no surface. The cone's cross-sections up to z + s lie inside it
    while |d| s + (z + s) spread <= D: that is the step. Rays under way are gathered anew every few steps: most need
    few, those that graze the surface need many, which the later rounds have.
    """

    def advance(steps, indices, carry):
        z, under_way = carry
        near, r, end, wide = _pick((z, rays, far, spread), indices)
        pace = 1.0 / (jnp.sqrt(sum(d * d for d in r[1])) + wide)

        def step(_, state):
            depth, _ = state
            room = sdf.distance(shapes, _at(r, depth)) - wide * depth
            going = (room > 0.5 * wide * depth + _TOLERANCE) & (depth < end)
            return jnp.where(going, depth + room * pace, depth), going

        depth, going = jax.lax.fori_loop(0, steps, step, (near, jnp.ones(indices.shape, bool)))
        return z.at[indices].set(depth), under_way.at[indices].set(going)

    def next_round(state):
        i, z, under_way = state
        steps = jnp.where(i < _ROUNDS // 2, _STEPS, _LATE_STEPS)
        return i + 1, *_for_selected(under_way, functools.partial(advance, steps), (z, under_way), block)

    state = (0, z, z < far)
    return jax.lax.while_loop(lambda s: (s[0] < _ROUNDS) & s[2].any(), next_round, state)[1]


def _shade(shapes: sdf.Shapes, rays: Rays, z: Float[Array, "n"]) -> Float[Array, "8 n"]:
    """Red, green, blue, coverage, depth and world normal of samples whose march ended at z; zeros for a miss."""
    value, gradient = sdf.distance_and_gradient(shapes, _at(rays, z))
    norm = jnp.sqrt(sum(g * g for g in gradient) + 1e-12)
    normal = [g / norm for g in gradient]
    approach = -sum(g * d for g, d in zip(gradient, rays[1], strict=True))
    # One Newton step along the ray takes away what the marching tolerance left.
    z = z + jnp.clip(value / jnp.maximum(approach, 0.02), -20.0 * _TOLERANCE, 20.0 * _TOLERANCE)
    *light, ambient = shapes.light
    lambert = jnp.maximum(sum(n * c for n, c in zip(normal, light, strict=True)), 0.0)
    rgb = sdf.color(shapes, _at(rays, z)) * (ambient + (1.0 - ambient) * lambert)
    return jnp.where(value < 1.5 * _TOLERANCE, jnp.stack([*rgb, jnp.ones_like(z), z, *normal]), 0.0)


def _tile_limits(shapes: sdf.Shapes, rays: Rays, spread: Float[Array, "t"]) -> tuple[Array, Array]:
    """Depths between which a tile's cone can meet the object's sphere; empty (far < near) where it passes it."""
    origins, directions = rays
    away, length = jnp.linalg.norm(origins, axis=0), jnp.linalg.norm(directions, axis=0)
    near = jnp.maximum((away - shapes.radius) / (length + spread), 1e-3)
    far = (away + shapes.radius) / jnp.maximum(length - spread, 0.5)
    closest = -jnp.sum(origins * directions, axis=0) / length**2
    clearance = jnp.sqrt(jnp.maximum(away**2 - (closest * length) ** 2, 0.0)) - spread * closest
    return near, jnp.where(clearance > shapes.radius, 0.0, far)


@functools.partial(jax.jit, static_argnames=("chunk", "block", "samples"))
def render(
    shapes: sdf.Shapes, cameras: Cameras, chunk: int = 1024, block: int = 4096, samples: int = len(SAMPLES)
) -> tuple[Float[Array, "v h w 4"], Float[Array, "v h w"], Float[Array, "v h w 3"]]:
    """Colour, coverage, depth and normals of one object.

    Args:
      shapes: an object inside the sphere of `shapes.radius` around the origin; cameras stand outside of it.
      cameras: (V,).
      chunk: tiles worked on at a time, which bounds the memory.
      block: rays worked on at a time: small for a CPU's cache, large for an accelerator.
      samples: of a pixel; 1 is its centre alone, which serves for depth and normals.

    Returns:
      rgba in [0, 1] with straight alpha, both averages over the samples; depth, the camera z at the pixel's centre, 0
      where that misses; normals there, world axes, zero where it misses.
    """
    views, rows, columns = len(cameras.intrinsics), -(-cameras.height // TILE), -(-cameras.width // TILE)
    tiles = views * rows * columns
    view, row, column = jnp.unravel_index(jnp.arange(tiles), (views, rows, columns))
    corners = jnp.stack([column, row], axis=-1).astype(jnp.float32) * TILE
    # Half a pixel's diagonal at depth one.
    pixel = _HALF_DIAGONAL / jnp.minimum(cameras.intrinsics[:, 0, 0], cameras.intrinsics[:, 1, 1])[view]

    axes = _rays(cameras, view, corners[:, None] + TILE / 2)
    near, far = _tile_limits(shapes, axes, TILE * pixel)
    start = _march(shapes, axes, near, far, TILE * pixel, block)
    local = np.stack(np.meshgrid(np.arange(TILE), np.arange(TILE)), axis=-1).reshape(-1, 2).astype(np.float32)

    def render_tiles(chosen, pictures):
        tile_views, z, end, spread, corner = _pick((view, start, far, pixel, corners.T), chosen)
        pixels = corner.T[:, None] + local
        z, end, spread = (jnp.repeat(x, TILE * TILE) for x in (z, end, spread))
        z = _march(shapes, _rays(cameras, tile_views, pixels + 0.5), z, end, spread, block)

        positions = (pixels[:, :, None] + SAMPLES[:samples]).reshape(chunk, -1, 2)
        rays = _rays(cameras, tile_views, positions)
        z, end = (jnp.repeat(x, samples) for x in (z, end))
        z = _march(shapes, rays, z, end, jnp.zeros_like(z), block)

        def shade(indices, shaded):
            return shaded.at[:, indices].set(_shade(shapes, *_pick((rays, z), indices)))

        shaded = _for_selected(z < end, shade, jnp.zeros((8, z.shape[0])), block)
        shaded = shaded.reshape(8, chunk, TILE * TILE, samples)
        hits = shaded[3].sum(-1)
        color = shaded[:3].sum(-1) / jnp.maximum(hits, 1.0)
        picture = jnp.concatenate([color, hits[None] / samples, shaded[4:, ..., 0]])
        return pictures.at[chosen].set(jnp.moveaxis(picture, 0, -1))

    pictures = _for_selected(start < far, render_tiles, jnp.zeros((tiles, TILE * TILE, 8)), chunk)
    pictures = pictures.reshape(views, rows, columns, TILE, TILE, 8).transpose(0, 1, 3, 2, 4, 5)
    pictures = pictures.reshape(views, rows * TILE, columns * TILE, 8)[:, : cameras.height, : cameras.width]
    return jnp.clip(pictures[..., :4], 0.0, 1.0), pictures[..., 4], pictures[..., 5:]
