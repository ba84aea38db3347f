"""GeoLRM in JAX and Flax: posed images of an object in, 3D Gaussians out."""
