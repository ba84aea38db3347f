"""The loop of one stage: restore, step, log, save."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geolrm_jax.data.examples import RING_VIEWS, ViewRule
from geolrm_jax.data.pipeline import PipelineConfig
from geolrm_jax.inference import abstract_model
from geolrm_jax.models.geolrm import GeoLRMConfig, with_remat
from geolrm_jax.precision import Precision
from geolrm_jax.runtime import distributed, logging
from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints, abstract_with_sharding
from geolrm_jax.runtime.cost import count
from geolrm_jax.runtime.interruption import WATCH, Preempted, Preemption, Profile, WatchConfig, Watchdog
from geolrm_jax.runtime.sharding import MeshConfig, batch_sharding, put_batch, shard_tree
from geolrm_jax.scene import Batch
from geolrm_jax.training.batches import Batches
from geolrm_jax.training.guard import GuardConfig
from geolrm_jax.training.monitor import Diverged, Monitor
from geolrm_jax.training.objectives import Objective
from geolrm_jax.training.optimizer import OptimizerConfig
from geolrm_jax.training.rollback import read_order, roll_back
from geolrm_jax.training.step import INIT, State, init_state, make_train_step


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
    guard: GuardConfig = GuardConfig()
    """Which steps are skipped, and how often the stage may go back because of it."""
    max_skipped: int = 20
    """Skipped steps among the guard's window at which the stage goes back to its last good checkpoint, or stops."""
    max_growth: int = 6
    """Times that the rasterizer's capacity may double before the run stops."""

    def __post_init__(self):
        positive = ("steps", "batch", "accumulation", "views", "log_every", "max_skipped")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_skipped > self.guard.window:
            raise ValueError(f"max_skipped {self.max_skipped} must not exceed guard.window {self.guard.window}")
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
    batches: Callable[[int], Iterator[Any]]
    """Gives a Grain iterator of this process's share of the batches, in the order of that number."""
    start: Callable[[State], Mapping[str, Any]] = lambda target: {}
    """Gives parts of `params` and `batch_stats`, laid out as in the abstract state, that take the place of fresh ones;
    called when nothing is restored."""
    watch: WatchConfig = WATCH
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What every checkpoint says of the run, in JSON's types."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A stage before its first batch; nothing is compiled until it is called."""

    abstract_state: State
    """Shapes with the shardings they have on the mesh."""
    init: Callable[[], State]
    build: Callable[[Objective], Callable]
    """step(state, constants, batch) for an objective."""
    flops: Callable[[Objective, Batch], int]
    """Operations of a step on such a batch, all devices together, without what rematerialisation does twice."""
    constants: Any
    batch_sharding: NamedSharding


def prepare(trainer: Trainer, mesh: Mesh | None = None, constants: Any = None) -> Prepared:
    """Everything of a stage that is decided before the first batch.

    A mesh is given together with what the objective has of `constants`, laid out on it; for devices that are described
    and not there these are shapes. Without one it is the trainer's own, and the constants are loaded.
    """
    stage = trainer.stage
    if mesh is None:
        mesh = trainer.mesh.make()
        constants = jax.device_put(stage.objective.constants(trainer.precision), NamedSharding(mesh, PartitionSpec()))
    model = stage.objective.networks(trainer.model)
    optimizer, schedule = stage.optimizer.make(stage.steps), stage.optimizer.schedule(stage.steps)

    def init(key):
        make = functools.partial(model.make, precision=trainer.precision)
        return init_state(make, stage.objective, optimizer, key, ema=stage.ema_decay > 0, guard=stage.guard)

    key = jax.random.fold_in(jax.random.key(trainer.seed), INIT)
    abstract = jax.eval_shape(init, key)
    shardings = shard_tree(mesh, abstract)
    abstract_state = abstract_with_sharding(abstract, shardings)

    def fresh() -> State:
        return with_values(jax.jit(init, out_shardings=shardings)(key), trainer.start(abstract_state), shardings)

    @functools.cache
    def build(objective: Objective, config: GeoLRMConfig = model) -> Callable:
        return make_train_step(
            abstract_model(config, trainer.precision)[0],
            objective,
            optimizer,
            schedule,
            seed=trainer.seed,
            accumulation=stage.accumulation,
            ema_decay=stage.ema_decay,
            guard=stage.guard,
            shardings=shardings,
        )

    def flops(objective: Objective, batch: Batch) -> int:
        return count(build(objective, with_remat(model, "none")), abstract_state, constants, batch).total

    return Prepared(abstract_state, fresh, build, flops, constants, batch_sharding(mesh))


