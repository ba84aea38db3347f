"""Where a network's values come from: a stage's own checkpoint > another run's > published weights > fresh ones.

The first is the loop's (it goes on where it stopped); the rest is decided here.
"""

from pathlib import Path
from typing import Any

from geolrm_jax.config import Experiment, read_config
from geolrm_jax.inference import Model, abstract_model, restore_variables
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import Checkpoints
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
      ValueError: if the file does not fit.
    """
    started: Variables = {"params": {}, "batch_stats": {}}
    if experiment.start_from:
        started = _of_another_run(Path(experiment.start_from))
    if name == "reconstruction" and experiment.proposal:
        own = restore_stage(experiment, "proposal", workdir)[0]
        started = {item: {**started[item], **own[item]} for item in started}
    model = experiment.stages[name].objective.networks(experiment.model)
    needed = {"proposal": model.proposal, "reconstruction": model.reconstruction}
    started = {item: {key: tree[key] for key in tree if needed[key]} for item, tree in started.items()}
    for network, config in needed.items():
        fresh = config and network not in started["params"]
        if experiment.dinov2_weights and fresh and "high" in config.encoder.levels:
            vit, digest = load_dinov2(experiment.dinov2_weights, config.encoder.vit)
            logging.notice(f"{name}: DINOv2 of {network} from {experiment.dinov2_weights}, SHA-256 {digest}")
            started["params"][network] = {"encoder": {"vit": vit}}
    return started


def _of_another_run(workdir: Path) -> Variables:
    """The networks of the latest stage that has a checkpoint."""
    experiment = read_config(workdir)
    stages = [name for name in experiment.stages if (workdir / name / "checkpoints").is_dir()]
    if not stages:
        raise FileNotFoundError(f"start_from {workdir}: no stage has checkpoints there")
    variables, _, step = restore_stage(experiment, stages[-1], workdir)
    logging.notice(f"starting from step {step} of {workdir / stages[-1]}")
    return variables
