"""`geolrm data`: sets of objects made, checked and rendered; each job is a function of the table at the end."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from geolrm_jax.data_render_cli import render
from geolrm_jax.runtime import logging

Arguments = Sequence[str]
SHOWN_FINDINGS = 20


def run(arguments: Arguments, program: str) -> None:
    """Runs `geolrm data JOB ...`; raises ValueError or OSError for what a user can mend."""
    parser = argparse.ArgumentParser(prog=program, description="Sets of objects: render, build, check.")
    parser.add_argument("job", choices=JOBS, help="; ".join(f"{name}: {job.__doc__}" for name, job in JOBS.items()))
    job = parser.parse_args(arguments[:1]).job
    JOBS[job](arguments[1:], f"{program} {job}")


def build(arguments: Arguments, program: str) -> None:
    """write a source's objects into a set that training reads"""
    known = _build_parser(program).parse_args(arguments)

    from geolrm_jax.data.builders.config import DataConfig
    from geolrm_jax.data.builders.layout import REJECTED_FILE, count_objects, read_rejected
    from geolrm_jax.data.builders.records import build as build_set

    config = DataConfig(
        _SOURCES[known.kind](known),
        known.grid,
        known.rounding,
        known.encoding,
        size=None if known.kind == "procedural" else known.size,
    )
    with logging.bars("object") as advance:
        directory = build_set(
            config,
            known.out,
            advance=advance,
            processes=known.processes,
            max_rejected=known.max_rejected,
            objects_per_shard=known.objects_per_shard,
        )
    rejected = read_rejected(directory)
    counts = count_objects(directory)
    reasons = f"{len(rejected)} objects, each with its reason, in {directory / REJECTED_FILE}" if rejected else "none"
    next_steps = [("check it", f"geolrm data check {directory}")]
    if counts["train"]:
        next_steps.append(("train on it", f"geolrm train --config NAME --data.root {directory} --data.built"))
    if counts["test"]:
        next_steps.append(("evaluate on it", f"geolrm eval --workdir DIR --data {directory}"))
    logging.summary(
        f"{directory}: complete",
        [
            ("objects", ", ".join(f"{count:,} {split}" for split, count in counts.items())),
            ("not in the set", reasons),
        ],
        next_steps,
    )


def _build_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Writes a source's objects into a set that training reads. The same command goes on with a build "
        "that was interrupted: finished shards stay as they are.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds of sources")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, metavar="DIR", help="the set to make")
    common.add_argument("--encoding", default="raw", choices=("raw", "png"), help="of images and depth (raw)")
    common.add_argument("--grid", type=int, default=128, metavar="N", help="voxels a side of the occupancy (128)")
    common.add_argument(
        "--rounding", default="voxel", choices=("voxel", "released"), help="of points to voxels (voxel)"
    )
    common.add_argument("--processes", type=int, metavar="N", help="that work at a time (one for each core)")
    common.add_argument(
        "--max-rejected", type=float, default=0.1, metavar="SHARE", help="of unsound objects that ends the build (0.1)"
    )
    common.add_argument("--objects-per-shard", type=int, metavar="N", help="at most (for 16 to 512 shards)")
    folders = argparse.ArgumentParser(add_help=False)
    folders.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder of the objects")
    folders.add_argument("--size", type=int, metavar="N", help="height of the stored views (that of the files)")
    folders.add_argument("--test", metavar="FILE|all", help="objects kept for evaluation: a list, or all (none)")

    job = kinds.add_parser("gobjaverse", parents=[common, folders], help="renders in the GObjaverse layout")
    job.add_argument("--index", type=Path, metavar="FILE", help="JSON list of objects, or object whose keys they are")
    job.add_argument("--captions", type=Path, metavar="FILE", help='leave out captions with "box" or "cube" in them')
    job.add_argument("--min-views", type=int, default=38, metavar="N", help="refuse objects with fewer views (38)")

    job = kinds.add_parser("transforms", parents=[common, folders], help="folders with a NeRF-style transforms.json")
    job.add_argument("--file", default="transforms.json", metavar="NAME", help="of the cameras' file (transforms.json)")
    job.add_argument("--scale", type=float, default=1.0, help="cube sides per length of the files (1)")
    job.add_argument("--min-views", type=int, default=8, metavar="N", help="refuse objects with fewer views (8)")

    job = kinds.add_parser("procedural", parents=[common], help="objects by seed alone, rendered on this machine")
    job.add_argument("--objects", type=int, default=200, metavar="N", help="to train on (200)")
    job.add_argument("--test-objects", type=int, default=16, metavar="N", help="kept for evaluation (16)")
    job.add_argument(
        "--unseen-family-objects",
        type=int,
        default=0,
        metavar="N",
        help="of a third, harder split: with primitives of a family that no other object has (0)",
    )
    job.add_argument("--size", type=int, default=128, metavar="N", help="side of the pictures (128)")
    job.add_argument("--seed", type=int, default=0, metavar="N", help="of the objects (0)")
    return parser


