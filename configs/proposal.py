"""The paper's first stage: the proposal network alone, in bfloat16 with float32 parameters.

  geolrm train --config proposal --data.source.root /data/gobjaverse --dinov2-weights dinov2_vitb14.safetensors

The paper: 0.5 day on 32 A100 40G, batch 2 per GPU, accumulation 8. Not yet run at this size by us.
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config
from geolrm_jax.precision import Precision


def get_config() -> Experiment:
    """The first stage of `geolrm`."""
    return replace(load_config("geolrm"), name="proposal", reconstruction=None, precision=Precision("bfloat16"))
