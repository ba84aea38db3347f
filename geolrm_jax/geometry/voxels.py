"""Dense voxel grids on the cube [-0.5, 0.5]^3: indices, positions, and points back to voxels.

Voxel i of G along an axis sits at i / (G - 1) - 0.5: the first and last voxels lie on the cube's faces.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Rounding = Literal["voxel", "released"]


def axis_positions(grid: int) -> np.ndarray:
    """Positions (G,) along one axis, float32, rounded as torch.linspace(-1, 1, G) / 2 rounds them on a CPU.

    The last bit matters to nothing but the released rule of `released_indices`.
    """
    i, step = np.arange(grid), np.float64(np.float32(2.0) / np.float32(grid - 1))
    ends = np.where(i < grid // 2, step * i - 1.0, 1.0 - step * (grid - 1 - i))
    return 0.5 * ends.astype(np.float32)


def voxel_positions(voxels: Int[Array, "*batch 3"], grid: int) -> Float[Array, "*batch 3"]:
    """World positions of integer voxel indices on a `grid`^3 lattice."""
    return jnp.asarray(axis_positions(grid))[voxels]


def released_indices(positions: Float[Array, "*batch 3"], grid: int, scale: float) -> Int[Array, "*batch 3"]:
    """floor((p / scale + 1)(G - 1) / 2) in float32, the paper's code's rule for the index that RoPE turns by.

    With scale 0.5 this is the voxel's index, but for about one voxel in six (of 128) that float32 puts one below.
    """
    return jnp.floor((positions.astype(jnp.float32) / scale + 1.0) * ((grid - 1) / 2.0)).astype(jnp.int32)


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
