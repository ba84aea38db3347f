"""Rotary position embedding in three dimensions (paper, Sec. 3.3; Su et al. 2021)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from geolrm_jax.precision import full


def rope3d(x: Float[Array, "b n k c"], voxels: Int[Array, "b n 3"], base: float = 10000.0) -> Float[Array, "b n k c"]:
    """Rotates queries or keys by the integer position of their voxel.

    The head is split in three equal parts for x, y and z; within a part of width 2Q the pair (i, i + Q) turns by
    position * base^(-i / Q). Angles and products are computed in at least float32.

    Args:
      x: heads whose width is a multiple of 6.
      voxels: indices on the fine grid.
      base: of the wavelengths' geometric series.

    Raises:
      ValueError: if the head width is no multiple of 6.
    """
    width = x.shape[-1]
    if width % 6:
        raise ValueError(f"3D RoPE needs a head width that is a multiple of 6, got {width}")
    pairs = width // 6
    frequencies = base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angles = voxels[..., None, :, None] * frequencies  # (b, n, 1, 3, q): the same for all heads
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    u, v = jnp.moveaxis(full(x).reshape(*x.shape[:-1], 3, 2, pairs), -2, 0)
    turned = jnp.stack([u * cos - v * sin, v * cos + u * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)
