"""Dense voxel grids on the cube [-0.5, 0.5]^3: indices, positions, and points back to voxels.

Voxel i of G along an axis sits at i / (G - 1) - 0.5: the first and last voxels lie on the cube's faces.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rounding = Literal["voxel", "released"]


def voxel_positions(voxels: Int[Array, "*batch 3"], grid: int) -> Float[Array, "*batch 3"]:
    """World positions of integer voxel indices on a `grid`^3 lattice."""
    return voxels.astype(jnp.float32) / (grid - 1) - 0.5


def grid_indices(grid: int) -> Int[Array, "n 3"]:
    """All (x, y, z) indices of a `grid`^3 lattice in C order: x slowest."""
    axis = jnp.arange(grid, dtype=jnp.int32)
    return jnp.stack(jnp.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)


def nearest_voxels(points, grid: int, rounding: Rounding = "voxel"):
    """Voxel indices of world points (..., 3), clamped to the grid; NumPy in gives NumPy out.

    `"voxel"` rounds to the nearest voxel position, (p + 0.5)(G - 1). `"released"` is the rule of the paper's code,
    (p + 0.5) G, which is up to one voxel off.
    """
    scale = grid if rounding == "released" else grid - 1
    return ((points + 0.5) * scale).round().clip(0, grid - 1).astype("int32")
