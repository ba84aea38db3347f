"""The `geolrm` console command; `train.py` and `eval.py` are its first two subcommands."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import absl.logging

Arguments = Sequence[str]
NO_CLUSTER = "this process alone, whatever cluster it runs in"


def main(arguments: Arguments | None = None) -> int:
    """Runs `geolrm COMMAND ...`; the exit code is 0, 1 for a run that failed, 2 for a wrong command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="geolrm", description="GeoLRM: posed images of an object in, 3D Gaussians out"
    )
    parser.add_argument("command", choices=COMMANDS, help="; ".join(f"{k}: {f.__doc__}" for k, f in COMMANDS.items()))
    command = parser.parse_args(arguments[:1]).command
    return COMMANDS[command](arguments[1:], program=f"geolrm {command}")


def clear_errors(command: Callable[..., int | None]) -> Callable[..., int]:
    """Turns what a user can mend into one line and exit code 1; anything else is a bug and keeps its traceback."""

    def run(arguments: Arguments, program: str) -> int:
        absl.logging.set_verbosity(absl.logging.FATAL)  # what Orbax and TFDS log as errors they also raise
        try:
            return command(arguments, program) or 0
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"{program}: error: {error}", file=sys.stderr)
            return 1

    run.__doc__ = command.__doc__
    return run


@clear_errors
def train(arguments: Arguments, program: str) -> int | None:
    """train the stages of a config, evaluate, export"""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Trains the stages of a config one after the other, evaluates and exports. Goes on where an "
        "interrupted run of the same work directory stopped.",
        epilog="Every field of the config can be overridden: --reconstruction.optimizer.learning-rate 3e-4; "
        f"`{program} --config NAME --help` lists them.",
        add_help=False,
    )
    parser.add_argument("--config", required=True, metavar="NAME|FILE", help="a config of the project, or a file")
    parser.add_argument("--workdir", type=Path, help="where everything is written (workdir/NAME)")
    _add_cluster_options(parser)
    watch = parser.add_argument_group("watching, which changes no number")
    watch.add_argument("--profile", type=_steps, metavar="START:STOP", help="write a profiler trace of these steps")
    watch.add_argument(
        "--hang-seconds", type=float, default=1800.0, help="without a step for so long, dump all stacks (1800)"
    )
    watch.add_argument("--hang-exit", action="store_true", help="and end then, with code 70")
    watch.add_argument("--save-seconds", type=float, default=300.0, help="time to save after SIGTERM (300)")
    if not any(a.startswith("--config") for a in arguments) and {"-h", "--help"} & set(arguments):
        parser.print_help()
        return
    known, overrides = parser.parse_known_args(arguments)

    from geolrm_jax import config, recipe
    from geolrm_jax.runtime import distributed, programs
    from geolrm_jax.runtime.interruption import PREEMPTED, Preempted, WatchConfig

    programs.keep_between_runs()
    distributed.initialize(detect=not known.no_cluster, heartbeat=known.heartbeat, timeout=known.join)
    watch = WatchConfig(known.hang_seconds, known.hang_exit, known.save_seconds, known.profile)
    experiment = config.apply_overrides(config.load_config(known.config), overrides, program=program)
    try:
        recipe.run(experiment, known.workdir or Path("workdir") / experiment.name, watch)
    except Preempted as stopped:
        print(f"{program}: {stopped}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED
    return None


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes", "found by themselves on clusters that JAX knows; see docs/scale.md"
    )
    group.add_argument("--no-cluster", action="store_true", help=NO_CLUSTER)
    group.add_argument(
        "--heartbeat", type=int, default=100, metavar="SECONDS", help="a process silent for so long is dead (100)"
    )
    group.add_argument(
        "--join", type=int, default=300, metavar="SECONDS", help="at the start, processes wait so long for all (300)"
    )


def _steps(text: str) -> tuple[int, int]:
    """Two steps with a colon between them."""
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit()):
        raise argparse.ArgumentTypeError(f"expected START:STOP, got {text!r}")
    return int(start), int(stop)


