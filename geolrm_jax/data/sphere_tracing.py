"""Pictures of signed-distance objects: cone marching down from tiles to pixels to samples, in JAX on any device.

Three levels, each starting where the one above stopped: one cone for a tile of 8 x 8 pixels, one for a pixel, one ray
for each of five samples in it. Tiles whose cone leaves the object's sphere are never worked on; the others are taken
in chunks, so that memory is bounded and the arrays of a chunk stay in a CPU's cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from geolrm_jax.data import sdf
from geolrm_jax.scene import Cameras

TILE = 8
# Sample positions in a pixel: its centre, whose depth and normal are returned, and a rotated grid of four.
SAMPLES = np.array([[0.5, 0.5], [0.375, 0.125], [0.875, 0.375], [0.125, 0.625], [0.625, 0.875]], np.float32)
LIGHT = np.array([0.45, -0.35, 0.82], np.float32) / np.linalg.norm([0.45, -0.35, 0.82])
AMBIENT = 0.45
_ROUNDS, _ROUND = 12, 6
_TOLERANCE = 2e-4


def _at(origins: Float[Array, "3 *rays"], directions: Float[Array, "3 *rays"], z: Float[Array, "*rays"]) -> sdf.Points:
    """Points at depth z along rays whose directions have camera z one."""
    return tuple(origins[a] + z * directions[a] for a in range(3))


def _over(selected: Bool[Array, "n"], body, carry, block: int):
    """Runs `body(indices, carry)` over the selected indices, `block` at a time; the last block is padded with n."""
    n = selected.shape[0]
    indices = jnp.nonzero(selected, size=n + block, fill_value=n)[0]

    def run(i, carry):
        return body(jax.lax.dynamic_slice_in_dim(indices, i * block, block), carry)

    return jax.lax.fori_loop(0, -(-selected.sum() // block), run, carry)


def _march(shapes, origins, directions, z, far, spread, block):
    """Depth at which each cone, `spread` wide at depth one, first comes near the surface, or a depth beyond `far`.

    A ball of radius D around the axis point at z holds no surface. The cone's cross-sections up to z + s lie inside it
    while |d| s + (z + s) spread <= D: that is the step. Rays that are still under way are gathered again every few
    steps: a few that graze the surface need many steps, most need few.
    """

    def steps(indices, carry):
        z, going = carry
        at = lambda x: x.at[..., indices].get(mode="clip")
        o, d, end, wide = at(origins), at(directions), at(far), at(spread)
        pace = 1.0 / (jnp.sqrt(sum(c * c for c in d)) + wide)

        def step(_, state):
            depth, _ = state
            room = sdf.distance(shapes, _at(o, d, depth)) - wide * depth
            under_way = (room > 0.5 * wide * depth + _TOLERANCE) & (depth < end)
            return jnp.where(under_way, depth + room * pace, depth), under_way

        depth, under_way = jax.lax.fori_loop(0, _ROUND, step, (at(z), jnp.ones(indices.shape, bool)))
        return z.at[indices].set(depth), going.at[indices].set(under_way)

    def round_(state):
        i, z, going = state
        return i + 1, *_over(going, steps, (z, going), block)

    state = (0, z, z < far)
    return jax.lax.while_loop(lambda s: (s[0] < _ROUNDS) & s[2].any(), round_, state)[1]


def _tile_rays(cameras: Cameras, pixels: Float[Array, "n 2"], views) -> tuple[Array, Array]:
    """Origins and directions (camera z one), each (3, n), of pixel positions in the given views."""
    poses, k = cameras.world_from_camera[views], cameras.intrinsics[views]
    x = (pixels[:, 0] - k[:, 0, 2]) / k[:, 0, 0]
    y = (pixels[:, 1] - k[:, 1, 2]) / k[:, 1, 1]
    directions = poses[:, :3, 0] * x[:, None] + poses[:, :3, 1] * y[:, None] + poses[:, :3, 2]
    return poses[:, :3, 3].T, directions.T


def _shade(shapes: sdf.Shapes, origins, directions, z, far):
    """Colour, hit mask, refined depth and world normal of samples whose march ended at z."""
    value, gradient = sdf.distance_and_gradient(shapes, _at(origins, directions, z))
    norm = jnp.sqrt(sum(g * g for g in gradient) + 1e-12)
    normal = [g / norm for g in gradient]
    approach = -sum(g * d for g, d in zip(gradient, directions, strict=True))
    # One Newton step on the distance along the ray: the marching tolerance leaves the depth.
    z_surface = z + jnp.clip(value / jnp.maximum(approach, 0.1), -4.0 * _TOLERANCE, 4.0 * _TOLERANCE)
    hit = (z < far) & (value < 4.0 * _TOLERANCE)
    lambert = jnp.maximum(sum(n * light for n, light in zip(normal, LIGHT, strict=True)), 0.0)
    rgb = sdf.color(shapes, _at(origins, directions, z)) * (AMBIENT + (1.0 - AMBIENT) * lambert)
    return jnp.where(hit, jnp.stack([*rgb, jnp.ones_like(z), z_surface, *normal]), 0.0)


@functools.partial(jax.jit, static_argnames=("chunk", "block"))
def render(shapes: sdf.Shapes, cameras: Cameras, chunk: int = 256, block: int = 8192):
    """Colour, coverage, depth and normals of one object.

    Args:
      shapes: an object inside its sphere of `shapes.radius`; cameras stand outside of it.
      cameras: (V,).
      chunk: tiles worked on at a time: 32 suits a CPU's cache, an accelerator wants thousands.

    Returns:
      rgba (V, H, W, 4) in [0, 1] with straight alpha, averaged over five samples; depth (V, H, W), the camera z at the
      pixel's centre, 0 where that misses; normal (V, H, W, 3), world axes, zero where the centre misses.
    """
    views, rows, columns = len(cameras.intrinsics), -(-cameras.height // TILE), -(-cameras.width // TILE)
    tiles = views * rows * columns
    view, row, column = jnp.unravel_index(jnp.arange(tiles), (views, rows, columns))
    corners = jnp.stack([column, row], axis=-1).astype(jnp.float32) * TILE

    pixel = 1.0 / jnp.minimum(cameras.intrinsics[:, 0, 0], cameras.intrinsics[:, 1, 1])[view]
    origins, directions = _tile_rays(cameras, corners + TILE / 2, view)
    distance_to_origin = jnp.linalg.norm(origins, axis=0)
    length = jnp.linalg.norm(directions, axis=0)
    spread = TILE * np.sqrt(0.5).astype(np.float32) * pixel
    near = jnp.maximum((distance_to_origin - shapes.radius) / (length + spread), 1e-3)
    far = (distance_to_origin + shapes.radius) / jnp.maximum(length - spread, 0.5)
    # A tile is empty too where its cone passes the sphere at a distance.
    along = -jnp.sum(origins * directions, axis=0) / length
    passes = jnp.sqrt(jnp.maximum(distance_to_origin**2 - along**2, 0.0)) > shapes.radius + spread * (along / length)
    start = _march(shapes, origins, directions, jnp.where(passes, far + 1.0, near), far, spread, block)
    active = start < far
    order = jnp.argsort(~active, stable=True)

    local = jnp.stack(jnp.meshgrid(jnp.arange(TILE), jnp.arange(TILE)), axis=-1).reshape(-1, 2).astype(jnp.float32)

    def render_chunk(i, pictures):
        chosen = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        pixels = corners[chosen][:, None] + local
        spread_out = lambda x: jnp.repeat(x[chosen], TILE * TILE)
        pixel_views, z, end, size = (spread_out(x) for x in (view, start, far, pixel))
        o, d = _tile_rays(cameras, (pixels + 0.5).reshape(-1, 2), pixel_views)
        z = _march(shapes, o, d, z, end, np.sqrt(0.5).astype(np.float32) * size, block)

        repeat = lambda x: jnp.repeat(x, len(SAMPLES))
        o, d = _tile_rays(cameras, (pixels[:, :, None] + SAMPLES).reshape(-1, 2), repeat(pixel_views))
        z, end = repeat(z), repeat(end)
        z = _march(shapes, o, d, z, end, jnp.zeros_like(z), block)

        def shade(indices, samples):
            at = lambda x: x.at[..., indices].get(mode="clip")
            return samples.at[:, indices].set(_shade(shapes, at(o), at(d), at(z), at(end)))

        samples = _over(z < end, shade, jnp.zeros((8, z.shape[0])), block)

        samples = samples.reshape(8, chunk, TILE * TILE, len(SAMPLES))
        hits = samples[3].sum(-1)
        color = samples[:3].sum(-1) / jnp.maximum(hits, 1.0)
        picture = jnp.concatenate([color, hits[None] / len(SAMPLES), samples[4:, ..., 0]])
        return pictures.at[chosen].set(jnp.moveaxis(picture, 0, -1))

    pad = -tiles % chunk
    order = jnp.concatenate([order, jnp.full((pad,), tiles, order.dtype)])
    pictures = jnp.zeros((tiles, TILE * TILE, 8))
    chunks = -(-active.sum() // chunk)
    pictures = jax.lax.fori_loop(0, chunks, render_chunk, pictures)
    pictures = pictures.reshape(views, rows, columns, TILE, TILE, 8).transpose(0, 1, 3, 2, 4, 5)
    pictures = pictures.reshape(views, rows * TILE, columns * TILE, 8)[:, : cameras.height, : cameras.width]
    return jnp.clip(pictures[..., :4], 0.0, 1.0), pictures[..., 4], pictures[..., 5:]
