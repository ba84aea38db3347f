"""No sampling points: levels are read at the projection alone (paper: 19.52 dB, SSIM 0.802, LPIPS 0.265).

geolrm train --config ablations/points_0 --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` without deformable sampling."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, transformer=replace(network.transformer, points=0))
    return replace(base, name="ablations_points_0", model=replace(base.model, reconstruction=network))
