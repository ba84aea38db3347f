"""Where networks start from: another run, DINOv2's file, or fresh values."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from geolrm_jax.config import load_config, write_config
from geolrm_jax.inference import abstract_model
from geolrm_jax.runtime.streamed import Streamed, save_streamed
from geolrm_jax.starting import start
from geolrm_jax.training.loop import with_values
from geolrm_jax.weights.dinov2_names import VIT
from geolrm_jax.weights.names import match


@pytest.fixture
def tiny(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))


def random_variables(model, precision, rng):
    shapes = abstract_model(model, precision)[1]
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def another_run(tiny, folder, stage, rng):
    """A work directory with one checkpoint of `stage`."""
    variables = random_variables(tiny.stages[stage].objective.networks(tiny.model), tiny.precision, rng)
    write_config(tiny, folder)
    streamed = jax.tree.map(lambda x: Streamed(x.shape, x.dtype, lambda: x), variables)
    save_streamed(folder / stage / "checkpoints", 7, streamed, {})
    return variables


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_reconstruction_starts_from_another_runs_proposal(tiny, rng, tmp_path):
    theirs = another_run(tiny, tmp_path, "proposal", rng)
    second = dataclasses.replace(tiny, proposal=None, start_from=str(tmp_path))
    started = start(second, "reconstruction", tmp_path / "new")
    same(started, theirs)


def test_the_latest_stage_of_another_run_counts_and_its_own_proposal_more(tiny, rng, tmp_path):
    whole = another_run(tiny, tmp_path / "other", "reconstruction", rng)
    own = another_run(tiny, tmp_path / "own", "proposal", rng)
    experiment = dataclasses.replace(tiny, start_from=str(tmp_path / "other"))
    started = start(experiment, "reconstruction", tmp_path / "own")
    same(started["params"]["proposal"], own["params"]["proposal"])
    same(started["params"]["reconstruction"], whole["params"]["reconstruction"])
    assert set(start(experiment, "proposal", tmp_path / "own")["params"]) == {"proposal"}


def test_dinov2_fills_the_encoders_of_fresh_networks_only(tiny, rng, tmp_path):
    vit = random_variables(tiny.model, tiny.precision, rng)["params"]["proposal"]["encoder"]["vit"]
    leaves = match(VIT, {"params": vit})
    tensors = {key: np.ascontiguousarray(leaf.store(pick(vit, leaf.path), key)) for leaf in leaves for key in leaf.keys}
    save_file(tensors, tmp_path / "dino.safetensors")
    own = another_run(tiny, tmp_path / "own", "proposal", rng)
    experiment = dataclasses.replace(tiny, dinov2_weights=str(tmp_path / "dino.safetensors"))

    started = start(experiment, "proposal", tmp_path / "own")
    same(started["params"], {"proposal": {"encoder": {"vit": vit}}})
    started = start(experiment, "reconstruction", tmp_path / "own")
    same(started["params"], {**own["params"], "reconstruction": {"encoder": {"vit": vit}}})


def pick(tree, path):
    for name in path.split("."):
        tree = tree[name]
    return tree


def test_values_take_their_place_in_the_state_or_are_refused():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = {"params": {"a": {"x": np.zeros(2), "y": np.zeros(3)}}, "step": np.zeros(())}
    shardings = jax.tree.map(lambda _: one, state)
    new = with_values(state, {"params": {"a": {"y": np.ones(3)}}}, shardings)
    same(new, {"params": {"a": {"x": np.zeros(2), "y": np.ones(3)}}, "step": np.zeros(())})
    with pytest.raises(ValueError, match=r"do not fit the model: params.a.y \(4,\)"):
        with_values(state, {"params": {"a": {"y": np.ones(4)}}}, shardings)
    with pytest.raises(ValueError, match=r"params.b \(\)"):
        with_values(state, {"params": {"b": np.ones(())}}, shardings)


def test_nothing_to_start_from_is_said(tiny, tmp_path):
    with pytest.raises(ValueError, match="start_from must name a work directory"):
        dataclasses.replace(tiny, proposal=None)
    write_config(tiny, tmp_path)
    with pytest.raises(FileNotFoundError, match="no stage has checkpoints"):
        start(dataclasses.replace(tiny, start_from=str(tmp_path)), "proposal", tmp_path)
