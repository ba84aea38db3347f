"""The roof: stages one after the other, evaluation, inference, each from a config or a work directory alone."""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from geolrm_jax.config import Experiment, check_workdir, read_config, to_tree, write_config
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.layout import REJECTED_FILE, read_rejected
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.examples import make_views
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.folder import read_views as read_gobjaverse
from geolrm_jax.data.on_demand import Records, open_data
from geolrm_jax.data.pipeline import training_dataset
from geolrm_jax.data.reader import open_split
from geolrm_jax.data.record import PosedImages
from geolrm_jax.data.transforms import read_views as read_transforms
from geolrm_jax.evaluation.protocol import choose_inputs
from geolrm_jax.evaluation.report import write_report
from geolrm_jax.evaluation.results import EvaluationResults, environment
from geolrm_jax.evaluation.runner import SURFACE, evaluate_objects, peak_memory_bytes
from geolrm_jax.export.files import written_whole
from geolrm_jax.export.ply import Flavour, write_ply
from geolrm_jax.export.video import write_video
from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.inference import reconstruct, reconstruct_and_count
from geolrm_jax.rendering import Renderer
from geolrm_jax.runtime import distributed, logging
from geolrm_jax.runtime.exclusive import exclusive
from geolrm_jax.runtime.interruption import WATCH, WatchConfig, ending_when_told
from geolrm_jax.runtime.sharding import row_share
from geolrm_jax.scene import Batch, Gaussians, Views
from geolrm_jax.starting import restore_model, start
from geolrm_jax.training.loop import Trainer, train
from geolrm_jax.weights import provenance
from geolrm_jax.weights.lpips import load_lpips

EVALUATED = "checkpoint.json"  # beside a report: the fingerprint of what it is of
PICTURED = 12  # objects with pictures in a report
FRAMES = 48  # of a turntable


def run(experiment: Experiment, workdir: Path, watch: WatchConfig = WATCH) -> None:
    """Data, proposal, reconstruction, evaluation, one object exported; what is built or trained already stays.

    Of several processes the first does what is not training; the others wait for it.

    Raises:
      Preempted: if training was told to stop; it has saved, and goes on when this is called again.
      SystemExit: 75, if a single process was told to stop at anything else; of several, each ends with that code.
    """
    started = time.perf_counter()
    logging.notice(f"{experiment.name}: {workdir} on {jax.device_count()} x {jax.devices()[0].device_kind}")
    distributed.say_who()
    experiment = experiment.absolute()
    check_workdir(experiment, workdir)
    if "released" in provenance.read(workdir):
        raise ValueError(
            f"{workdir} holds imported weights: to go on from them, train elsewhere with --warm-start {workdir}"
        )
    check_batches(experiment)
    data = data_directory(experiment, workdir)
    with ending_when_told(), exclusive(workdir):
        with distributed.only_first("building the data") as first:
            if first:
                record_weights(experiment, workdir)
                if not experiment.data.on_demand:
                    build_shown(experiment.data, data)
                check_protocol(experiment, data)
                write_config(experiment, workdir)
        for name in experiment.stages:
            train(make_trainer(experiment, name, workdir, data, watch))
        with distributed.only_first("evaluating") as first:
            if first:
                finish(experiment, workdir, started)


def finish(experiment: Experiment, workdir: Path, started: float) -> None:
    """Evaluation, one object exported, the last screen; `started` is when `time.perf_counter()` began to count."""
    if not experiment.reconstruction:
        logging.notice(f"{experiment.name}: done; the proposal's checkpoints are in {workdir / 'proposal'}")
        return
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


def build_shown(config: DataConfig, directory: Path) -> Path:
    """`build` with a bar for each split, and a word on what is not in the set."""
    with logging.bars("object") as advance:
        build(config, directory, advance=advance)
    rejected = read_rejected(directory)
    if rejected:
        logging.notice(f"{len(rejected)} objects of the source are not in the set: see {directory / REJECTED_FILE}")
    return directory


def check_batches(experiment: Experiment) -> None:
    """Raises a ValueError unless every stage's batch can be split over the mesh."""
    shards = experiment.mesh.rows(jax.device_count())
    for name, stage in experiment.stages.items():
        if stage.batch // stage.accumulation % shards:
            raise ValueError(
                f"{name}.batch {stage.batch} in {stage.accumulation} parts: each part must be a multiple of the "
                f"{shards} devices along mesh axes data and fsdp"
            )


def record_weights(experiment: Experiment, workdir: Path) -> None:
    """Writes which files of published weights the run uses, so that a missing one is known at once."""
    objective = experiment.reconstruction and experiment.reconstruction.objective
    files = {"dinov2": experiment.dinov2_weights, "lpips": getattr(objective, "lpips_weights", None)}
    for role, file in files.items():
        if file:
            provenance.record(workdir, role, file)


