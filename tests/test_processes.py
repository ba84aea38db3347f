"""Training by several real processes, and by several devices of one: the numbers of one process with one device.

Run as a program, this file is `geolrm train`, in float64 where `WIDE` is set.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax import cli
from geolrm_jax.config import load_config
from geolrm_jax.data.builders.records import build
from geolrm_jax.runtime.interruption import PREEMPTED
from geolrm_jax.runtime.logging import read_metrics
from geolrm_jax.training import loop

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "configs" / "tiny_proposal.py"


def load_survival():
    """The benchmark, which reads checkpoints of any mesh as NumPy arrays."""
    spec = importlib.util.spec_from_file_location("survival", ROOT / "benchmarks" / "survival.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["survival"] = module
    spec.loader.exec_module(module)
    return module


survival = load_survival()


def start(workdir, options, *, processes=1, devices=1, wide=False, config=CONFIG):
    """The processes of a run; what they say goes to files beside the work directory."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    options = [str(option) for option in options]
    if wide:
        environment |= {"WIDE": "1", "JAX_ENABLE_X64": "1"}
        options += ["--precision.compute", "float64"]
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{listener.getsockname()[1]}"
        environment["JAX_NUM_PROCESSES"] = str(processes)
    command = [sys.executable, __file__, "--config", str(config), "--workdir", str(workdir), *options]
    started = []
    for index in range(processes):
        with open(f"{workdir}.{index}.log", "ab") as log:
            own = environment | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {})
            started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    return started


def finish(running, workdir, expected=0):
    codes = [process.wait(timeout=3600) for process in running]
    said = "\n".join(Path(f"{workdir}.{index}.log").read_text()[-3000:] for index in range(len(running)))
    assert codes == [expected] * len(running), said


def run(workdir, options, **how):
    """Trains to the end; the lines of the log."""
    finish(start(workdir, options, **how), workdir)
    return read_metrics(workdir / "metrics.jsonl")


def options_of(data, *, steps, batch, every=1):
    saving = ("--proposal.checkpoint.every", every, "--proposal.checkpoint.keep", 30)
    return ["--data.root", data, "--proposal.steps", steps, "--proposal.batch", batch, *saving]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One built set for all runs."""
    return build(load_config(str(CONFIG)).data, tmp_path_factory.mktemp("set") / "data")


def gradient(workdir):
    """The clipped gradient of the first step by parameter: what Adam's first moment holds behind it, up to a factor."""
    return {name: x for name, x in survival.arrays(workdir, 1).items() if "['mu']" in name}


def assert_same_first_step(workdir, lines, one_workdir, one_lines):
    """Loss, norms of all parts, and the gradient itself, to 1e-5."""
    names = [name for name in one_lines[0] if name == "loss" or name.startswith("gradient_norm")]
    assert len(names) >= 4
    for name in names:
        np.testing.assert_allclose(lines[0][name], one_lines[0][name], rtol=1e-5, err_msg=name)
    ours, theirs = (np.concatenate([x.ravel() for x in gradient(w).values()]) for w in (workdir, one_workdir))
    assert ours.size == theirs.size > 1000
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_two_processes_train_like_one(data, tmp_path):
    options = options_of(data, steps=4, batch=2)  # the program of test_road.py: one compilation less
    one, two = tmp_path / "one", tmp_path / "two"
    alone, together = run(one, options), run(two, options, processes=2)
    assert_same_first_step(two, together, one, alone)
    np.testing.assert_allclose([x["loss"] for x in together], [x["loss"] for x in alone], rtol=1e-4)
    hosts = together[1]["hosts"]["seconds_per_step"]
    assert {hosts["min"][1], hosts["max"][1]} <= {f"{socket.gethostname()} (process {i})" for i in range(2)}
    assert "hosts" not in alone[1]
    assert not list(tmp_path.glob("two/tensorboard/*/events*.1"))