@clear_errors
def evaluate(arguments: Arguments, program: str) -> None:
    """evaluate a work directory's checkpoint on unseen objects"""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Rebuilds the model from a work directory alone, restores a checkpoint, evaluates, and writes "
        "report.json and report.html. Works beside a training that still runs.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="what training has written")
    parser.add_argument("--step", default="latest", metavar="N|latest|best", help="which checkpoint (latest)")
    parser.add_argument(
        "--data", type=Path, help="a built data set, or a folder in the GObjaverse layout, to use instead"
    )
    parser.add_argument("--split", help="of the set to use (the config's evaluation.split; test with --data)")
    parser.add_argument("--objects", type=int, help="evaluate the first N objects only")
    parser.add_argument("--lpips", metavar="FILE", help="weights of LPIPS; see `geolrm weights lpips` (the config's)")
    parser.add_argument("--out", type=Path, help="folder of the report (WORKDIR/eval/STEP)")
    group = parser.add_argument_group("beside a training")
    group.add_argument("--follow", action="store_true", help="evaluate each checkpoint as it appears, to the last step")
    group.add_argument(
        "--metric",
        default="psnr",
        choices=("psnr", "ssim", "lpips", "chamfer"),
        help="what eval/best.json is about (psnr)",
    )
    group.add_argument(
        "--idle-timeout",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="end with an error when no new checkpoint has come for so long (never)",
    )
    parser.add_argument("--no-cluster", action="store_true", help=NO_CLUSTER)
    known = parser.parse_args(arguments)
    from geolrm_jax import following, recipe
    from geolrm_jax.runtime import distributed, programs

    programs.keep_between_runs()
    if known.follow and (known.step != "latest" or known.out):
        parser.error("--follow evaluates every step into WORKDIR/eval/STEP: it goes with neither --step nor --out")
    chosen = {"data": known.data, "split": known.split, "objects": known.objects, "lpips_weights": known.lpips}
    with distributed.by_one(detect=not known.no_cluster) as mine:
        if mine and known.follow:
            following.follow(known.workdir, following.FollowConfig(known.metric, known.idle_timeout, **chosen))
        elif mine:
            recipe.evaluate(known.workdir, step=known.step, out=known.out, **chosen)


@clear_errors
def infer(arguments: Arguments, program: str) -> None:
    """reconstruct one object from a folder of posed images"""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Reads a folder in the GObjaverse layout, or images with a transforms.json, and writes the object "
        "as gaussians.ply and turntable.mp4.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="what training has written")
    parser.add_argument("--views", type=Path, required=True, help="the folder")
    parser.add_argument("--inputs", help="numbers of the views to use, as 0,6,12,18 (all)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--step", default="latest", metavar="N|latest|best", help="which checkpoint (latest)")
    parser.add_argument("--size", type=int, default=256, help="side of the turntable in pixels (256)")
    parser.add_argument("--ply", default="3dgs", choices=("3dgs", "released"), help="flavour of gaussians.ply (3dgs)")
    known = parser.parse_args(arguments)
    try:
        inputs = [int(view) for view in known.inputs.split(",")] if known.inputs else None
    except ValueError:
        parser.error(f"--inputs: expected numbers with commas between them, got {known.inputs!r}")

    from geolrm_jax import recipe
    from geolrm_jax.runtime import programs

    programs.keep_between_runs()
    recipe.infer(
        known.workdir,
        known.views,
        known.out,
        inputs=inputs,
        step=known.step,
        size=known.size,
        flavour=known.ply,
    )


