"""Checkpoints written and read one array at a time."""

import weakref

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints
from geolrm_jax.runtime.streamed import Streamed, save_streamed

CONFIG = CheckpointConfig()


class Source:
    """Arrays that are made when asked for, and how many of them were alive then."""

    def __init__(self, fails_at=None):
        rng = np.random.default_rng(0)
        self.arrays = {f"a{n}": rng.standard_normal((n + 2, 300)).astype(np.float32) for n in range(6)}
        self.fails_at, self.given, self.most_alive = fails_at, [], 0

    def load(self, name):
        if len(self.given) == self.fails_at:
            raise OSError("the disk is gone")
        array = self.arrays[name].copy()
        self.given.append(weakref.ref(array))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.given))
        return array

    def tree(self):
        params = {
            name: Streamed(array.shape, array.dtype, lambda name=name: self.load(name))
            for name, array in self.arrays.items()
        }
        count = Streamed((), np.dtype(np.int32), lambda: np.array(41, np.int32))
        return {"params": {"net": params}, "batch_stats": {"net": {"count": count}}}


def abstract(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def test_what_is_streamed_is_restored_like_any_checkpoint(tmp_path):
    source = Source()
    save_streamed(tmp_path, 0, source.tree(), {"file": "x.ckpt", "sha256": "abc"})
    assert len(source.given) == 6 and source.most_alive == 1
    checkpoints = Checkpoints(tmp_path, CONFIG, write=False)
    assert checkpoints.resolve("latest") == 0 and checkpoints.resolve("0") == 0
    with pytest.raises(FileNotFoundError, match="'best'"):
        checkpoints.resolve("best")
    model = checkpoints.restore_model(0, abstract(source.tree()))
    assert isinstance(model["params"]["net"]["a0"], jax.Array)
    np.testing.assert_equal(jax.device_get(model["params"]["net"]), source.arrays)
    assert model["batch_stats"]["net"]["count"] == 41
    read = checkpoints.open_arrays(0)
    np.testing.assert_array_equal(read("params", "net.a3"), source.arrays["a3"])
    assert read("batch_stats", "net.count") == 41 and read("batch_stats", "net.count").dtype == np.int32


def test_an_interrupted_write_leaves_no_checkpoint_and_can_be_repeated(tmp_path):
    with pytest.raises(OSError, match="the disk is gone"):
        save_streamed(tmp_path, 0, Source(fails_at=3).tree(), {})
    assert not any(folder.name.isdigit() for folder in tmp_path.iterdir())
    checkpoints = Checkpoints(tmp_path, CONFIG, write=False)
    assert checkpoints.steps == []
    with pytest.raises(FileNotFoundError, match="no checkpoint 'latest'"):
        checkpoints.resolve("latest")
    save_streamed(tmp_path, 0, Source().tree(), {})
    assert Checkpoints(tmp_path, CONFIG, write=False).steps == [0]


def test_arrays_of_a_trained_checkpoint_are_read_alone_and_averages_come_first(tmp_path):
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": {"scale": jnp.ones(3)}}
    state = {
        "params": params,
        "batch_stats": {"a": {"mean": jnp.zeros(3)}},
        "ema": {"b": {"scale": jnp.full(3, 7.0)}},
        "opt_state": optax.sgd(1.0).init(params),
        "step": jnp.array(1),
    }
    writing = Checkpoints(tmp_path, CONFIG, write=True)
    writing.save(1, state, iter(grain.MapDataset.range(9).to_iter_dataset()), {"loss": 1.0})
    writing.close()
    read = Checkpoints(tmp_path, CONFIG, write=False).open_arrays(1)
    found = read("params", "a.kernel")
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, params["a"]["kernel"])
    np.testing.assert_array_equal(read("params", "b.scale"), state["ema"]["b"]["scale"])
    np.testing.assert_array_equal(read("batch_stats", "a.mean"), np.zeros(3))
    with pytest.raises(ValueError, match=r"1 does not fit: no a\.bias among its params"):
        read("params", "a.bias")


def test_another_format_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("geolrm_jax.runtime.streamed.FORMAT_VERSION", 1)
    save_streamed(tmp_path, 0, Source().tree(), {})
    with pytest.raises(ValueError, match=r"checkpoints of format version 1, this program reads 3 and no other"):
        Checkpoints(tmp_path, CONFIG, write=False)