def _gobjaverse(known: argparse.Namespace):
    from geolrm_jax.data.folder import FolderSource

    def absolute(path: Path | None) -> str | None:
        return str(path.resolve()) if path else None

    return FolderSource(
        str(known.source.resolve()),
        test=_test_objects(known.test),
        index=absolute(known.index),
        captions=absolute(known.captions),
        min_views=known.min_views,
    )


def _transforms(known: argparse.Namespace):
    from geolrm_jax.data.transforms import TransformsSource

    test = _test_objects(known.test)
    return TransformsSource(str(known.source.resolve()), test, known.file, known.scale, known.min_views)


def _procedural(known: argparse.Namespace):
    from geolrm_jax.data.procedural import ProceduralSource

    return ProceduralSource(
        train_objects=known.objects,
        test_objects=known.test_objects,
        unseen_family_objects=known.unseen_family_objects,
        size=known.size,
        seed=known.seed,
    )


_SOURCES = {"gobjaverse": _gobjaverse, "transforms": _transforms, "procedural": _procedural}


def _test_objects(test: str | None) -> tuple[str, ...] | None:
    """The objects that `--test` means; None: all."""
    from geolrm_jax.data.folder import read_names

    if test == "all":
        return None
    return tuple(read_names(test)) if test else ()


def check(arguments: Arguments, program: str) -> None:
    """verify a built set: counts, checksums, ranges, cameras, depth against occupancy; write a page of pictures"""
    parser = argparse.ArgumentParser(
        prog=program, description=f"{check.__doc__.capitalize()}. Exit code 1 if it is wrong."
    )
    parser.add_argument("set", type=Path, metavar="DIR", help="a built set")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge one object of N; files: all (1)")
    parser.add_argument("--pictured", type=int, default=12, metavar="N", help="objects on the page (12)")
    parser.add_argument("--processes", type=int, metavar="N", help="that work at a time (one for each core)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="of pictures (DIR/check.html)")
    known = parser.parse_args(arguments)

    from geolrm_jax.data.checking import check as check_set

    with logging.bars("object") as advance:
        report = check_set(
            known.set,
            every=known.every,
            pictured=known.pictured,
            processes=known.processes,
            page=known.page,
            advance=advance,
        )
    if report.page_error:
        logging.warn(f"the page of pictures was not written, --page FILE puts it elsewhere: {report.page_error}")
    title = f"{known.set}: sound" if not report.findings else f"{known.set}: {len(report.findings)} things are wrong"
    logging.summary(title, [*report.rows, ("pictures", str(report.page or "none"))], [])
    if report.findings:
        shown = "\n  ".join(report.findings[:SHOWN_FINDINGS])
        more = len(report.findings) - SHOWN_FINDINGS
        raise ValueError(f"{known.set} is not sound:\n  {shown}" + (f"\n  and {more} more" if more > 0 else ""))


JOBS = {"build": build, "check": check, "render": render}
