"""Checkpoints of several real processes: saved by four with two devices each, read by one, two and three.

Run as a program, this file is one of those processes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geolrm_jax.runtime import checkpoint
from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints
from geolrm_jax.runtime.checksums import find_damage
from geolrm_jax.runtime.exclusive import exclusive

CONFIG = CheckpointConfig(every=1, keep=5)
ROWS = 48  # divides by the devices of one, two, three and four processes


class Position:
    """A data iterator that is nothing but its state."""

    def __init__(self, at=0):
        self.at = at

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def values(step):
    """The whole state, in NumPy."""
    rng = np.random.default_rng(step)
    kernel, bias = rng.normal(size=(ROWS, 6)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    params = {"net": {"kernel": kernel, "bias": bias}}
    state = {"params": params, "batch_stats": {"net": {"mean": bias + 1}}, "ema": jax.tree.map(np.negative, params)}
    return state | {"opt_state": {"mu": {"kernel": kernel * 2}}, "step": np.array(step, np.int32)}


def shardings(state):
    """Kernels are split by rows over all devices of all processes; the rest is everywhere."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.tree.map(lambda x: NamedSharding(mesh, P("fsdp") if x.ndim == 2 else P()), state)


def placed(state):
    """The state on the mesh; every process gives the parts that its devices hold."""
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), state, shardings(state))


def as_saved(state):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state))


def same(ours, theirs):
    """Bit for bit, of the parts that are here."""

    def check(x, y):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, y[shard.index])

    jax.tree.map(check, ours, theirs)


def save(folder):
    writing = Checkpoints(folder, CONFIG, write=True, run={"seed": 3})
    for step in (1, 2, 3):
        writing.save(step, placed(values(step)), Position(step), {"loss": float(step)})
    writing.close()


def restore(folder, expected):
    """The newest sound checkpoint as a trainer reads it, and the model as a reader does."""
    with exclusive(folder):
        writing, position = Checkpoints(folder, CONFIG, write=True), Position()
        step, state = writing.restore_newest(as_saved(values(0)), position)
        assert (step, position.at) == (int(expected), int(expected))
        same(state, values(step))
        writing.save(9, state, position, {"loss": 0.0})
        writing.close()
    reading = Checkpoints(folder, CONFIG, write=False)
    target = as_saved({name: values(0)[name] for name in ("params", "batch_stats")})
    model = reading.restore_model(reading.resolve("latest"), target)
    same(model, {"params": values(step)["ema"], "batch_stats": values(step)["batch_stats"]})
    if jax.process_index() == 0:  # one process alone, on one of its devices
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        alone = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
        same(
            reading.restore_model(9, alone),
            {"params": values(step)["ema"], "batch_stats": values(step)["batch_stats"]},
        )
        assert reading.open_arrays(9)("params", "net.kernel").shape == (ROWS, 6)


def none_sound(folder):
    try:
        Checkpoints(folder, CONFIG, write=True).restore_newest(as_saved(values(0)), Position())
    except ValueError as error:
        assert "is sound" in str(error)
    else:
        raise AssertionError("a damaged checkpoint was restored")


def refused(folder):
    try:
        with exclusive(folder):
            raise AssertionError("two runs at once")
    except BlockingIOError as error:
        assert "another run works there" in str(error)


def unwritable(folder):
    """Process 0 alone meets the error, as where only its host has lost the file system; all raise it."""
    if jax.process_index() == 0:
        folder.touch()
    for what in (exclusive(folder).__enter__, lambda: Checkpoints(folder, CONFIG, write=True)):
        try:
            what()
        except OSError as error:
            assert str(folder) in str(error)
            assert ("process 0 says what is wrong" in str(error)) == (jax.process_index() > 0)
        else:
            raise AssertionError("a file was taken for a folder")


def for_all(folder):
    """Process 0 alone reads the files, and all restore what it has found sound."""
    reading, looked = Checkpoints(folder, CONFIG, write=False), []
    checkpoint.find_damage = lambda *arguments: looked.append(arguments) or find_damage(*arguments)
    assert reading.newest_for_all() == 3
    target = as_saved({name: values(0)[name] for name in ("params", "batch_stats")})
    same(reading.restore_model(3, target), {"params": values(3)["ema"], "batch_stats": values(3)["batch_stats"]})
    assert len(looked) == (jax.process_index() == 0)


def run(processes, *command, devices=2, timeout=300):
    """Runs this file as so many processes that find each other on this machine; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    words, started = [tempfile.TemporaryFile("w+") for _ in range(processes)], []  # noqa: SIM115
    try:
        for index, file in enumerate(words):
            line = [sys.executable, __file__, address, str(processes), str(index), *map(str, command)]
            started.append(subprocess.Popen(line, env=environment, stdout=file, stderr=file))
        for process in started:
            process.wait(timeout)
    finally:
        for process in started:
            process.kill()
        said = [(file.seek(0), file.read())[1] for file in words]
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
    return said


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run(4, "save", folder)
    about = json.loads((folder / "3" / "run" / "run.json").read_text())
    assert (about["processes"], about["devices"], about["seed"]) == (4, 8, 3)
    assert len(list((folder / "3" / "model").glob("ocdbt.process_*"))) == 4
    return folder


@pytest.fixture
def saved(written, tmp_path):
    """Steps 1, 2 and 3 of four processes."""
    return shutil.copytree(written, tmp_path / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_saved_by_four_processes_restored_by_others(saved, processes):
    run(processes, "restore", saved, 3)
    assert (saved / "9" / "checksums.json").is_file()


@pytest.mark.slow
def test_all_processes_pass_over_the_same_damaged_checkpoint(saved):
    """Only a part that another process than the first would read is damaged."""
    largest = max((saved / "3").glob("model/ocdbt.process_3/d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    said = run(2, "restore", saved, 2)
    assert "is damaged and passed over for 2: model/ocdbt.process_3" in said[0] and "damaged" not in said[1]
    assert sorted(os.listdir(saved)) == [".lock", "1", "2", "3.damaged", "9"]


@pytest.mark.slow
def test_all_processes_stop_alike(saved, tmp_path):
    for file in saved.glob("*/checksums.json"):
        file.unlink()
    run(2, "none_sound", saved)
    with exclusive(tmp_path):
        run(2, "refused", tmp_path)
    run(2, "unwritable", tmp_path / "file")


@pytest.mark.slow
def test_one_process_looks_for_damage_for_all(saved):
    run(2, "for_all", saved)


if __name__ == "__main__":
    address, processes, index, command, *arguments = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, int(processes), int(index), cluster_detection_method="deactivate", heartbeat_timeout_seconds=30
    )
    commands = (save, restore, none_sound, refused, unwritable, for_all)
    {function.__name__: function for function in commands}[command](Path(arguments[0]), *arguments[1:])
