"""Quaternions (wxyz) and rotation matrices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize(vectors: Float[Array, "*batch d"], epsilon: float = 1e-12) -> Float[Array, "*batch d"]:
    """Unit vectors; a zero vector stays zero, with a finite gradient."""
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True, initial=1.0)
    vectors = vectors / jax.lax.stop_gradient(largest)  # the square of a large one would overflow
    squared = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jnp.where(squared > epsilon**2, 1.0 / jnp.sqrt(jnp.maximum(squared, epsilon**2)), 0.0)


def matrix_from_quaternion(quats: Float[Array, "*batch 4"]) -> Float[Array, "*batch 3 3"]:
    """Rotation matrices of wxyz quaternions, normalised here."""
    w, x, y, z = jnp.moveaxis(normalize(quats), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
