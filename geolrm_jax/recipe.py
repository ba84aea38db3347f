"""The roof: stages one after the other, evaluation, inference, each from a config or a work directory alone."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from geolrm_jax.config import Experiment, read_config, to_tree, write_config
from geolrm_jax.data.folder import read_views as read_gobjaverse
from geolrm_jax.data.pipeline import build, make_views, open_split, training_dataset
from geolrm_jax.data.record import PosedImages
from geolrm_jax.data.transforms import read_views as read_transforms
from geolrm_jax.evaluation.protocol import choose_inputs
from geolrm_jax.evaluation.report import write_report
from geolrm_jax.evaluation.results import EvaluationResults, environment
from geolrm_jax.evaluation.runner import SURFACE, evaluate_objects, peak_memory_bytes
from geolrm_jax.export.ply import write_ply
from geolrm_jax.export.video import write_video
from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.inference import Model, abstract_model, reconstruct, restore_variables
from geolrm_jax.losses.lpips import load_lpips
from geolrm_jax.rendering import rasterize
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import Checkpoints
from geolrm_jax.scene import Gaussians, Views
from geolrm_jax.training.loop import Trainer, train

PICTURED = 12  # objects with pictures in a report
FRAMES = 48  # of a turntable


def run(experiment: Experiment, workdir: Path) -> None:
    """Data, proposal, reconstruction, evaluation, one object exported; what is done already is not done again."""
    started = time.perf_counter()
    logging.notice(f"{experiment.name}: {workdir} on {jax.device_count()} x {jax.devices()[0].device_kind}")
    write_config(experiment, workdir)
    data = build(experiment.data, data_directory(experiment, workdir))
    for name in experiment.stages:
        train(make_trainer(experiment, name, workdir, data))
    report = evaluate(workdir)
    example = export_example(experiment, workdir, report.parent)
    logging.summary(
        f"{experiment.name}: done in {logging.duration(time.perf_counter() - started)}",
        [
            ("report", str(report.with_suffix(".html"))),
            ("numbers", str(report)),
            ("an object", f"{example / 'gaussians.ply'} and turntable.mp4"),
            ("checkpoints", str(workdir / "reconstruction" / "checkpoints")),
            ("log", f"{workdir / 'metrics.jsonl'}; tensorboard --logdir {workdir / 'tensorboard'}"),
            ("config", str(workdir / "config.json")),
        ],
        [
            ("evaluate another checkpoint", f"python eval.py --workdir {workdir} --step best"),
            ("reconstruct your own pictures", f"geolrm infer --workdir {workdir} --views FOLDER --out out"),
        ],
    )


def data_directory(experiment: Experiment, workdir: Path) -> Path:
    """Where the built data set of a run lies."""
    return Path(experiment.data.root) if experiment.data.root else workdir / "data"


def make_trainer(experiment: Experiment, name: str, workdir: Path, data: Path) -> Trainer:
    """All that one stage's training needs; the reconstruction starts from the latest proposal."""
    stage = experiment.stages[name]
    processes = jax.process_count()
    if stage.batch % processes:
        raise ValueError(f"{name}.batch {stage.batch} must be a multiple of the {processes} processes")
    batches = training_dataset(
        open_split(data, "train"),
        batch=stage.batch // processes,
        views=stage.views,
        inputs=max(stage.inputs),
        input_size=(experiment.input_size,) * 2,
        render_size=(experiment.render_size,) * 2,
        seed=experiment.seed,
        shard=(jax.process_index(), processes),
        view_rule=stage.view_rule,
    )
    on_a_proposal = name == "reconstruction" and experiment.proposal
    return Trainer(
        name=name,
        stage=stage,
        model=experiment.model,
        precision=experiment.precision,
        mesh=experiment.mesh,
        seed=experiment.seed,
        directory=workdir,
        data=iter(batches),
        warm_start=restore_stage(experiment, "proposal", workdir, "latest")[0] if on_a_proposal else None,
    )


def restore_stage(experiment: Experiment, name: str, workdir: Path, step: str | int):
    """`params` and `batch_stats` of a stage's checkpoint, the structure they fit, and the checkpoint's step."""
    stage = experiment.stages[name]
    graphdef, shapes = abstract_model(stage.objective.networks(experiment.model), experiment.precision)
    checkpoints = Checkpoints(workdir / name / "checkpoints", stage.checkpoint, write=False)
    number = checkpoints.resolve(step)
    variables = restore_variables(checkpoints, number, shapes)
    checkpoints.close()
    return variables, graphdef, number


def load_model(workdir: Path | str, step: str | int = "latest") -> Model:
    """The trained model of a work directory, ready for `geolrm_jax.reconstruct`.

    Args:
      workdir: what training has written.
      step: "latest", "best" or the number of a checkpoint of the reconstruction stage.

    Raises:
      FileNotFoundError: if there is no such work directory or checkpoint.
      ValueError: if the checkpoint is incomplete.
    """
    return _load_model(read_config(Path(workdir)), Path(workdir), step)[0]


