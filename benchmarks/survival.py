"""Kills a random process of a run at random moments, restarts all, and compares the end with an uninterrupted run's.

    python benchmarks/survival.py [--processes 2] [--rounds 20] [--json FILE]

The processes are real ones of `geolrm train`, joined by jax.distributed over loopback, with collectives on the CPU. A
round starts all of them, draws one and a moment (in the start of the program, or some steps and a part of a step behind
it), and sends it SIGKILL. The others must end by themselves: JAX's heartbeats tell them, or one does not come to the
start in time. The next round goes on in the same work directory, and must say that it goes on from the newest
checkpoint there; a run that comes to its end is compared, and another begun. After the last round the run is finished.
Every array of the last checkpoint, parameters and optimizer, must be equal to those of a run that was never
interrupted, bit for bit.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from geolrm_jax.runtime.logging import read_metrics

ROOT = Path(__file__).parents[1]
# Without it XLA's CPU client may begin independent collectives of a device in any order, and then wait for ever.
ORDERED = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
CONFIG = ROOT / "tests" / "configs" / "tiny_proposal.py"
FEW_STEPS = 8  # a round lives for about so many at most
PATIENCE = 60  # seconds, beside those that JAX waits, that a process may take to end when another has died


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs share."""

    processes: int
    steps: int
    every: int
    heartbeat: int
    join: int
    folder: Path

    def start(self, workdir: Path) -> list[subprocess.Popen]:
        """All processes of a run; each writes its words to `workdir` with its number behind it."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        environment = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"), **os.environ}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": str(self.processes), "XLA_FLAGS": ORDERED}
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-m", "geolrm_jax.cli", "train", "--config", str(CONFIG), "--workdir", str(workdir)]
        command += ["--heartbeat", str(self.heartbeat), "--join", str(self.join)]
        command += ["--data.root", str(self.folder / "data")]
        command += ["--proposal.steps", str(self.steps), "--proposal.checkpoint.every", str(self.every)]
        command += ["--proposal.batch", str(2 * self.processes)]
        started = []
        for index in range(self.processes):
            with open(f"{workdir}.{index}.log", "ab") as log:
                words = {"stdout": log, "stderr": subprocess.STDOUT}
                own = {**environment, "JAX_PROCESS_ID": str(index)}
                started.append(subprocess.Popen(command, env=own, **words))
        return started

    def finish(self, workdir: Path) -> list[int]:
        """Runs to the end; the exit codes."""
        return [process.wait() for process in self.start(workdir)]


def steps_logged(workdir: Path) -> int:
    """Steps of which the log tells; 0 before there is one."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    found = (workdir / "proposal" / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in found if path.name.isdigit()), default=0)


def said(workdir: Path, process: int) -> str:
    """What this process, and those before it, have said."""
    path = Path(f"{workdir}.{process}.log")
    return path.read_text(errors="replace") if path.exists() else ""


def went_on_from(words: str) -> int:
    """The step of the checkpoint that the first process has said it goes on from, 0 where it has not."""
    found = re.search(r"going on from the checkpoint of step (\d+)", words)
    return int(found[1]) if found else 0


