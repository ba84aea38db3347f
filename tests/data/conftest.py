"""Tiny procedural sets, built once."""

import shutil

import pytest

from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.records import build
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


@pytest.fixture(scope="session")
def other_set(tmp_path_factory):
    """Three other objects."""
    source = ProceduralSource(train_objects=3, test_objects=0, seed=9, size=32, view_ids=(1, 5, 9, 13, 17, 21, 26))
    return build(DataConfig(source, occupancy_grid=16), tmp_path_factory.mktemp("data") / "other")


@pytest.fixture(scope="session")
def damaged_set(tiny_set, tmp_path_factory):
    """The tiny set, object 2's views damaged: a shard of so small a set holds one object."""
    damaged = shutil.copytree(tiny_set, tmp_path_factory.mktemp("data") / "damaged")
    shard = sorted((damaged / "views").glob("*/views-train*"))[2]
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    shard.write_bytes(content)
    return damaged
