"""The parts of a reconstruction step, each compiled and timed apart: the table of train_step.py."""

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from measuring import compiled_memory, take_turns
from step_setup import Step, compile_step, mfu

from geolrm_jax.inference import abstract_model
from geolrm_jax.models.geolrm import with_remat
from geolrm_jax.models.splitting import STACKED, whole
from geolrm_jax.runtime.cost import count
from geolrm_jax.training.objectives import Objective

PASSES = ("forward", "with_backward")
FROZEN = "frozen proposal, anchors"


class Program:
    """A function of arrays, compiled; a call waits for its results."""

    def __init__(self, function: Callable, *arguments: Any):
        self.arguments, self.compiled = arguments, jax.jit(function).lower(*arguments).compile()

    def __call__(self) -> Any:
        """The results."""
        return jax.block_until_ready(self.compiled(*self.arguments))


class Update:
    """The real step whose gradients are given: guard, optimizer, averages, norms for the log."""

    def __init__(self, step: Step):
        self.step, self.objective = step, GivenGradients(step.objective.trains)
        self.gradients = jax.tree.map(lambda x: 1e-3 * x, {n: step.state["params"][n] for n in self.objective.trains})
        self.compiled = compile_step(step, self.objective, self.gradients)

    def __call__(self) -> None:
        """Takes a step."""
        step = self.step
        step.state, _ = jax.block_until_ready(self.compiled(step.state, self.gradients, step.batch))

    def flops(self) -> int:
        """Operations of a call."""
        prepared = self.step.prepared
        return count(prepared.build(self.objective), prepared.abstract_state, self.gradients, self.step.batch).total


@dataclasses.dataclass(frozen=True)
class GivenGradients(Objective):
    """No losses; `constants` holds the gradients of the trained networks' parameters."""

    trains: tuple[str, ...]

    def losses(self, model, constants, batch, key):
        """Zero."""
        parameters = {name: nnx.to_pure_dict(nnx.state(getattr(model, name), nnx.Param)) for name in self.trains}
        return {"zero": zero(parameters, constants)}, {}


@jax.custom_vjp
def zero(parameters: Any, gradients: Any) -> jax.Array:
    """Zero, with these gradients."""
    return jnp.zeros(())


zero.defvjp(lambda _, gradients: (jnp.zeros(()), gradients), lambda gradients, _: (gradients, None))


class Parts:
    """Rows of the table of parts.

    Args:
      step: started; its parameters and batch are used.
      repeats: turns.
    """

    def __init__(self, step: Step, repeats: int):
        config, precision = step.objective.networks(step.experiment.model), step.experiment.precision
        self.repeats, self.rows = repeats, []
        self.mesh = step.prepared.batch_sharding.mesh.abstract_mesh
        graphdef = abstract_model(config, precision)[0]
        self.model = nnx.merge(graphdef, step.state["params"], step.state["batch_stats"])
        # The same without rematerialisation, to count operations.
        graphdef, shapes = abstract_model(with_remat(config, "none"), precision)
        self.bare = nnx.merge(graphdef, shapes["params"], shapes["batch_stats"])

    def measure(
        self,
        name: str,
        path: str | None,
        call: Callable,
        moving: tuple = (),
        still: tuple = (),
        *,
        backward: bool = True,
        of: str | None = None,
    ) -> Any:
        """Adds a row, and returns what the part gives.

        Args:
          name: of the row.
          path: of the part's module in the model; "" is all of it, None stands for no module.
          call: (module, *moving, *still) -> arrays.
          moving: arguments that gradients flow to, beside the module's parameters.
          still: the other arguments.
          backward: False for a part that gets no gradient.
          of: name of the row that this one is a share of.
        """
        graphdef, *states = nnx.split(module_at(path, self.model), nnx.Param, ...)
        parameters, rest = map(nnx.to_pure_dict, states)  # batch statistics are written where they are merged
        function, bare = (self.function(g, call) for g in (graphdef, nnx.split(module_at(path, self.bare))[0]))
        arguments = (parameters, moving, rest, still)
        programs = {"forward": Program(function, *arguments)}
        given = programs["forward"]()
        if backward:
            arguments, bare = (*arguments, floats(given)), with_backward(bare)
            programs["with_backward"] = Program(with_backward(function), *arguments)
        self.add(name, programs, count(bare, *arguments).total, of)
        return given

    def function(self, graphdef: Any, call: Callable) -> Callable:
        """A part as a pure function of arrays."""

        def forward(parameters, moving, rest, still):
            with jax.sharding.use_abstract_mesh(self.mesh):
                return call(nnx.merge(graphdef, whole(parameters, without=STACKED), rest), *moving, *still)

        return forward

    def add(self, name: str, programs: dict[str, Any], flops: int, of: str | None = None) -> None:
        """Times programs in turns and adds their row; operations and memory are the last one's."""
        seconds = take_turns(programs, self.repeats)
        last = [*programs][-1]
        figures = {"flops": flops, "mfu": mfu(flops, seconds[last]["median"])}
        figures["memory"] = compiled_memory(programs[last].compiled)
        self.rows.append({"part": name, "of": of} | {k: seconds.get(k) for k in PASSES} | figures)


