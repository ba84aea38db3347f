"""The model that the ablations change: 12 layers at 224^2 (paper: 20.73 dB, SSIM 0.831, LPIPS 0.216; 8 points).

  geolrm train --config ablations/proposal --data.source.root /data/gobjaverse
  geolrm train --config ablations/full --data.source.root /data/gobjaverse

Not yet run by us. The paper does not say how long its ablations trained; the steps here are the full model's.
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`reconstruction`, shallower and on smaller images."""
    base = load_config("reconstruction")
    network = base.model.reconstruction
    network = replace(network, transformer=replace(network.transformer, depth=12))
    return replace(
        base,
        name="ablations_full",
        model=replace(base.model, reconstruction=network),
        evaluation=replace(base.evaluation, input_size=224, render_size=224),
        input_size=224,
        render_size=224,
        warm_start="workdir/ablations_proposal",
    )
