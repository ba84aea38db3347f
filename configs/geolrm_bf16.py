"""`geolrm` with matrix products in bfloat16, in both stages.

  geolrm train --config geolrm_bf16 --data.source.root /data/gobjaverse --data.source.test ID ID … \
      --dinov2-weights dinov2_vitb14.safetensors --reconstruction.objective.lpips-weights lpips_vgg16.safetensors

Parameters, optimizer, cameras, projections, sampling coordinates, softmax, norms, Gaussians, rasterization and losses
stay in float32 (`precision.py`). The paper's second stage failed in mixed precision, in which projections were rounded
too; docs/scale.md has what that costs at a small size. Not yet run at this size by us.
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config
from geolrm_jax.precision import Precision


def get_config() -> Experiment:
    """Both stages of `geolrm`."""
    return replace(load_config("geolrm"), name="geolrm_bf16", precision=Precision("bfloat16"))
