"""The loop of one stage: restore, step, log, save."""

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from geolrm_jax.data.examples import RING_VIEWS, ViewRule
from geolrm_jax.data.pipeline import PipelineConfig
from geolrm_jax.inference import abstract_model
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.precision import Precision
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints, abstract_with_sharding
from geolrm_jax.runtime.sharding import MeshConfig, batch_sharding, put_batch, shard_tree
from geolrm_jax.scene import Batch
from geolrm_jax.training.objectives import Objective
from geolrm_jax.training.optimizer import OptimizerConfig
from geolrm_jax.training.step import INIT, State, init_state, make_train_step

DOUBLINGS = "capacity_doublings"


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
    """How views are drawn: at random, or four of them 90 degrees apart and others at random (released)."""
    other_inputs: tuple[int, ...] = (0,)
    """With the released rule `inputs` are numbers of the four, and these numbers of the others; each is drawn."""
    pipeline: PipelineConfig = PipelineConfig()
    """How the data are read: sets to mix in, augmentation, damaged records, workers."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ema_decay: float = 0.0
    """Decay of averaged parameters, which evaluation then uses; 0 keeps none."""
    log_every: int = 20
    """Steps between lines of the log, each the mean since the last; divides checkpoint.every."""
    max_skipped: int = 20
    """Non-finite steps after which the run stops."""
    max_growth: int = 6
    """Times that the rasterizer's capacity may double before the run stops."""

    def __post_init__(self):
        positive = ("steps", "batch", "accumulation", "views", "log_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} must be a multiple of accumulation {self.accumulation}")
        if self.view_rule == "released" and self.views < RING_VIEWS:
            raise ValueError(f'view_rule "released" needs at least {RING_VIEWS} views, got {self.views}')
        first = RING_VIEWS if self.view_rule == "released" else self.views
        if not self.inputs or min(self.inputs) < 1 or max(self.inputs) > first:
            raise ValueError(f"inputs {self.inputs} must lie between 1 and {first}")
        others = self.views - first
        if not self.other_inputs or min(self.other_inputs) < 0 or max(self.other_inputs) > others:
            raise ValueError(f"other_inputs {self.other_inputs} must lie between 0 and {others}")
        if self.checkpoint.every % self.log_every:
            raise ValueError(
                f"checkpoint.every {self.checkpoint.every} must be a multiple of log_every {self.log_every}"
            )

    @property
    def candidates(self) -> int:
        """Leading views of an example that may become inputs."""
        return max(self.inputs) if self.view_rule == "paper" else RING_VIEWS + max(self.other_inputs)


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
    start: Callable[[], Mapping[str, Any]] = dict
    """Gives parts of `params` and `batch_stats` that take the place of fresh ones; called when nothing is restored."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A stage before its first batch; nothing is compiled until it is called."""

    abstract_state: State
    """Shapes with the shardings they have on the mesh."""
    init: Callable[[], State]
    build: Callable[[Objective], Callable]
    """step(state, constants, batch) for an objective."""
    constants: Any
    batch_sharding: NamedSharding


def prepare(trainer: Trainer) -> Prepared:
    """Everything of a stage that is decided before the first batch."""
    stage, mesh = trainer.stage, trainer.mesh.make()
    model = stage.objective.networks(trainer.model)
    optimizer, schedule = stage.optimizer.make(stage.steps), stage.optimizer.schedule(stage.steps)
    graphdef, _ = abstract_model(model, trainer.precision)

    def init(key):
        make = functools.partial(model.make, precision=trainer.precision)
        return init_state(make, stage.objective, optimizer, key, ema=stage.ema_decay > 0)

    key = jax.random.fold_in(jax.random.key(trainer.seed), INIT)
    abstract = jax.eval_shape(init, key)
    shardings = shard_tree(mesh, abstract)

    def fresh() -> State:
        return with_values(jax.jit(init, out_shardings=shardings)(key), trainer.start(), shardings)

    def build(objective: Objective) -> Callable:
        return make_train_step(
            graphdef,
            objective,
            optimizer,
            schedule,
            seed=trainer.seed,
            accumulation=stage.accumulation,
            ema_decay=stage.ema_decay,
            shardings=shardings,
        )

    constants = jax.device_put(stage.objective.constants(trainer.precision), NamedSharding(mesh, PartitionSpec()))
    return Prepared(abstract_with_sharding(abstract, shardings), fresh, build, constants, batch_sharding(mesh))


def train(trainer: Trainer) -> None:
    """Trains a stage to its last step, going on from its latest checkpoint if there is one."""
    stage, prepared = trainer.stage, prepare(trainer)
    checkpoints = Checkpoints(trainer.directory / trainer.name / "checkpoints", stage.checkpoint, write=True)
    first, doublings = checkpoints.resolve("latest") if checkpoints.steps else 0, 0
    if first:
        doublings = int(checkpoints.metrics(first)[DOUBLINGS])
        state = checkpoints.restore(first, prepared.abstract_state, trainer.data)
        logging.notice(f"{trainer.name}: going on from the checkpoint of step {first}")
    else:
        state = prepared.init()

    with (
        logging.RunLogger(trainer.directory, trainer.name, first or None) as log,
        logging.progress(trainer.name, stage.steps, start=first) as bar,
    ):
        monitor = Monitor(trainer.name, stage, prepared.build, log, bar, doublings)
        for done in range(first + 1, stage.steps + 1):
            start = time.perf_counter()
            batch = next(trainer.data)
            waited = time.perf_counter() - start
            inputs = drawn_inputs(stage, trainer.seed, done - 1)
            batch = with_inputs(batch, inputs)
            with jax.transfer_guard("disallow"):
                batch = put_batch(batch, prepared.batch_sharding)
                state, metrics = monitor.step(state, prepared.constants, batch)
            save = done % stage.checkpoint.every == 0 or done == stage.steps
            monitor.add(done, metrics, len(inputs), waited, flush=save)
            if save:
                checkpoints.save(done, state, trainer.data, monitor.since_save())
    checkpoints.close()


