"""Checkpoints: what is saved comes back, what is damaged is named."""

import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints

CONFIG = CheckpointConfig(every=1, keep=2, best="loss")


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


def iterator():
    return iter(grain.MapDataset.range(100).seed(3).shuffle().to_iter_dataset())


@pytest.fixture
def saved(tmp_path):
    """Steps 1 to 5 with losses whose lowest is at step 2."""
    data = iterator()
    with_losses = Checkpoints(tmp_path, CONFIG, write=True)
    for step, loss in enumerate([5.0, 1.0, 3.0, 4.0, 2.0], start=1):
        next(data)
        with_losses.save(step, make_state(step), data, {"loss": loss})
    with_losses.close()
    return tmp_path


def test_latest_and_best_are_kept(saved):
    checkpoints = Checkpoints(saved, CONFIG, write=False)
    assert checkpoints.steps == [2, 4, 5]
    assert checkpoints.resolve("latest") == 5 and checkpoints.resolve("best") == 2 and checkpoints.resolve("4") == 4


def test_everything_comes_back_bit_for_bit(saved):
    checkpoints = Checkpoints(saved, CONFIG, write=True)
    data, fresh = iterator(), iterator()
    expected = [next(fresh) for _ in range(8)]
    state = checkpoints.restore(4, abstract(make_state(0)), data)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(4))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(0))
    assert [next(data) for _ in range(4)] == expected[4:]
    checkpoints.close()


def test_the_model_alone_comes_back_and_averages_take_the_place_of_raw_parameters(tmp_path):
    state = make_state(1)
    state["ema"] = {"b": state["params"]["b"] + 10.0}
    checkpoints = Checkpoints(tmp_path, CONFIG, write=True)
    checkpoints.save(1, state, iterator(), {"loss": 1.0})
    checkpoints.close()
    target = abstract({name: state[name] for name in ("params", "batch_stats")})
    model = Checkpoints(tmp_path, CONFIG, write=False).restore_model(1, target)
    np.testing.assert_array_equal(model["params"]["b"], state["ema"]["b"])
    np.testing.assert_array_equal(model["params"]["a"]["kernel"], state["params"]["a"]["kernel"])


def test_an_unknown_step_is_named_with_those_there_are(saved):
    checkpoints = Checkpoints(saved, CONFIG, write=False)
    for wrong in ("7", "newest"):
        with pytest.raises(FileNotFoundError, match=rf"'{wrong}'.*2, 4, 5"):
            checkpoints.resolve(wrong)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        Checkpoints(tmp_path / "nothing-here", CONFIG, write=False)


@pytest.mark.parametrize("damage", ["item", "array", "metadata"])
def test_an_incomplete_checkpoint_is_named(saved, damage):
    model = saved / "5" / "model"
    if damage == "item":
        shutil.rmtree(model)
    elif damage == "array":
        for file in (f for folder in model.rglob("d") for f in folder.iterdir()):
            file.unlink()
    else:
        (model / "_METADATA").unlink()
    target = abstract({name: make_state(5)[name] for name in ("params", "batch_stats")})
    checkpoints = Checkpoints(saved, CONFIG, write=False)
    with pytest.raises(ValueError, match=r"checkpoint .*5 is incomplete"):
        checkpoints.restore_model(5, target)


def test_other_shapes_are_refused(saved):
    state = make_state(5)
    state["params"]["b"] = jnp.zeros(7)
    target = abstract({name: state[name] for name in ("params", "batch_stats")})
    with pytest.raises(ValueError, match="does not fit"):
        Checkpoints(saved, CONFIG, write=False).restore_model(5, target)


def test_best_needs_its_metric(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(best="psnr"), write=True)
    with pytest.raises(ValueError, match=r"'psnr'.*one of loss"):
        checkpoints.save(1, make_state(1), iterator(), {"loss": 1.0})
    checkpoints.close()
