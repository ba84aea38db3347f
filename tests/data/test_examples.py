"""Posed images at another size."""

import numpy as np

from geolrm_jax.data.examples import make_views, resize_images
from geolrm_jax.data.folder import read_views


def test_images_resized_in_eight_bits_are_the_resized_images(real_renders):
    """Premultiplied colours and alpha to within rounding to 8 bits, depth and cameras to the bit."""
    images = read_views(real_renders / "basket", (0, 7))
    small = resize_images(images, 112)
    stored, direct = make_views(small, (112, 112)), make_views(images, (112, 112))
    np.testing.assert_allclose(stored.alpha, direct.alpha, atol=0.51 / 255)
    np.testing.assert_allclose(stored.rgb, direct.rgb, atol=1.02 / 255)
    np.testing.assert_array_equal(stored.depth, direct.depth)
    np.testing.assert_array_equal(small.cameras.intrinsics, direct.cameras.intrinsics)
    assert small.rgba.shape == (2, 112, 112, 4) and resize_images(images, None) is images
