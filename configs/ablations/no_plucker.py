"""Without Plücker rays beside the colours (paper: 20.64 dB, SSIM 0.826, LPIPS 0.244).

geolrm train --config ablations/no_plucker --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` whose low level sees colours alone."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, encoder=replace(network.encoder, plucker=False))
    return replace(base, name="ablations_no_plucker", model=replace(base.model, reconstruction=network))
