"""Depth losses: edge-aware log-L1 (DN-Splatter, Turkulainen et al. 2024) and total variation."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from geolrm_jax.losses.photometric import mean_over_views

DepthMean = Literal["surface", "pixels"]


def edge_aware_log_l1(
    depth: Float[Array, "b v h w"],
    target: Float[Array, "b v h w"],
    image: Float[Array, "b v h w 3"],
    mask: Bool[Array, "b v h w"],
    valid: Bool[Array, "b v"],
    mean: DepthMean = "surface",
) -> Float[Array, ""]:
    """exp(-|∂I|) log(1 + |D - D̂|) at the left (x) and the top (y) pixel of every pair of neighbours.

    Args:
      depth: rendered camera z.
      target: measured camera z.
      image: the target picture in [0, 1]; |∂I| is the channel mean of its absolute forward differences.
      mask: pixels that count.
      valid: views that count.
      mean: divide by the pixels that count (the released code) or by all pixels of valid views (the paper).
    """
    error = jnp.log1p(jnp.abs(depth - target))
    total = jnp.zeros(())
    for edge, here in (
        (jnp.diff(image, axis=-2), (..., slice(None), slice(-1))),
        (jnp.diff(image, axis=-3), (..., slice(-1), slice(None))),
    ):
        kept = mask[here] & valid[..., None, None]
        pixels = kept.sum() if mean == "surface" else valid.sum() * (kept.shape[-2] * kept.shape[-1])
        loss = jnp.where(kept, jnp.exp(-jnp.abs(edge).mean(-1)) * error[here], 0.0)
        total += loss.sum() / jnp.maximum(pixels, 1)
    return total


def total_variation(depth: Float[Array, "b v h w"], valid: Bool[Array, "b v"]) -> Float[Array, ""]:
    """mean |∂x D| + mean |∂y D| of valid views, unmasked."""
    return mean_over_views(jnp.abs(jnp.diff(depth, axis=-1)), valid) + mean_over_views(
        jnp.abs(jnp.diff(depth, axis=-2)), valid
    )
