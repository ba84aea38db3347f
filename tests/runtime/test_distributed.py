"""How processes find each other and wait, what they tell each other; the watchdog and the trace.

Run as a program, this file is one of two processes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax._src.clusters.k8s_cluster import K8sCluster

from geolrm_jax.runtime import distributed, interruption
from geolrm_jax.runtime.interruption import Preempted, Preemption, Profile, WatchConfig, Watchdog


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
    with distributed.only_first("work") as first:
        assert first == (index == 0)
    kind, message = (OSError, "full") if index == 0 else (ValueError, "bad work failed: process 0 says why")
    with pytest.raises(kind, match=message), distributed.only_first("bad work") as first:
        if first:
            raise OSError("full")
    if index == 0:
        with pytest.raises(TimeoutError) as raised:
            distributed.barrier("the first alone", 2.0)
        print(raised.value, flush=True)
    else:
        time.sleep(4)


def told_of_two(index: int) -> None:
    """The program: the second waits for the first, as while it builds the data or evaluates."""
    distributed.initialize(timeout=60)
    with interruption.ending_when_told(), distributed.only_first("work") as first:
        print("waiting", flush=True)
        if first:
            time.sleep(100)


def processes_of_two(*command: str) -> list[subprocess.Popen]:
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(index), *command],
            env={**os.environ, **where, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def test_two_processes_wait_for_each_other_and_name_who_is_missing():
    running = processes_of_two()
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


@pytest.mark.parametrize(("rank", "mine"), [("0", True), ("3", False)])
def test_one_of_many_processes_works_and_joins_no_run(rank, mine, monkeypatch):
    with distributed.by_one() as first:
        assert first  # no cluster
    for name, value in (SLURM | {"SLURM_NTASKS": "8", "SLURM_PROCID": rank}).items():
        monkeypatch.setenv(name, value)
    with distributed.by_one() as first:
        assert first == mine
    with distributed.by_one(detect=False) as first:
        assert first
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with distributed.by_one() as first:
        assert not first
    assert not jax.distributed.is_initialized()


def test_a_pod_of_kubernetes_that_is_no_job_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(K8sCluster, "is_env_present", classmethod(lambda cls: True))
    assert distributed.detected_cluster() == "K8sCluster"
    with pytest.raises(ValueError, match=r"K8sCluster does not say which process this is .*Indexed.*--no-cluster"):
        distributed.initialize()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distributed.initialize()
    assert asked[0]["cluster_detection_method"] is None  # JAX finds the job by itself
    jax.config.update("jax_enable_preemption_service", True)


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


def test_a_hang_of_the_file_system_ends_the_process_too(tmp_path, monkeypatch, capfd):
    ended, file = [], tmp_path / "file"
    file.touch()
    monkeypatch.setattr(interruption.os, "_exit", ended.append)
    with Watchdog(file / "no folder", WatchConfig(hang_seconds=0.2, hang_exit=True)) as watchdog:
        hang(watchdog, 1.0)
        said = capfd.readouterr().err
        assert ended == [interruption.HUNG] and "could not be written" in said and "in hang" in said
        monkeypatch.setattr(interruption, "DUMPING", 0.2)
        monkeypatch.setattr(interruption.Path, "mkdir", lambda *_, **__: time.sleep(2.0))
        hang(watchdog, 1.0)
        assert ended == [interruption.HUNG] * 2  # by the timer: the file system still hangs


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
    monkeypatch.setattr(interruption, "POLL", 0.05)
    with pytest.raises(Preempted), Preemption(save_seconds=0.1) as preemption:
        assert not preemption.due()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.due()
        time.sleep(1.0)
    assert ended == [interruption.NOT_SAVED] and "not saved within 0.1 seconds" in capsys.readouterr().err


def test_a_notice_behind_the_last_question_stops_the_run_too():
    with pytest.raises(Preempted, match="behind the last step"), Preemption(save_seconds=60.0) as preemption:
        assert not preemption.due()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    with pytest.raises(KeyError), Preemption(save_seconds=60.0):
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError  # an error is not hidden


def test_outside_of_training_a_notice_ends_a_process_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised, interruption.ending_when_told():
        with Preemption(save_seconds=60.0):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        raise AssertionError("not ended")
    assert raised.value.code == interruption.PREEMPTED and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("training", [False, True])
def test_who_ends_by_itself_after_a_notice_is_left_alone(training, monkeypatch):
    """A process of several that has saved, and one that is done while it gives the others time to hear."""
    ended, notice = [], threading.Event()
    monkeypatch.setattr(interruption, "_end", lambda why, code: ended.append(code))
    monkeypatch.setattr(interruption, "POLL", 0.4)
    monkeypatch.setattr(interruption.Preemption, "listening", False)
    monkeypatch.setattr(distributed, "told", notice.is_set)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(interruption.multihost_utils, "reached_preemption_sync_point", lambda number: True)
    with interruption.ending_when_told():
        if training:
            with contextlib.suppress(Preempted), Preemption(save_seconds=60.0) as preemption:
                notice.set()
                assert preemption.due()
            time.sleep(0.8)
        notice.set()
        time.sleep(0.6)
    assert not ended


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_outside_of_training_a_notice_to_one_process_ends_all(which):
    running = processes_of_two("told")
    for process in running:
        assert process.stdout.readline() == "waiting\n"
    running[which].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [interruption.PREEMPTED] * 2, said


def test_a_trace_of_some_steps_is_written(tmp_path, capsys):
    double = jax.jit(lambda x: 2 * x)
    with Profile(tmp_path, (2, 3)) as profile:
        for step in range(1, 6):
            profile.before(step)
            profile.after(step, double(np.float32(step)))
            assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 3)
    assert "no profile" not in capsys.readouterr().out
    with Profile(tmp_path, (7, 9)) as profile:
        profile.before(6)
        profile.after(6, None)
    assert "no profile: none of the steps 7 to 9 came by" in capsys.readouterr().out


if __name__ == "__main__":
    (told_of_two if sys.argv[2:] else of_two)(int(sys.argv[1]))
