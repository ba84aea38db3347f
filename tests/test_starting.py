"""Where networks start from: another run, DINOv2's file, or fresh values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from geolrm_jax.config import load_config, write_config
from geolrm_jax.inference import abstract_model
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import abstract_with_sharding
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


def begin(experiment, stage, workdir):
    """`start` with the stage's own shapes, everything on one device."""
    model = experiment.stages[stage].objective.networks(experiment.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_model(model, experiment.precision)[1]
    return start(experiment, stage, workdir, abstract_with_sharding(shapes, jax.tree.map(lambda _: device, shapes)))


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_reconstruction_starts_from_another_runs_proposal(tiny, rng, tmp_path):
    theirs = another_run(tiny, tmp_path, "proposal", rng)
    second = dataclasses.replace(tiny, proposal=None, warm_start=str(tmp_path))
    started = begin(second, "reconstruction", tmp_path / "new")
    same(started, theirs)


def test_the_latest_stage_of_another_run_counts_and_its_own_proposal_more(tiny, rng, tmp_path):
    whole = another_run(tiny, tmp_path / "other", "reconstruction", rng)
    own = another_run(tiny, tmp_path / "own", "proposal", rng)
    experiment = dataclasses.replace(tiny, warm_start=str(tmp_path / "other"))
    started = begin(experiment, "reconstruction", tmp_path / "own")
    same(started["params"]["proposal"], own["params"]["proposal"])
    same(started["params"]["reconstruction"], whole["params"]["reconstruction"])
    assert set(begin(experiment, "proposal", tmp_path / "own")["params"]) == {"proposal"}


def save_dinov2(vit, file):
    leaves = match(VIT, {"params": vit})
    tensors = {key: np.ascontiguousarray(leaf.store(pick(vit, leaf.path), key)) for leaf in leaves for key in leaf.keys}
    save_file(tensors, file)


def test_dinov2_fills_the_encoders_of_fresh_networks_only(tiny, rng, tmp_path):
    vit = random_variables(tiny.model, tiny.precision, rng)["params"]["proposal"]["encoder"]["vit"]
    save_dinov2(vit, tmp_path / "dino.safetensors")
    own = another_run(tiny, tmp_path / "own", "proposal", rng)
    experiment = dataclasses.replace(tiny, dinov2_weights=str(tmp_path / "dino.safetensors"))

    started = begin(experiment, "proposal", tmp_path / "own")
    same(started["params"], {"proposal": {"encoder": {"vit": vit}}})
    started = begin(experiment, "reconstruction", tmp_path / "own")
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
        return dataclasses.replace(tiny, model=model, proposal=None, warm_start=str(tmp_path / "other"))

    registers = dataclasses.replace(network.encoder, vit=dataclasses.replace(network.encoder.vit, registers=4))
    with pytest.raises(ValueError, match=r"reconstruction.encoder.vit.registers: nothing there, \(4, 12\) in this"):
        begin(starting_with(encoder=registers), "reconstruction", tmp_path)
    decoder = dataclasses.replace(network.decoder, gaussians_per_anchor=3)
    with pytest.raises(ValueError, match=r"decoder.hidden.bias: \(28,\) there, \(42,\) in this config"):
        begin(starting_with(decoder=decoder), "reconstruction", tmp_path)


def changed(tiny, folder, **changes):
    """The reconstruction alone, with another decoder than that of the run in `folder`."""
    decoder = dataclasses.replace(tiny.model.reconstruction.decoder, gaussians_per_anchor=3)
    network = dataclasses.replace(tiny.model.reconstruction, decoder=decoder)
    model = dataclasses.replace(tiny.model, reconstruction=network)
    return dataclasses.replace(tiny, model=model, proposal=None, warm_start=str(folder), **changes)


def test_what_a_fork_changed_stays_fresh_where_that_is_allowed_and_is_told(tiny, rng, tmp_path, monkeypatch):
    theirs = another_run(tiny, tmp_path / "other", "reconstruction", rng)
    said = []
    monkeypatch.setattr(logging, "notice", said.append)
    experiment = changed(tiny, tmp_path / "other", allow_missing=r"decoder\.(hidden|out|refine)")
    ours = flatten_dict(begin(experiment, "reconstruction", tmp_path))
    kept = {path: x for path, x in flatten_dict(theirs).items() if path in ours}
    same(ours, kept)
    fresh = {".".join(path[1:]) for path in {*flatten_dict(theirs)} - {*ours}}
    assert fresh and all(name.startswith("reconstruction.decoder.") for name in fresh)
    assert f"{len(ours)} arrays loaded, 0 of them cast to another type; {len(fresh)} stay fresh" in said[0]
    assert {line.split(": ")[1] for line in said[1:]} == fresh
    assert "  fresh: reconstruction.decoder.hidden.bias: (28,) there, (42,) in this config" in said
    with pytest.raises(ValueError, match=r"see --allow-missing\): reconstruction.decoder.hidden.bias: \(28,\) there"):
        begin(changed(tiny, tmp_path / "other", allow_missing="encoder"), "reconstruction", tmp_path)
    assert {
        line.split(": ")[1] for line in said if line.startswith("  does not fit: ")
    } == fresh  # all, not the first ten


def test_arrays_that_a_fork_does_not_have_are_told_and_new_ones_stay_fresh(tiny, rng, tmp_path, monkeypatch):
    """Their ViT has registers, ours has none; and the other way round."""
    network = tiny.model.reconstruction
    vit = dataclasses.replace(network.encoder.vit, registers=4)
    encoder = dataclasses.replace(network.encoder, vit=vit)
    model = dataclasses.replace(tiny.model, reconstruction=dataclasses.replace(network, encoder=encoder))
    with_registers = dataclasses.replace(tiny, model=model)
    another_run(with_registers, tmp_path / "with", "reconstruction", rng)
    another_run(tiny, tmp_path / "without", "reconstruction", rng)
    said = []
    monkeypatch.setattr(logging, "notice", said.append)
    options = {"proposal": None, "allow_missing": "registers"}
    without = dataclasses.replace(tiny, warm_start=str(tmp_path / "with"), **options)
    assert "registers" not in begin(without, "reconstruction", tmp_path)["params"]["reconstruction"]["encoder"]["vit"]
    assert "  not used: reconstruction.encoder.vit.registers: (4, 12) there, nothing in this config" in said
    more = dataclasses.replace(with_registers, warm_start=str(tmp_path / "without"), **options)
    assert "registers" not in begin(more, "reconstruction", tmp_path)["params"]["reconstruction"]["encoder"]["vit"]
    assert "  fresh: reconstruction.encoder.vit.registers: nothing there, (4, 12) in this config" in said


def test_dinov2_fills_a_vit_that_stays_fresh(tiny, rng, tmp_path):
    theirs = another_run(tiny, tmp_path / "other", "proposal", rng)
    network = tiny.model.proposal
    vit = dataclasses.replace(network.encoder.vit, width=14)
    encoder = dataclasses.replace(network.encoder, vit=vit)
    wider = dataclasses.replace(tiny.model, proposal=dataclasses.replace(network, encoder=encoder))
    values = random_variables(wider, tiny.precision, rng)["params"]["proposal"]["encoder"]["vit"]
    save_dinov2(values, tmp_path / "dino.safetensors")
    experiment = dataclasses.replace(
        tiny,
        model=wider,
        warm_start=str(tmp_path / "other"),
        allow_missing=r"encoder\.",
        dinov2_weights=str(tmp_path / "dino.safetensors"),
    )
    started = begin(experiment, "proposal", tmp_path)["params"]["proposal"]
    same(started["encoder"]["vit"], values)
    same(started["transformer"], theirs["params"]["proposal"]["transformer"])


def test_parameters_are_cast_to_the_types_of_this_config(tiny, rng, tmp_path, monkeypatch):
    theirs = another_run(tiny, tmp_path / "other", "proposal", rng)
    said = []
    monkeypatch.setattr(logging, "notice", said.append)
    shapes = abstract_model(tiny.stages["proposal"].objective.networks(tiny.model), tiny.precision)[1]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=device), shapes)
    experiment = dataclasses.replace(tiny, warm_start=str(tmp_path / "other"))
    started = start(experiment, "proposal", tmp_path, halves)
    same(started, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), theirs))
    assert f"{len(jax.tree.leaves(theirs))} of them cast" in said[0]


def test_a_pattern_needs_a_warm_start_and_must_be_one(tiny):
    with pytest.raises(ValueError, match=r"allow_missing 'x' is about warm_start"):
        dataclasses.replace(tiny, allow_missing="x")
    with pytest.raises(ValueError, match=r"allow_missing '\(' is no regular expression"):
        dataclasses.replace(tiny, warm_start="there", allow_missing="(")


def test_a_stage_without_a_complete_checkpoint_is_passed_over(tiny, rng, tmp_path):
    own = another_run(tiny, tmp_path, "proposal", rng)
    (tmp_path / "reconstruction" / "checkpoints").mkdir(parents=True)
    same(begin(dataclasses.replace(tiny, warm_start=str(tmp_path)), "proposal", tmp_path / "new"), own)


def test_nothing_to_warm_start_is_said(tiny, tmp_path):
    with pytest.raises(ValueError, match="warm_start must name a work directory"):
        dataclasses.replace(tiny, proposal=None)
    write_config(tiny, tmp_path)
    with pytest.raises(FileNotFoundError, match="no stage has a checkpoint"):
        begin(dataclasses.replace(tiny, warm_start=str(tmp_path)), "proposal", tmp_path)
