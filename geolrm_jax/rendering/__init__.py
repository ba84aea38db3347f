"""The differentiable Gaussian rasterizer."""

from geolrm_jax.rendering.capacity import Renderer
from geolrm_jax.rendering.rasterizer import count_pairs, rasterize, rasterize_sharded
from geolrm_jax.rendering.spherical_harmonics import colors_from_harmonics

__all__ = ["Renderer", "colors_from_harmonics", "count_pairs", "rasterize", "rasterize_sharded"]
