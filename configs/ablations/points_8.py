"""Eight sampling points, as the full model (paper: 20.73 dB, SSIM 0.839, LPIPS 0.220).

geolrm train --config ablations/points_8 --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` under the name of this row of the paper's table."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, transformer=replace(network.transformer, points=8))
    return replace(base, name="ablations_points_8", model=replace(base.model, reconstruction=network))
