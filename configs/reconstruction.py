"""The paper's second stage, in float32: the reconstruction network on the anchors of a trained proposal.

  geolrm train --config reconstruction --data.source.root /data/gobjaverse --warm-start workdir/proposal \
      --dinov2-weights dinov2_vitb14.safetensors --reconstruction.objective.lpips-weights lpips_vgg16.safetensors

The paper: 2 days on 32 A100 40G, batch 1 per GPU, accumulation 8. Not yet run at this size by us.
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """The second stage of `geolrm`."""
    return replace(load_config("geolrm"), name="reconstruction", proposal=None, warm_start="workdir/proposal")
