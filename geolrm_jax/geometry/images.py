"""Posed images at another size (NumPy, on the host): the one resizer of training data, evaluation and inference."""

import jax
import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from geolrm_jax.geometry.cameras import resize
from geolrm_jax.scene import Views


def resize_views(views: Views, height: int, width: int) -> Views:
    """Views (...,) of any leading axes at another size, cameras with them.

    Colours and coverage are premultiplied and resized by a triangle filter as wide as the larger pixel (antialiased
    bilinear); depth is that of the nearest pixel. Leaves are NumPy's afterwards; views that have the size already are
    returned as they are.
    """
    if views.alpha.shape[-2:] == (height, width):
        return views
    views = jax.tree.map(np.asarray, views)
    lead = views.alpha.shape[:-2]
    rgb = np.empty((*lead, height, width, 3), np.float32)
    alpha = np.empty((*lead, height, width), np.float32)
    for index in np.ndindex(lead):
        alpha[index] = resize_channel(views.alpha[index], height, width)
        for channel in range(3):
            rgb[index][..., channel] = resize_channel(views.rgb[index][..., channel], height, width)
    depth = resize_depth(views.depth, height, width)
    return Views(resize(views.cameras, height, width), rgb, alpha, depth, views.valid)


def resize_channel(image: Float[np.ndarray, "h w"], height: int, width: int) -> Float32[np.ndarray, "h2 w2"]:
    """Antialiased bilinear resizing of one channel in floating point."""
    channel = Image.fromarray(np.ascontiguousarray(image, np.float32))
    return np.asarray(channel.resize((width, height), Image.Resampling.BILINEAR))


def resize_depth(depth: Float[np.ndarray, "*batch h w"], height: int, width: int) -> Float[np.ndarray, "*batch h2 w2"]:
    """The depth of the nearest pixel."""
    rows = ((np.arange(height) + 0.5) * depth.shape[-2] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * depth.shape[-1] / width).astype(int)
    return depth[..., rows[:, None], columns]
