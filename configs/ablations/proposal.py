"""The proposal network that all ablations share: the paper's, at 224^2.

geolrm train --config ablations/proposal --data.source.root /data/gobjaverse
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """`proposal` on smaller images."""
    base = load_config("proposal")
    evaluation = replace(base.evaluation, input_size=224, render_size=224)
    return replace(base, name="ablations_proposal", input_size=224, render_size=224, evaluation=evaluation)
