"""A stage's train step as training runs it, with a synthetic batch: what train_step.py measures."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from measuring import compiled_memory

from geolrm_jax.config import Experiment
from geolrm_jax.data.examples import make_views
from geolrm_jax.data.occupancy import drop_edges, occupancy_from_depth
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.models.geolrm import with_remat
from geolrm_jax.precision import Precision
from geolrm_jax.runtime.hardware import peak_flops
from geolrm_jax.runtime.sharding import put_batch
from geolrm_jax.scene import Batch
from geolrm_jax.training.loop import Trainer, prepare
from geolrm_jax.training.objectives import Objective

RING = 24  # views of the GObjaverse rig's upper ring


def configured(
    experiment: Experiment, stage: str, inputs: int, batch: int, compute: str, remat: str | None
) -> Experiment:
    """The experiment with one part of `batch` objects per device, so many input views, and these choices."""
    config = experiment.stages[stage]
    config = dataclasses.replace(
        config,
        batch=batch * experiment.mesh.rows(jax.device_count()),
        accumulation=1,
        views=max(config.views, inputs),
        inputs=(inputs,),
        view_rule="paper",
        other_inputs=(0,),
    )
    model = with_remat(experiment.model, remat) if remat else experiment.model
    return dataclasses.replace(experiment, precision=Precision(compute), model=model, **{stage: config})


def make_batch(experiment: Experiment, stage: str) -> Batch:
    """Procedural objects, NumPy leaves; the first views are inputs and all are targets."""
    config, grid = experiment.stages[stage], experiment.model.proposal.fine_grid
    ids = tuple(RING * v // config.views if config.views <= RING else v for v in range(config.views))
    source = ProceduralSource(config.batch, 0, size=experiment.render_size, view_ids=ids)

    def example(index: int) -> Batch:
        images = source.read("train", source.ids("train")[index])
        views, targets = (make_views(images, (size, size)) for size in (experiment.input_size, experiment.render_size))
        inputs = jax.tree.map(lambda x: x[: config.inputs[0]], views)
        occupancy = occupancy_from_depth(drop_edges(images.depth, images.cameras), images.cameras, grid)
        # One object at a time: `Batch` itself wants a leading axis.
        return jax.tree.map(lambda x: x[None], (inputs, targets, occupancy, np.int32(index)))

    examples = [example(index) for index in range(config.batch)]
    return Batch(*jax.tree.map(lambda *leaves: np.concatenate(leaves), *examples))


def make_constants(objective: Objective, precision: Precision) -> Any:
    """Random arrays in the place of what the losses need, LPIPS's weights: no file is read."""
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.standard_normal(x.shape, np.float32).astype(x.dtype) / max(math.prod(x.shape[:-1]), 1) ** 0.5

    return jax.tree.map(draw, objective.abstract_constants(precision))


class Step:
    """A stage's compiled train step with its state; a call takes one step and waits for it.

    Attributes:
      state: None until `start`.
      metrics: of the last step.
      peak: most bytes on the fullest device, those of other programs aside; None if it does not tell, or if other
        programs had taken more before.
    """

    def __init__(self, experiment: Experiment, name: str, batch: Batch):
        self.experiment, self.stage = experiment, experiment.stages[name]
        trainer = Trainer(
            name=name,
            stage=self.stage,
            model=experiment.model,
            precision=experiment.precision,
            mesh=experiment.mesh,
            seed=experiment.seed,
            directory=Path(),
            batches=iter,
        )
        mesh = experiment.mesh.make()
        constants = make_constants(self.stage.objective, experiment.precision)
        constants = jax.device_put(constants, NamedSharding(mesh, PartitionSpec()))
        self.prepared = prepare(trainer, mesh, constants)
        self.objective, self.state, self.metrics, self.peak = self.stage.objective, None, {}, None
        self.batch = put_batch(batch, self.prepared.batch_sharding)
        self.compile()

    def compile(self) -> None:
        """For the objective as it is."""
        begin = time.perf_counter()
        self.compiled = compile_step(self, self.objective, self.prepared.constants)
        self.seconds_compiling = time.perf_counter() - begin

    def start(self) -> None:
        """Makes the state and takes steps until nothing overflows."""
        own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((self.batch, self.prepared.constants)))
        before, others = device_memory("peak_bytes_in_use"), device_memory("bytes_in_use")
        self.state = self.prepared.init()
        self()
        while self.metrics.get("overflow"):
            self.objective = self.objective.grown()
            self.compile()
            self()
        after = device_memory("peak_bytes_in_use")
        self.peak = after - (others - own) if after and after > before else None

    def __call__(self) -> None:
        """Takes a step."""
        self.state, self.metrics = jax.block_until_ready(self.compiled(self.state, self.prepared.constants, self.batch))

    def row(self, seconds: dict[str, float], together: bool) -> dict[str, Any]:
        """What is known of the step, times without a mean."""
        experiment, stage, count_of = self.experiment, self.stage, self.prepared.flops
        flops, metrics = count_of(self.objective, self.batch), jax.device_get(self.metrics)
        told = ("loss", "skipped", "anchors", "overflow", "invalid_gaussians")
        return {
            "compute": experiment.precision.compute,
            "remat": remat_of(experiment.model),
            "objects": stage.batch,
            "inputs": stage.inputs[0],
            "targets": stage.views,
            "input_size": experiment.input_size,
            "render_size": experiment.render_size,
            "devices": jax.device_count(),
            "mesh": experiment.mesh.shape(jax.device_count()),
            "took_turns": together,
            "seconds": seconds,
            "samples_per_second": stage.batch / seconds["median"],
            "flops_per_sample": flops / stage.batch,
            "mfu": mfu(flops, seconds["median"]),
            "memory": {"compiled": compiled_memory(self.compiled), "peak": self.peak},
            "seconds_compiling": self.seconds_compiling,
            "objective": dataclasses.asdict(self.objective),
            "last_step": {name: float(metrics[name]) for name in told if name in metrics},
        }


def compile_step(step: Step, objective: Objective, constants: Any) -> jax.stages.Compiled:
    """The step of the same stage for another objective."""
    build, state = step.prepared.build, step.prepared.abstract_state
    return build(objective).lower(state, constants, step.batch).compile()


def device_memory(which: str) -> int | None:
    """A number of `memory_stats`, of the device where it is largest; None on a CPU."""
    told = [(device.memory_stats() or {}).get(which) for device in jax.local_devices()]
    return None if None in told else max(told)


def remat_of(config: Any) -> list[str]:
    """The policies that occur in a tree of config dataclasses."""
    found = {config.remat} if hasattr(config, "remat") else set()
    parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return sorted(found.union(*(remat_of(part) for part in parts if dataclasses.is_dataclass(part))))


def mfu(flops: float, seconds: float) -> float | None:
    """Of the devices' dense bfloat16 peak; None where that is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return flops / seconds / (peak * jax.device_count()) if peak else None
