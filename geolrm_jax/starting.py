"""Where a network's values come from: a stage's own checkpoint > a warm start > published weights > fresh ones.

The first is the loop's (it goes on where it stopped); the rest is decided here. A warm start takes parameters and batch
statistics of another run, averaged ones where it has them, and nothing else.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from geolrm_jax.config import Experiment, read_config
from geolrm_jax.inference import Model, abstract_model, restore_variables
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import CheckpointConfig, Checkpoints
from geolrm_jax.runtime.checksums import fingerprint
from geolrm_jax.weights.dinov2 import load_dinov2

Variables = dict[str, Any]
Flat = dict[tuple[str, ...], Any]


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


def restore_model(experiment: Experiment, workdir: Path, step: str | int) -> tuple[Model, int, int | None]:
    """The model of a work directory, the step of its checkpoint and, from before it was read, its fingerprint."""
    if not experiment.reconstruction:
        raise ValueError(f"{workdir}: its config {experiment.name!r} trains no reconstruction network")
    stage, folder = experiment.reconstruction, workdir / "reconstruction" / "checkpoints"
    graphdef, shapes = abstract_model(stage.objective.networks(experiment.model), experiment.precision)
    with contextlib.closing(Checkpoints(folder, stage.checkpoint, write=False)) as checkpoints:
        number = checkpoints.resolve(step)
        found = fingerprint(folder / str(number))
        variables = restore_variables(checkpoints, number, shapes)
    anchors = experiment.evaluation.max_anchors
    return Model(variables, graphdef, experiment.evaluation.input_size, anchors, experiment.seed), number, found


def start(experiment: Experiment, name: str, workdir: Path, target: Variables) -> Variables:
    """What takes the place of fresh values when a stage begins, as a part of `params` and `batch_stats`.

    All processes of a run call it together; what is restored from checkpoints never lies whole in one of them.

    Args:
      experiment: says what to start from.
      name: of the stage.
      workdir: of the run, whose proposal the reconstruction starts from.
      target: all of `params` and `batch_stats`: shapes, types and shardings to restore onto.

    Raises:
      FileNotFoundError: if `warm_start` has no checkpoint, or there is no file `dinov2_weights`.
      ValueError: if the networks there or the file do not fit; what differs is listed.
    """
    started: Flat = {}
    wanted = {path: array for path, array in flatten_dict(target).items() if path[0] in ("params", "batch_stats")}
    if experiment.warm_start:
        folder = latest_stage(Path(experiment.warm_start))
        started |= load_fitting(folder, wanted, experiment.allow_missing)
    if name == "reconstruction" and experiment.proposal:
        proposal = {path: array for path, array in wanted.items() if path[1] == "proposal"}
        started |= load_fitting(workdir / "proposal", proposal)
    model = experiment.stages[name].objective.networks(experiment.model)
    for network, config in {"proposal": model.proposal, "reconstruction": model.reconstruction}.items():
        vit = ("params", network, "encoder", "vit")
        fresh = config and not any(path[:4] == vit for path in started)
        if experiment.dinov2_weights and fresh and "high" in config.encoder.levels:
            values, digest = load_dinov2(experiment.dinov2_weights, config.encoder.vit)
            logging.notice(f"{name}: DINOv2 of {network} from {experiment.dinov2_weights}, SHA-256 {digest}")
            started |= {(*vit, *path): value for path, value in flatten_dict(values).items()}
    return unflatten_dict(started)


def latest_stage(workdir: Path) -> Path:
    """The folder of the last stage of a work directory that has a complete checkpoint."""
    for name in ("reconstruction", "proposal"):
        folder = workdir / name / "checkpoints"
        if folder.is_dir() and any(found.name.isdigit() for found in folder.iterdir()):
            return workdir / name
    raise FileNotFoundError(f"warm_start {workdir}: no stage has a checkpoint there")


def load_fitting(folder: Path, wanted: Flat, allow_missing: str | None = None) -> Flat:
    """The arrays of a stage's newest checkpoint that fit, laid out and typed as wanted; the log says which do not.

    Networks that are only there, or only wanted, are left out.

    Args:
      folder: of the stage.
      wanted: targets by path: collection, network, name.
      allow_missing: a pattern found in the names, as `reconstruction.decoder.hidden.bias`, of arrays that may be
        missing there or have another shape; arrays that are not wanted are then left out too. None: all must fit.

    Raises:
      ValueError: if others do not fit, with their names and shapes, or if none fits.
    """
    with contextlib.closing(Checkpoints(folder / "checkpoints", CheckpointConfig(), write=False)) as checkpoints:
        step = checkpoints.newest_for_all()
        there = flatten_dict(checkpoints.model_arrays(step))
        fitting = _fitting(there, wanted, allow_missing, folder, step)
        return flatten_dict(checkpoints.restore_model(step, unflatten_dict(fitting)))


def _fitting(there: Flat, wanted: Flat, allow_missing: str | None, folder: Path, step: int) -> Flat:
    """Those of the wanted arrays that are there in the same shape; raises and tells as `load_fitting` says."""
    networks = {path[1] for path in there} & {path[1] for path in wanted}
    there, here = ({path: x for path, x in tree.items() if path[1] in networks} for tree in (there, wanted))
    fitting = {path: x for path, x in here.items() if path in there and there[path].shape == x.shape}
    unfit = {_name(path): _shapes(there.get(path), x) for path, x in here.items() if path not in fitting}
    unused = {_name(path): _shapes(x, None) for path, x in there.items() if path not in here}
    if allow_missing is None:
        refused = unfit | unused
    else:
        refused = {name: shapes for name, shapes in unfit.items() if not re.search(allow_missing, name)}
    if refused or not fitting:
        for name, shapes in sorted(refused.items()):  # all of them: the error has the first ten
            logging.notice(f"  does not fit: {name}: {shapes}")
        raise ValueError(_refusal(folder, refused))
    cast = sum(there[path].dtype != x.dtype for path, x in fitting.items())
    logging.notice(
        f"starting from step {step} of {folder}: {len(fitting)} arrays loaded, {cast} of them cast to another type; "
        f"{len(unfit)} stay fresh, {len(unused)} of theirs are not used"
    )
    for word, listed in (("fresh", unfit), ("not used", unused)):
        for name, shapes in sorted(listed.items()):
            logging.notice(f"  {word}: {name}: {shapes}")
    return fitting


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path[1:])


def _shapes(there: Any, here: Any) -> str:
    has, needs = ("nothing" if x is None else str(x.shape) for x in (there, here))
    return f"{has} there, {needs} in this config"


def _refusal(folder: Path, refused: dict[str, str]) -> str:
    if not refused:
        return f"no array of {folder} fits the model"
    listed = "; ".join(f"{name}: {shapes}" for name, shapes in sorted(refused.items())[:10])
    more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
    return f"the networks of {folder} do not fit the model (see --allow-missing): {listed}{more}"
