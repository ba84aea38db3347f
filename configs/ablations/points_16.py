"""Sixteen sampling points (paper: 20.80 dB, SSIM 0.846, LPIPS 0.219).

geolrm train --config ablations/points_16 --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` with twice the points."""
    base = load_config("ablations/full")
    network = base.model.reconstruction
    network = replace(network, transformer=replace(network.transformer, points=16))
    return replace(base, name="ablations_points_16", model=replace(base.model, reconstruction=network))
