"""One compiled rasterizer for many scenes: a capacity that only grows."""

from jaxtyping import Float

from geolrm_jax.rendering.rasterizer import count_pairs, rasterize, roomy
from geolrm_jax.scene import AnyArray, Cameras, Gaussians, Rendering


class Renderer:
    """Renders scene after scene with a capacity that holds the largest so far, half as much again.

    `rasterize` with capacity "auto" compiles anew for every size of scene; this does only when one does not fit.

    Args:
      background: of `rasterize`.
    """

    def __init__(self, background: Float[AnyArray, "..."] | None = None):
        self.background = background
        self.capacity = 1  # the least there is: a scene may be empty

    def make_room(self, gaussians: Gaussians, cameras: Cameras) -> None:
        """Grows the capacity if these pairs do not fit."""
        pairs = count_pairs(gaussians, cameras)
        if roomy(pairs) > self.capacity:
            self.capacity = roomy(pairs + pairs // 2)

    def __call__(self, gaussians: Gaussians, cameras: Cameras) -> Rendering:
        """The pictures; `make_room` comes first, else `Rendering.overflow` may not be zero."""
        return rasterize(gaussians, cameras, background=self.background, capacity=self.capacity)
