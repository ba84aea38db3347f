"""Perspective projection of 3D Gaussians to 2D Gaussians in the image plane (EWA splatting, Zwicker et al. 2001).

Vectors and matrices are tuples of their components here, each an array whose last axis is G: all of it, and of its
derivative, is elementwise over long rows. Nothing is left to matrix products, which devices may round (a pixel position
has no bits to spare) and libraries round according to a Gaussian's place in the array.
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from geolrm_jax.geometry.cameras import camera_from_world
from geolrm_jax.geometry.rotations import matrix_from_quaternion
from geolrm_jax.scene import Cameras

# How far outside the image, as a share of its half width, the Jacobian still follows the point: a perspective
# Jacobian far off-axis would smear Gaussians at the border over the whole picture.
JACOBIAN_MARGIN = 0.3
MAX_SIGMA = 1e8  # pixels; the determinant of a larger Gaussian overflows float32
MAX_SLOPE = 1e8  # x/z; farther off, no Gaussian of at most that size reaches the picture


class Projected(NamedTuple):
    """Gaussians as the cameras see them, all (..., V, G).

    Attributes:
      x, y: centres in pixels.
      xx, xy, yy: covariance in pixels squared, dilation included.
      determinant: of that covariance.
      undilated: determinant of the covariance without dilation.
      depth: camera z.
      visible: False where the centre is not between the near and far planes or too far aside, and for a covariance
        that is singular or too large for float32; other values but depth are finite there too, and mean nothing.
    """

    x: Float[Array, "*batch g"]
    y: Float[Array, "*batch g"]
    xx: Float[Array, "*batch g"]
    xy: Float[Array, "*batch g"]
    yy: Float[Array, "*batch g"]
    determinant: Float[Array, "*batch g"]
    undilated: Float[Array, "*batch g"]
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
      cameras: poses may be any invertible matrices; the inverse is the general one. The centre is K (x, y, z) / z with
        the whole matrix; the Jacobian knows the focal lengths and the principal point only.
      near, far: camera z of what is drawn lies strictly between them.
      eps2d: dilation in pixels squared.
    """
    pose = camera_from_world(cameras)[..., None]
    rotation = matrix_from_quaternion(quats)
    x, y, depth = _transform(pose, [means[..., i] for i in range(3)])
    x, y, depth = x + pose[..., 0, 3, :], y + pose[..., 1, 3, :], depth + pose[..., 2, 3, :]
    drawn = (depth > near) & (depth < far)
    z = jnp.where(drawn, depth, 1.0)
    drawn &= jnp.maximum(jnp.abs(x), jnp.abs(y)) < MAX_SLOPE * z
    x, y = (jnp.where(drawn, a, 0) / z for a in (x, y))

    k = cameras.intrinsics[..., None]
    fx, fy = k[..., 0, 0, :], k[..., 1, 1, :]
    slope_x = _clamp_slope(x, fx, k[..., 0, 2, :], cameras.width)
    slope_y = _clamp_slope(y, fy, k[..., 1, 2, :], cameras.height)
    arrows = []
    for axis in range(3):
        u, v, w = _transform(pose, [rotation[..., i, axis] * scales[..., axis] for i in range(3)])
        arrow = fx / z * (u - slope_x * w), fy / z * (v - slope_y * w)
        drawn &= jnp.maximum(jnp.abs(arrow[0]), jnp.abs(arrow[1])) < MAX_SIGMA
        arrows.append(arrow)
    xx, xy, yy, determinant, undilated = _covariance(
        [[jnp.where(drawn, p, 0) for p in arrow] for arrow in arrows], eps2d
    )
    return Projected(
        x=k[..., 0, 0, :] * x + k[..., 0, 1, :] * y + k[..., 0, 2, :],
        y=k[..., 1, 0, :] * x + k[..., 1, 1, :] * y + k[..., 1, 2, :],
        xx=xx,
        xy=xy,
        yy=yy,
        determinant=determinant,
        undilated=undilated,
        depth=depth,
        visible=drawn & (determinant > 0),
    )


def _transform(pose: Float[Array, "*views 4 4 1"], vector: list[Float[Array, "*scenes g"]]) -> list[Array]:
    """The components (..., V, G) of every view's linear part times a vector of its scene."""
    return [sum(pose[..., i, j, :] * vector[j][..., None, :] for j in range(3)) for i in range(3)]


def _clamp_slope(slope: Array, focal: Array, centre: Array, size: int) -> Array:
    """x/z (or y/z) limited to the image and a margin around it."""
    margin = JACOBIAN_MARGIN * 0.5 * size / jnp.abs(focal)
    left, right = -centre / focal, (size - centre) / focal  # a negative focal length mirrors
    return jnp.clip(slope, jnp.minimum(left, right) - margin, jnp.maximum(left, right) + margin)


def _covariance(arrows: list[list[Array]], eps2d: float) -> tuple[Array, Array, Array, Array, Array]:
    """xx, xy, yy and determinant of sum_k p_k p_k^T + eps2d I for three arrows p_k = (x_k, y_k), and that for eps2d 0.

    The determinant by Cauchy-Binet is a sum of squares: a needle's does not cancel, as xx yy - xy^2 would.
    """
    xx, xy, yy = (sum(p[i] * p[j] for p in arrows) for i, j in ((0, 0), (0, 1), (1, 1)))
    minors = sum((p[0] * q[1] - q[0] * p[1]) ** 2 for p, q in itertools.combinations(arrows, 2))
    return xx + eps2d, xy, yy + eps2d, minors + eps2d * (xx + yy) + eps2d**2, minors


def antialiasing(projected: Projected) -> Float[Array, "*batch g"]:
    """What undoes the light that dilation adds, sqrt(det / det dilated): Mip-Splatting (Yu et al. 2024), 2D.

    Zero, with a zero gradient, for needles and points too thin for the dtype.
    """
    p = projected
    wide = p.visible & (p.undilated > jnp.finfo(p.undilated.dtype).tiny)
    root, dilated_root = (jnp.sqrt(jnp.where(wide, d, 1)) for d in (p.undilated, p.determinant))
    return jnp.where(wide, root / dilated_root, 0)
