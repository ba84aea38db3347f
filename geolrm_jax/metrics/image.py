"""PSNR and SSIM of images in [0, 1]; any leading axes, one number per image. LPIPS is `losses/lpips.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geolrm_jax.precision import full
from geolrm_jax.scene import AnyArray

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def psnr(image: Float[AnyArray, "*batch h w c"], reference: Float[AnyArray, "*batch h w c"]) -> Float[Array, "*batch"]:
    """Peak signal-to-noise ratio in dB, -10 log10 MSE, over all pixels and channels of an image.

    The MSE is held above 1e-10: an exact copy counts 100 dB, so that averages stay finite.
    """
    error = jnp.mean((full(jnp.asarray(image)) - full(jnp.asarray(reference))) ** 2, axis=(-3, -2, -1))
    return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(image: Float[AnyArray, "*batch h w c"], reference: Float[AnyArray, "*batch h w c"]) -> Float[Array, "*batch"]:
    """Structural similarity (Wang et al. 2004, Eq. 13), data range 1.

    Gaussian windows of 11 pixels and sigma 1.5 that lie wholly inside the image; mean over windows, then channels.

    Raises:
      ValueError: if the image is smaller than a window.
    """
    if min(image.shape[-3:-1]) < SSIM_WINDOW:
        size = "x".join(map(str, image.shape[-3:-1]))
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {size}")
    x, y = full(jnp.asarray(image)), full(jnp.asarray(reference))
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x, variance_y = _window_mean(x * x) - mean_x**2, _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def _window_mean(x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h2 w2 c"]:
    """Gaussian-weighted means: shifted sums, exact in float32 where a convolution might run in TF32."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights = weights / weights.sum()
    for axis in (-3, -2):
        size = x.shape[axis] - SSIM_WINDOW + 1
        shifted = (jax.lax.slice_in_dim(x, k, k + size, axis=x.ndim + axis) for k in range(SSIM_WINDOW))
        x = sum(float(weight) * part for weight, part in zip(weights, shifted, strict=True))
    return x
