"""Training by several real processes, and by several devices of one: the numbers of one process with one device.

Run as a program, this file is `geolrm train`; where `WIDE` is set in float64 and without the evaluation, and where
`NOTED` is set it notes in that file which rows a step is given.
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
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax import cli, recipe
from geolrm_jax.config import load_config
from geolrm_jax.data.builders.records import build
from geolrm_jax.runtime.interruption import PREEMPTED
from geolrm_jax.runtime.logging import read_metrics
from geolrm_jax.training import loop

ROOT = Path(__file__).parents[1]
CONFIG, BOTH = (ROOT / "tests" / "configs" / f"{name}.py" for name in ("tiny_proposal", "tiny"))


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
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {survival.ORDERED}"
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
            own = environment | {"NOTED": f"{workdir}.{index}.rows"}
            own |= {"JAX_PROCESS_ID": str(index)} if processes > 1 else {}
            started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    return started


def finish(running, workdir, expected=0):
    try:
        codes = [process.wait(timeout=1800) for process in running]
    finally:
        for process in running:
            process.kill()
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


def joined(arrays, word):
    """All arrays whose names have that word, one behind the other."""
    return np.concatenate([x.ravel() for name, x in sorted(arrays.items()) if word in name]).astype(np.float64)


def differences(workdir, lines, one_workdir, one_lines, stage="proposal"):
    """Relative differences from the run of one device: of the first step's loss, norms of all parts and gradient, which
    Adam's first moment holds up to a factor; of every step's loss; of the last parameters."""
    names = [name for name in one_lines[0] if name.startswith("gradient_norm")]
    assert len(names) >= 4 and len(lines) == len(one_lines) == lines[-1]["step"]

    def worst(names, ours, theirs):
        return max(abs(a[name] / b[name] - 1) for name in names for a, b in zip(ours, theirs, strict=True))

    def apart(step, word):
        ours, theirs = (joined(survival.arrays(w, step, stage), word) for w in (workdir, one_workdir))
        assert ours.size == theirs.size > 1000
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    return {
        "first loss": worst(["loss"], lines[:1], one_lines[:1]),
        "first norms": worst(names, lines[:1], one_lines[:1]),
        "first gradient": apart(1, "['mu']"),
        "losses": worst(["loss"], lines, one_lines),
        "parameters": apart(len(lines), "model['params']"),
    }


def test_two_processes_train_like_one(data, tmp_path):
    options = options_of(data, steps=4, batch=2)  # the program of test_road.py: one compilation less
    one, two = tmp_path / "one", tmp_path / "two"
    alone, together = run(one, options), run(two, options, processes=2)
    found = differences(two, together, one, alone)
    assert max(found[name] for name in found if name.startswith("first")) < 1e-5 and found["losses"] < 1e-4, found
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
HEADS = [  # as many as `context` may have
    *("--model.proposal.transformer.heads", 4, "--model.proposal.transformer.width", 24),
    *("--model.reconstruction.transformer.heads", 4, "--model.reconstruction.transformer.width", 24),
]


WIDTHS = [pytest.param(False, id="float32", marks=pytest.mark.long), pytest.param(True, id="float64")]
IN_CI = ("4 processes", "data 2 x context 4")


@pytest.fixture(scope="module", params=WIDTHS)
def twenty_steps(request, data, tmp_path_factory):
    """Twenty steps of each stage by one process with one device: options, whether in float64, work directory, lines."""
    workdir = tmp_path_factory.mktemp("alone") / "one"
    options = [*options_of(data, steps=20, batch=8), *HEADS]
    of_second = ("--reconstruction.checkpoint.every", 1, "--reconstruction.checkpoint.keep", 30)
    options += ["--reconstruction.steps", 20, "--reconstruction.batch", 8, *of_second]
    return options, request.param, workdir, run(workdir, options, wide=request.param, config=BOTH)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["proposal", "reconstruction"])
@pytest.mark.parametrize("layout", [pytest.param(x, marks=() if x in IN_CI else pytest.mark.long) for x in LAYOUTS])
def test_every_layout_trains_like_one_device(layout, stage, twenty_steps, tmp_path, record_property):
    """The reconstruction starts from the same trained proposal; behind it the first process evaluates."""
    options, wide, one, alone = twenty_steps
    how, workdir = dict(LAYOUTS[layout]), tmp_path / "many"
    config = BOTH
    if stage == "proposal":
        config = CONFIG
        options = options[: options.index("--model.reconstruction.transformer.heads")]
    else:
        shutil.copytree(one / "proposal", workdir / "proposal")
    lines = run(workdir, [*options, *how.pop("mesh", ())], wide=wide, config=config, **how)
    alone = [line for line in alone if line["stage"] == stage]
    found = differences(workdir, [line for line in lines if line["stage"] == stage], one, alone, stage)
    for name, value in found.items():
        record_property(name, value)
    assert len(alone) == 20 and alone[-1]["loss"] < alone[0]["loss"] and alone[0].get("anchors", 1) > 0
    assert max(found[name] for name in found if name.startswith("first")) < 1e-5, found
    assert found["losses"] < (1e-6 if wide else 1e-3), found
    if stage == "reconstruction" and not wide:
        assert json.loads((workdir / "eval" / "20" / "report.json").read_text())["checkpoint_step"] == 20


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
def test_a_process_that_finds_no_first_one_ends(tmp_path):
    """As when that one dies in its start: JAX ends the process, long before the 300 seconds that it waits by itself."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "geolrm_jax.cli", "train", "--config", str(CONFIG), "--workdir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **own}
    done = subprocess.run([*command, "--join", "3"], env=environment, capture_output=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGABRT and b"DEADLINE_EXCEEDED" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_four_processes_saved_one_two_and_three_go_on_with(data, tmp_path):
    """Saved by four processes with two devices each, parameters over two; the next steps see the same rows."""
    options = [*options_of(data, steps=4, batch=24, every=2), "--mesh.fsdp", 2]
    four = tmp_path / "four"
    expected = run(four, options, processes=4, devices=2)
    order = noted(four, 4)
    assert [len(rows) for rows in order] == [24] * 4 and order[2] != order[3]
    shutil.rmtree(four / "proposal" / "checkpoints" / "4")
    for processes, devices in ((1, 2), (2, 1), (3, 2)):
        workdir = shutil.copytree(four, tmp_path / f"{processes}")
        lines = run(workdir, options, processes=processes, devices=devices)
        assert noted(workdir, processes) == order[2:]
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


def noted(workdir, processes):
    """For each step that these processes have done what stood in which row of the global batch, by all of them."""
    noted_by = [Path(f"{workdir}.{index}.rows").read_text().splitlines() for index in range(processes)]
    return [sorted({tuple(row) for line in lines for row in json.loads(line)}) for lines in zip(*noted_by, strict=True)]


def note_rows(file):
    """From here on every step leaves a line: place in the global batch, record and CRC-32 of its views, row by row."""
    put_batch = loop.put_batch

    def noting(batch, sharding):
        placed = put_batch(batch, sharding)
        rows = []
        for records, views in zip(placed.index.addressable_shards, placed.targets.rgb.addressable_shards, strict=True):
            first, checked = records.index[0].start or 0, [zlib.crc32(row.tobytes()) for row in np.asarray(views.data)]
            rows += [(first + i, int(record), checked[i]) for i, record in enumerate(np.asarray(records.data))]
        with open(file, "a") as lines:
            lines.write(json.dumps(rows) + "\n")
        return placed

    loop.put_batch = noting


def train_in_float64():
    """From here on parameters, statistics and moments are float64."""
    init_state = loop.init_state

    def wide(*arguments, **keywords):
        state = init_state(*arguments, **keywords)
        return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)

    loop.init_state = wide
    recipe.finish = lambda *_: None  # evaluation is in float32


if __name__ == "__main__":
    note_rows(os.environ["NOTED"])
    if os.environ.get("WIDE"):
        train_in_float64()
    sys.exit(cli.train(sys.argv[1:], program="train"))
