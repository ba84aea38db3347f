import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from geolrm_jax.metrics.image import psnr, ssim


def pictures(rng, *shape):
    """A smooth picture and a noisy copy."""
    image = gaussian_filter(rng.uniform(size=shape), 1.5, axes=(-3, -2))
    noisy = np.clip(image + rng.normal(scale=0.05, size=shape), 0, 1)
    return image.astype(np.float32), noisy.astype(np.float32)


def scipy_ssim(x, y):
    """Wang et al. with SciPy's filter in float64; truncate 3.5 sigma gives 11 taps, the crop leaves whole windows."""

    def blur(values):
        return gaussian_filter(values, 1.5, truncate=3.5, axes=(0, 1))[5:-5, 5:-5]

    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = blur(x), blur(y)
    sxx, syy, sxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    maps = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sxx + syy + c2))
    return maps.mean(axis=(0, 1)).mean()


def test_psnr_over_leading_axes(rng):
    x, y = pictures(rng, 2, 3, 14, 17, 3)
    expected = 10 * np.log10(1 / np.mean((x.astype(np.float64) - y) ** 2, axis=(2, 3, 4)))
    assert expected.shape == (2, 3)
    np.testing.assert_allclose(psnr(x, y), expected, rtol=1e-5)


def test_psnr_of_a_known_error_and_of_a_copy():
    image = np.full((4, 4, 3), 0.5, np.float32)
    assert float(psnr(image + np.float32(0.1), image)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(image, image)) == pytest.approx(100.0)


def test_ssim_against_scipy(rng):
    x, y = pictures(rng, 2, 33, 24, 3)
    expected = [scipy_ssim(a, b) for a, b in zip(x, y, strict=True)]
    assert 0.3 < expected[0] < 0.95
    np.testing.assert_allclose(ssim(x, y), expected, atol=1e-5)
    np.testing.assert_allclose(ssim(x, x), 1.0, atol=1e-6)
    np.testing.assert_allclose(ssim(x, y), ssim(y, x), atol=1e-6)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    x, y = np.zeros((12, 12, 3), np.float32), np.ones((12, 12, 3), np.float32)
    assert float(ssim(x, y)) == pytest.approx(0.01**2 / (1 + 0.01**2), rel=1e-3)


def test_bfloat16_pictures_are_compared_in_float32(rng):
    x, y = (jnp.asarray(p, jnp.bfloat16) for p in pictures(rng, 16, 16, 3))
    assert psnr(x, y).dtype == jnp.float32
    np.testing.assert_allclose(ssim(x, y), scipy_ssim(np.asarray(x), np.asarray(y)), atol=1e-5)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 10x32"):
        jax.eval_shape(ssim, jnp.zeros((10, 32, 3)), jnp.zeros((10, 32, 3)))
