"""Image losses of the reconstruction network."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def image_mse(
    rendered: Float[Array, "b v h w 3"], target: Float[Array, "b v h w 3"], valid: Bool[Array, "b v"]
) -> Float[Array, ""]:
    """Mean squared error of valid views, images in [0, 1] scaled to [-1, 1]: four times the error as given."""
    return 4.0 * mean_over_views((rendered - target) ** 2, valid)


def alpha_mse(
    rendered: Float[Array, "b v h w"], target: Float[Array, "b v h w"], valid: Bool[Array, "b v"]
) -> Float[Array, ""]:
    """Mean squared error of the coverage of valid views."""
    return mean_over_views((rendered - target) ** 2, valid)


def mean_over_views(values: Float[Array, "b v *rest"], valid: Bool[Array, "b v"]) -> Float[Array, ""]:
    """Mean over everything in valid views; zero if there are none."""
    per_view = values.reshape(*valid.shape, -1).mean(-1)
    return jnp.sum(jnp.where(valid, per_view, 0.0)) / jnp.maximum(valid.sum(), 1)
