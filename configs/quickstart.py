"""The whole road on a small machine: procedural objects, both stages, evaluation, export.

  python train.py --config configs/quickstart.py

2 CPU cores, 7 min 40 s. On 12 unseen objects, 4 inputs and 4 targets at 112^2: PSNR 18.6 dB, nearest input view
14.2 dB, white picture 9.9 dB; proposal within one voxel: precision 0.99, recall 0.99.
"""

from geolrm_jax.config import Experiment
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.data.procedural_shapes import Distribution
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

SIZE, GRID, ANCHORS = 112, 16, 896
TARGETS = (3, 9, 15, 21)
PLAIN = Distribution(wire=0.0, displaced=0.0, lit=0.0)  # what small networks learn in minutes
VIEWS = tuple(sorted({*range(0, 24, 2), *TARGETS}))  # of the GObjaverse rig


def get_config() -> Experiment:
    """Small networks on 16^3 voxels."""
    encoder = ImageEncoderConfig(ViTConfig(width=96, depth=2, heads=4, pretrained_grid=8, remat="none"), channels=64)
    transformer = TransformerConfig(width=96, depth=3, heads=4, points=2, remat="none")
    checkpoint = CheckpointConfig(every=100, keep=2)
    return Experiment(
        name="quickstart",
        data=DataConfig(
            ProceduralSource(240, 12, size=SIZE, view_ids=VIEWS, distribution=PLAIN),
            occupancy_grid=GRID,
        ),
        model=GeoLRMConfig(
            ProposalConfig(encoder, transformer, coarse_grid=8, fine_grid=GRID),
            ReconstructionConfig(encoder, transformer, GaussianDecoderConfig(12, offset_max=0.1, scale_max=0.03)),
        ),
        proposal=StageConfig(
            ProposalObjective(),
            steps=250,
            batch=4,
            views=4,
            inputs=(4,),
            optimizer=OptimizerConfig(2e-3, warmup=40, clip=1.0),
            checkpoint=checkpoint,
            log_every=10,
        ),
        reconstruction=StageConfig(
            ReconstructionObjective(max_anchors=ANCHORS),
            steps=450,
            batch=2,
            views=6,
            inputs=(4,),
            optimizer=OptimizerConfig(2e-3, warmup=40, clip=1.0),
            checkpoint=checkpoint,
            log_every=10,
        ),
        evaluation=Protocol(TARGETS, inputs=4, input_size=SIZE, render_size=SIZE, max_anchors=ANCHORS),
        input_size=SIZE,
        render_size=SIZE,
    )
