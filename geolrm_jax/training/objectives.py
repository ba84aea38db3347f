"""What is trained: each objective says which networks it needs, which it trains, and its losses.

A fork's own objective is a frozen dataclass derived from `Objective`, named in a config.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from geolrm_jax.losses.depth import DepthMean, edge_aware_log_l1, total_variation
from geolrm_jax.losses.lpips import Lpips
from geolrm_jax.losses.occupancy import Counting, affinity, cross_entropy
from geolrm_jax.losses.photometric import alpha_mse, image_mse, mean_over_views
from geolrm_jax.models.geolrm import GeoLRM, GeoLRMConfig, ProposalMode
from geolrm_jax.precision import Precision
from geolrm_jax.rendering import rasterize_sharded
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.sharding import ROWS, VIEWS
from geolrm_jax.scene import Batch, Gaussians, Rendering, Views
from geolrm_jax.weights.lpips import load_lpips

Losses = Mapping[str, Array]
Metrics = Mapping[str, Array]


class Objective(abc.ABC):
    """Members that the step and the loop use."""

    trains: ClassVar[tuple[str, ...]]
    """Top-level names of the parameters that get gradients; the others stay frozen."""

    def networks(self, model: GeoLRMConfig) -> GeoLRMConfig:
        """The part of the model that the objective runs: all of it unless said otherwise."""
        return model

    def constants(self, precision: Precision) -> Any:
        """Arrays that the losses need besides parameters, as a pytree; loaded once."""
        return None

    def abstract_constants(self, precision: Precision) -> Any:
        """Shapes of what `constants` gives when all that it may read is there; nothing is read."""
        return None

    @abc.abstractmethod
    def losses(self, model: GeoLRM, constants: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Losses, Metrics]:
        """Weighted losses by name, to be summed, and metrics; `batch.inputs` holds the drawn number of views."""

    def grown(self) -> "Objective":
        """The same with twice the static capacities, for when a metric named overflow is not zero."""
        raise ValueError(f"{type(self).__name__} reports overflow but has no capacity to double")


@dataclasses.dataclass(frozen=True)
class ProposalObjective(Objective):
    """Occupancy of the fine grid (specification, section 3)."""

    cross_entropy: float = 1.0
    """Weight of the binary cross-entropy."""
    affinity: float = 1.0
    """Weight of the scene-class affinity."""
    counting: Counting = "scene"
    """Soft counts of the affinity per scene (ours) or over the batch (released)."""
    metric_logit: float = 0.0
    """Voxels above it count as occupied in the metrics; the released code's stands at 0.5."""

    trains: ClassVar = ("proposal",)

    def networks(self, model: GeoLRMConfig) -> GeoLRMConfig:
        """The proposal network alone."""
        return dataclasses.replace(model, reconstruction=None)

    def losses(self, model: GeoLRM, constants: None, batch: Batch, key: Key[Array, ""]) -> tuple[Losses, Metrics]:
        """Cross-entropy and affinity; metrics at `metric_logit`."""
        logits = model.proposal(batch.inputs, train=True, key=key)
        losses = {
            "cross_entropy": self.cross_entropy * cross_entropy(logits, batch.occupancy),
            "affinity": self.affinity * affinity(logits, batch.occupancy, self.counting),
        }
        predicted = logits > self.metric_logit
        hits = jnp.sum(predicted & batch.occupancy)
        metrics = {
            "precision": hits / jnp.maximum(predicted.sum(), 1),
            "recall": hits / jnp.maximum(batch.occupancy.sum(), 1),
            "iou": hits / jnp.maximum(jnp.sum(predicted | batch.occupancy), 1),
        }
        return losses, metrics


