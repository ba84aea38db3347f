"""The loop of one stage: restore, step, log, save."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from geolrm_jax.data.pipeline import ViewRule
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.precision import Precision
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints, abstract_with_sharding
from geolrm_jax.runtime.sharding import MeshConfig, batch_sharding, put_batch, shard_tree
from geolrm_jax.training.objectives import Objective
from geolrm_jax.training.optimizer import OptimizerConfig
from geolrm_jax.training.step import State, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """How one stage is trained."""

    objective: Objective
    steps: int
    batch: int = 32
    """Objects per step, over all devices and parts of an accumulated step."""
    accumulation: int = 1
    """Parts that a step's batch is worked through in."""
    views: int = 8
    """Views drawn of each object; all of them supervise."""
    inputs: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    """Numbers of input views; each step draws one, and each is a compiled program of its own."""
    view_rule: ViewRule = "paper"
    """How views are drawn: at random, or four of them 90 degrees apart (released)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ema_decay: float = 0.0
    """Decay of averaged parameters, which evaluation then uses; 0 keeps none."""
    log_every: int = 20
    """Steps between lines of the log, each the mean since the last; divides checkpoint.every."""
    max_skipped: int = 100
    """Non-finite steps after which the run stops."""

    def __post_init__(self):
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} must be a multiple of accumulation {self.accumulation}")
        if not self.inputs or min(self.inputs) < 1 or max(self.inputs) > self.views:
            raise ValueError(f"inputs {self.inputs} must lie between 1 and views {self.views}")
        if self.checkpoint.every % self.log_every:
            raise ValueError(
                f"checkpoint.every {self.checkpoint.every} must be a multiple of log_every {self.log_every}"
            )


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything a stage needs, already built."""

    name: str
    stage: StageConfig
    model: GeoLRMConfig
    precision: Precision
    mesh: MeshConfig
    seed: int
    directory: Path
    """The work directory; checkpoints go to `directory/name/checkpoints`."""
    data: Iterator[Any]
    """A Grain iterator of this process's share of the batches."""
    warm_start: Mapping[str, Any] | None = None
    """`params` and `batch_stats` of other stages that take the place of fresh ones."""


def train(trainer: Trainer) -> None:
    """Trains a stage to its last step, going on from its latest checkpoint if there is one."""
    stage, mesh = trainer.stage, trainer.mesh.make()
    model = stage.objective.networks(trainer.model)
    optimizer, schedule = stage.optimizer.make(stage.steps), stage.optimizer.schedule(stage.steps)
    checkpoints = Checkpoints(trainer.directory / trainer.name / "checkpoints", stage.checkpoint, write=True)

    def make(rngs):
        return model.make(rngs, trainer.precision)

    def init(key):
        return init_state(make, stage.objective, optimizer, key, ema=stage.ema_decay > 0)

    key = jax.random.fold_in(jax.random.key(trainer.seed), 0)
    abstract = jax.eval_shape(init, key)
    shardings = shard_tree(mesh, abstract)
    first = 0
    if checkpoints.steps:
        first = checkpoints.resolve("latest")
        state = checkpoints.restore(first, abstract_with_sharding(abstract, shardings), trainer.data)
        logging.notice(f"{trainer.name}: going on from the checkpoint of step {first}")
    else:
        state = warm_started(jax.jit(init, out_shardings=shardings)(key), trainer.warm_start, shardings)
    constants = stage.objective.constants()
    graphdef = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, nnx.BatchStat)[0]

    def build(objective: Objective) -> Callable:
        return make_train_step(
            graphdef,
            objective,
            optimizer,
            schedule,
            seed=trainer.seed,
            accumulation=stage.accumulation,
            ema_decay=stage.ema_decay,
        )

    with (
        logging.RunLogger(trainer.directory, trainer.name, first or None) as log,
        logging.progress(trainer.name, stage.steps, start=first) as bar,
    ):
        window = Window(trainer.name, stage, build, log, bar)
        sharding = batch_sharding(mesh)
        for step in range(first, stage.steps):
            start = time.perf_counter()
            batch = next(trainer.data)
            waited = time.perf_counter() - start
            inputs = drawn_inputs(stage.inputs, trainer.seed, step)
            with jax.transfer_guard("disallow"):
                state, metrics = window.step(state, constants, put_batch(batch, sharding), inputs)
            done = step + 1
            save = done % stage.checkpoint.every == 0 or done == stage.steps
            window.add(done, metrics, inputs, waited, last=save)
            if save:
                checkpoints.save(done, state, trainer.data, window.since_save())
    checkpoints.close()


