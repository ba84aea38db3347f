"""What a configured model is made of and what it costs: parameters per part, FLOPs per object. Nothing is allocated."""

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from geolrm_jax.config import Experiment
from geolrm_jax.export.files import written_whole
from geolrm_jax.inference import abstract_model
from geolrm_jax.models.geolrm import with_remat
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.cost import Cost, array_bytes, count
from geolrm_jax.scene import Anchors, Batch, Cameras, Views

# Where the parameters below a network's name belong: the first prefix that fits.
PARTS = {
    "encoder.vit": "image encoder, ViT",
    "encoder": "image encoder, convolutions",
    "transformer.blocks": "transformer blocks",
    "decoder": "decoder",
    "": "other",
}


def describe(experiment: Experiment, *, views: Sequence[int], anchors: Sequence[int]) -> dict[str, Any]:
    """Parameters and FLOPs of a config, as the JSON of `geolrm info`.

    Args:
      experiment: only its model, sizes, stages and precision are read.
      views: numbers of input views.
      anchors: numbers of anchors of the reconstruction network.

    Returns:
      `parameters`: by network and part, with totals, exact. `forward`: of one object, a row for each number of views
      and anchors. `training`: forward and backward of one object, a row for each stage and number of views, with
      `as_configured` and `without_remat`. FLOPs are objects of `matmul`, `convolution`, `other` and `total`; `unknown`
      names what the count could not see through.

    Raises:
      ValueError: if a number is below one.
    """
    for name, numbers in (("views", views), ("anchors", anchors)):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name}: expected numbers of at least 1, got {list(numbers)}")
    _, shapes = abstract_model(experiment.model, experiment.precision)
    return {
        "config": experiment.name,
        "input_size": experiment.input_size,
        "render_size": experiment.render_size,
        "parameters": parameters_by_part(shapes["params"]),
        "parameter_bytes": array_bytes(shapes["params"]),
        "forward": list(_forward(experiment, views, anchors)),
        "training": list(_training(experiment, views)),
    }


def show(described: dict[str, Any]) -> None:
    """Prints what `describe` returns as three tables."""
    networks = [name for name in described["parameters"] if name != "total"]
    counts = Table("", *networks, title=f"{described['config']}: parameters")
    for part in (*PARTS.values(), "total"):
        of_networks = [described["parameters"][name].get(part) for name in networks]
        if any(of_networks):
            counts.add_row(part, *("" if n is None else f"{n:,}" for n in of_networks), end_section=part == "other")
    counts.caption = f"together {described['parameters']['total']:,}, {_giga(described['parameter_bytes'])} GB"

    size = described["input_size"]
    forward = Table("views", "anchors", *networks, "total", title=f"Forward, GFLOPs of one object, images of {size}²")
    for row in described["forward"]:
        cells = [row[name]["total"] for name in (*networks, "total")]
        forward.add_row(str(row["views"]), f"{row['anchors']:,}" if row["anchors"] else "", *map(_giga, cells))

    kinds = {"as_configured": "as configured", "without_remat": "without remat"}
    training = Table("stage", "views", *kinds.values(), title="Forward and backward, GFLOPs of one object")
    for row in described["training"]:
        training.add_row(row["stage"], str(row["views"]), *(_giga(row[kind]["total"]) for kind in kinds))
    unknown = dict.fromkeys(name for row in described["training"] + described["forward"] for name in row["unknown"])
    if unknown:
        training.caption = f"Counted once, because their rounds depend on the data: {', '.join(unknown)}"

    for table in (counts, forward, training):
        for column in table.columns[1:]:
            column.justify = "right"
        table.title_justify = table.caption_justify = "left"
        if table.rows:
            logging.console.print(table)


