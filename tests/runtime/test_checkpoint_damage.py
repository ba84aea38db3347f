"""Checkpoints that are damaged, disks that are full, folders that are shared: a clear error or the one before."""

import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints
from geolrm_jax.runtime.exclusive import exclusive

CONFIG = CheckpointConfig(every=1, keep=3)
NOT_READ = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax's notes on how it wrote


def make_state(seed, size=300):
    params = {"kernel": jax.random.normal(jax.random.key(seed), (size, size)), "bias": jnp.zeros(size)}
    return {"params": params, "batch_stats": {}, "opt_state": {"mu": params}, "step": jnp.array(seed)}


def abstract(state):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


class Position:
    """A data iterator that is nothing but its state."""

    def __init__(self, at=0):
        self.at = at

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    writing = Checkpoints(folder, CONFIG, write=True)
    for step in (1, 2):
        writing.save(step, make_state(step), Position(step), {"loss": float(step)})
    writing.close()
    return folder


@pytest.fixture
def saved(written, tmp_path):
    """Steps 1 and 2."""
    return shutil.copytree(written, tmp_path / "checkpoints")


@pytest.fixture
def warned(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warn", said.append)
    return said


def restored(folder):
    """Step and state of the newest sound checkpoint, checked to be all of it."""
    writing, position = Checkpoints(folder, CONFIG, write=True), Position()
    step, state = writing.restore_newest(abstract(make_state(0)), position)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
    assert position.at == step and writing.metrics(step) == {"loss": step}
    return step, writing


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_no_file_can_be_damaged_unnoticed(saved, damage, warned):
    """Every file of the newest checkpoint in turn: what is read is that checkpoint's or the one before's, whole."""
    good = shutil.copytree(saved / "2", saved.parent / "good")
    noticed = 0
    for name in files_of(good):
        damage(saved / "2" / name)
        reading = Checkpoints(saved, CONFIG, write=False)
        step = reading.resolve("latest")
        whole = reading._newest_sound(("model", "optimizer", "run"))[0]
        if name.parts[0] in NOT_READ:
            assert (step, whole) == (2, 2)
        else:
            noticed += 1
            assert whole == 1 and str(saved / "2") in warned[-1]
            assert str(name) in warned[-1] or name.name == "checksums.json"
            if name.name != "checksums.json":  # whose bytes speak of any item
                assert step == (1 if name.parts[0] == "model" else 2)
        reading.close()
        shutil.copyfile(good / name, saved / "2" / name)
    assert noticed > 15


def test_a_damaged_newest_checkpoint_is_moved_aside_and_its_step_saved_again(saved, warned):
    largest = max((saved / "2").rglob("d/*"), key=lambda file: file.stat().st_size)
    truncate(largest)
    step, writing = restored(saved)
    assert step == 1 and len(warned) == 1
    assert "checkpoint" in warned[0] and largest.name in warned[0] and "passed over for 1" in warned[0]
    assert sorted(os.listdir(saved)) == ["1", "2.damaged"]
    writing.save(2, make_state(2), Position(2), {"loss": 2.0})
    writing.close()
    assert restored(saved)[0] == 2
    truncate(next((saved / "2").rglob("d/*")))
    assert restored(saved)[0] == 1
    assert sorted(os.listdir(saved)) == ["1", "2.damaged", "2.damaged2"]


def test_where_none_is_sound_nothing_is_moved(saved):
    for step in "12":
        (saved / step / "checksums.json").unlink()
    writing = Checkpoints(saved, CONFIG, write=True)
    with pytest.raises(ValueError, match=r"is sound \(2: no checksums.json in it; 1: no checksums.json in it\)"):
        writing.restore_newest(abstract(make_state(0)), Position())
    assert sorted(os.listdir(saved)) == ["1", "2"]
    with pytest.raises(ValueError, match="is sound"):
        Checkpoints(saved, CONFIG, write=False).resolve("latest")


def test_a_damaged_step_asked_for_by_number_is_an_error(saved):
    flip(max((saved / "2" / "model").rglob("d/*"), key=lambda file: file.stat().st_size))
    reading = Checkpoints(saved, CONFIG, write=False)
    model = {name: abstract(make_state(0))[name] for name in ("params", "batch_stats")}
    for read in (lambda: reading.restore_model(2, model), lambda: reading.open_arrays(2)):
        with pytest.raises(ValueError, match=r"checkpoints/2 is damaged: model/.* has other bytes than were written"):
            read()
    np.testing.assert_array_equal(
        reading.restore_model(1, model)["params"]["kernel"], make_state(1)["params"]["kernel"]
    )


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    writing = Checkpoints(tmp_path, CONFIG, write=True)
    assert writing.restore_newest(abstract(make_state(0)), Position()) is None


def test_what_a_kill_leaves_is_no_checkpoint_and_goes(saved):
    """A save that was cut short, and a deletion."""
    shutil.copytree(saved / "2", saved / "3.orbax-checkpoint-tmp")
    shutil.copytree(saved / "2", saved / "0.deleted")
    assert Checkpoints(saved, CONFIG, write=False).steps == [1, 2]
    assert restored(saved)[0] == 2
    assert sorted(os.listdir(saved)) == ["1", "2"]


@pytest.mark.parametrize("before", [[], ["1", "2"]])
@pytest.mark.parametrize("noticed", ["at once", "at the end"])
def test_a_write_that_fails_is_an_error_and_the_checkpoints_before_it_stay(saved, noticed, before):
    """Files may not pass 100 kB here: writing fails in TensorStore's threads as on a full disk."""
    if not before:
        saved = saved.parent / "empty"
    writing = Checkpoints(saved, CheckpointConfig(keep=1, best="none"), write=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(OSError, match="/3 could not be written, those before it are as they were: "),
            contextlib.closing(writing),  # as in the loop: it must not say anything else
        ):
            writing.save(3, make_state(3), Position(3), {"loss": 3.0})
            if noticed == "at once":
                for _ in range(200):
                    writing.check()
                    time.sleep(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writing = Checkpoints(saved, CONFIG, write=True)
    assert sorted(os.listdir(saved)) == before
    if before:
        writing.close()
        step, writing = restored(saved)
        assert step == 2
    writing.save(3, make_state(3), Position(3), {"loss": 3.0})
    writing.close()
    assert restored(saved)[0] == 3


FULL_AND_READ_ONLY = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint_damage import *

disk = Path({disk!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], check=True)
folder = disk / "checkpoints"
writing = Checkpoints(folder, CONFIG, write=True)
writing.save(1, make_state(1), Position(1), {{"loss": 1.0}})
writing.wait()
try:
    writing.save(2, make_state(2, size=700), Position(2), {{"loss": 2.0}})
    writing.close()
except OSError as error:
    print("FULL:", error)
print("THEN:", restored(folder)[0], *sorted(os.listdir(folder)))
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
try:
    Checkpoints(folder, CONFIG, write=True)
except OSError as error:
    print("READ-ONLY:", error)
print("READ:", Checkpoints(folder, CONFIG, write=False).resolve("latest"))
"""


def test_a_full_disk_and_a_read_only_one(tmp_path):
    """Real ones, mounted where only the child process sees them."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("this system lets no process mount for itself")
    script = FULL_AND_READ_ONLY.format(tests=str(Path(__file__).parent), disk=str(tmp_path))
    found = subprocess.run([*unshare, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    said = dict(line.split(": ", 1) for line in found.stdout.splitlines() if ": " in line)
    assert "checkpoints/2 could not be written" in said["FULL"] and "No space left" in said["FULL"], found.stderr
    assert said["THEN"] == "1 1"
    assert "Read-only file system" in said["READ-ONLY"] and "checkpoints" in said["READ-ONLY"]
    assert said["READ"] == "1"


HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b"process 1 on elsewhere")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_work_directory_is_refused_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    message = rf"{tmp_path}: another run works there \(process 1 on elsewhere\)"
    with pytest.raises(OSError, match=message), exclusive(tmp_path):
        raise AssertionError("two runs at once")
    holder.kill()
    holder.wait()
    with exclusive(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    with exclusive(tmp_path):
        pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, warned):
    def lockf(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with exclusive(tmp_path):
        assert len(warned) == 1 and "no locks" in warned[0]
