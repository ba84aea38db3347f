"""The differentiable Gaussian rasterizer."""
