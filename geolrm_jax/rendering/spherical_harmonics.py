"""Colours that depend on the direction of view, as real spherical harmonics up to degree 3."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from geolrm_jax.geometry.rotations import normalize
from geolrm_jax.precision import full
from geolrm_jax.scene import AnyArray, Cameras

COEFFICIENTS = (1, 4, 9, 16)  # of degrees 0 to 3


def colors_from_harmonics(
    coefficients: Float[AnyArray, "*scenes g k 3"], means: Float[AnyArray, "*scenes g 3"], cameras: Cameras
) -> Float[Array, "*views g 3"]:
    """Colours for `Gaussians.colors`, one set per view, as in 3D Gaussian Splatting (Kerbl et al. 2023).

    The colour is the expansion in the unit direction from the camera's centre to the Gaussian's, plus 0.5, and at
    least 0. The basis is real, orthonormal over the sphere and has the Condon-Shortley phase: Y_lm is sqrt(2) times
    the imaginary part of the complex Y_l|m| for m < 0, and sqrt(2) times its real part for m > 0.

    Args:
      coefficients: (..., G, (d + 1)^2, 3) for degree d of 0 to 3, ordered by l, then m from -l to l: for each
        channel the order of f_dc and f_rest in PLY files.
      means: world positions (..., G, 3).
      cameras: leading axes (..., V); only their centres matter.

    Returns:
      (..., V, G, 3), at least float32. A Gaussian with a value that is not finite has the colour NaN, which
      `rasterize` leaves out and counts, and no gradient.

    Raises:
      ValueError: if the number of coefficients belongs to no degree, or leading axes disagree.
    """
    coefficients, means = full(jnp.asarray(coefficients)), full(jnp.asarray(means))
    if coefficients.shape[-2] not in COEFFICIENTS:
        raise ValueError(f"coefficients are {coefficients.shape}; expected {COEFFICIENTS} in the axis before the last")
    poses = full(jnp.asarray(cameras.world_from_camera))
    if coefficients.shape[:-2] != means.shape[:-1] or poses.shape[:-3] != means.shape[:-2]:
        raise ValueError(
            "coefficients (..., G, K, 3), means (..., G, 3) and cameras (..., V) must share their leading axes: "
            f"they are {coefficients.shape}, {means.shape} and {poses.shape[:-2]}"
        )
    finite = jnp.all(jnp.isfinite(means), axis=-1) & jnp.all(jnp.isfinite(coefficients), axis=(-2, -1))
    means = jnp.where(finite[..., None], means, 0)
    coefficients = jnp.where(finite[..., None, None], coefficients, 0)[..., None, :, :, :]
    directions = normalize(means[..., None, :, :] - poses[..., :, None, :3, 3])
    harmonics = basis(directions, math.isqrt(coefficients.shape[-2]) - 1)
    color = sum(y[..., None] * coefficients[..., k, :] for k, y in enumerate(harmonics))
    return jnp.where(finite[..., None, :, None], jnp.maximum(color + 0.5, 0), jnp.nan)


def basis(directions: Float[Array, "*batch 3"], degree: int) -> list[Float[Array, "*batch"]]:
    """The real spherical harmonics of unit vectors up to a degree of at most 3, ordered by l, then m."""
    x, y, z = jnp.moveaxis(directions, -1, 0)
    xx, yy, zz = x * x, y * y, z * z

    def c(numerator, denominator):
        return math.sqrt(numerator / (denominator * math.pi))

    terms = [c(1, 4) * jnp.ones_like(x)]
    if degree >= 1:
        terms += [-c(3, 4) * y, c(3, 4) * z, -c(3, 4) * x]
    if degree >= 2:
        terms += [c(15, 4) * x * y, -c(15, 4) * y * z, c(5, 16) * (2 * zz - xx - yy), -c(15, 4) * x * z]
        terms += [c(15, 16) * (xx - yy)]
    if degree >= 3:
        terms += [-c(35, 32) * y * (3 * xx - yy), c(105, 4) * x * y * z, -c(21, 32) * y * (4 * zz - xx - yy)]
        terms += [c(7, 16) * z * (2 * zz - 3 * xx - 3 * yy), -c(21, 32) * x * (4 * zz - xx - yy)]
        terms += [c(105, 16) * z * (xx - yy), -c(35, 32) * x * (xx - 3 * yy)]
    return terms