def _load_model(experiment: Experiment, workdir: Path, step: str | int) -> tuple[Model, int]:
    if not experiment.reconstruction:
        raise ValueError(f"{workdir}: its config {experiment.name!r} trains no reconstruction network")
    variables, graphdef, number = restore_stage(experiment, "reconstruction", workdir, step)
    anchors = experiment.evaluation.max_anchors
    return Model(variables, graphdef, experiment.evaluation.input_size, anchors, experiment.seed), number


def evaluate(
    workdir: Path, *, step: str | int = "latest", data: Path | None = None, objects: int | None = None, out=None
) -> Path:
    """Evaluates a checkpoint on the objects kept from training, or on `data`, and returns the path of report.json.

    Args:
      workdir: all that is needed to rebuild the model.
      step: of the reconstruction stage.
      data: a built set, whose test split (else all of it) is used, or a folder in the GObjaverse layout.
      objects: only the first so many.
      out: folder of the report; by default `workdir/eval/STEP`.
    """
    experiment = read_config(workdir)
    model, number = _load_model(experiment, workdir, step)
    out = Path(out) if out else workdir / "eval" / str(number)
    records = open_split(data or data_directory(experiment, workdir), "test")
    lpips_file = experiment.reconstruction.objective.lpips_weights
    lpips, lpips_hash = load_lpips(lpips_file) if lpips_file else (None, None)
    if lpips is None:
        logging.notice("evaluation: no LPIPS weights file, the metric is off")
    chosen = range(len(records))[:objects]
    results = evaluate_objects(model, records, chosen, experiment.evaluation, lpips=lpips, pictures=PICTURED)
    as_json, _ = write_report(
        out,
        EvaluationResults(
            config_name=experiment.name,
            config=to_tree(experiment),
            protocol=experiment.evaluation,
            checkpoint_step=number,
            objects=results,
            lpips_sha256=lpips_hash,
            surface=SURFACE,
            peak_memory_bytes=peak_memory_bytes(),
            environment=environment(),
        ),
    )
    return as_json


def export_example(experiment: Experiment, workdir: Path, out: Path) -> Path:
    """The first unseen object, reconstructed from the protocol's inputs, as files; returns their folder."""
    record = open_split(data_directory(experiment, workdir), "test")[0]
    inputs = choose_inputs(experiment.evaluation, record.view_ids, record.cameras(range(len(record.view_ids))))
    model = load_model(workdir)
    gaussians = reconstruct(model, to_views(record.views(inputs)))
    folder = out / record.id.replace("/", "_")
    export(gaussians, folder, size=256)
    return folder


def to_views(images: PosedImages) -> Views:
    """Decoded images as views (V,) of their own size."""
    return make_views(images, (images.cameras.height, images.cameras.width))


def infer(
    workdir: Path, folder: Path, out: Path, *, inputs: Sequence[int] | None, step: str | int = "latest", size: int = 256
) -> None:
    """Reconstructs the object that a folder of posed images shows, into `out`.

    Args:
      workdir: of the model.
      folder: one object in the GObjaverse layout, or images with a transforms.json.
      out: gets gaussians.ply and turntable.mp4.
      inputs: numbers of the views to use; None for all.
      step: of the reconstruction stage.
      size: side of the turntable in pixels.
    """
    read = read_transforms if (folder / "transforms.json").is_file() else read_gobjaverse
    images = read(folder, inputs)
    experiment = read_config(workdir)
    model, number = _load_model(experiment, workdir, step)
    views = to_views(images)
    jax.block_until_ready(reconstruct(model, views))
    start = time.perf_counter()
    gaussians = jax.block_until_ready(reconstruct(model, views))
    seconds = time.perf_counter() - start
    count = export(gaussians, out, size=size)
    anchors = count // experiment.model.reconstruction.decoder.gaussians_per_anchor
    logging.summary(
        f"{folder}: reconstructed from {len(images.view_ids)} views",
        [
            ("checkpoint", f"step {number} of {workdir}"),
            ("seconds", f"{seconds:.3f} from images in memory to Gaussians, compilation excluded"),
            ("anchors", f"{anchors:,}"),
            ("Gaussians", f"{count:,} in {out / 'gaussians.ply'}"),
            ("turntable", str(out / "turntable.mp4")),
        ],
        [],
    )


def export(gaussians: Gaussians, out: Path, *, size: int) -> int:
    """Writes gaussians.ply and turntable.mp4; returns the number of Gaussians."""
    out.mkdir(parents=True, exist_ok=True)
    count = write_ply(out / "gaussians.ply", gaussians)
    write_video(out / "turntable.mp4", turntable_frames(gaussians, size), fps=24)
    return count


def turntable_frames(gaussians: Gaussians, size: int):
    """Pictures (size, size, 3) of one scene on white, around the object once."""
    rig = turntable(FRAMES, size=size)
    for view in range(FRAMES):
        camera = jax.tree.map(lambda x: jnp.asarray(x[view : view + 1]), rig)  # noqa: B023
        yield np.clip(np.asarray(rasterize(gaussians, camera, background=jnp.ones(3)).rgb[0]), 0.0, 1.0)
