"""Layouts of convolutions against torch's own layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.weights.names import CONVOLUTION, TRANSPOSED_CONVOLUTION

torch = pytest.importorskip("torch")


def assert_equal(module, layout, layer, images):
    ours = module(jnp.asarray(images.transpose(0, 2, 3, 1)), layout.here(layer.weight.detach().numpy()))
    theirs = layer(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(np.asarray(ours).transpose(0, 3, 1, 2), theirs, atol=2e-6)


def test_transposed_convolution_of_the_high_level(rng):
    def module(x, kernel):
        layer = nnx.ConvTranspose(
            5, 7, (4, 4), (2, 2), padding="SAME", use_bias=False, precision=jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0)
        )
        layer.kernel[...] = jnp.asarray(kernel)
        return layer(x)

    layer = torch.nn.ConvTranspose2d(5, 7, 4, stride=2, padding=1, bias=False)
    images = rng.standard_normal((2, 5, 3, 4)).astype(np.float32)
    assert_equal(module, TRANSPOSED_CONVOLUTION, layer, images)


def test_convolution_of_the_low_level(rng):
    def module(x, kernel):
        layer = nnx.Conv(
            9, 6, (4, 4), (4, 4), padding="VALID", use_bias=False, precision=jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0)
        )
        layer.kernel[...] = jnp.asarray(kernel)
        return layer(x)

    images = rng.standard_normal((2, 9, 8, 12)).astype(np.float32)
    assert_equal(module, CONVOLUTION, torch.nn.Conv2d(9, 6, 4, stride=4, bias=False), images)
