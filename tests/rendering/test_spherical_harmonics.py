"""Spherical harmonics against SciPy's, finite differences, and pictures from two sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import sph_harm_y

from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.rendering import colors_from_harmonics, rasterize
from geolrm_jax.scene import Cameras, Gaussians


def scipy_basis(directions, degree):
    """Real harmonics of the complex ones, ordered by l, then m."""
    x, y, z = np.moveaxis(directions, -1, 0)
    theta, phi = np.arccos(z), np.arctan2(y, x)

    def real(degree, order):
        complex_one = sph_harm_y(degree, abs(order), theta, phi)
        return complex_one.real if order == 0 else np.sqrt(2) * (complex_one.imag if order < 0 else complex_one.real)

    return np.stack([real(n, m) for n in range(degree + 1) for m in range(-n, n + 1)], axis=-1)


def make_scene(rng, degree, scenes=(), gaussians=50, views=3):
    rig = turntable(views, size=8)
    poses, intrinsics = (np.broadcast_to(a, (*scenes, *a.shape)) for a in (rig.world_from_camera, rig.intrinsics))
    means = rng.uniform(-0.5, 0.5, (*scenes, gaussians, 3)).astype(np.float32)
    coefficients = 0.4 * rng.normal(size=(*scenes, gaussians, (degree + 1) ** 2, 3)).astype(np.float32)
    return coefficients, means, Cameras(poses, intrinsics, 8, 8)


@pytest.mark.parametrize(("degree", "scenes"), [(0, ()), (1, (2,)), (2, ()), (3, (2, 2))])
def test_equal_scipy(rng, degree, scenes):
    coefficients, means, cameras = make_scene(rng, degree, scenes)
    offset = means[..., None, :, :].astype(np.float64) - cameras.world_from_camera[..., :, None, :3, 3]
    basis = scipy_basis(offset / np.linalg.norm(offset, axis=-1, keepdims=True), degree)
    expected = np.maximum(np.einsum("...vgk,...gkc->...vgc", basis, coefficients) + 0.5, 0)
    colors = colors_from_harmonics(coefficients, means, cameras)
    assert colors.shape == (*scenes, 3, 50, 3)
    if degree:
        assert np.any(expected == 0)  # clamped
    np.testing.assert_allclose(colors, expected, atol=4e-6)


def test_gradients_equal_finite_differences(rng):
    coefficients, means, cameras = make_scene(rng, 3, gaussians=5, views=2)
    weights = rng.normal(size=(2, 5, 3))
    arguments = [np.float64(a) for a in (coefficients, means, cameras.world_from_camera)]

    def total(coefficients, means, poses):
        colors = colors_from_harmonics(coefficients, means, Cameras(poses, cameras.intrinsics, 8, 8))
        return jnp.sum(weights * colors)

    with jax.enable_x64(True):
        check_grads(total, arguments, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_a_value_that_is_not_finite_stays_in_its_gaussian(rng):
    coefficients, means, cameras = make_scene(rng, 1, gaussians=4)
    means[0, 1], coefficients[2, 3, 0] = np.nan, np.inf

    def total(coefficients, means):
        g = means.shape[0]
        colors = colors_from_harmonics(coefficients, means, cameras)
        opaque = Gaussians(means, jnp.full((g, 3), 0.2), jnp.ones((g, 4)), jnp.ones(g), colors, jnp.ones(g, bool))
        rendering = rasterize(opaque, cameras, capacity=64)
        return jnp.sum(rendering.rgb), rendering.invalid

    gradients, invalid = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(coefficients, means)
    assert invalid == 2
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert [bool(np.any(np.asarray(g) != 0)) for g in gradient] == [False, True, False, True]


def test_each_side_has_its_colour():
    """Red along the first harmonic in x: bright seen along +x, dark seen along -x (the basis function is -x)."""
    cameras = turntable(2, size=16, elevation=0.0)  # at +x and at -x
    coefficients = np.zeros((1, 4, 3), np.float32)
    coefficients[0, 3, 0] = 0.5
    flat = Gaussians(
        np.zeros((1, 3), np.float32),
        np.full((1, 3), 0.2, np.float32),
        np.ones((1, 4), np.float32),
        np.full(1, 0.9, np.float32),
        colors_from_harmonics(coefficients, np.zeros((1, 3), np.float32), cameras),
        np.ones(1, bool),
    )
    rendering = rasterize(flat, cameras)
    red = np.asarray(rendering.rgb[..., 0] / rendering.alpha)[:, 8, 8]
    bend = 0.5 * np.sqrt(3 / (4 * np.pi))
    np.testing.assert_allclose(red, [0.5 + bend, 0.5 - bend], rtol=1e-5)


def test_wrong_shapes_are_named(rng):
    coefficients, means, cameras = make_scene(rng, 1, (2,))
    with pytest.raises(ValueError, match=r"\(2, 50, 3, 3\); expected \(1, 4, 9, 16\)"):
        colors_from_harmonics(coefficients[..., :3, :], means, cameras)
    with pytest.raises(ValueError, match=r"leading axes.*\(50, 3\) and \(2, 3\)"):
        colors_from_harmonics(coefficients[0], means[0], cameras)
