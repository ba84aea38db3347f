"""A tiny procedural set, built once."""

import pytest

from geolrm_jax.data.builders.records import DataConfig, build
from geolrm_jax.data.procedural import ProceduralSource

TINY = DataConfig(
    source=ProceduralSource(train_objects=7, test_objects=2, size=32, view_ids=(0, 4, 8, 12, 16, 20, 25)),
    occupancy_grid=16,
)


@pytest.fixture(scope="session")
def tiny_config():
    return TINY


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory):
    return build(TINY, tmp_path_factory.mktemp("data") / "tiny")
