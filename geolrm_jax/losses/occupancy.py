"""Losses of the proposal network: cross-entropy and scene-class affinity (MonoScene, Cao and de Charette 2022)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from geolrm_jax.precision import full

Counting = Literal["scene", "batch"]


def cross_entropy(logits: Float[Array, "b g g g"], target: Bool[Array, "b g g g"]) -> Float[Array, ""]:
    """Binary cross-entropy with logits, mean over all voxels."""
    logits = full(logits)
    return jnp.mean(jax.nn.softplus(logits) - logits * target)


def affinity(
    logits: Float[Array, "b g g g"], target: Bool[Array, "b g g g"], counting: Counting = "scene"
) -> Float[Array, ""]:
    """-log precision - log recall - log specificity of the occupied class, from soft counts.

    Args:
      logits: occupancy.
      target: ground truth.
      counting: soft counts are summed per scene and the losses averaged, or summed over the whole batch first.
    """
    p, t = jax.nn.sigmoid(full(logits)), target.astype(full(logits).dtype)
    axes = (1, 2, 3) if counting == "scene" else (0, 1, 2, 3)
    hits = (p * t).sum(axes)
    precision = _ratio(hits, p.sum(axes))
    recall = _ratio(hits, t.sum(axes))
    specificity = _ratio(((1 - p) * (1 - t)).sum(axes), (1 - t).sum(axes))
    return -jnp.mean(jnp.log(precision) + jnp.log(recall) + jnp.log(specificity))


def _ratio(part: Float[Array, "..."], whole: Float[Array, "..."]) -> Float[Array, "..."]:
    """part / whole, one where there is nothing to count; the part is held above e^-80 for the logarithm."""
    return jnp.where(whole > 0, jnp.maximum(part, jnp.exp(-80.0)) / jnp.where(whole > 0, whole, 1.0), 1.0)
