"""The default model of the specification at full size, both stages, on GObjaverse.

  geolrm train --config geolrm --data.source.root /data/gobjaverse

The paper trained each stage for 12 epochs of 280k objects on 32 A100: 0.5 and 2 days. Not yet run at this size by us.
"""

from geolrm_jax.config import Experiment
from geolrm_jax.data.pipeline import DataConfig, FolderSource
from geolrm_jax.evaluation.protocol import Protocol
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.precision import Precision
from geolrm_jax.training.loop import StageConfig
from geolrm_jax.training.objectives import ProposalObjective, ReconstructionObjective

OBJECTS, EPOCHS = 280_000, 12
TEST_OBJECTS = ("0/10005",)  # objects kept from training: replace by your list


def get_config() -> Experiment:
    """The paper's sizes and schedule: batches of 64 and 32 GPUs' worth of 1, accumulated 8 times."""
    proposal, reconstruction = 2 * 32 * 8, 1 * 32 * 8
    return Experiment(
        name="geolrm",
        data=DataConfig(FolderSource("/data/gobjaverse", test=TEST_OBJECTS), occupancy_grid=128, image_encoding="png"),
        model=GeoLRMConfig(),
        proposal=StageConfig(ProposalObjective(), steps=EPOCHS * OBJECTS // proposal, batch=proposal, accumulation=8),
        reconstruction=StageConfig(
            ReconstructionObjective(), steps=EPOCHS * OBJECTS // reconstruction, batch=reconstruction, accumulation=8
        ),
        evaluation=Protocol(),
        precision=Precision("float32"),
    )
