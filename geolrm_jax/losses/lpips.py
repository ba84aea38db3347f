"""LPIPS (Zhang et al. 2018): distances of VGG16 activations, weighted as people judge similarity."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from geolrm_jax.losses.photometric import mean_over_views
from geolrm_jax.models.vgg import VGG16, WIDTHS, Taps
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import AnyArray
from kernels_pallas.mesh import apart

# ImageNet's mean and deviation, moved from [0, 1] to the range [-1, 1] and rounded as in the published metric.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Lpips(nnx.Module):
    """The metric with its weights, which are never trained; images are (..., H, W, 3) in [-1, 1].

    The convolutions run in the compute dtype, normalisation and distances in at least float32. For a gradient only
    the activations and the target's features are kept. `weights/lpips.py` fills it from files.
    """

    def __init__(self, *, rngs: nnx.Rngs, precision: Precision):
        self.vgg = VGG16(rngs=rngs, precision=precision)
        self.heads = nnx.List([nnx.Param(jnp.full(width, 1.0 / width)) for width in WIDTHS])

    def features(self, images: Float[AnyArray, "*batch h w 3"]) -> Taps:
        """The five activations, each pixel's vector of unit length."""
        return tuple(_unit(tap) for tap in self._activations(images))

    def target_features(self, images: Float[AnyArray, "*batch h w 3"]) -> Taps:
        """Features of the pictures compared with, without gradient; computed once, whatever is compared."""
        return jax.lax.stop_gradient(self.features(jax.lax.stop_gradient(images)))

    def distance(self, images: Float[AnyArray, "*batch h w 3"], target_features: Taps) -> Float[Array, "*batch"]:
        """LPIPS of every image: weighted squared differences (their Eq. 1), mean over pixels, sum over activations."""
        parts = zip(self._activations(images), target_features, self.heads, strict=True)
        return sum(_difference(activation, target, head[...]) for activation, target, head in parts)

    def between(
        self, images: Float[Array, "b v h w 3"], targets: Float[Array, "b v h w 3"], valid: Bool[Array, "b v"]
    ) -> Float[Array, ""]:
        """The loss term: mean LPIPS of valid views, for images in [0, 1]; no gradient to the targets."""

        def distances(lpips, images, targets):
            return lpips.distance(2.0 * images - 1.0, lpips.target_features(2.0 * targets - 1.0))

        return mean_over_views(apart(distances, images, targets, shared=self, views=True), valid)

    def _activations(self, images: Float[AnyArray, "*batch h w 3"]) -> Taps:
        images = full(jnp.asarray(images))
        return self.vgg((images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype))


def _unit(activation: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h w c"]:
    """x / (|x| + 1e-10) over channels. Where x is all zero the gradient is NaN, which the ReLU before it discards."""
    x = full(activation)
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)


@jax.checkpoint
def _difference(
    activation: Float[Array, "*batch h w c"], target: Float[Array, "*batch h w c"], head: Float[Array, "c"]
) -> Float[Array, "*batch"]:
    return jnp.mean(jnp.sum(head * (_unit(activation) - target) ** 2, axis=-1), axis=(-2, -1))