def check_protocol(experiment: Experiment, data: Path) -> None:
    """Raises a ValueError if the set cannot be evaluated: better before the training than after."""
    record = open_data(experiment.data, data, experiment.evaluation.split)[0]
    choose_inputs(experiment.evaluation, record.view_ids, record.cameras(range(len(record.view_ids))))


def data_directory(experiment: Experiment, workdir: Path) -> Path:
    """Where the built data set of a run lies, if it has one."""
    return Path(experiment.data.root) if experiment.data.root else workdir / "data"


def make_trainer(experiment: Experiment, name: str, workdir: Path, data: Path, watch: WatchConfig = WATCH) -> Trainer:
    """All that one stage's training needs."""
    stage = experiment.stages[name]
    source, share = open_data(experiment.data, data, "train"), row_share(experiment.mesh.make())

    def batches(order: int) -> Iterator[Batch]:
        dataset = training_dataset(
            source,
            batch=stage.batch,
            views=stage.views,
            inputs=stage.candidates,
            input_size=(experiment.input_size,) * 2,
            render_size=(experiment.render_size,) * 2,
            seed=data_seed(experiment.seed, order),
            share=share,
            view_rule=stage.view_rule,
            config=stage.pipeline,
            report=report_damage,
        )
        return iter(dataset)

    return Trainer(
        name=name,
        stage=stage,
        model=experiment.model,
        precision=experiment.precision,
        mesh=experiment.mesh,
        seed=experiment.seed,
        directory=workdir,
        batches=batches,
        start=functools.partial(start, experiment, name, workdir),
        watch=watch,
        about={"seed": experiment.seed, "config": to_tree(experiment), **dataclasses.asdict(environment())},
    )


def data_seed(seed: int, order: int) -> int:
    """The seed of the data's order: the run's own for the first, one drawn from it after each rollback."""
    return int(np.random.SeedSequence((seed, order)).generate_state(1)[0] >> 1) if order else seed


def report_damage(text: str) -> None:
    """Tells of a damaged record, on every process: each meets records of its own."""
    if logging.is_writer():
        logging.warn(text)
    else:
        print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)


def evaluate(
    workdir: Path,
    *,
    step: str | int = "latest",
    data: Path | None = None,
    split: str | None = None,
    objects: int | None = None,
    lpips_weights: str | None = None,
    out: Path | None = None,
) -> Path:
    """Evaluates a checkpoint on the objects kept from training, or on `data`, and returns the path of report.json.

    Behind the report a file beside it says which checkpoint, that may be saved anew, it is of.

    Args:
      workdir: all that is needed to rebuild the model.
      step: of the reconstruction stage.
      data: a built set, or a folder in the GObjaverse layout, all of it.
      split: by default the protocol's, and "test" of `data`.
      objects: only the first so many.
      lpips_weights: of the metric; by default the file that the config names.
      out: folder of the report; by default `workdir/eval/STEP`, with `data`'s name and the split behind it if given.
    """
    experiment = read_config(workdir)
    model, number, found = restore_model(experiment, workdir, step)
    protocol = replace(experiment.evaluation, split=evaluated_split(experiment, data, split))
    out = Path(out) if out else workdir / "eval" / f"{number}{report_suffix(data, split)}"
    lpips_file = lpips_weights or experiment.reconstruction.objective.lpips_weights
    lpips, lpips_hash = load_lpips(lpips_file) if lpips_file else (None, None)
    records = open_records(experiment, workdir, data, protocol.split, out)
    if lpips is None:
        logging.notice("evaluation: no LPIPS weights file, the metric is off")
    chosen = range(len(records))[:objects]
    results = evaluate_objects(model, records, chosen, protocol, lpips=lpips, pictures=PICTURED)
    as_json, _ = write_report(
        out,
        EvaluationResults(
            config_name=experiment.name,
            config=to_tree(experiment),
            protocol=protocol,
            checkpoint_step=number,
            objects=results,
            lpips_sha256=lpips_hash,
            surface=SURFACE,
            peak_memory_bytes=peak_memory_bytes(),
            environment=environment(),
        ),
    )
    with written_whole(out / EVALUATED) as temporary:
        temporary.write_text(json.dumps({"crc32": found}) + "\n")
    return as_json


def evaluated_split(experiment: Experiment, data: Path | None, split: str | None) -> str:
    """The one that was asked for, else "test" of other data, else the protocol's."""
    return split or ("test" if data else experiment.evaluation.split)


def report_suffix(data: Path | None, split: str | None) -> str:
    """What follows the step in the name of a report's folder, where other objects than the protocol's are evaluated."""
    return "".join(f"-{name}" for name in (data and data.resolve().name, split) if name)


