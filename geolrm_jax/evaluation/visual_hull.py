"""The surface of the visual hull: what silhouettes alone say of the occupied voxels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from geolrm_jax.geometry.cameras import project
from geolrm_jax.geometry.voxels import grid_indices, voxel_positions
from geolrm_jax.scene import Views


def hull_surface(views: Views, grid: int) -> Bool[Array, "b g g g"]:
    """Voxels of the visual hull (Laurentini 1994) that touch its outside.

    A voxel is kept if its centre falls on the object (alpha > 0.5) in every valid view that sees it; of those the ones
    with a free 6-neighbour, or at the cube's faces, are the surface.
    """
    points = voxel_positions(grid_indices(grid), grid)
    points = jnp.broadcast_to(points, (views.alpha.shape[0], *points.shape))
    pixels, z = project(views.cameras, points)
    height, width = views.cameras.height, views.cameras.width
    x, y = (jnp.floor(pixels[..., i]).astype(jnp.int32) for i in (0, 1))
    seen = (z > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height) & views.valid[..., None]
    index = y.clip(0, height - 1) * width + x.clip(0, width - 1)
    alpha = jnp.take_along_axis(jnp.asarray(views.alpha).reshape(*views.alpha.shape[:2], -1), index, axis=-1)
    inside = jnp.all(~seen | (alpha > 0.5), axis=1).reshape(-1, grid, grid, grid)
    return inside & ~_eroded(inside)


def _eroded(inside: Bool[Array, "b g g g"]) -> Bool[Array, "b g g g"]:
    """Voxels whose six neighbours are all inside; beyond the cube is outside."""
    padded = jnp.pad(inside, ((0, 0), (1, 1), (1, 1), (1, 1)))
    neighbours = [jnp.roll(padded, shift, axis)[:, 1:-1, 1:-1, 1:-1] for axis in (1, 2, 3) for shift in (-1, 1)]
    return jax.tree.reduce(jnp.logical_and, neighbours)
