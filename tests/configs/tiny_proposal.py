"""The first stage of the smallest experiment."""

from dataclasses import replace
from pathlib import Path

from geolrm_jax.config import Experiment, load_config


def get_config() -> Experiment:
    """No reconstruction."""
    return replace(load_config(str(Path(__file__).with_name("tiny.py"))), name="tiny_proposal", reconstruction=None)
