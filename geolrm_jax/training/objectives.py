"""What is trained: each objective says which networks it needs, which it trains, and its losses.

A fork's own objective is a frozen dataclass derived from `Objective`, named in a config.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from geolrm_jax.losses.depth import DepthMean, edge_aware_log_l1, total_variation
from geolrm_jax.losses.lpips import Lpips, load_lpips
from geolrm_jax.losses.occupancy import Counting, affinity, cross_entropy
from geolrm_jax.losses.photometric import alpha_mse, image_mse, mean_over_views
from geolrm_jax.models.geolrm import GeoLRM, GeoLRMConfig
from geolrm_jax.precision import Precision
from geolrm_jax.rendering import rasterize
from geolrm_jax.runtime import logging
from geolrm_jax.scene import Batch

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

    trains: ClassVar = ("proposal",)

    def networks(self, model: GeoLRMConfig) -> GeoLRMConfig:
        """The proposal network alone."""
        return dataclasses.replace(model, reconstruction=None)

    def losses(self, model: GeoLRM, constants: None, batch: Batch, key: Key[Array, ""]) -> tuple[Losses, Metrics]:
        """Cross-entropy and affinity; metrics at logit 0."""
        logits = model.proposal(batch.inputs, train=True)
        losses = {
            "cross_entropy": self.cross_entropy * cross_entropy(logits, batch.occupancy),
            "affinity": self.affinity * affinity(logits, batch.occupancy, self.counting),
        }
        predicted = logits > 0
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
    max_anchors: int = 4096
    """Anchors per object; of more occupied voxels a random subset is used."""
    pairs_per_gaussian: float = 4.0
    """Capacity of the rasterizer: (Gaussian, tile) pairs per Gaussian and view; doubled when it overflows."""

    trains: ClassVar = ("reconstruction",)

    def constants(self, precision: Precision) -> Lpips | None:
        """LPIPS, if a weights file is given."""
        if self.lpips_weights:
            return load_lpips(self.lpips_weights, precision)[0]
        logging.notice("reconstruction: no LPIPS weights file, the term is off")
        return None

    def losses(self, model: GeoLRM, constants: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Losses, Metrics]:
        """Losses over all target views, each scene over a random background of its own."""
        anchor_key, background_key = jax.random.split(key)
        anchors, occupied = model.propose(batch.inputs, max_anchors=self.max_anchors, key=anchor_key)
        gaussians = model.reconstruction(anchors, batch.inputs, train=True)

        targets = batch.targets
        background = jax.random.uniform(background_key, (targets.rgb.shape[0], 1, 3))
        pictures = targets.over(background[:, :, None, None])
        views = targets.valid.size
        capacity = int(self.pairs_per_gaussian * gaussians.means.shape[1] * views)
        background = jnp.broadcast_to(background, (*targets.valid.shape, 3))
        rendered = rasterize(
            gaussians, targets.cameras, background=background, depth=self.rendered_depth, capacity=capacity
        )

        measured = (targets.depth > 0) & targets.valid[..., None, None]
        losses = {
            "image": self.image * image_mse(rendered.rgb, pictures, targets.valid),
            "alpha": self.alpha * alpha_mse(rendered.alpha, targets.alpha, targets.valid),
            "depth": self.depth
            * edge_aware_log_l1(rendered.depth, targets.depth, pictures, measured, targets.valid, self.depth_mean),
            "total_variation": self.total_variation * total_variation(rendered.depth, targets.valid),
        }
        if constants is not None:
            losses["lpips"] = self.lpips * constants.between(rendered.rgb, pictures, targets.valid)
        mse = jax.lax.stop_gradient(mean_over_views((rendered.rgb - pictures) ** 2, targets.valid))
        metrics = {
            "psnr": -10.0 * jnp.log10(mse),
            "anchors": anchors.mask.sum(-1).mean(dtype=jnp.float32),
            "anchors_dropped": jnp.mean(occupied - anchors.mask.sum(-1), dtype=jnp.float32),
            "overflow": rendered.overflow,
            "invalid_gaussians": rendered.invalid,
        }
        return losses, metrics

    def grown(self) -> "ReconstructionObjective":
        """Twice the pairs."""
        return dataclasses.replace(self, pairs_per_gaussian=2 * self.pairs_per_gaussian)
