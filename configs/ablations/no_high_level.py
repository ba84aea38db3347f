"""Without the high-level features (paper: 15.85 dB, SSIM 0.798, LPIPS 0.289).

geolrm train --config ablations/no_high_level --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` without DINOv2."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, encoder=replace(network.encoder, levels=("low",)))
    return replace(base, name="ablations_no_high_level", model=replace(base.model, reconstruction=network))
