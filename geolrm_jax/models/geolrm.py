"""The whole model: proposal, reconstruction, and both behind one call."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from geolrm_jax.models.gaussian_decoder import GaussianDecoderConfig
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.image_encoder import ImageEncoderConfig
from geolrm_jax.models.proposal import ProposalConfig, select_anchors
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors, Gaussians, Views


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """The reconstruction network; the defaults are the paper's."""

    encoder: ImageEncoderConfig = ImageEncoderConfig()
    transformer: TransformerConfig = TransformerConfig(width=768, depth=16)
    decoder: GaussianDecoderConfig = GaussianDecoderConfig()

    def make(self, rngs: nnx.Rngs, precision: Precision) -> "ReconstructionNetwork":
        """The module, with fresh parameters."""
        return ReconstructionNetwork(self, rngs=rngs, precision=precision)


class ReconstructionNetwork(nnx.Module):
    """Sparse anchors through a transformer of their own, each token decoded into Gaussians (paper, Sec. 3.2-3.4)."""

    def __init__(self, config: ReconstructionConfig, *, rngs: nnx.Rngs, precision: Precision):
        self.encoder = config.encoder.make(rngs, precision)
        self.transformer = config.transformer.make(config.encoder.channels, self.encoder.levels, rngs, precision)
        self.decoder = config.decoder.make(config.transformer.width, rngs, precision)

    def __call__(self, anchors: Anchors, views: Views, *, train: bool = False) -> Gaussians:
        """Gaussians of the object that `views` (B, V) show."""
        tokens = self.transformer(anchors, views, self.encoder(views, train=train))
        return self.decoder(tokens, anchors)


@dataclasses.dataclass(frozen=True)
class GeoLRMConfig:
    """Both networks; the defaults are the paper's model."""

    proposal: ProposalConfig = ProposalConfig()
    reconstruction: ReconstructionConfig | None = ReconstructionConfig()
    """None leaves this network out: what the proposal stage trains."""

    def make(self, rngs: nnx.Rngs, precision: Precision) -> "GeoLRM":
        """The module, with fresh parameters."""
        return GeoLRM(self, rngs=rngs, precision=precision)


class GeoLRM(nnx.Module):
    """Images to Gaussians in one forward pass."""

    def __init__(self, config: GeoLRMConfig, *, rngs: nnx.Rngs, precision: Precision):
        self.proposal = config.proposal.make(rngs, precision)
        if config.reconstruction:
            self.reconstruction = config.reconstruction.make(rngs, precision)

    def __call__(
        self, views: Views, *, max_anchors: int, key: Key[Array, ""]
    ) -> tuple[Gaussians, Float[Array, "b g g g"]]:
        """Gaussians (B, max_anchors · per anchor) of posed views (B, V), and the occupancy logits of the proposal."""
        logits = self.proposal(views)
        return self.reconstruction(select_anchors(logits, max_anchors, key), views), logits

    def propose(self, views: Views, *, max_anchors: int, key: Key[Array, ""]) -> tuple[Anchors, Int[Array, "b"]]:
        """Anchors at the predicted occupied voxels, and how many of those there were.

        No gradient flows back, and the proposal's batch statistics stay as they are.
        """
        logits = jax.lax.stop_gradient(self.proposal(views))
        return select_anchors(logits, max_anchors, key), jnp.sum(logits > 0, axis=(1, 2, 3))