def arrays(workdir: Path, step: int, stage: str = "proposal") -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its name."""
    found = {}
    for item in ("model", "optimizer"):
        folder, handler = workdir / stage / "checkpoints" / str(step) / item, ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(folder).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        with ocp.Checkpointer(handler) as checkpointer:
            restored = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(tree, restore_args=as_numpy))
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def differing(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    """Names of arrays that are not equal bit for bit."""
    assert first.keys() == second.keys()
    return [name for name in first if first[name].tobytes() != second[name].tobytes()]


def wait_for_moment(running: list[subprocess.Popen], workdir: Path, draw: random.Random, start_seconds: float) -> dict:
    """Returns at a random moment: one in four in the start of the program, the others behind a random step.

    Args:
      running: the processes; where one ends by itself, this returns too.
      workdir: theirs.
      draw: random numbers.
      start_seconds: about how long it takes from the start to the first step.

    Returns:
      `in`, "start" or "steps"; `newest`, the checkpoint found; `seconds_to_first_step`, None if there was none.
    """
    before, logged, begun = newest(workdir), steps_logged(workdir), time.monotonic()
    in_start, steps = draw.random() < 0.25, draw.randrange(FEW_STEPS)
    moment, first_step = draw.uniform(0, start_seconds), None
    while all(process.poll() is None for process in running):
        now, waited = steps_logged(workdir), time.monotonic() - begun
        if first_step is None and now > before and now != logged:  # the log still has what the kill before cut off
            first_step = waited
        if waited > moment if in_start else first_step is not None and now > before + steps:
            time.sleep(draw.uniform(0, 0.2))
            break
        time.sleep(0.02)
    return {"in": "start" if in_start else "steps", "newest": before, "seconds_to_first_step": first_step}


def play_round(setup: Setup, workdir: Path, draw: random.Random, start_seconds: float) -> dict:
    """Starts all, kills one, waits for the others; what happened, `wait_for_moment`'s words included."""
    earlier, victim = len(said(workdir, 0)), draw.randrange(setup.processes)
    running = setup.start(workdir)
    happened = wait_for_moment(running, workdir, draw, start_seconds)
    happened |= {"victim": victim, "killed": running[victim].poll() is None, "logged": steps_logged(workdir)}
    running[victim].kill()
    killed_at, ended = time.monotonic(), []
    for process in running:
        try:
            patience = PATIENCE + setup.join + 4 * setup.heartbeat
            process.wait(timeout=max(1.0, killed_at + patience - time.monotonic()))
            ended.append(True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended.append(False)
    happened["seconds_until_others_ended"] = round(time.monotonic() - killed_at, 1)
    happened["went_on_from"] = went_on_from(said(workdir, 0)[earlier:])
    return happened | {"codes": [process.returncode for process in running], "others_ended_by_themselves": all(ended)}


def bring_to_end(setup: Setup, workdir: Path, expected: dict[str, np.ndarray]) -> dict:
    """Runs without a kill, compares, clears the work directory; exit codes and what differs."""
    before, earlier = newest(workdir), len(said(workdir, 0))
    codes = setup.finish(workdir)
    if any(codes):
        print(said(workdir, 0)[-3000:])
    different = ["everything: the run failed"] if any(codes) else differing(expected, arrays(workdir, setup.steps))
    shutil.rmtree(workdir)
    resumed = {"newest": before, "went_on_from": went_on_from(said(workdir, 0)[earlier:])}
    return {**resumed, "codes": codes, "differing": different}


def play(setup: Setup, count: int, seed: int) -> dict:
    """An uninterrupted run, then so many rounds and what comes of them."""
    calm, torn, draw = setup.folder / "calm", setup.folder / "torn", random.Random(seed)
    begun = time.monotonic()
    if any(setup.finish(calm)):
        raise SystemExit(said(calm, 0))
    start_seconds = (time.monotonic() - begun) / 2
    expected, rounds, ends = arrays(calm, setup.steps), [], []
    while len(rounds) < count:
        happened = play_round(setup, torn, draw, start_seconds)
        print(len(rounds) + 1, json.dumps(happened), flush=True)
        start_seconds = happened["seconds_to_first_step"] or start_seconds
        rounds += [happened] if happened["killed"] else []
        if newest(torn) == setup.steps or len(rounds) == count:
            ends.append({"after_round": len(rounds), **bring_to_end(setup, torn, expected)})
            print(json.dumps(ends[-1]), flush=True)
    return {"rounds": rounds, "ends": ends, "arrays": len(expected)}


def not_resumed(result: dict) -> list[dict]:
    """Rounds with a step, and ends, that did not go on from the newest checkpoint that was there."""
    stepped = [happened for happened in result["rounds"] if happened["seconds_to_first_step"] is not None]
    return [happened for happened in (*stepped, *result["ends"]) if happened["went_on_from"] != happened["newest"]]


def main() -> int:
    """Parses, plays, writes; the exit code is 1 if a run did not resume, ended otherwise, or hung."""
    from measuring import environment  # beside this file, which tests load from elsewhere

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--heartbeat", type=int, default=10, help="seconds")
    parser.add_argument("--join", type=int, default=90, help="seconds that processes wait for each other at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    known = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(known.processes, known.steps, known.every, known.heartbeat, known.join, Path(folder))
        result = play(setup, known.rounds, known.seed)
    about = {name: getattr(known, name) for name in ("processes", "steps", "every", "heartbeat", "join", "seed")}
    versions = environment(os.cpu_count(), "flax", "orbax.checkpoint", "grain")
    result = {**versions, **about, **result}
    if known.json:
        known.json.write_text(json.dumps(result, indent=2) + "\n")
    rounds, ends = result["rounds"], result["ends"]
    lost, good = len(not_resumed(result)), not any(end["differing"] for end in ends)
    hung = sum(not happened["others_ended_by_themselves"] for happened in rounds)
    longest = max(happened["seconds_until_others_ended"] for happened in rounds)
    print(
        f"{len(rounds)} kills, {len(ends)} runs brought to their end, {'all' if good else 'NOT all'} bit-equal in "
        f"{result['arrays']} arrays; {lost} did not go on from the newest checkpoint; the others ended within "
        f"{longest:.1f} s, {hung} hung"
    )
    return 0 if good and not hung and not lost else 1


if __name__ == "__main__":
    sys.exit(main())
