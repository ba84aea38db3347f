"""DINOv2's vision transformer (Oquab et al. 2023): patch tokens of an image of any size that is a multiple of 14."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from geolrm_jax.models.attention import attention
from geolrm_jax.models.layers import Remat, linear, scan_blocks, stack
from geolrm_jax.precision import Precision, full

PATCH = 14
PositionRule = Literal["scale_factor", "size", "size_antialiased"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A DINOv2 backbone; the defaults are ViT-B/14."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    pretrained_grid: int = 37
    """Side, in patches, of the image that the position embedding was made for."""
    registers: int = 0
    """Tokens between class token and patches, without a position (Darcet et al. 2024); the published models have 4."""
    position_rule: PositionRule = "scale_factor"
    """How positions are interpolated: by the factor (h + 0.1) / grid, as DINOv2's own code and the released GeoLRM do;
    to the size, as newer ports do; to the size with antialiasing, as models with registers were made."""
    layer_scale: float = 1.0
    """Initial value of LayerScale."""
    remat: Remat = "full"
    """What the backward pass computes again of a block: nothing, all but products with parameters, or all."""

    def make(self, rngs: nnx.Rngs, precision: Precision) -> "ViT":
        """The module, with fresh parameters."""
        return ViT(self, rngs=rngs, precision=precision)


def vit(size: Literal["small", "base", "large"], *, registers: int = 0) -> ViTConfig:
    """ViT-S/14, ViT-B/14 or ViT-L/14 as published, with the position rule its weights were trained for.

    The published models with registers have 4.
    """
    width, depth, heads = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    rule = "size_antialiased" if registers else "scale_factor"
    return ViTConfig(width=width, depth=depth, heads=heads, registers=registers, position_rule=rule)


def _vit_linear(inputs: int, outputs: int, rngs: nnx.Rngs, precision: Precision) -> nnx.Linear:
    init = jax.nn.initializers.truncated_normal(0.02)
    zeros = jax.nn.initializers.zeros
    return linear(inputs, outputs, rngs=rngs, precision=precision, kernel_init=init, bias_init=zeros)


class ViTBlock(nnx.Module):
    """Pre-norm attention and MLP, each scaled per channel (LayerScale)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, precision: Precision):
        width = config.width
        self.heads = config.heads
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, dtype=precision.wide, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, dtype=precision.wide, rngs=rngs)
        self.query, self.key, self.value, self.out = (_vit_linear(width, width, rngs, precision) for _ in range(4))
        self.fc1 = _vit_linear(width, config.mlp_ratio * width, rngs, precision)
        self.fc2 = _vit_linear(config.mlp_ratio * width, width, rngs, precision)
        self.scale1 = nnx.Param(jnp.full(width, config.layer_scale, jnp.float32))
        self.scale2 = nnx.Param(jnp.full(width, config.layer_scale, jnp.float32))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = self.norm1(x)
        q, k, v = (rearrange(p(y), "b n (k c) -> b n k c", k=self.heads) for p in (self.query, self.key, self.value))
        y = rearrange(attention(q, k, v, jnp.ones(x.shape[:2], bool)), "b n k c -> b n (k c)")
        x = x + self.scale1[...] * self.out(y)
        return x + self.scale2[...] * self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """Patch embedding, class token, interpolated positions, registers, blocks, final LayerNorm."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, precision: Precision):
        width = config.width
        normal = jax.nn.initializers.truncated_normal(0.02)
        self.config = config
        self.patches = nnx.Conv(
            3,
            width,
            (PATCH, PATCH),
            PATCH,
            padding="VALID",
            kernel_init=normal,
            dtype=precision.dtype,
            precision=precision.products,
            rngs=rngs,
        )
        self.class_token = nnx.Param(normal(rngs.params(), (width,)))
        self.positions = nnx.Param(normal(rngs.params(), (1 + config.pretrained_grid**2, width)))
        # Stands for hidden patches in DINOv2's own training only: kept so that a checkpoint comes back whole.
        self.mask_token = nnx.Param(jnp.zeros(width))
        if config.registers:
            self.registers = nnx.Param(1e-6 * jax.random.normal(rngs.params(), (config.registers, width)))
        self.blocks = stack(lambda rngs: ViTBlock(config, rngs=rngs, precision=precision), config.depth, rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=precision.wide, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h14 w14 d"]:
        """Patch tokens of normalised images, as a map; class token and registers take part but are not returned."""
        x = self.norm(scan_blocks(self.blocks, self.embed(images), remat=self.config.remat))
        return rearrange(x[:, 1 + self.config.registers :], "b (r c) d -> b r c d", r=images.shape[1] // PATCH)

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Class token, registers and patches before the first block."""
        x = full(self.patches(images))
        positions = interpolate_positions(self.positions[...], *x.shape[1:3], self.config.position_rule)
        x = rearrange(x, "b r c d -> b (r c) d") + positions[1:]
        first = self.class_token[...] + positions[:1]
        if self.config.registers:
            first = jnp.concatenate([first, self.registers[...]])
        return jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], *first.shape)), x], axis=1)


def interpolate_positions(
    positions: Float[Array, "n d"], rows: int, columns: int, rule: PositionRule
) -> Float[Array, "m d"]:
    """Position embeddings (class token, then a square grid) for a `rows` x `columns` grid of patches.

    torch's bicubic, which `jax.image.resize` does not offer. The grid that the embedding was made for is returned
    unchanged.
    """
    grid = int((positions.shape[0] - 1) ** 0.5)
    if (rows, columns) == (grid, grid):
        return positions
    patches = positions[1:].reshape(grid, grid, -1)
    along = _antialiased if rule == "size_antialiased" else functools.partial(_bicubic, rule=rule)
    patches = jnp.einsum("ri,cj,ijd->rcd", along(grid, rows), along(grid, columns), patches, precision="highest")
    return jnp.concatenate([positions[:1], patches.reshape(rows * columns, -1)])


def _bicubic(source: int, target: int, *, rule: PositionRule) -> np.ndarray:
    """The (target, source) matrix of torch's bicubic interpolation along one axis: borders are repeated."""
    step = source / (target + 0.1) if rule == "scale_factor" else source / target
    x = (np.arange(target) + 0.5) * step - 0.5
    taps = np.floor(x).astype(int)[:, None] + np.arange(-1, 3)
    matrix = np.zeros((target, source), np.float32)
    rows = np.broadcast_to(np.arange(target)[:, None], taps.shape)
    np.add.at(matrix, (rows, taps.clip(0, source - 1)), _cubic(np.abs(x[:, None] - taps), a=-0.75))
    return matrix


def _antialiased(source: int, target: int) -> np.ndarray:
    """The (target, source) matrix of torch's antialiased bicubic interpolation along one axis.

    Keys' cubic with a = -0.5, widened by the step where the grid shrinks; what falls outside is left out and the rest
    normalised.
    """
    step = source / target
    x = (np.arange(target) + 0.5) * step - 0.5
    weights = _cubic(np.abs(x[:, None] - np.arange(source)) / max(step, 1.0), a=-0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' (1981) cubic convolution kernel with slope `a` at distance 1; zero from 2 on."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
