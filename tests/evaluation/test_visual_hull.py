"""The visual hull of a ball's silhouettes is a shell around it."""

import jax.numpy as jnp
import numpy as np

from geolrm_jax.evaluation.visual_hull import hull_surface
from geolrm_jax.geometry.cameras import gobjaverse_rig, rays
from geolrm_jax.geometry.voxels import grid_indices, voxel_positions
from geolrm_jax.scene import Views

RADIUS, GRID = 0.35, 24


def ball_views(size=128):
    rig = gobjaverse_rig(size=size)
    origins, directions = rays(rig)
    along = -jnp.einsum("vc,vhwc->vhw", origins, directions)
    nearest = jnp.linalg.norm(origins[:, None, None] + along[..., None] * directions, axis=-1)
    alpha = (nearest < RADIUS).astype(jnp.float32)[None]
    cameras = type(rig)(rig.world_from_camera[None], rig.intrinsics[None], size, size)
    return Views(cameras, jnp.zeros((*alpha.shape, 3)), alpha, alpha, jnp.ones(alpha.shape[:2], bool))


def test_surface_of_a_balls_hull_lies_at_its_radius():
    surface = np.asarray(hull_surface(ball_views(), GRID))[0]
    distance = np.linalg.norm(voxel_positions(grid_indices(GRID), GRID), axis=-1).reshape((GRID,) * 3)
    found = distance[surface]
    voxel = 1 / (GRID - 1)
    assert found.min() > RADIUS - 2 * voxel  # nothing inside
    assert np.quantile(found, 0.9) < RADIUS + voxel  # 40 silhouettes leave little room around a ball
    shell = np.abs(distance - (RADIUS - 0.5 * voxel)) < 0.4 * voxel
    assert surface[shell].mean() > 0.8


def test_views_that_do_not_exist_carve_nothing():
    views = ball_views()
    absent = jnp.zeros_like(views.valid)
    everything = hull_surface(Views(views.cameras, views.rgb, views.alpha, views.depth, absent), 6)[0]
    inner = np.zeros((6, 6, 6), bool)
    inner[1:-1, 1:-1, 1:-1] = True
    np.testing.assert_array_equal(everything, ~inner)
