"""The proposal network (paper, Sec. 3.1): which voxels hold a surface, and the anchors drawn from them."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from geolrm_jax.geometry.voxels import grid_indices, voxel_positions
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.image_encoder import ImageEncoderConfig
from geolrm_jax.models.layers import linear
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors, Views
from kernels_pallas.mesh import apart

Padding = Literal["masked", "origin"]


@dataclasses.dataclass(frozen=True)
class ProposalConfig:
    """The proposal network; the defaults are the paper's."""

    encoder: ImageEncoderConfig = ImageEncoderConfig()
    transformer: TransformerConfig = TransformerConfig()
    coarse_grid: int = 16
    """Tokens per axis."""
    fine_grid: int = 128
    """Voxels per axis; a multiple of coarse_grid."""

    def make(self, rngs: nnx.Rngs, precision: Precision) -> "ProposalNetwork":
        """The module, with fresh parameters."""
        return ProposalNetwork(self, rngs=rngs, precision=precision)


class ProposalNetwork(nnx.Module):
    """Dense coarse anchors through a transformer; each token becomes the logits of its block of fine voxels."""

    def __init__(self, config: ProposalConfig, *, rngs: nnx.Rngs, precision: Precision):
        if config.fine_grid % config.coarse_grid:
            raise ValueError(f"fine_grid {config.fine_grid} must be a multiple of coarse_grid {config.coarse_grid}")
        self.config = config
        self.encoder = config.encoder.make(rngs, precision)
        self.transformer = config.transformer.make(config.encoder.channels, len(config.encoder.levels), rngs, precision)
        block = (config.fine_grid // config.coarse_grid) ** 3
        self.upsample = linear(config.transformer.width, block, rngs=rngs, precision=precision)

    def __call__(
        self, views: Views, *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> Float[Array, "b g g g"]:
        """Occupancy logits of the fine grid, C order over (x, y, z).

        Args:
          views: (B, V) at the input size.
          train: use and update batch statistics.
          key: turns dropout on.
        """
        coarse, sub = self.config.coarse_grid, self.config.fine_grid // self.config.coarse_grid
        anchors = dense_anchors(coarse, self.config.fine_grid, views.rgb.shape[0])
        tokens = self.transformer(anchors, views, self.encoder(views, train=train), key)
        logits = self.upsample(tokens).astype(tokens.dtype)
        return rearrange(logits, "b (x y z) (i j k) -> b (x i) (y j) (z k)", x=coarse, y=coarse, i=sub, j=sub)


def dense_anchors(coarse: int, fine: int, scenes: int) -> Anchors:
    """Every node of a `coarse`^3 lattice spanning the cube; its RoPE index is its place on the fine grid."""
    indices = grid_indices(coarse)
    positions = voxel_positions(indices, coarse)
    voxels = indices * (fine - 1) // (coarse - 1)
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (scenes, *x.shape)), (positions, voxels))
    return Anchors(*batch, mask=jnp.ones((scenes, coarse**3), bool))


def select_anchors(
    logits: Float[Array, "b g g g"], count: int, key: Key[Array, ""], padding: Padding = "masked"
) -> Anchors:
    """Anchors at the voxels whose logit is positive.

    Args:
      logits: occupancy of the fine grid.
      count: static number of anchors; fewer occupied voxels are padded with a mask, of more a uniform random
        subset is kept.
      key: of the subset.
      padding: masked, or anchors at the origin like any other (released).

    Returns:
      Valid anchors first, in C order of their voxels; masked padding sits at voxel 0.
    """
    grid = logits.shape[-1]
    flat = logits.reshape(logits.shape[0], -1)
    cells = flat.shape[-1]
    priority = jnp.where(flat > 0, jax.random.uniform(key, flat.shape, minval=0.5), 0.0)
    chosen = apart(lambda _, priority: _first_cells(priority, min(count, cells)), priority)
    chosen = jnp.pad(chosen, ((0, 0), (0, count - chosen.shape[-1])), constant_values=cells)
    mask = chosen < cells
    voxels = jnp.stack(jnp.unravel_index(jnp.where(mask, chosen, 0), (grid, grid, grid)), axis=-1).astype(jnp.int32)
    positions = voxel_positions(voxels, grid)
    if padding == "origin":
        voxels = jnp.where(mask[..., None], voxels, (grid - 1) // 2)
        return Anchors(jnp.where(mask[..., None], positions, 0.0), voxels, jnp.ones_like(mask))
    return Anchors(positions, voxels, mask)


def _first_cells(priority: Float[Array, "b cells"], count: int) -> Int[Array, "b count"]:
    """Numbers of the `count` cells of highest positive priority, in order; where there are fewer, one past the last."""
    best, chosen = jax.lax.top_k(priority, count)
    return jnp.sort(jnp.where(best > 0, chosen, priority.shape[-1]), axis=-1)
