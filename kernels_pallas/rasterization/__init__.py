"""Blending of sorted Gaussians in tiles."""
