"""Front-to-back blending of 2D Gaussians in tiles: the operation that hardware kernels implement.

An implementation is a module with `forward` and `backward`, as in reference.py; the rest, which is common to all, is
here: the choice, the derivative, and the sum of the pairs' gradients.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from kernels_pallas.rasterization import reference
from kernels_pallas.rasterization.shapes import TILE, Grid, Pairs

Implementation = Literal["auto", "xla"]
IMPLEMENTATIONS = {"xla": reference}


class Splats(NamedTuple):
    """Projected Gaussians.

    Attributes:
      means: x, y in pixels of the splat's own image.
      conics: (a, b, c) of the inverse covariance [[a, b], [b, c]].
      opacities: in [0, 1]; a splat that stands in a pair has at least 1/255.
      features: what is blended.
    """

    means: Float[Array, "n 2"]
    conics: Float[Array, "n 3"]
    opacities: Float[Array, "n"]
    features: Float[Array, "n c"]


def blend(
    splats: Splats, pairs: Pairs, grid: Grid, *, max_alpha: float = 0.999, implementation: str = "auto"
) -> tuple[Float[Array, "m h w c"], Float[Array, "m h w"]]:
    """Blends splats front to back in every pixel (Kerbl et al. 2023, Eq. 2-3).

    At a pixel centre p splat i of the tile has alpha_i = min(max_alpha, o_i exp(-(p - m_i)^T Q_i (p - m_i) / 2)), or
    none below 1/255; its weight is alpha_i T_i with the transmittance T_i = prod_{j<i} (1 - alpha_j). A pixel is
    finished before the splat that would bring its transmittance to 1e-4 or below.

    Args:
      splats: N of them, float32 or float64, all of one dtype.
      pairs: which splats stand in which tile, in which order.
      grid: the images and tiles.
      max_alpha: clamp of alpha, below one.
      implementation: "xla", or "auto" for the best on this platform.

    Returns:
      Weighted sums of the features (M, H, W, C) and the transmittance that remains (M, H, W). Differentiable in all
      fields of `splats`, summed in a fixed order: the same input gives the same bits.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}; expected 'auto' or one of {sorted(IMPLEMENTATIONS)}")
    name = "xla" if implementation == "auto" else implementation
    drawn = splats.opacities > 0
    log_opacity = jnp.log(jnp.where(drawn, splats.opacities, 1))
    table = jnp.concatenate([splats.means, splats.conics, log_opacity[:, None], splats.features], axis=-1)
    sums, transmittance = _blend(grid, max_alpha, name, table, pairs)
    return _untile(sums, grid), _untile(transmittance[:, None], grid)[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blend(grid, max_alpha, name, table, pairs):
    """(sums, transmittance) in tiles."""
    blended = _forward(grid, max_alpha, name)(table, pairs)
    return blended.sums, blended.transmittance


def _blend_forward(grid, max_alpha, name, table, pairs):
    blended = _forward(grid, max_alpha, name)(table, pairs)
    return (blended.sums, blended.transmittance), (table, pairs, blended)


def _blend_backward(grid, max_alpha, name, residuals, cotangents):
    table, pairs, blended = residuals
    by_slot = _backward(grid, max_alpha, name)(table, pairs, blended, *cotangents)
    summed = jax.ops.segment_sum(by_slot, pairs.splat, table.shape[0], indices_are_sorted=True)
    return summed, None


_blend.defvjp(_blend_forward, _blend_backward)


# A loop whose trip count depends on the data would, if batched, carry every element to the end of the longest: under
# vmap the elements are blended one after the other instead.


def _forward(grid, max_alpha, name):
    @jax.custom_batching.sequential_vmap
    def run(table, pairs):
        return IMPLEMENTATIONS[name].forward(table, pairs, grid, max_alpha)

    return run


def _backward(grid, max_alpha, name):
    @jax.custom_batching.sequential_vmap
    def run(table, pairs, blended, sums_bar, transmittance_bar):
        return IMPLEMENTATIONS[name].backward(table, pairs, grid, max_alpha, blended, sums_bar, transmittance_bar)

    return run


def _untile(tiles: Float[Array, "tiles c px"], grid: Grid) -> Float[Array, "m h w c"]:
    """Images of tiles, without the pixels that pad the last row and column."""
    images = rearrange(
        tiles, "(m r q) c (y x) -> m (r y) (q x) c", m=grid.images, r=grid.rows, q=grid.columns, y=TILE, x=TILE
    )
    return images[:, : grid.height, : grid.width]
