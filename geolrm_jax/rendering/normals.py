"""World normals of Gaussians: a flat Gaussian is a piece of surface, and its shortest axis that surface's normal."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from geolrm_jax.geometry.rotations import matrix_from_quaternion
from geolrm_jax.scene import Cameras


def facing_normals(
    means: Float[Array, "*scenes g 3"],
    scales: Float[Array, "*scenes g 3"],
    quats: Float[Array, "*scenes g 4"],
    cameras: Cameras,
) -> list[Float[Array, "*views g"]]:
    """The x, y and z, each (..., V, G), of every Gaussian's shortest axis, turned to every camera's centre.

    Of axes of the same length the first is taken, and an axis seen exactly from the side stays as it is. Which axis
    is the shortest and which way it is turned are choices without a gradient: there is one for `quats` alone.
    """
    shortest = jnp.argmin(scales, axis=-1)
    rotation = matrix_from_quaternion(quats)
    axis = [jnp.where(shortest == 0, r[0], jnp.where(shortest == 1, r[1], r[2])) for r in _entries(rotation)]
    centre = cameras.world_from_camera[..., None]
    towards = sum(axis[i][..., None, :] * (centre[..., i, 3, :] - means[..., None, :, i]) for i in range(3))
    return [jnp.where(towards >= 0, a[..., None, :], -a[..., None, :]) for a in axis]


def _entries(matrices: Float[Array, "*batch 3 3"]) -> list[list[Array]]:
    """The entries of matrices, row by row."""
    return [[matrices[..., i, j] for j in range(3)] for i in range(3)]
