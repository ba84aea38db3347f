"""Checkpoints: what is saved comes back, what is kept is what the config says, what does not fit is named."""

import dataclasses
import json
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints

CONFIG = CheckpointConfig(every=1, keep=2, keep_every=3)
RUN = {"seed": 7, "config": {"name": "x"}, "environment": {"versions": {"jax": jax.__version__}}}


def make_state(seed):
    params = {"a": {"kernel": jax.random.normal(jax.random.key(seed), (4, 3))}, "b": jnp.arange(3.0) + seed}
    return {
        "params": params,
        "batch_stats": {"mean": jnp.full(3, float(seed))},
        "opt_state": optax.adamw(1e-3).init(params),
        "step": jnp.array(seed, jnp.int32),
    }


def abstract(state):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def abstract_model(state):
    return abstract({name: state[name] for name in ("params", "batch_stats")})


def iterator():
    return iter(grain.MapDataset.range(100).seed(3).shuffle().to_iter_dataset())


def save_all(folder, losses, config=CONFIG):
    """Steps 1, 2, ... with these losses."""
    data, writing = iterator(), Checkpoints(folder, config, write=True, run=RUN)
    for step, loss in enumerate(losses, start=1):
        next(data)
        writing.save(step, make_state(step), data, {"loss": loss})
    writing.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_all(folder, [5.0, 1.0, 3.0, 4.0, 2.0])
    return folder


