"""The differentiable Gaussian rasterizer."""

from geolrm_jax.rendering.capacity import Renderer
from geolrm_jax.rendering.rasterizer import count_pairs, rasterize

__all__ = ["Renderer", "count_pairs", "rasterize"]
