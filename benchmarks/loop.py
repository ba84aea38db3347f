"""The training loop against the compiled step alone: what is spent outside XLA, waiting for data, and on compilation.

    python benchmarks/loop.py [--config quickstart] [--stage reconstruction] [--steps 60] [--json FILE]

Trains a stage for a few steps through `training.loop.train`, then runs the same compiled step on batches that are on
the device already, one after the other, synchronised. Seconds per step of the loop less those of the step alone are
spent outside XLA's execution. The loop's first half, which compiles, is left out of its time; compilations are
counted after its first ten steps.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax

from geolrm_jax import recipe
from geolrm_jax.config import load_config
from geolrm_jax.data.builders.records import build
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.logging import read_metrics
from geolrm_jax.runtime.sharding import put_batch
from geolrm_jax.training import loop


def run_loop(trainer: loop.Trainer) -> tuple[float, float, int]:
    """Seconds per step and of waiting for data per step, in the second half; compilations after ten steps."""
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            compilations.append(time.time()) if name.endswith("backend_compile_duration") else None
        )
    )
    loop.train(trainer)
    lines = read_metrics(trainer.directory / "metrics.jsonl")
    late = lines[len(lines) // 2 :]
    count = sum(lines[0]["wall_time"] < moment < lines[-1]["wall_time"] for moment in compilations)
    return (
        statistics.mean(line["seconds_per_step"] for line in late),
        statistics.mean(line["seconds_waiting_for_data"] for line in late),
        count,
    )


def run_step_alone(trainer: loop.Trainer, steps: int) -> float:
    """Seconds per step of the compiled step, inputs on the device, synchronised."""
    prepared = loop.prepare(trainer)
    step, state = prepared.build(trainer.stage.objective), prepared.init()
    data = trainer.batches(0)
    batches = [next(data) for _ in range(4)]

    def put(batch):
        return jax.block_until_ready(put_batch(batch, prepared.batch_sharding))

    choices = [loop.drawn_inputs(trainer.stage, trainer.seed, k) for k in range(steps)]
    of_inputs = {inputs: [put(loop.with_inputs(batch, inputs)) for batch in batches] for inputs in set(choices)}
    for inputs in of_inputs:
        state, _ = jax.block_until_ready(step(state, prepared.constants, of_inputs[inputs][0]))
    start = time.perf_counter()
    for k, inputs in enumerate(choices):
        state, _ = jax.block_until_ready(step(state, prepared.constants, of_inputs[inputs][k % 4]))
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--stage", default="reconstruction", choices=("proposal", "reconstruction"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workdir", type=Path, help="a trained work directory whose data and proposal are used")
    parser.add_argument("--json", type=Path)
    known = parser.parse_args()
    experiment = load_config(known.config)
    with tempfile.TemporaryDirectory() as folder:
        data = build(experiment.data, known.workdir / "data" if known.workdir else Path(folder) / "data")
        stage = dataclasses.replace(
            experiment.stages[known.stage],
            steps=known.steps,
            log_every=10,
            checkpoint=dataclasses.replace(experiment.stages[known.stage].checkpoint, every=1000),
        )
        changed = dataclasses.replace(experiment, **{known.stage: stage})
        source = known.workdir or Path(folder)
        trainer = recipe.make_trainer(changed, known.stage, source, data)
        trainer = dataclasses.replace(trainer, directory=Path(folder) / "run")
        in_loop, waiting, compilations = run_loop(trainer)
        alone = run_step_alone(trainer, known.steps // 2)
    result = {
        "config": known.config,
        "stage": known.stage,
        "steps": known.steps,
        "seconds_per_step_in_loop": in_loop,
        "seconds_per_step_alone": alone,
        "share_outside_xla": 1 - alone / in_loop,
        "share_waiting_for_data": waiting / in_loop,
        "compilations_after_ten_steps": compilations,
        "load": os.getloadavg()[0],
        "hardware": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
    }
    logging.notice(json.dumps(result, indent=2))
    if known.json:
        known.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