@clear_errors
def info(arguments: Arguments, program: str) -> None:
    """parameters per part and FLOPs of a config, without building the model"""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Counts a config's parameters and FLOPs from shapes alone: nothing is allocated or compiled.",
        epilog=f"Fields of the config can be overridden; `{program} --config NAME --help` lists them.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="NAME|FILE", help="a config of the project, or a file")
    parser.add_argument("--views", default="1,4,8", type=_numbers, metavar="N,N", help="input views (1,4,8)")
    parser.add_argument("--anchors", default="4096,16384", type=_numbers, metavar="N,N", help="anchors (4096,16384)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    if not any(a.startswith("--config") for a in arguments) and {"-h", "--help"} & set(arguments):
        parser.print_help()
        return
    known, overrides = parser.parse_known_args(arguments)

    from geolrm_jax import config
    from geolrm_jax import info as roof

    experiment = config.apply_overrides(config.load_config(known.config), overrides, program=program)
    described = roof.describe(experiment, views=known.views, anchors=known.anchors)
    roof.show(described)
    if known.json:
        roof.write(described, known.json)


def _numbers(text: str) -> list[int]:
    """Numbers with commas between them."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


@clear_errors
def weights(arguments: Arguments, program: str) -> None:
    """import the released checkpoint, export to its layout, download public files, combine those of LPIPS"""
    parser = argparse.ArgumentParser(prog=program, description="Weights from elsewhere, in and out.")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB", title="jobs")

    job = jobs.add_parser(
        "import",
        help="make a work directory of a released GeoLRM checkpoint",
        epilog="Fields of the config can be overridden, as for `geolrm train`.",
        allow_abbrev=False,
    )
    job.add_argument("--from", dest="file", type=Path, required=True, help=".ckpt, .pth or .safetensors")
    job.add_argument("--to", type=Path, required=True, metavar="DIR", help="the work directory to make")
    job.add_argument("--config", default="released", metavar="NAME|FILE", help="a config of that model (released)")

    job = jobs.add_parser("export", help="write a model as safetensors in the released layout")
    job.add_argument("--workdir", type=Path, required=True, help="what training or an import has written")
    job.add_argument("--step", default="latest", metavar="N|latest|best", help="which checkpoint (latest)")
    job.add_argument("--to", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")

    job = jobs.add_parser("fetch", help="download a known public file, verified; an interrupted download is resumed")
    job.add_argument("name", help="geolrm, vgg16, lpips-heads, dinov2-base, ...; a wrong name lists them all")
    job.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the file")

    job = jobs.add_parser("lpips", help="combine VGG16 and the linear heads into the file that LPIPS reads")
    job.add_argument("--vgg", type=Path, required=True, metavar="FILE", help="torchvision's vgg16-397923af.pth")
    job.add_argument("--heads", type=Path, required=True, metavar="FILE", help="weights/v0.1/vgg.pth of `lpips`")
    job.add_argument("--to", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")

    known, overrides = parser.parse_known_args(arguments)
    if overrides and known.job != "import":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")

    from geolrm_jax import config, interchange
    from geolrm_jax.runtime import logging
    from geolrm_jax.weights import fetch, lpips

    if known.job == "import":
        experiment = config.apply_overrides(config.load_config(known.config), overrides, program=f"{program} import")
        interchange.import_weights(experiment, known.file, known.to)
    elif known.job == "export":
        interchange.export_weights(known.workdir, known.to, step=known.step)
    elif known.job == "fetch":
        fetch.fetch(known.name, known.to)
    else:
        digests = lpips.combine(known.vgg, known.heads, known.to)
        rows = [(f"SHA-256 of {name}", digest) for name, digest in digests.items()]
        override = f"--reconstruction.objective.lpips-weights {known.to}"
        logging.summary(f"{known.to}: written", rows, [("train with it", f"geolrm train --config NAME {override}")])


@clear_errors
def data(arguments: Arguments, program: str) -> None:
    """render meshes, build a set of objects, check one"""
    from geolrm_jax import data_cli

    data_cli.run(arguments, program)


@clear_errors
def plan(arguments: Arguments, program: str) -> None:
    """memory, computing and communication of the train step on accelerators that need not be there"""
    from geolrm_jax import plan_cli

    plan_cli.run(arguments, program)


COMMANDS = {
    "train": train,
    "eval": evaluate,
    "infer": infer,
    "info": info,
    "plan": plan,
    "weights": weights,
    "data": data,
}

if __name__ == "__main__":
    sys.exit(main())
