"""Where a network's values come from: a stage's own checkpoint > another run's > published weights > fresh ones.

The first is the loop's (it goes on where it stopped); the rest is decided here.
"""

from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from geolrm_jax.config import Experiment, read_config
from geolrm_jax.inference import Model, abstract_model, restore_variables
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints
from geolrm_jax.weights.dinov2 import load_dinov2

Variables = dict[str, Any]


def load_model(workdir: Path | str, step: str | int = "latest") -> Model:
    """The trained model of a work directory, ready for `geolrm_jax.reconstruct`.

    Args:
      workdir: what training or `geolrm weights import` has written.
      step: "latest", "best" or the number of a checkpoint of the reconstruction stage.

    Raises:
      FileNotFoundError: if there is no such work directory or checkpoint.
      ValueError: if the checkpoint is incomplete.
    """
    return restore_model(read_config(Path(workdir)), Path(workdir), step)[0]


def restore_model(experiment: Experiment, workdir: Path, step: str | int) -> tuple[Model, int]:
    """The model of a work directory and the step of its checkpoint."""
    if not experiment.reconstruction:
        raise ValueError(f"{workdir}: its config {experiment.name!r} trains no reconstruction network")
    variables, graphdef, number = restore_stage(experiment, "reconstruction", workdir, step)
    anchors = experiment.evaluation.max_anchors
    return Model(variables, graphdef, experiment.evaluation.input_size, anchors, experiment.seed), number


def restore_stage(
    experiment: Experiment, name: str, workdir: Path, step: str | int = "latest"
) -> tuple[Variables, Any, int]:
    """`params` and `batch_stats` of a stage's checkpoint, the structure they fit, and the checkpoint's step."""
    stage = experiment.stages[name]
    graphdef, shapes = abstract_model(stage.objective.networks(experiment.model), experiment.precision)
    checkpoints = Checkpoints(workdir / name / "checkpoints", stage.checkpoint, write=False)
    number = checkpoints.resolve(step)
    variables = restore_variables(checkpoints, number, shapes)
    checkpoints.close()
    return variables, graphdef, number


def start(experiment: Experiment, name: str, workdir: Path) -> Variables:
    """What takes the place of fresh values when a stage begins, as a part of `params` and `batch_stats`.

    Raises:
      FileNotFoundError: if `start_from` has no checkpoint, or there is no file `dinov2_weights`.
      ValueError: if the networks there or the file do not fit; what differs is listed.
    """
    started: Variables = {"params": {}, "batch_stats": {}}
    if experiment.start_from:
        started = _of_another_run(Path(experiment.start_from))
    if name == "reconstruction" and experiment.proposal:
        own = restore_stage(experiment, "proposal", workdir)[0]
        started = {item: {**started[item], **own[item]} for item in started}
    model = experiment.stages[name].objective.networks(experiment.model)
    networks = {"proposal": model.proposal, "reconstruction": model.reconstruction}
    started = {item: {key: tree[key] for key in tree if networks[key]} for item, tree in started.items()}
    _check_fit(started, abstract_model(model, experiment.precision)[1], experiment.start_from or workdir)
    for network, config in networks.items():
        fresh = config and network not in started["params"]
        if experiment.dinov2_weights and fresh and "high" in config.encoder.levels:
            vit, digest = load_dinov2(experiment.dinov2_weights, config.encoder.vit)
            logging.notice(f"{name}: DINOv2 of {network} from {experiment.dinov2_weights}, SHA-256 {digest}")
            started["params"][network] = {"encoder": {"vit": vit}}
    return started


def _check_fit(started: Variables, wanted: Variables, source: Path | str) -> None:
    """Raises a ValueError unless every network in `started` is whole and has the shapes of the model's."""
    problems = []
    for item, networks in started.items():
        for network in networks:
            there, here = (
                {".".join(path): np.shape(x) for path, x in traverse_util.flatten_dict(tree[item][network]).items()}
                for tree in (started, wanted)
            )
            for path in sorted({*there, *here}):
                if there.get(path) != here.get(path):
                    has, needs = (str(shapes.get(path, "nothing")) for shapes in (there, here))
                    problems.append(f"{network}.{path}: {has} there, {needs} in this config")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"the networks of {source} do not fit the model: {'; '.join(problems[:10])}{more}")


def _of_another_run(workdir: Path) -> Variables:
    """The networks of the latest stage that has a complete checkpoint."""
    experiment = read_config(workdir)
    for name in reversed(experiment.stages):
        folder = workdir / name / "checkpoints"
        if folder.is_dir() and _has_steps(folder, experiment.stages[name].checkpoint):
            variables, _, step = restore_stage(experiment, name, workdir)
            logging.notice(f"starting from step {step} of {workdir / name}")
            return variables
    raise FileNotFoundError(f"start_from {workdir}: no stage has a checkpoint there")


def _has_steps(folder: Path, config: CheckpointConfig) -> bool:
    checkpoints = Checkpoints(folder, config, write=False)
    steps = checkpoints.steps
    checkpoints.close()
    return bool(steps)