def drawn_inputs(choices: tuple[int, ...], seed: int, step: int) -> int:
    """The number of input views of a step: the same on every process, and after every restart."""
    return choices[int(np.random.default_rng((seed, step)).integers(len(choices)))]


def warm_started(state: State, other: Mapping[str, Any] | None, shardings: Any) -> State:
    """`state` with the networks that `other` holds in place of fresh ones."""
    for item in ("params", "batch_stats") if other else ():
        placed = {name: jax.device_put(tree, shardings[item][name]) for name, tree in other[item].items()}
        state[item] = {**state[item], **placed}
    return state


class Window:
    """Runs steps one ahead of what has been measured, averages metrics between log lines, acts on what they say."""

    def __init__(self, name: str, stage: StageConfig, build: Callable, log: logging.RunLogger, bar: logging.Progress):
        self.name, self.stage, self.build, self.log, self.bar = name, stage, build, log, bar
        self.objective = stage.objective
        self.compiled = build(self.objective)
        self.seen: set[int] = set()
        self.skipped = 0
        self.pending: tuple | None = None
        self.sums, self.saved_sums = defaultdict(list), defaultdict(list)
        self.started = time.perf_counter()

    def step(self, state, constants, batch, inputs: int):
        """Dispatches one step; says so before the first of each number of inputs, which compiles."""
        if inputs not in self.seen:
            self.seen.add(inputs)
            logging.notice(f"{self.name}: compiling the step for {inputs} input views")
        return self.compiled(state, constants, batch, inputs=inputs)

    def add(self, done: int, metrics: Mapping[str, jax.Array], inputs: int, waited: float, *, last: bool) -> None:
        """Takes a dispatched step's metrics; those of the step before, finished by now, are fetched."""
        ready, self.pending = self.pending, (done, metrics, inputs, waited)
        if ready:
            self._take(*ready)
        if last or done % self.stage.log_every == 0:
            self._take(*self.pending)
            self.pending = None
            self._write(done)

    def since_save(self) -> dict[str, float]:
        """Mean metrics since the last call."""
        means = {name: float(np.mean(values)) for name, values in self.saved_sums.items()}
        self.saved_sums.clear()
        return means

    def _take(self, done: int, metrics: Mapping[str, jax.Array], inputs: int, waited: float) -> None:
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self.skipped += int(values["skipped"])
        if values["skipped"]:
            logging.warn(f"{self.name}: step {done} skipped, its loss or gradient is not finite")
            if self.skipped > self.stage.max_skipped:
                raise FloatingPointError(
                    f"{self.name}: {self.skipped} steps skipped, more than max_skipped {self.stage.max_skipped}: "
                    "lower optimizer.learning-rate or look at the data"
                )
        if values.get("overflow"):
            self._grow(done, int(values["overflow"]))
        for name, value in {**values, "inputs": inputs, "seconds_waiting_for_data": waited}.items():
            if not (values["skipped"] and name not in ("skipped", "learning_rate")):
                self.sums[name].append(value)
                self.saved_sums[name].append(value)

    def _grow(self, done: int, overflow: int) -> None:
        self.objective = self.objective.grown()
        self.compiled, self.seen = self.build(self.objective), set()
        logging.warn(
            f"{self.name}: step {done} left out {overflow} (Gaussian, tile) pairs; capacity doubled: {self.objective}"
        )

    def _write(self, done: int) -> None:
        now = time.perf_counter()
        steps = max(len(self.sums["skipped"]), 1)
        means = {name: float(np.mean(values)) for name, values in self.sums.items()}
        means["seconds_per_step"] = (now - self.started) / steps
        means["skipped"] = float(np.sum(self.sums["skipped"]))
        self.log.log(done, means)
        shown = ("loss", "psnr", "iou", "anchors")
        self.bar.update(done, {name: means[name] for name in shown if name in means})
        self.sums.clear()
        self.started = now
