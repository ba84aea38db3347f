"""Ground-truth occupancy of an object from the depth of its views (NumPy: it is made once, when a set is built)."""

import numpy as np
from jaxtyping import Bool, Float

from geolrm_jax.geometry.voxels import Rounding, nearest_voxels
from geolrm_jax.scene import Cameras

# A surface point of the cube is nearer to its centre than half the cube's diagonal.
HALF_DIAGONAL = 0.867


def reliable_depth(depth: Float[np.ndarray, "v h w"], cameras: Cameras) -> Bool[np.ndarray, "v h w"]:
    """Pixels whose depth can be trusted: not missing, and none of the eight neighbours is.

    A depth below |camera position| - 0.867 lies in front of the cube and counts as missing. Pixels next to a missing
    one are left out, since at a silhouette a renderer may average object and background.
    """
    nearest = np.linalg.norm(cameras.world_from_camera[:, :3, 3], axis=-1) - HALF_DIAGONAL
    missing = (depth <= 0.0) | (depth < nearest[:, None, None])
    padded = np.pad(missing, ((0, 0), (1, 1), (1, 1)))
    wide = padded[:, :, :-2] | padded[:, :, 1:-1] | padded[:, :, 2:]
    return ~(wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:])


def unproject_pixels(
    depth: Float[np.ndarray, "v h w"], cameras: Cameras, chosen: Bool[np.ndarray, "v h w"]
) -> Float[np.ndarray, "n 3"]:
    """World points of the chosen pixels' centres, by camera z."""
    view, row, column = np.nonzero(chosen)
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
      depth: camera z in cube sides, 0 where missing.
      cameras: (V,), NumPy leaves.
      grid: voxels a side.
      rounding: rule of `geometry.voxels.nearest_voxels`.

    Returns:
      (G, G, G) over (x, y, z) in C order.
    """
    points = unproject_pixels(depth, cameras, reliable_depth(depth, cameras))
    occupancy = np.zeros((grid, grid, grid), bool)
    occupancy[tuple(nearest_voxels(points, grid, rounding).T)] = True
    return occupancy
