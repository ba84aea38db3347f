"""Six input views in every step (paper: 20.97 dB, SSIM 0.839, LPIPS 0.220; at 4, 8, 12 inputs 19.72, 20.85, 21.43 dB).

geolrm train --config ablations/fixed_inputs --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`ablations/full` with a fixed number of inputs."""
    base = load_config("ablations/full")
    return replace(base, name="ablations_fixed_inputs", reconstruction=replace(base.reconstruction, inputs=(6,)))
