"""The released checkpoint's layout, in and out of work directories."""

from contextlib import closing
from pathlib import Path

import numpy as np

from geolrm_jax.config import Experiment, check_workdir, read_config, write_config
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import Checkpoints
from geolrm_jax.runtime.streamed import save_streamed
from geolrm_jax.weights import provenance, released
from geolrm_jax.weights.files import open_tensors, sha256_of


def import_weights(experiment: Experiment, file: Path, workdir: Path) -> None:
    """Makes a work directory of a released checkpoint, for `evaluate` and `infer`.

    Its parts are config.json, weights.json, which says where the weights are from, and last the checkpoint, as step 0
    of the reconstruction: a folder with that is complete. Memory grows with the largest array, not with the file.

    Args:
      experiment: whose model the checkpoint fits.
      file: safetensors or a torch checkpoint in the released layout.
      workdir: may exist, without checkpoints.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is unreadable or does not fit the model, or the folder has checkpoints or is another config's.
    """
    model = _whole_model(experiment, experiment.name)
    for folder in workdir.glob("*/checkpoints/*"):
        if folder.name.isdigit():
            raise ValueError(f"{workdir} has a checkpoint already, {folder}: choose another folder")
    tensors = open_tensors(file)
    plan = released.plan(tensors.shapes, model, where=str(file))
    narrowed = plan.check_types(tensors.dtypes, str(file))
    experiment = experiment.absolute()
    check_workdir(experiment, workdir)
    write_config(experiment, workdir)
    source = provenance.record(workdir, "released", tensors.path, tensors.sha256)
    not_finite = []

    def read(key: str) -> np.ndarray:
        tensor = tensors.read(key)
        if not np.isfinite(tensor).all():
            not_finite.append(key)
        return tensor

    with logging.progress("import", len(plan.leaves), unit="array") as bar:
        save_streamed(workdir / "reconstruction" / "checkpoints", 0, plan.streamed(read, bar.update), source)
    if not_finite:
        logging.warn(f"{file}: NaN or infinity in {', '.join(not_finite)}")

    parts = plan.parts()
    ignored = f", {len(plan.ignored)} ignored (lpips.*)" if plan.ignored else ""
    widened = [("widened", f"{len(tensors.widened)} tensors of 16 bits, to float32")] if tensors.widened else []
    widened += [("narrowed", f"{len(narrowed)} tensors of 64 bits, to float32")] if narrowed else []
    logging.summary(
        f"{file}: imported into {workdir}",
        [
            *((part, f"{count:,} parameters") for part, count in parts.items()),
            ("in all", f"{sum(parts.values()):,} parameters"),
            ("keys", f"{plan.consumed} consumed{ignored}"),
            *widened,
            ("SHA-256", source["sha256"]),
            ("config", f"{experiment.name}, in {workdir / 'config.json'}"),
        ],
        [
            ("reconstruct your own pictures", f"geolrm infer --workdir {workdir} --views FOLDER --out out"),
            ("evaluate on renders of objects", f"geolrm eval --workdir {workdir} --data FOLDER"),
        ],
    )


def export_weights(workdir: Path, file: Path, *, step: str | int = "latest") -> None:
    """Writes a work directory's model as safetensors in the released layout, one array at a time.

    Args:
      workdir: of the model.
      file: ends in .safetensors; one that is there is replaced, when the new one is complete.
      step: of the reconstruction stage; its averaged parameters are taken where it has them.

    Raises:
      FileNotFoundError: if there is no such work directory or checkpoint.
      ValueError: if the checkpoint is incomplete, or the model has parts that the released one has not.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a name that ends in .safetensors")
    experiment = read_config(workdir)
    model = _whole_model(experiment, str(workdir))
    folder = workdir / "reconstruction" / "checkpoints"
    with closing(Checkpoints(folder, experiment.reconstruction.checkpoint, write=False)) as checkpoints:
        number = checkpoints.resolve(step)
        keys = released.export(file, model, checkpoints.open_arrays(number))
    logging.summary(
        f"{file}: written",
        [
            ("checkpoint", f"step {number} of {workdir}"),
            ("keys", str(keys)),
            ("bytes", f"{file.stat().st_size:,}"),
            ("SHA-256", sha256_of(file)),
        ],
        [("back again", f"geolrm weights import --from {file} --to FOLDER --config THE_MODELS_CONFIG")],
    )


def _whole_model(experiment: Experiment, where: str) -> GeoLRMConfig:
    """The networks of the reconstruction stage, which are both."""
    if not experiment.reconstruction:
        raise ValueError(f"{where}: its config {experiment.name!r} has no reconstruction network")
    return experiment.reconstruction.objective.networks(experiment.model)
