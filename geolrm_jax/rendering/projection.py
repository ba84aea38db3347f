"""Perspective projection of 3D Gaussians to 2D Gaussians in the image plane (EWA splatting, Zwicker et al. 2001).

The Gaussians' axis G stays last, so that everything here is elementwise over long contiguous rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from geolrm_jax.geometry.cameras import camera_from_world
from geolrm_jax.geometry.rotations import matrix_from_quaternion
from geolrm_jax.scene import Cameras

# How far outside the image, as a share of its half width, the Jacobian still follows the point: a perspective
# Jacobian far off-axis would smear Gaussians at the border over the whole picture.
JACOBIAN_MARGIN = 0.3


class Projected(NamedTuple):
    """Gaussians as the cameras see them, all (..., V, G).

    Attributes:
      x, y: centres in pixels.
      xx, xy, yy: covariance in pixels squared, dilation included.
      determinant: of that covariance.
      depth: camera z.
      visible: False for those behind the near or beyond the far plane and for a singular or infinite covariance; their
        other values are finite or multiplied by nothing.
    """

    x: Float[Array, "*batch g"]
    y: Float[Array, "*batch g"]
    xx: Float[Array, "*batch g"]
    xy: Float[Array, "*batch g"]
    yy: Float[Array, "*batch g"]
    determinant: Float[Array, "*batch g"]
    depth: Float[Array, "*batch g"]
    visible: Bool[Array, "*batch g"]


def project(
    means: Float[Array, "*scenes g 3"],
    scales: Float[Array, "*scenes g 3"],
    quats: Float[Array, "*scenes g 4"],
    cameras: Cameras,
    *,
    near: float,
    far: float,
    eps2d: float,
) -> Projected:
    """Projects finite Gaussians into cameras (..., V).

    The covariance is J W R S (J W R S)^T + eps2d I: each principal axis of the Gaussian, an arrow in the world, goes
    through the camera's linear part W and the perspective Jacobian J at the centre; the sum of the outer products of
    the three projected arrows is the covariance.

    Args:
      means: world positions (..., G, 3).
      scales: standard deviations (..., G, 3).
      quats: wxyz (..., G, 4).
      cameras: poses may be any invertible matrices; the inverse is the general one.
      near, far: camera z of what is drawn lies strictly between them.
      eps2d: dilation in pixels squared.
    """
    pose = camera_from_world(cameras)
    linear, translation = pose[..., :3, :3], pose[..., :3, 3, None]
    x, y, depth = jnp.moveaxis(_product("...vij,...jg->...vig", linear, means.swapaxes(-1, -2)) + translation, -2, 0)
    drawn = (depth > near) & (depth < far)
    z = jnp.where(drawn, depth, 1.0)
    x, y = x / z, y / z

    k = cameras.intrinsics[..., None]
    fx, fy = k[..., 0, 0, :], k[..., 1, 1, :]
    slope_x = _clamp_slope(x, fx, k[..., 0, 2, :], cameras.width)
    slope_y = _clamp_slope(y, fy, k[..., 1, 2, :], cameras.height)

    arrows = jnp.moveaxis(matrix_from_quaternion(quats) * scales[..., None, :], -3, -1)  # (..., component, axis, g)
    arrows = _product("...vij,...jag->...viag", linear, arrows)
    across = (fx / z)[..., None, :] * (arrows[..., 0, :, :] - slope_x[..., None, :] * arrows[..., 2, :, :])
    down = (fy / z)[..., None, :] * (arrows[..., 1, :, :] - slope_y[..., None, :] * arrows[..., 2, :, :])
    xx, xy, yy, determinant = _covariance(across, down, eps2d)
    return Projected(
        x=k[..., 0, 0, :] * x + k[..., 0, 1, :] * y + k[..., 0, 2, :],
        y=k[..., 1, 0, :] * x + k[..., 1, 1, :] * y + k[..., 1, 2, :],
        xx=xx,
        xy=xy,
        yy=yy,
        determinant=determinant,
        depth=depth,
        visible=drawn & (determinant > 0) & jnp.isfinite(determinant),
    )


def _product(equation: str, a: Array, b: Array) -> Array:
    """einsum in full precision on every device: a pixel position has no bits to spare."""
    return jnp.einsum(equation, a, b, precision="highest")


def _clamp_slope(slope: Array, focal: Array, centre: Array, size: int) -> Array:
    """x/z (or y/z) limited to the image and a margin around it."""
    margin = JACOBIAN_MARGIN * 0.5 * size / focal
    return jnp.clip(slope, -(centre / focal + margin), (size - centre) / focal + margin)


def _covariance(across: Array, down: Array, eps2d: float) -> tuple[Array, Array, Array, Array]:
    """xx, xy, yy and determinant of sum_k p_k p_k^T + eps2d I, for arrows p_k = (across_k, down_k) (..., 3, G).

    The determinant by Cauchy-Binet is a sum of squares: a needle's does not cancel, as xx yy - xy^2 would.
    """
    xx, xy, yy = (across**2).sum(-2), (across * down).sum(-2), (down**2).sum(-2)
    minors = across * jnp.roll(down, 1, axis=-2) - down * jnp.roll(across, 1, axis=-2)
    determinant = (minors**2).sum(-2) + eps2d * (xx + yy) + eps2d**2
    return xx + eps2d, xy, yy + eps2d, determinant
