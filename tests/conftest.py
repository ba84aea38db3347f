"""Fixtures for all tests: where independent numbers and real renders lie, and one compilation cache for all workers."""

import os
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Compiled programs of a file are freed behind it: those of all together take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of numbers from independent programs."""
    folder = Path(os.environ.get("GEOLRM_PARITY_DIR", ROOT.parent / "shared" / "parity"))
    if not folder.is_dir():
        pytest.skip(f"no parity vectors at {folder}: set GEOLRM_PARITY_DIR")
    return folder


@pytest.fixture(scope="session")
def real_renders() -> Path:
    """The folder of real objects' renders in the GObjaverse layout."""
    folder = ROOT.parent / "shared" / "renders"
    if not folder.is_dir():
        pytest.skip(f"no renders of real objects at {folder}")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded random numbers."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny() -> str:
    """The smallest config that goes down the whole road."""
    return str(ROOT / "tests" / "configs" / "tiny.py")


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """Its work directory, trained and evaluated; tests may add reports."""
    from geolrm_jax import cli

    workdir = tmp_path_factory.mktemp("road") / "work"
    assert cli.main(["train", "--config", tiny, "--workdir", str(workdir)]) == 0
    return workdir
