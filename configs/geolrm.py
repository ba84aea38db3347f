"""The default model of the specification at full size, both stages one after the other, on GObjaverse.

  geolrm train --config geolrm --data.source.root /data/gobjaverse --data.source.test ID ID … \
      --dinov2-weights dinov2_vitb14.safetensors --reconstruction.objective.lpips-weights lpips_vgg16.safetensors

The values are the paper's: 12 epochs of 280k objects, global batches of 32 GPUs x 2 (proposal) and x 1
(reconstruction), accumulated 8 times. Steps are optimizer steps. The paper took 0.5 and 2 days on 32 A100 40G; not yet
run at this size by us.
"""

from geolrm_jax.config import Experiment
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.evaluation.protocol import Protocol
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.training.loop import StageConfig
from geolrm_jax.training.objectives import ProposalObjective, ReconstructionObjective

OBJECTS, EPOCHS = 280_000, 12
TEST_OBJECTS = ("0/10005",)  # objects kept from training: replace by your list


def get_config() -> Experiment:
    """Batches of 512 and 256 objects in 8 parts each."""
    proposal, reconstruction = 2 * 32 * 8, 1 * 32 * 8
    return Experiment(
        name="geolrm",
        data=DataConfig(FolderSource("/data/gobjaverse", test=TEST_OBJECTS), occupancy_grid=128, image_encoding="png"),
        model=GeoLRMConfig(),
        proposal=StageConfig(ProposalObjective(), steps=EPOCHS * OBJECTS // proposal, batch=proposal, accumulation=8),
        reconstruction=StageConfig(
            ReconstructionObjective(pairs_per_gaussian=8.0),
            steps=EPOCHS * OBJECTS // reconstruction,
            batch=reconstruction,
            accumulation=8,
        ),
        evaluation=Protocol(),
    )