def module_at(path: str | None, model: nnx.Module) -> nnx.Module:
    """A part of the model; for None one without anything in it."""
    return nnx.Dict() if path is None else attrgetter(path)(model) if path else model


def floats(tree: Any) -> list[jax.Array]:
    """The leaves that can have a gradient."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def with_backward(forward: Callable) -> Callable:
    """A part's results, and gradients of its parameters and of `moving` for given ones of the results."""

    def both(parameters, moving, rest, still, cotangents):
        given, pull = jax.vjp(lambda *inputs: floats(forward(*inputs, rest, still)), parameters, moving)
        return given, floats(pull(cotangents))

    return both


def time_parts(step: Step, repeats: int) -> list[dict[str, Any]]:
    """The rows of a step of the reconstruction: its forward pass once more, part by part, then the update."""
    objective, batch, lpips = step.objective, step.batch, step.prepared.constants
    views, targets, key = batch.inputs, batch.targets, jax.random.key(0)
    parts = Parts(step, repeats)
    measure, trains = parts.measure, objective.proposal_mode == "training"

    def propose(model, views, key):
        return model.propose(views, max_anchors=objective.max_anchors, key=key, mode=objective.proposal_mode)

    def transform(transformer, maps, anchors, views, key):
        return transformer(anchors, views, maps, key)

    def terms(_, rendered, gaussians, targets, pictures):
        return objective.terms(gaussians, rendered, targets, pictures, None)

    anchors, _ = measure(FROZEN, "", propose, still=(views, key), backward=False)
    encoding = dict(still=(views,), backward=False, of=FROZEN)
    measure("its image encoder", "proposal.encoder", lambda encoder, v: encoder(v, train=trains), **encoding)

    maps = measure("image encoder", "reconstruction.encoder", lambda m, views: m(views, train=True), still=(views,))
    tokens = measure("transformer", "reconstruction.transformer", transform, (maps,), (anchors, views, key))
    gaussians = measure("Gaussian decoder", "reconstruction.decoder", lambda m, *x: m(*x), (tokens,), (anchors,))

    background = objective.draw_background(targets, key)
    rendered = measure(
        "rasterizer", None, lambda _, *x: objective.render(*x), (gaussians,), still=(targets, background)
    )
    pictures = objective.composite(targets, background[..., None, None, :])
    measure("losses without LPIPS", None, terms, (rendered,), still=(gaussians, targets, pictures))
    if lpips is not None:
        compared = (lpips, pictures, targets.valid)
        measure("LPIPS", None, lambda _, rgb, lpips, *x: lpips.between(rgb, *x), (rendered.rgb,), still=compared)

    update = Update(step)
    parts.add("guard, optimizer", {"with_backward": update}, update.flops())
    return parts.rows
