"""The differentiable Gaussian rasterizer."""

from geolrm_jax.rendering.rasterizer import count_pairs, rasterize

__all__ = ["count_pairs", "rasterize"]
