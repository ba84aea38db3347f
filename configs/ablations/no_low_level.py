"""Without the low-level features (paper: 20.29 dB, SSIM 0.817, LPIPS 0.246).

geolrm train --config ablations/no_low_level --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` with DINOv2's features alone."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, encoder=replace(network.encoder, levels=("high",)))
    return replace(base, name="ablations_no_low_level", model=replace(base.model, reconstruction=network))
