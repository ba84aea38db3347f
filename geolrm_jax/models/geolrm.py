"""The whole model: proposal, reconstruction, and both behind one call."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from geolrm_jax.models.gaussian_decoder import GaussianDecoderConfig
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.image_encoder import ImageEncoderConfig
from geolrm_jax.models.layers import Remat
from geolrm_jax.models.proposal import Padding, ProposalConfig, select_anchors
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors, Gaussians, Views

ProposalMode = Literal["evaluation", "training"]


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
        self.transformer = config.transformer.make(config.encoder.channels, len(config.encoder.levels), rngs, precision)
        self.decoder = config.decoder.make(config.transformer.width, rngs, precision)

    def __call__(
        self, anchors: Anchors, views: Views, *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> Gaussians:
        """Gaussians of the object that `views` (B, V) show; `train` and `key` as in `ProposalNetwork`."""
        tokens = self.transformer(anchors, views, self.encoder(views, train=train), key)
        return self.decoder(tokens, anchors)


@dataclasses.dataclass(frozen=True)
class GeoLRMConfig:
    """Both networks; the defaults are the paper's model."""

    proposal: ProposalConfig = ProposalConfig()
    reconstruction: ReconstructionConfig | None = ReconstructionConfig()
    """None leaves this network out: what the proposal stage trains."""
    padding: Padding = "masked"
    """Padding of the anchors is masked, or takes part as anchors at the origin (released)."""

    def make(self, rngs: nnx.Rngs, precision: Precision) -> "GeoLRM":
        """The module, with fresh parameters."""
        return GeoLRM(self, rngs=rngs, precision=precision)


class GeoLRM(nnx.Module):
    """Images to Gaussians in one forward pass."""

    def __init__(self, config: GeoLRMConfig, *, rngs: nnx.Rngs, precision: Precision):
        self.padding = config.padding
        self.proposal = config.proposal.make(rngs, precision)
        if config.reconstruction:
            self.reconstruction = config.reconstruction.make(rngs, precision)

    def __call__(
        self, views: Views, *, max_anchors: int, key: Key[Array, ""]
    ) -> tuple[Gaussians, Float[Array, "b g g g"]]:
        """Gaussians (B, max_anchors · per anchor) of posed views (B, V), and the occupancy logits of the proposal."""
        logits = self.proposal(views)
        return self.reconstruction(select_anchors(logits, max_anchors, key, self.padding), views), logits

    def propose(
        self, views: Views, *, max_anchors: int, key: Key[Array, ""], mode: ProposalMode = "evaluation"
    ) -> tuple[Anchors, Int[Array, "b"]]:
        """Anchors at the predicted occupied voxels, and how many of those there were; no gradient flows back.

        Args:
          views: (B, V) at the input size.
          max_anchors: of more occupied voxels a random subset is used.
          key: of the subset, and of dropout in training mode.
          mode: the proposal's batch statistics stay as they are, or it runs as in its own training (released).
        """
        if mode == "training":
            key, dropout_key = jax.random.split(key)
            logits = self.proposal(views, train=True, key=dropout_key)
        else:
            logits = self.proposal(views)
        logits = jax.lax.stop_gradient(logits)
        return select_anchors(logits, max_anchors, key, self.padding), jnp.sum(logits > 0, axis=(1, 2, 3))


def with_remat(config: Any, remat: Remat) -> Any:
    """A tree of config dataclasses with every field `remat` set."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changed = {name: with_remat(value, remat) for name, value in fields.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(config, **changed, **({"remat": remat} if "remat" in fields else {}))
