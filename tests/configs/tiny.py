"""The smallest experiment that goes down the whole road: for tests."""

from geolrm_jax.config import Experiment
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.evaluation.protocol import Protocol
from geolrm_jax.models.dinov2 import ViTConfig
from geolrm_jax.models.gaussian_decoder import GaussianDecoderConfig
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.geolrm import GeoLRMConfig, ReconstructionConfig
from geolrm_jax.models.image_encoder import ImageEncoderConfig
from geolrm_jax.models.proposal import ProposalConfig
from geolrm_jax.runtime.checkpoint import CheckpointConfig
from geolrm_jax.training.loop import StageConfig
from geolrm_jax.training.objectives import ProposalObjective, ReconstructionObjective
from geolrm_jax.training.optimizer import OptimizerConfig


def get_config() -> Experiment:
    """28 x 28 pixels, 8^3 voxels, four steps a stage."""
    encoder = ImageEncoderConfig(ViTConfig(width=12, depth=1, heads=2, pretrained_grid=2), channels=8)
    transformer = TransformerConfig(width=12, depth=1, heads=2, points=1)
    common = dict(
        steps=4,
        batch=2,
        views=3,
        inputs=(2,),
        optimizer=OptimizerConfig(1e-3, warmup=1),
        checkpoint=CheckpointConfig(every=2, keep=2),
        log_every=1,
    )
    return Experiment(
        name="tiny",
        data=DataConfig(
            ProceduralSource(train_objects=4, test_objects=2, size=28, view_ids=(0, 3, 6, 9, 12)), occupancy_grid=8
        ),
        model=GeoLRMConfig(
            ProposalConfig(encoder, transformer, coarse_grid=4, fine_grid=8),
            ReconstructionConfig(encoder, transformer, GaussianDecoderConfig(gaussians_per_anchor=2, scale_max=0.1)),
        ),
        proposal=StageConfig(ProposalObjective(), **common),
        reconstruction=StageConfig(ReconstructionObjective(max_anchors=32), ema_decay=0.9, **common),
        evaluation=Protocol(
            targets=(3, 9), inputs=2, input_size=28, render_size=28, max_anchors=64, surface_points=200
        ),
        input_size=28,
        render_size=28,
    )
