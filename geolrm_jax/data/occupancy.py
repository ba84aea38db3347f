"""Ground-truth occupancy of an object from the depth of its views (NumPy: it is made once, when a set is built)."""

import numpy as np
from jaxtyping import Bool, Float

from geolrm_jax.geometry.voxels import Rounding, nearest_voxels
from geolrm_jax.scene import Cameras

HALF_DIAGONAL = 0.867


def drop_edges(depth: Float[np.ndarray, "v h w"], cameras: Cameras) -> Float[np.ndarray, "v h w"]:
    """Depth with every pixel missing (0) that is, or that has among its eight neighbours one, without a surface.

    At a silhouette a renderer may average object and background. A depth below |camera position| - 0.867, half the
    cube's diagonal, lies in front of the cube and counts as missing too.
    """
    nearest = np.linalg.norm(cameras.world_from_camera[:, :3, 3], axis=-1) - HALF_DIAGONAL
    missing = (depth <= 0.0) | (depth < nearest[:, None, None])
    padded = np.pad(missing, ((0, 0), (1, 1), (1, 1)))
    wide = padded[:, :, :-2] | padded[:, :, 1:-1] | padded[:, :, 2:]
    return np.where(wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:], np.zeros_like(depth), depth)


def unproject_pixels(depth: Float[np.ndarray, "v h w"], cameras: Cameras) -> Float[np.ndarray, "n 3"]:
    """World points of all pixels that have a depth, through their centres."""
    view, row, column = np.nonzero(depth > 0.0)
    z = depth[view, row, column]
    k, pose = cameras.intrinsics[view], cameras.world_from_camera[view]
    x, y = (column + 0.5 - k[:, 0, 2]) / k[:, 0, 0], (row + 0.5 - k[:, 1, 2]) / k[:, 1, 1]
    local = np.stack([x * z, y * z, z], axis=-1)
    return np.einsum("nij,nj->ni", pose[:, :3, :3], local) + pose[:, :3, 3]


def occupancy_from_depth(
    depth: Float[np.ndarray, "v h w"], cameras: Cameras, grid: int, rounding: Rounding = "voxel"
) -> Bool[np.ndarray, "g g g"]:
    """Voxels that hold a surface point seen by some view (the paper's ground truth for the proposal network).

    Args:
      depth: camera z in cube sides, 0 where missing; usually from `drop_edges`.
      cameras: (V,), NumPy leaves.
      grid: voxels a side.
      rounding: rule of `geometry.voxels.nearest_voxels`.

    Returns:
      (G, G, G) over (x, y, z) in C order; points outside the cube count for its outermost voxels.
    """
    occupancy = np.zeros((grid, grid, grid), bool)
    occupancy[tuple(nearest_voxels(unproject_pixels(depth, cameras), grid, rounding).T)] = True
    return occupancy
