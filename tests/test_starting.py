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


def test_values_take_their_place_and_averages_start_from_them():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"a": {"x": np.zeros(2), "y": np.zeros(3)}, "b": np.zeros(1)}
    state = {"params": params, "ema": {"a": jax.tree.map(np.copy, params["a"])}, "step": np.zeros(())}
    shardings = jax.tree.map(lambda _: one, state)
    new = with_values(state, {"params": {"a": {"y": np.ones(3)}}}, shardings)
    after = {"x": np.zeros(2), "y": np.ones(3)}
    same(new, {"params": {"a": after, "b": np.zeros(1)}, "ema": {"a": after}, "step": np.zeros(())})


def test_networks_that_are_not_whole_or_of_other_shapes_are_refused(tiny, rng, tmp_path):
    another_run(tiny, tmp_path / "other", "reconstruction", rng)
    network = tiny.model.reconstruction

    def starting_with(**changes):
        model = dataclasses.replace(tiny.model, reconstruction=dataclasses.replace(network, **changes))
        return dataclasses.replace(tiny, model=model, proposal=None, start_from=str(tmp_path / "other"))

    registers = dataclasses.replace(network.encoder, vit=dataclasses.replace(network.encoder.vit, registers=4))
    with pytest.raises(ValueError, match=r"reconstruction.encoder.vit.registers: nothing there, \(4, 12\) in this"):
        start(starting_with(encoder=registers), "reconstruction", tmp_path)
    decoder = dataclasses.replace(network.decoder, gaussians_per_anchor=3)
    with pytest.raises(ValueError, match=r"decoder.hidden.bias: \(28,\) there, \(42,\) in this config"):
        start(starting_with(decoder=decoder), "reconstruction", tmp_path)


def test_a_stage_without_a_complete_checkpoint_is_passed_over(tiny, rng, tmp_path):
    own = another_run(tiny, tmp_path, "proposal", rng)
    (tmp_path / "reconstruction" / "checkpoints").mkdir(parents=True)
    same(start(dataclasses.replace(tiny, start_from=str(tmp_path)), "proposal", tmp_path / "new"), own)


def test_nothing_to_start_from_is_said(tiny, tmp_path):
    with pytest.raises(ValueError, match="start_from must name a work directory"):
        dataclasses.replace(tiny, proposal=None)
    write_config(tiny, tmp_path)
    with pytest.raises(FileNotFoundError, match="no stage has a checkpoint"):
        start(dataclasses.replace(tiny, start_from=str(tmp_path)), "proposal", tmp_path)
