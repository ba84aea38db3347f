"""Ground-truth occupancy of an object from the depth of its views (NumPy: it is made once, when a set is built)."""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from geolrm_jax.geometry.voxels import Rounding, axis_positions, nearest_voxels
from geolrm_jax.scene import Cameras

HALF_DIAGONAL = 0.867
# Share of a wider cube's faces that a visual hull may fill, and of views that must have a point in their pictures. 16
# real objects seen by 8 or more views all around fill at most 0.006; 1.5 times as large 13 and 3 times as large 15 of
# them fill more than 0.01.
WIDER, HULL_OUTSIDE, SEEN_BY = 1.3, 0.01, 0.9
_CHUNK, _FACE_POINTS = 1 << 18, 32


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
    """World points of all pixels that have a depth, through their centres, view after view."""
    return np.concatenate([_unproject_view(depth[view], cameras, view) for view in range(len(depth))])


def _unproject_view(depth: Float[np.ndarray, "h w"], cameras: Cameras, view: int) -> Float[np.ndarray, "n 3"]:
    k, pose = cameras.intrinsics[view], cameras.world_from_camera[view]
    row, column = np.nonzero(depth > 0.0)
    z = depth[row, column]
    x, y = (column + 0.5 - k[0, 2]) / k[0, 0], (row + 0.5 - k[1, 2]) / k[1, 1]
    local, pose = np.stack([x * z, y * z, z]).astype(depth.dtype), pose.astype(depth.dtype)
    # Not a product by BLAS: it takes all cores for itself, and a set is built by as many processes as there are cores.
    return np.einsum("ij,jn->in", pose[:3, :3], local).T + pose[:3, 3]


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
    for view in range(len(depth)):
        occupancy[tuple(nearest_voxels(_unproject_view(depth[view], cameras, view), grid, rounding).T)] = True
    return occupancy


def project_points(
    points: Float[np.ndarray, "n 3"], cameras: Cameras, view: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, camera z) of world points in one view; row and column are -1 for points outside the picture."""
    pose, k = cameras.world_from_camera[view], cameras.intrinsics[view]
    x, y, z = np.einsum("ji,jn->in", pose[:3, :3], (points - pose[:3, 3]).T)
    safe = np.where(z > 1e-6, z, 1.0)
    column, row = np.floor(k[0, 0] * x / safe + k[0, 2]), np.floor(k[1, 1] * y / safe + k[1, 2])
    inside = (z > 1e-6) & (column >= 0) & (column < cameras.width) & (row >= 0) & (row < cameras.height)
    return np.where(inside, row, -1).astype(int), np.where(inside, column, -1).astype(int), z


def _count_views(
    points: Float[np.ndarray, "n 3"], alpha: UInt8[np.ndarray, "v h w"], cameras: Cameras
) -> Int[np.ndarray, "n"]:
    """In how many views' pictures a point lies; 0 outside the hull: where one has it outside its silhouette."""
    hull, count = np.ones(len(points), bool), np.zeros(len(points), int)
    for view in range(len(alpha)):
        kept = np.flatnonzero(hull)
        for part in np.split(kept, range(_CHUNK, len(kept), _CHUNK)):
            row, column, _ = project_points(points[part], cameras, view)
            inside = row >= 0
            count[part] += inside
            hull[part] &= ~inside | (alpha[view, row, column] > 127)
    return np.where(hull, count, 0)


def check_hull(alpha: UInt8[np.ndarray, "v h w"], cameras: Cameras, origin: str) -> None:
    """Raises a ValueError that names `origin` if the visual hull of silhouettes goes on outside the cube.

    Looked at are points on the faces of a wider cube: few views leave a hull with cones that end a little outside.
    Points that some views do not have in their pictures do not count: an object that fills the pictures has a hull that
    goes on behind their edges.
    """
    side = np.linspace(-0.5 * WIDER, 0.5 * WIDER, _FACE_POINTS, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1)
    points = grid[(np.abs(grid) == side[-1]).any(axis=-1)]
    share = np.mean(_count_views(points, alpha, cameras) > SEEN_BY * len(alpha))
    if share > HULL_OUTSIDE:
        raise ValueError(
            f"{origin} does not fit the cube [-0.5, 0.5]^3 (--scale?), or is not seen from enough sides: its visual "
            f"hull fills {share:.1%} of the faces of a cube {WIDER} times as wide"
        )


def occupancy_from_silhouettes(
    alpha: UInt8[np.ndarray, "v h w"], cameras: Cameras, grid: int
) -> Bool[np.ndarray, "g g g"]:
    """The outer voxels of the visual hull: what to train the proposal on where no view has depth.

    A voxel belongs to the hull if every view that has it in its picture sees it inside the silhouette (alpha above one
    half), and at least one has. Concave parts that no silhouette shows are filled; the result bounds the object.

    Returns:
      (G, G, G) over (x, y, z): voxels of the hull with a neighbour along an axis that is not, or at the cube's face.
    """
    axis = axis_positions(grid).astype(np.float32)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    solid = np.pad(_count_views(points, alpha, cameras).reshape((grid,) * 3) > 0, 1)
    inner = np.ones((grid,) * 3, bool)
    for axis in range(3):
        for shift in (-1, 1):
            inner &= np.roll(solid, shift, axis)[1:-1, 1:-1, 1:-1]
    return solid[1:-1, 1:-1, 1:-1] & ~inner