@pytest.fixture
def saved(written, tmp_path):
    """Steps 1 to 5 with losses whose lowest is at step 2."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_the_latest_the_best_and_multiples_are_kept(saved):
    checkpoints = Checkpoints(saved, CONFIG, write=False)
    assert checkpoints.steps == [2, 3, 4, 5]
    assert checkpoints.resolve("latest") == 5 and checkpoints.resolve("best") == 2 and checkpoints.resolve("4") == 4
    assert {folder.name for folder in saved.iterdir()} == {"2", "3", "4", "5"}


def test_policies():
    nan = float("nan")
    scores = {10: 1.0, 20: 0.5, 30: nan, 40: 0.5, 50: 0.9, 60: 2.0}
    metrics = {step: {"loss": value, "psnr": value} for step, value in scores.items()}
    metrics[70] = {"other": 0.0}
    lowest = CheckpointConfig(every=10, keep=1)
    assert lowest.best_of(metrics) == 40  # the later of equals
    assert lowest.kept(metrics) == {40, 70}
    highest = CheckpointConfig(every=10, keep=2, keep_every=20, best="psnr", higher_is_better=True)
    assert highest.kept(metrics) == {20, 40, 60, 70}
    between = {step: {} for step in (10, 20, 21, 22, 30, 31)}  # saved at notices too
    assert CheckpointConfig(every=10, keep=2).kept(between) == {20, 30, 31}
    assert CheckpointConfig(best="absent").best_of(metrics) is None
    for wrong in ({"every": 0}, {"keep": 0}, {"every": 10, "keep_every": 15}, {"keep_every": 0}):
        with pytest.raises(ValueError, match=rf"checkpoint\.{list(wrong)[-1]}"):
            CheckpointConfig(**wrong)


def test_everything_comes_back_bit_for_bit(saved):
    checkpoints = Checkpoints(saved, CONFIG, write=True)
    data, fresh = iterator(), iterator()
    expected = [next(fresh) for _ in range(8)]
    step, state = checkpoints.restore_newest(abstract(make_state(0)), data)
    assert step == 5 and checkpoints.metrics(5) == {"loss": 2.0}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(5))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(0))
    assert [next(data) for _ in range(3)] == expected[5:]
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, abstract(make_state(0)), data), make_state(3))
    checkpoints.close()


def test_a_checkpoint_says_what_run_it_is_of(saved):
    about = json.loads((saved / "5" / "run" / "run.json").read_text())
    assert about["step"] == 5 and about["format_version"] == 3 and about["processes"] == 1
    assert {name: about[name] for name in RUN} == RUN


def test_restored_onto_other_types_and_another_mesh(saved):
    mesh = jax.make_mesh((1,), ("fsdp",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    target = abstract_model(make_state(5))
    target["params"]["b"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=rows)
    model = Checkpoints(saved, CONFIG, write=False).restore_model(5, target)
    assert model["params"]["b"].dtype == jnp.bfloat16 and model["params"]["b"].sharding == rows
    np.testing.assert_array_equal(model["params"]["b"], make_state(5)["params"]["b"].astype(jnp.bfloat16))

    state = abstract(make_state(0))
    state["params"]["b"] = target["params"]["b"]
    whole = Checkpoints(saved, CONFIG, write=False).restore(5, state, iterator())
    assert whole["params"]["b"].dtype == jnp.bfloat16 and whole["opt_state"][0].mu["b"].dtype == jnp.float32


def test_the_model_alone_comes_back_and_averages_take_the_place_of_raw_parameters(tmp_path):
    state = make_state(1)
    state["ema"] = {"b": state["params"]["b"] + 10.0}
    checkpoints = Checkpoints(tmp_path, CONFIG, write=True)
    checkpoints.save(1, state, iterator(), {"loss": 1.0})
    checkpoints.close()
    reading = Checkpoints(tmp_path, CONFIG, write=False)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), reading.model_arrays(1))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_model(state))
    model = reading.restore_model(1, abstract_model(state))
    np.testing.assert_array_equal(model["params"]["b"], state["ema"]["b"])
    np.testing.assert_array_equal(model["params"]["a"]["kernel"], state["params"]["a"]["kernel"])
    part = reading.restore_model(1, {"params": {"b": abstract(state)["params"]["b"]}})
    assert list(part) == ["params"] and list(part["params"]) == ["b"]


def test_saving_an_earlier_step_takes_the_place_of_what_came_after(saved):
    checkpoints = Checkpoints(saved, dataclasses.replace(CONFIG, keep=3), write=True)
    checkpoints.save(4, make_state(40), iterator(), {"loss": 0.5})
    checkpoints.close()
    assert checkpoints.steps == [2, 3, 4]
    state = Checkpoints(saved, CONFIG, write=False).restore(4, abstract(make_state(0)), iterator())
    assert state["step"] == 40


def test_a_kill_before_a_step_is_saved_anew_leaves_no_half_of_the_old_one(saved, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    checkpoints = Checkpoints(saved, CONFIG, write=True)
    monkeypatch.setattr(shutil, "rmtree", killed)  # as the first file is deleted
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(5, make_state(50), iterator(), {"loss": 0.5})
    monkeypatch.undo()
    checkpoints.close()
    assert Checkpoints(saved, CONFIG, write=False).steps == [2, 3, 4]


def test_an_unknown_step_is_named_with_those_there_are(saved):
    checkpoints = Checkpoints(saved, CONFIG, write=False)
    for wrong in ("7", "newest"):
        with pytest.raises(FileNotFoundError, match=rf"'{wrong}'.*2, 3, 4, 5"):
            checkpoints.resolve(wrong)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        Checkpoints(tmp_path / "nothing-here", CONFIG, write=False)


def test_other_shapes_are_refused_and_nothing_is_taken_for_damaged(saved):
    state = make_state(5)
    state["params"]["b"] = jnp.zeros(7)
    with pytest.raises(ValueError, match=r"does not fit: params\.b is \(3,\) there, \(7,\) here"):
        Checkpoints(saved, CONFIG, write=False).restore_model(5, abstract_model(state))
    with pytest.raises(ValueError, match="does not fit"):
        Checkpoints(saved, CONFIG, write=True).restore_newest(abstract(state), iterator())
    assert Checkpoints(saved, CONFIG, write=False).steps == [2, 3, 4, 5]


def test_checkpoints_of_earlier_formats_are_named(saved):
    file = saved / "5" / "run" / "run.json"
    file.write_text(file.read_text().replace('"format_version": 3', '"format_version": 9'))
    with pytest.raises(ValueError, match="checkpoints of format version 9, this program reads 3 and no other"):
        Checkpoints(saved, CONFIG, write=False)
    (saved / "metadata").mkdir()
    with pytest.raises(ValueError, match="format version 1 or 2"):
        Checkpoints(saved, CONFIG, write=True)


def test_without_the_metric_of_the_best_it_is_saved_all_the_same(tmp_path):
    config = CheckpointConfig(best="psnr")
    checkpoints = Checkpoints(tmp_path, config, write=True)
    checkpoints.save(1, make_state(1), iterator(), {})
    checkpoints.close()
    assert checkpoints.steps == [1]
    with pytest.raises(FileNotFoundError, match="'best'"):
        Checkpoints(tmp_path, config, write=False).resolve("best")