@dataclasses.dataclass(frozen=True)
class ReconstructionObjective(Objective):
    """Renders of the Gaussians on the anchors that the frozen proposal predicts (specification, section 4)."""

    image: float = 1.0
    """Weight of the image MSE."""
    lpips: float = 2.0
    """Weight of LPIPS; without lpips_weights the term is off."""
    lpips_weights: str | None = None
    """A safetensors file with VGG16 and the LPIPS heads."""
    alpha: float = 1.0
    """Weight of the coverage MSE."""
    depth: float = 0.2
    """Weight of the edge-aware log-L1 of depth."""
    total_variation: float = 0.05
    """Weight of the total variation of depth."""
    depth_mean: DepthMean = "surface"
    """The depth loss is divided by the pixels with measured depth (released) or by all (paper)."""
    rendered_depth: Literal["accumulated", "expected"] = "accumulated"
    """Depth that is compared: the sum of weight times z (released), or that divided by alpha."""
    depth_pixels: Literal["measured", "covered"] = "measured"
    """The depth loss counts pixels with measured depth, or with alpha (released: missing depth pulls to zero)."""
    background: Literal["scene", "batch"] = "scene"
    """A random background for every scene, or one for the whole batch (released)."""
    compositing: Literal["once", "twice"] = "once"
    """Targets are laid over the background once, or the result once more with the same alpha (released)."""
    proposal_mode: ProposalMode = "evaluation"
    """The frozen proposal's batch statistics and dropout: as in evaluation, or as in training (released)."""
    max_anchors: int = 4096
    """Anchors per object; of more occupied voxels a random subset is used."""
    pairs_per_gaussian: float = 4.0
    """Capacity of the rasterizer: (Gaussian, tile) pairs per Gaussian and view; doubled when it overflows."""

    trains: ClassVar = ("reconstruction",)

    def constants(self, precision: Precision) -> Lpips | None:
        """LPIPS, if it has a weight and a file is given."""
        if self.lpips and self.lpips_weights:
            return load_lpips(self.lpips_weights, precision)[0]
        if self.lpips:
            logging.notice("reconstruction: no LPIPS weights file, the term is off")
        return None

    def abstract_constants(self, precision: Precision) -> Lpips | None:
        """LPIPS, unless its weight is zero."""
        return jax.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0), precision=precision)) if self.lpips else None

    def losses(self, model: GeoLRM, constants: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Losses, Metrics]:
        """Losses over all target views, over a random background."""
        anchor_key, background_key, dropout_key = jax.random.split(key, 3)
        anchors, occupied = model.propose(
            batch.inputs, max_anchors=self.max_anchors, key=anchor_key, mode=self.proposal_mode
        )
        gaussians = model.reconstruction(anchors, batch.inputs, train=True, key=dropout_key)

        targets = batch.targets
        background = self.draw_background(targets, background_key)
        pictures = self.composite(targets, background[..., None, None, :])
        rendered = self.render(gaussians, targets, background)
        losses = self.terms(gaussians, rendered, targets, pictures, constants)
        mse = jax.lax.stop_gradient(mean_over_views((rendered.rgb - pictures) ** 2, targets.valid))
        metrics = {
            "psnr": -10.0 * jnp.log10(mse),
            "anchors": jnp.mean(jnp.minimum(occupied, self.max_anchors), dtype=jnp.float32),
            "anchors_dropped": jnp.mean(jnp.maximum(occupied - self.max_anchors, 0), dtype=jnp.float32),
            "overflow": rendered.overflow,
            "invalid_gaussians": rendered.invalid,
        }
        return losses, metrics

    def render(self, gaussians: Gaussians, targets: Views, background: Float[Array, "b v 3"]) -> Rendering:
        """The Gaussians (B, G), seen by the cameras of the targets (B, V)."""
        return rasterize_sharded(
            gaussians,
            targets.cameras,
            scene_axes=ROWS,
            view_axes=VIEWS,
            background=background,
            depth=self.rendered_depth,
            capacity=int(self.pairs_per_gaussian * gaussians.means.shape[1] * targets.valid.size),
        )

    def terms(
        self,
        gaussians: Gaussians,
        rendered: Rendering,
        targets: Views,
        pictures: Float[Array, "b v h w 3"],
        constants: Any,
    ) -> Losses:
        """The weighted losses by name; a fork adds its own.

        Args:
          gaussians: (B, G).
          rendered: they, seen by the targets' cameras.
          targets: (B, V).
          pictures: the targets over the background of the renders.
          constants: LPIPS, if it is on.
        """
        counted = targets.depth > 0 if self.depth_pixels == "measured" else targets.alpha > 0
        measured = counted & targets.valid[..., None, None]
        losses = {
            "image": self.image * image_mse(rendered.rgb, pictures, targets.valid),
            "alpha": self.alpha * alpha_mse(rendered.alpha, targets.alpha, targets.valid),
            "depth": self.depth
            * edge_aware_log_l1(rendered.depth, targets.depth, pictures, measured, targets.valid, self.depth_mean),
            "total_variation": self.total_variation * total_variation(rendered.depth, targets.valid),
        }
        if constants is not None:
            losses["lpips"] = self.lpips * constants.between(rendered.rgb, pictures, targets.valid)
        return losses

    def draw_background(self, targets: Views, key: Key[Array, ""]) -> Float[Array, "b v 3"]:
        """Uniform colours, the same in all views of a scene."""
        scenes, views = targets.valid.shape
        drawn = jax.random.uniform(key, (scenes if self.background == "scene" else 1, 1, 3))
        return jnp.broadcast_to(drawn, (scenes, views, 3))

    def composite(self, targets: Views, background: Float[Array, "b v 1 1 3"]) -> Float[Array, "b v h w 3"]:
        """The pictures that renders are compared with."""
        pictures = targets.over(background)
        if self.compositing == "twice":
            pictures = dataclasses.replace(targets, rgb=pictures * targets.alpha[..., None]).over(background)
        return pictures

    def grown(self) -> "ReconstructionObjective":
        """Twice the pairs."""
        return dataclasses.replace(self, pairs_per_gaussian=2 * self.pairs_per_gaussian)
