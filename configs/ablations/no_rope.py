"""Without 3D RoPE (paper: 20.52 dB, SSIM 0.827, LPIPS 0.224).

geolrm train --config ablations/no_rope --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` without rotary position embedding."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, transformer=replace(network.transformer, rope_index="none"))
    return replace(base, name="ablations_no_rope", model=replace(base.model, reconstruction=network))
