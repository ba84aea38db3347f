"""Four sampling points (paper: 20.21 dB, SSIM 0.819, LPIPS 0.238).

geolrm train --config ablations/points_4 --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` with half the points."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, transformer=replace(network.transformer, points=4))
    return replace(base, name="ablations_points_4", model=replace(base.model, reconstruction=network))
