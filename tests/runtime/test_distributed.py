"""How processes find each other and wait, what they tell each other; the watchdog and the trace.

Run as a program, this file is one of two processes.
"""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from geolrm_jax.runtime import distributed, interruption
from geolrm_jax.runtime.interruption import Preemption, Profile, WatchConfig, Watchdog


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def of_two(index: int) -> None:
    """The program: both come to one barrier, only the first to the second."""
    distributed.initialize(timeout=60)
    assert jax.process_count() == 2 and jax.process_index() == index
    names = distributed.host_names()
    assert names == [f"{socket.gethostname()} (process {i})" for i in range(2)]
    gathered = distributed.per_host({"wait": 1.0 + index, "same": 5.0})
    assert gathered["wait"].tolist() == [1.0, 2.0]
    assert distributed.extremes(gathered)["wait"] == {"min": (1.0, names[0]), "max": (2.0, names[1])}
    for _ in range(2):
        distributed.barrier("both", 30.0)
    with distributed.only_first("work", 30.0) as first:
        assert first == (index == 0)
    if index == 0:
        with pytest.raises(TimeoutError) as raised:
            distributed.barrier("the first alone", 2.0)
        print(raised.value, flush=True)
    else:
        time.sleep(4)


def test_two_processes_wait_for_each_other_and_name_who_is_missing():
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(index)],
            env={**os.environ, **where, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    expected = f"the first alone: {socket.gethostname()} (process 1) did not come within 2 seconds; 1 of 2 processes"
    assert expected in said[0]


def test_half_a_cluster_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set, and no cluster"):
        distributed.initialize()
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID: expected a number, got 'one'"):
        distributed.initialize()


SLURM = {f"SLURM_{name}": "1" for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")}


@pytest.mark.parametrize(
    ("variables", "found"), [({}, None), (SLURM, "slurm"), ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://1.2.3.4:5"}, "ompi")]
)
def test_clusters_are_detected(variables, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.detected_cluster() == found


def test_one_process_alone_starts_nothing():
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    distributed.barrier("nobody", 0.001)
    with distributed.only_first("work") as first:
        assert first
    assert distributed.per_host({"a": 2.0})["a"].tolist() == [2.0] and len(distributed.host_names()) == 1


def hang(watchdog, seconds):
    """A stack to find in the dump."""
    watchdog.beat(7)
    time.sleep(seconds)


def test_a_hang_is_written_down_once_and_again_after_the_next_step(tmp_path, capsys):
    with Watchdog(tmp_path, WatchConfig(hang_seconds=0.3)) as watchdog:
        for dumps in (1, 2):
            hang(watchdog, 1.5)
            text = (tmp_path / "stacks-0.txt").read_text()
            assert text.count("nothing since step 7") == dumps and "in hang" in text and "in _watch" in text
    said = capsys.readouterr().err
    assert said.count("no step for 0.3 seconds, the last was 7") == 2 and str(tmp_path / "stacks-0.txt") in said


def test_steps_in_time_leave_no_dump(tmp_path):
    with Watchdog(tmp_path, WatchConfig(hang_seconds=2.0)) as watchdog:
        for step in range(12):
            watchdog.beat(step)
            time.sleep(0.25)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [dict(hang_seconds=0.0), dict(save_seconds=-1.0), dict(profile=(5, 4))])
def test_bad_watch_configs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WatchConfig(**wrong)


def test_a_save_that_takes_too_long_is_given_up(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(interruption.os, "_exit", ended.append)
    with Preemption(save_seconds=0.1) as preemption:
        assert not preemption.due()
        os.kill(os.getpid(), interruption.signal.SIGTERM)
        assert preemption.due()
        time.sleep(1.0)
        preemption._told = False  # or it is passed on
    assert ended == [interruption.PREEMPTED] and "not saved within 0.1 seconds" in capsys.readouterr().err


def test_a_notice_that_nobody_asked_for_is_passed_on():
    got = []
    before = interruption.signal.signal(interruption.signal.SIGTERM, lambda *_: got.append("outside"))
    with Preemption(save_seconds=60.0):
        os.kill(os.getpid(), interruption.signal.SIGTERM)
        time.sleep(0.01)
        assert not got
    assert got == ["outside"]
    with pytest.raises(interruption.Preempted), Preemption(save_seconds=60.0) as preemption:
        os.kill(os.getpid(), interruption.signal.SIGTERM)
        if preemption.due():
            raise interruption.Preempted
    assert got == ["outside"]
    interruption.signal.signal(interruption.signal.SIGTERM, before)


def test_a_trace_of_some_steps_is_written(tmp_path):
    double = jax.jit(lambda x: 2 * x)
    with Profile(tmp_path, (2, 3)) as profile:
        for step in range(1, 6):
            profile.before(step)
            profile.after(step, double(np.float32(step)))
            assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 3)


if __name__ == "__main__":
    of_two(int(sys.argv[1]))
