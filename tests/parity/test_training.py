"""Schedules, file formats and sizes against the released program's."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.config import load_config
from geolrm_jax.export.ply import read_ply, write_ply
from geolrm_jax.precision import Precision
from geolrm_jax.training.optimizer import OptimizerConfig
from geolrm_jax.weights.released import released_leaves


@pytest.mark.parametrize("key, warmup, period", [("lr/gen_mult", 12_000, 100_000), ("lr/srl_mult", 500, 50_000)])
def test_learning_rate(released, key, warmup, period):
    """Unclamped: the multiplier rises again after its period."""
    rate = OptimizerConfig(1.0, warmup, period, "rise").schedule(1)
    ours = [float(rate(step)) for step in released.vectors["lr/steps"]]
    np.testing.assert_allclose(ours, released.vectors[key], rtol=1e-5, atol=1e-5)


def test_ply_is_read_and_written_equal(released, tmp_path):
    source = released.vectors["ply/bytes"].tobytes()
    (tmp_path / "theirs.ply").write_bytes(source)
    gaussians = read_ply(tmp_path / "theirs.ply", "released")
    parts = (gaussians.means, gaussians.opacities[:, None], gaussians.scales, gaussians.quats, gaussians.colors)
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), released.vectors["ply/loaded"])
    write_ply(tmp_path / "ours.ply", gaussians, "released")
    assert (tmp_path / "ours.ply").read_bytes() == source


def test_released_config_has_the_released_parameters(parity):
    """Keys, shapes and counts per part of the full-size model."""
    truth = json.loads((parity / "released_state_dict.json").read_text())
    config = load_config("released").model
    leaves = released_leaves(config)
    shapes = {key: list(leaf.there_shape) for leaf in leaves for key in leaf.keys}
    assert shapes == truth["shapes"] and len(shapes) == truth["n_keys"]

    trained = {
        key: np.prod(shape)
        for leaf in leaves
        if leaf.collection == "params"
        for key, shape in ((key, leaf.there_shape) for key in leaf.keys)
    }
    for part, count in truth["param_counts"].items():
        prefix = {"ALL": "", "serializer.TOTAL": "serializer.", "lrm_generator.TOTAL": "lrm_generator."}.get(part, part)
        assert sum(size for key, size in trained.items() if key.startswith(prefix)) == count, part
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0), Precision()))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == truth["param_counts"]["ALL"]