# Real processes, and devices of one: data 4 x fsdp 2, and two rows with their tokens over four devices.
LAYOUTS = {
    "2 processes": dict(processes=2),
    "4 processes": dict(processes=4),
    "data 4 x fsdp 2": dict(devices=8, mesh=("--mesh.data", 4, "--mesh.fsdp", 2)),
    "data 2 x context 4": dict(devices=8, mesh=("--mesh.data", 2, "--mesh.context", 4)),
}


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "float64"])
def twenty_steps(request, data, tmp_path_factory):
    """Twenty steps of one process with one device: options, whether in float64, work directory, lines."""
    workdir = tmp_path_factory.mktemp("alone") / "one"
    options = options_of(data, steps=20, batch=8)
    return options, request.param, workdir, run(workdir, options, wide=request.param)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_device(layout, twenty_steps, tmp_path):
    options, wide, one, alone = twenty_steps
    how = dict(LAYOUTS[layout])
    workdir = tmp_path / "many"
    lines = run(workdir, [*options, *how.pop("mesh", ())], wide=wide, **how)
    assert_same_first_step(workdir, lines, one, alone)
    ours, theirs = (np.array([line["loss"] for line in of]) for of in (lines, alone))
    assert len(ours) == 20 and theirs[-1] < theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6 if wide else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", [dict(processes=2), dict(devices=8, mesh=("--mesh.fsdp", 2, "--mesh.context", 4))])
def test_both_stages_and_the_evaluation(how, data, tmp_path):
    """The reconstruction of one process and of many, on the same trained proposal; the first process evaluates."""
    options = ["--data.root", data, "--proposal.batch", 8, "--reconstruction.batch", 8]
    one, many, tiny = tmp_path / "one", tmp_path / "many", ROOT / "tests" / "configs" / "tiny.py"
    alone = run(one, options, config=tiny)
    shutil.copytree(one / "proposal", many / "proposal")
    how = dict(how)
    together = run(many, [*options, *how.pop("mesh", ())], config=tiny, **how)
    alone, together = ([x for x in lines if x["stage"] == "reconstruction"] for lines in (alone, together))
    names = [name for name in alone[0] if name in ("loss", "image", "depth") or name.startswith("gradient_norm")]
    assert len(names) >= 7 and alone[0]["anchors"] == together[0]["anchors"] > 0
    for name in names:
        np.testing.assert_allclose(together[0][name], alone[0][name], rtol=1e-5, err_msg=name)
    assert json.loads((many / "eval" / "4" / "report.json").read_text())["checkpoint_step"] == 4


@pytest.mark.slow
def test_a_notice_to_one_of_two_processes_stops_both_behind_the_same_step(data, tmp_path):
    options = options_of(data, steps=60, batch=2, every=30)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, options, processes=2)
    running = start(stopped, options, processes=2)
    log = stopped / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3) and running[0].poll() is None:
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    finish(running, stopped, expected=PREEMPTED)
    saved = survival.newest(stopped)
    assert 3 <= saved < 60 and len(read_metrics(log)) == saved
    run(stopped, options, processes=2)
    assert not survival.differing(survival.arrays(whole, 60), survival.arrays(stopped, 60))


@pytest.mark.slow
def test_what_four_processes_saved_one_two_and_three_go_on_with(data, tmp_path):
    """Saved by four processes with two devices each, parameters over two; the next step sees the same batch."""
    options = [*options_of(data, steps=4, batch=24, every=2), "--mesh.fsdp", 2]
    four = tmp_path / "four"
    expected = run(four, options, processes=4, devices=2)
    shutil.rmtree(four / "proposal" / "checkpoints" / "4")
    for processes, devices in ((1, 2), (2, 1), (3, 2)):
        workdir = shutil.copytree(four, tmp_path / f"{processes}")
        lines = run(workdir, options, processes=processes, devices=devices)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        np.testing.assert_allclose(lines[2]["loss"], expected[2]["loss"], rtol=1e-5)
        for line, other in zip(lines[:2], expected[:2], strict=True):  # what was logged before is not touched
            assert line == other
        about = json.loads((workdir / "proposal" / "checkpoints" / "4" / "run" / "run.json").read_text())
        assert about["iterator"]["position"] == 4 * 24 and about["processes"] == processes


@pytest.mark.slow
def test_a_process_killed_at_random_moments_loses_nothing(tmp_path):
    """Two rounds of the benchmark; it compares with an uninterrupted run, bit for bit."""
    command = [sys.executable, str(ROOT / "benchmarks" / "survival.py"), "--rounds", "2", "--steps", "12"]
    command += ["--every", "2", "--heartbeat", "20", "--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rounds"]) == 2 and all(end["differing"] == [] for end in result["ends"])


def train_in_float64():
    """From here on parameters, statistics and moments are float64."""
    init_state = loop.init_state

    def wide(*arguments, **keywords):
        state = init_state(*arguments, **keywords)
        return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)

    loop.init_state = wide


if __name__ == "__main__":
    if os.environ.get("WIDE"):
        train_in_float64()
    sys.exit(cli.train(sys.argv[1:], program="train"))
