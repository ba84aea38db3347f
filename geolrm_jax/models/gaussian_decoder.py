"""From anchor tokens to 3D Gaussians (paper, Sec. 3.4)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from geolrm_jax.geometry.rotations import normalize
from geolrm_jax.models.layers import linear
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import Anchors, Gaussians

PARTS = (3, 1, 3, 4, 3)  # offset, opacity, scale, rotation, colour


@dataclasses.dataclass(frozen=True)
class GaussianDecoderConfig:
    """Ranges of the decoded Gaussians, in cube sides."""

    gaussians_per_anchor: int = 32
    offset_max: float = 0.2
    """Farthest that a Gaussian lies from its anchor on each axis."""
    offset: Literal["one_sided", "symmetric"] = "one_sided"
    """sigmoid(.) * offset_max (paper and released), or (2 sigmoid(.) - 1) * offset_max."""
    scale_max: float = 0.02
    """Largest standard deviation."""

    def make(self, width: int, rngs: nnx.Rngs, precision: Precision) -> "GaussianDecoder":
        """The module for tokens of `width`, with fresh parameters."""
        return GaussianDecoder(self, width, rngs=rngs, precision=precision)


class GaussianDecoder(nnx.Module):
    """A two-layer MLP; each token becomes `gaussians_per_anchor` Gaussians around its anchor."""

    def __init__(self, config: GaussianDecoderConfig, width: int, *, rngs: nnx.Rngs, precision: Precision):
        outputs = config.gaussians_per_anchor * sum(PARTS)
        self.config = config
        self.hidden = linear(width, outputs, rngs=rngs, precision=precision)
        self.out = linear(outputs, outputs, rngs=rngs, precision=precision)

    def __call__(self, tokens: Float[Array, "b n d"], anchors: Anchors) -> Gaussians:
        """Gaussians (B, N·per anchor, ...), those of padding masked out."""
        per_anchor = self.config.gaussians_per_anchor
        raw = full(self.out(jax.nn.silu(self.hidden(tokens))))
        raw = rearrange(raw, "b n (g c) -> b (n g) c", g=per_anchor)
        offset, opacity, scale, rotation, color = jnp.split(raw, [3, 4, 7, 11], axis=-1)
        centers = jnp.repeat(anchors.positions, per_anchor, axis=1)
        return Gaussians(
            means=centers + self.share(jax.nn.sigmoid(offset)) * self.config.offset_max,
            scales=jax.nn.sigmoid(scale) * self.config.scale_max,
            quats=normalize(rotation),
            opacities=jax.nn.sigmoid(opacity[..., 0]),
            colors=jnp.clip(color, -0.5, 0.5) + 0.5,
            mask=jnp.repeat(anchors.mask, per_anchor, axis=1),
        )

    def share(self, sigmoid: Float[Array, "b g 3"]) -> Float[Array, "b g 3"]:
        """Share of offset_max, in [0, 1] or [-1, 1]."""
        return 2.0 * sigmoid - 1.0 if self.config.offset == "symmetric" else sigmoid