def open_records(experiment: Experiment, workdir: Path, data: Path | None, split: str, out: Path) -> Records:
    """The objects to evaluate on; a folder in the GObjaverse layout is built into `out/data` first."""
    if data is None and "released" in provenance.read(workdir):
        raise ValueError(f"{workdir} holds imported weights and no data: name some with --data")
    if data is None:
        return open_data(experiment.data, data_directory(experiment, workdir), split)
    if not (data / "data_config.json").is_file():
        source = FolderSource(str(data.resolve()), test=None)
        config = replace(experiment.data, source=source, root=None, built=False, on_demand=False)
        data = build_shown(config, out / "data")
    records = open_split(data, split)
    if records[0].grid != experiment.data.occupancy_grid:
        raise ValueError(
            f"{data}: occupancy of {records[0].grid} voxels a side, the model's has {experiment.data.occupancy_grid}"
        )
    return records


def export_example(experiment: Experiment, workdir: Path, out: Path) -> Path:
    """The first unseen object, reconstructed from the protocol's inputs, as files; returns their folder."""
    record = open_data(experiment.data, data_directory(experiment, workdir), experiment.evaluation.split)[0]
    inputs = choose_inputs(experiment.evaluation, record.view_ids, record.cameras(range(len(record.view_ids))))
    model, *_ = restore_model(experiment, workdir, "latest")
    gaussians = reconstruct(model, to_views(record.views(inputs)))
    folder = out / record.id.replace("/", "_")
    export(gaussians, folder, size=256)
    return folder


def to_views(images: PosedImages) -> Views:
    """Decoded images as views (V,) of their own size."""
    return make_views(images, (images.cameras.height, images.cameras.width))


def infer(
    workdir: Path,
    folder: Path,
    out: Path,
    *,
    inputs: Sequence[int] | None,
    step: str | int = "latest",
    size: int = 256,
    flavour: Flavour = "3dgs",
) -> None:
    """Reconstructs the object that a folder of posed images shows, into `out`.

    Args:
      workdir: of the model.
      folder: one object in the GObjaverse layout, or images with a transforms.json.
      out: gets gaussians.ply and turntable.mp4.
      inputs: numbers of the views to use; None for all.
      step: of the reconstruction stage.
      size: side of the turntable in pixels.
      flavour: of gaussians.ply.
    """
    read = read_transforms if (folder / "transforms.json").is_file() else read_gobjaverse
    images = read(folder, inputs)
    experiment = read_config(workdir)
    model, number, _ = restore_model(experiment, workdir, step)
    views = to_views(images)
    jax.block_until_ready(reconstruct(model, views))
    begun = time.perf_counter()
    gaussians, occupied = jax.block_until_ready(reconstruct_and_count(model, views))
    seconds = time.perf_counter() - begun
    count = export(gaussians, out, size=size, flavour=flavour)
    if occupied > model.max_anchors:
        logging.warn(f"{occupied} voxels were found occupied, evaluation.max_anchors uses {model.max_anchors} of them")
    if occupied == 0:
        logging.warn("no voxel was found occupied: there is nothing to draw")
    logging.summary(
        f"{folder}: reconstructed from {len(images.view_ids)} views",
        [
            ("checkpoint", f"step {number} of {workdir}"),
            ("seconds", f"{seconds:.3f} from images in memory to Gaussians, compilation excluded"),
            ("anchors", f"{min(int(occupied), model.max_anchors):,}"),
            ("Gaussians", f"{count:,} in {out / 'gaussians.ply'}"),
            ("turntable", str(out / "turntable.mp4")),
        ],
        [],
    )


def export(gaussians: Gaussians, out: Path, *, size: int, flavour: Flavour = "3dgs") -> int:
    """Writes gaussians.ply and turntable.mp4; returns the number of Gaussians."""
    out.mkdir(parents=True, exist_ok=True)
    count = write_ply(out / "gaussians.ply", gaussians, flavour)
    write_video(out / "turntable.mp4", turntable_frames(gaussians, size), fps=24)
    return count


def turntable_frames(gaussians: Gaussians, size: int) -> Iterator[np.ndarray]:
    """Pictures (size, size, 3) of one scene on white, around the object once."""
    rig, render = turntable(FRAMES, size=size), Renderer(background=jnp.ones(3))
    cameras = [jax.tree.map(lambda x: jnp.asarray(x[view : view + 1]), rig) for view in range(FRAMES)]  # noqa: B023
    for camera in cameras:
        render.make_room(gaussians, camera)
    with logging.progress("turntable", FRAMES, unit="frame") as bar:
        for done, camera in enumerate(cameras, start=1):
            yield np.clip(np.asarray(render(gaussians, camera).rgb[0]), 0.0, 1.0)
            bar.update(done)
