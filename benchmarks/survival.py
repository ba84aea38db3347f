"""Kills a random process of a run at random moments, restarts all, and compares the end with an uninterrupted run's.

    python benchmarks/survival.py [--processes 2] [--rounds 20] [--json FILE]

The processes are real ones of `geolrm train`, joined by jax.distributed over loopback, with collectives on the CPU. A
round starts all of them, draws one and a moment (in the start of the program, or some steps and a part of a step
behind it), and sends it SIGKILL. The others must end by themselves, as JAX's heartbeats tell them. The next round goes
on in the same work directory; a run that comes to its end is compared, and another begun. After the last round the run
is finished. Every array of the last checkpoint, parameters and optimizer, must be equal to those of a run that was
never interrupted, bit for bit.
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
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
CONFIG = ROOT / "tests" / "configs" / "tiny_proposal.py"
FEW_STEPS = 8  # a round lives for at most so many


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs share."""

    processes: int
    steps: int
    every: int
    heartbeat: int
    folder: Path

    def start(self, workdir: Path) -> list[subprocess.Popen]:
        """All processes of a run; each writes its words to `workdir` with its number behind it."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        environment = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"), **os.environ}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": str(self.processes)}
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-m", "geolrm_jax.cli", "train", "--config", str(CONFIG), "--workdir", str(workdir)]
        command += ["--heartbeat", str(self.heartbeat), "--data.root", str(self.folder / "data")]
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


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its name."""
    found = {}
    for item in ("model", "optimizer"):
        folder, handler = workdir / "proposal" / "checkpoints" / str(step) / item, ocp.PyTreeCheckpointHandler()
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


def play_round(setup: Setup, workdir: Path, draw: random.Random, start_seconds: float) -> dict:
    """Starts, kills one, waits for the others; what happened.

    Args:
      start_seconds: about how long a start takes until its first step.
    """
    before, begun, running = newest(workdir), time.monotonic(), setup.start(workdir)
    victim = draw.randrange(setup.processes)
    live_for = None if draw.random() < 0.25 else draw.randrange(FEW_STEPS)
    logged, first_step = steps_logged(workdir), None
    moment = draw.uniform(0, start_seconds)
    while all(process.poll() is None for process in running):
        now, waited = steps_logged(workdir), time.monotonic() - begun
        if now > before and now != logged and first_step is None:
            first_step = waited
        if (live_for is None and waited > moment) or (live_for is not None and first_step and now > before + live_for):
            time.sleep(draw.uniform(0, 0.2))
            break
        time.sleep(0.01)
    killed = running[victim].poll() is None
    running[victim].kill()
    killed_at = time.monotonic()
    patience = killed_at + 60 + 4 * setup.heartbeat
    for process in running:
        try:
            process.wait(timeout=max(1.0, patience - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {
        "victim": victim,
        "killed": killed,
        "in": "start" if live_for is None else "steps",
        "resumed_at": before,
        "logged": steps_logged(workdir),
        "seconds_to_first_step": first_step,
        "seconds_until_others_ended": round(time.monotonic() - killed_at, 1),
        "codes": [process.returncode for process in running],
        "ended_by_themselves": all(
            code != -9 for i, code in enumerate(process.returncode for process in running) if i != victim
        ),
    }


def main() -> int:
    """Parses, kills, compares, writes; the exit code is 1 if a run did not resume or ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--heartbeat", type=int, default=10, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    known = parser.parse_args()
    draw, rounds, ends = random.Random(known.seed), [], []
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(known.processes, known.steps, known.every, known.heartbeat, Path(folder))
        calm, torn = Path(folder) / "calm", Path(folder) / "torn"
        begun = time.monotonic()
        codes = setup.finish(calm)
        if any(codes):
            print(Path(f"{calm}.0.log").read_text())
            return 1
        expected, start_seconds = arrays(calm, known.steps), (time.monotonic() - begun) / 2
        while len(rounds) < known.rounds:
            happened = play_round(setup, torn, draw, start_seconds)
            print(len(rounds) + 1, json.dumps(happened), flush=True)
            start_seconds = happened["seconds_to_first_step"] or start_seconds
            if happened["killed"]:
                rounds.append(happened)
            if newest(torn) == known.steps or len(rounds) == known.rounds:
                codes = setup.finish(torn)
                different = ["a run that failed"] if any(codes) else differing(expected, arrays(torn, known.steps))
                ends.append({"after_round": len(rounds), "codes": codes, "differing": different})
                print(json.dumps(ends[-1]), flush=True)
                if any(codes):
                    print(Path(f"{torn}.0.log").read_text()[-3000:])
                shutil.rmtree(torn)
    result = {
        "date": datetime.date.today().isoformat(),
        "processes": known.processes,
        "steps": known.steps,
        "checkpoint_every": known.every,
        "heartbeat_seconds": known.heartbeat,
        "jax": jax.__version__,
        "rounds": rounds,
        "ends": ends,
        "arrays": len(expected),
    }
    if known.json:
        known.json.write_text(json.dumps(result, indent=2) + "\n")
    waited = [played["seconds_until_others_ended"] for played in rounds]
    good = not any(end["differing"] for end in ends) and all(played["ended_by_themselves"] for played in rounds)
    print(
        f"{len(rounds)} kills, {len(ends)} runs brought to their end, "
        f"{'all' if good else 'NOT all'} bit-equal in {len(expected)} arrays; "
        f"the others ended within {max(waited):.1f} s"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