def train(trainer: Trainer) -> None:
    """Trains a stage to its last step, going on from its newest checkpoint if there is one.

    Raises:
      Preempted: if the run was told to stop; it has saved.
      FloatingPointError: if too many steps are skipped, after the last rollback too.
    """
    directory = trainer.directory / trainer.name
    prepared, order = prepare(trainer), read_order(directory)
    with (
        Preemption(trainer.watch.save_seconds) as preemption,
        Watchdog(directory, trainer.watch) as watchdog,
    ):
        while True:
            batches = Batches(trainer.batches, order)
            try:
                return train_in_order(trainer, prepared, batches, preemption, watchdog)
            except Diverged as diverged:
                with contextlib.closing(open_checkpoints(trainer)) as checkpoints:
                    order = roll_back(directory, trainer.stage, checkpoints, batches.order, diverged)


def train_in_order(
    trainer: Trainer, prepared: Prepared, batches: Batches, preemption: Preemption, watchdog: Watchdog
) -> None:
    """Trains to the last step, or to the step at which too many were skipped."""
    stage, directory = trainer.stage, trainer.directory / trainer.name
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(trainer)))
        first, state = checkpoints.restore_newest(prepared.abstract_state, batches) or (0, prepared.init())
        watchdog.beat(first)
        # Before the watchdog bites: the barrier knows whose host is missing.
        distributed.barrier(f"{trainer.name}: starting from step {first}", 0.9 * trainer.watch.hang_seconds)
        saved = checkpoints.metrics(first) if first else {}
        if first:
            logging.notice(f"{trainer.name}: going on from the checkpoint of step {first}")
        log = stack.enter_context(logging.RunLogger(trainer.directory, trainer.name, first or None))
        bar = stack.enter_context(logging.progress(trainer.name, stage.steps, start=first))
        profile = stack.enter_context(Profile(trainer.directory / "profile" / trainer.name, trainer.watch.profile))
        monitor = Monitor(trainer.name, stage, prepared.build, prepared.flops, log, bar, directory, saved)
        for done in range(first + 1, stage.steps + 1):
            profile.before(done)
            started = time.perf_counter()
            batch = next(batches)
            received = time.perf_counter()
            inputs = drawn_inputs(stage, trainer.seed, done - 1)
            batch = put_batch(with_inputs(batch, inputs), prepared.batch_sharding)
            with jax.transfer_guard("disallow"):
                state, metrics = monitor.step(state, prepared.constants, batch)
            host = {
                "inputs": float(len(inputs)),
                "seconds_waiting_for_data": received - started,
                "seconds_dispatching": time.perf_counter() - received,
            }
            profile.after(done, state)
            stop = preemption.due()
            whole = done % min(stage.checkpoint.every, stage.steps) == 0
            save = stop or whole or done == stage.steps
            monitor.add(done, metrics, host, damaged=batches.damaged, flush=save)
            watchdog.beat(done)
            if done % stage.log_every == 0:
                checkpoints.check()
            if save:
                checkpoints.save(done, state, batches, monitor.since_save(whole))
            if stop:
                checkpoints.wait()
                raise Preempted(f"{trainer.name}: told to stop; saved at step {done} of {stage.steps}")


def open_checkpoints(trainer: Trainer) -> Checkpoints:
    """The stage's, for writing."""
    directory = trainer.directory / trainer.name / "checkpoints"
    return Checkpoints(directory, trainer.stage.checkpoint, write=True, run=trainer.about)


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
        restored = isinstance(x, jax.Array) and x.sharding == where[path]  # where it belongs, and nobody else's
        flat[path] = x if restored else jax.device_put(x, where[path], may_alias=False)
    state = {**state, **traverse_util.unflatten_dict(flat)}
    if "ema" in state:
        state["ema"] = jax.tree.map(jnp.copy, {name: state["params"][name] for name in state["ema"]})
    return state