def write(described: dict[str, Any], path: Path) -> None:
    """Writes what `describe` returns as JSON."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n")


def _giga(number: int) -> str:
    return f"{number / 1e9:,.1f}" if number >= 1e9 else f"{number / 1e9:.3g}"


def parameters_by_part(params: dict[str, Any]) -> dict[str, Any]:
    """Numbers of parameters: `{network: {part: number, ..., "total": number}, ..., "total": number}`."""
    networks: dict[str, Counter] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        network, *names = (str(key.key) for key in path)
        part = next(PARTS[prefix] for prefix in PARTS if f"{'.'.join(names)}.".startswith(prefix))
        networks.setdefault(network, Counter())[part] += leaf.size
    table = {
        network: {part: parts[part] for part in PARTS.values() if part in parts} | {"total": parts.total()}
        for network, parts in networks.items()
    }
    return table | {"total": sum(parts["total"] for parts in table.values())}


def _forward(experiment: Experiment, views: Sequence[int], anchors: Sequence[int]) -> Iterator[dict[str, Any]]:
    graphdef, variables = abstract_model(experiment.model, experiment.precision)

    def propose(variables, seen):
        return nnx.merge(graphdef, *variables.values()).proposal(seen)

    def reconstruct(variables, places, seen):
        return nnx.merge(graphdef, *variables.values()).reconstruction(places, seen)

    for number in views:
        seen = _abstract_views(number, experiment.input_size)
        proposal = count(propose, variables, seen)
        for places in anchors if experiment.model.reconstruction else [None]:
            row = {"views": number, "anchors": places, "proposal": _as_json(proposal)}
            if places is not None:
                reconstruction = count(reconstruct, variables, _abstract_anchors(places), seen)
                row["reconstruction"] = _as_json(reconstruction)
            total = proposal + reconstruction if places is not None else proposal
            yield row | {"total": _as_json(total), "unknown": list(total.unknown)}


def _training(experiment: Experiment, views: Sequence[int]) -> Iterator[dict[str, Any]]:
    for name, stage in experiment.stages.items():
        constants = stage.objective.constants(experiment.precision)
        for number in views:
            costs = {
                word: _step_cost(experiment, stage, model, constants, number)
                for word, model in (
                    ("as_configured", experiment.model),
                    ("without_remat", with_remat(experiment.model, "none")),
                )
            }
            unknown = list(costs["as_configured"].unknown)
            yield {"stage": name, "views": number, **{w: _as_json(c) for w, c in costs.items()}, "unknown": unknown}


def _step_cost(experiment: Experiment, stage, model, constants, views: int) -> Cost:
    """Losses of one object and their gradient by all parameters that the stage trains."""
    objective = stage.objective
    graphdef, variables = abstract_model(objective.networks(model), experiment.precision)
    trained = {name: variables["params"][name] for name in objective.trains}
    frozen = {name: tree for name, tree in variables["params"].items() if name not in trained}

    def total(trained, frozen, stats, constants, batch, key):
        losses, _ = objective.losses(nnx.merge(graphdef, {**frozen, **trained}, stats), constants, batch, key)
        return sum(losses.values())

    key = jax.eval_shape(lambda: jax.random.key(0))
    grid = experiment.model.proposal.fine_grid
    batch = jax.eval_shape(
        lambda: Batch(
            _views(views, experiment.input_size),
            _views(max(stage.views, views), experiment.render_size),
            jnp.zeros((1, grid, grid, grid), bool),
            jnp.zeros(1, jnp.int32),
        )
    )
    return count(jax.value_and_grad(total), trained, frozen, variables["batch_stats"], constants, batch, key)


def _views(number: int, size: int) -> Views:
    lead = (1, number)
    cameras = Cameras(jnp.zeros((*lead, 4, 4)), jnp.zeros((*lead, 3, 3)), size, size)
    image = jnp.zeros((*lead, size, size))
    return Views(cameras, jnp.zeros((*image.shape, 3)), image, image, jnp.ones(lead, bool))


@functools.cache
def _abstract_views(number: int, size: int) -> Views:
    return jax.eval_shape(lambda: _views(number, size))


def _abstract_anchors(number: int) -> Anchors:
    def make() -> Anchors:
        return Anchors(jnp.zeros((1, number, 3)), jnp.zeros((1, number, 3), jnp.int32), jnp.ones((1, number), bool))

    return jax.eval_shape(make)


def _as_json(cost: Cost) -> dict[str, int]:
    return {"matmul": cost.matmul, "convolution": cost.convolution, "other": cost.other, "total": cost.total}