def drawn_inputs(stage: StageConfig, seed: int, step: int) -> tuple[int, ...]:
    """Which of an example's views are a step's inputs: the same on every process, and after every restart."""
    rng = np.random.default_rng((seed, step))
    first, others = (choices[int(rng.integers(len(choices)))] for choices in (stage.inputs, stage.other_inputs))
    return (*range(first), *range(RING_VIEWS, RING_VIEWS + others))


def with_inputs(batch: Batch, views: tuple[int, ...]) -> Batch:
    """The batch (NumPy leaves) with only these of its input views."""
    # A slice where it will do: it copies nothing, and this is done between two steps.
    which = slice(len(views)) if views == tuple(range(len(views))) else list(views)
    return dataclasses.replace(batch, inputs=jax.tree.map(lambda x: x[:, which], batch.inputs))


def with_values(state: State, values: Mapping[str, Any], shardings: Any) -> State:
    """`state` with `values`, a part of its tree, in the place of what it holds there; averages start from them too."""
    flat, where = (traverse_util.flatten_dict({k: tree[k] for k in values}) for tree in (state, shardings))
    for path, x in traverse_util.flatten_dict(dict(values)).items():
        flat[path] = jax.device_put(x, where[path], may_alias=False)
    state = {**state, **traverse_util.unflatten_dict(flat)}
    if "ema" in state:
        state["ema"] = jax.tree.map(jnp.copy, {name: state["params"][name] for name in state["ema"]})
    return state


class Monitor:
    """Averages the steps' metrics between log lines and acts on what they say.

    Metrics of a step are fetched after the next one is dispatched: the device never waits for the host.
    """

    def __init__(
        self,
        name: str,
        stage: StageConfig,
        build: Callable,
        log: logging.RunLogger,
        bar: logging.Progress,
        doublings: int,
    ):
        self.name, self.stage, self.build, self.log, self.bar = name, stage, build, log, bar
        self.doublings = doublings
        self.objective = stage.objective
        for _ in range(doublings):
            self.objective = self.objective.grown()
        self.compiled = build(self.objective)
        self.seen: set[int] = set()
        self.skipped = 0
        self.in_flight: tuple | None = None
        self.since_line, self.since_checkpoint = defaultdict(list), defaultdict(list)
        self.line_started = time.perf_counter()

    def step(self, state, constants, batch: Batch):
        """Dispatches one step; says so before the first of each number of inputs, which compiles."""
        inputs = batch.inputs.valid.shape[1]
        if inputs not in self.seen:
            self.seen.add(inputs)
            logging.notice(f"{self.name}: compiling the step for {inputs} input views")
        return self.compiled(state, constants, batch)

    def add(self, done: int, metrics: Mapping[str, jax.Array], inputs: int, waited: float, *, flush: bool) -> None:
        """Takes the metrics of a dispatched step; writes a line where one is due."""
        before, self.in_flight = self.in_flight, (done, metrics, inputs, waited, self.objective)
        if before:
            self._take(*before)
        if flush or done % self.stage.log_every == 0:
            self._take(*self.in_flight)
            self.in_flight = None
            self._write(done)

    def since_save(self) -> dict[str, float]:
        """Mean metrics since the last call, and what a restart needs of this object."""
        means = {name: float(np.mean(values)) for name, values in self.since_checkpoint.items()}
        self.since_checkpoint.clear()
        return means | {DOUBLINGS: float(self.doublings)}

    def _take(self, done: int, metrics: Mapping[str, jax.Array], inputs: int, waited: float, ran: Objective) -> None:
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        values |= {"inputs": inputs, "seconds_waiting_for_data": waited}
        if values["skipped"]:
            self._skip(done)
            values = {"skipped": 1.0}  # the rest is not finite
        if values.get("overflow"):
            self._grow(done, int(values["overflow"]), ran)
        for name, value in values.items():
            self.since_line[name].append(value)
            self.since_checkpoint[name].append(value)

    def _skip(self, done: int) -> None:
        self.skipped += 1
        logging.warn(f"{self.name}: step {done} skipped, its loss or gradient is not finite")
        if self.skipped >= self.stage.max_skipped:
            raise FloatingPointError(
                f"{self.name}: {self.skipped} steps skipped, as many as max_skipped: "
                "lower optimizer.learning-rate or look at the data"
            )

    def _grow(self, done: int, overflow: int, ran: Objective) -> None:
        logging.warn(f"{self.name}: step {done} left out {overflow} (Gaussian, tile) pairs, its capacity was too small")
        if ran is self.objective:  # else it was dispatched before the capacity grew
            self.doublings += 1
            if self.doublings > self.stage.max_growth:
                raise ValueError(
                    f"{self.name}: the capacity was doubled {self.stage.max_growth} times and overflows still"
                )
            self.objective = self.objective.grown()
            self.compiled, self.seen = self.build(self.objective), set()
            logging.notice(f"{self.name}: capacity doubled, set it so in the config: {self.objective}")

    def _write(self, done: int) -> None:
        now = time.perf_counter()
        means = {name: float(np.mean(values)) for name, values in self.since_line.items()}
        means["seconds_per_step"] = (now - self.line_started) / len(self.since_line["skipped"])
        means["skipped"] = float(np.sum(self.since_line["skipped"]))
        self.log.log(done, means)
        self.bar.update(done, {name: means[name] for name in ("loss", "psnr", "iou", "anchors") if name in means})
        self.since_line.clear()
        self.line_started = now
