"""`geolrm data render`: meshes into posed pictures; needs the extra `mesh`."""

import argparse
import functools
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path

from geolrm_jax.runtime import logging


def render(arguments: Sequence[str], program: str) -> None:
    """render GLB, OBJ and PLY meshes into the GObjaverse layout"""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Renders every mesh below a folder with Mitsuba: 40 views around it, colour with alpha, depth, "
        "normals and cameras, in the GObjaverse layout. Goes on where an interrupted run stopped. Meshes that cannot "
        "be used are listed with the reason in OUT/rejected.json.",
    )
    parser.add_argument("--meshes", type=Path, required=True, metavar="DIR", help="GLB, glTF, OBJ, PLY at any depth")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the objects")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (512)")
    parser.add_argument("--samples", type=int, default=64, help="per pixel (64)")
    parser.add_argument("--views", default="0-39", metavar="N-N,N", help="numbers in the rig of 40 (0-39)")
    parser.add_argument(
        "--light", default="studio", choices=("studio", "uniform"), help="lighter above, or 1 from everywhere (studio)"
    )
    parser.add_argument(
        "--up", default="file", choices=("file", "y", "z"), help="the meshes' axis; file: glTF y, OBJ and PLY z (file)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="renderers at work (one for each core)")
    known = parser.parse_args(arguments)
    missing = [name for name in ("mitsuba", "trimesh") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'geolrm-jax[mesh]'")

    from geolrm_jax.data.folder import DUPLICATE_VIEWS
    from geolrm_jax.data.mesh_objects import RIG_VIEWS, RenderConfig
    from geolrm_jax.data.mesh_sets import REJECTED_FILE, SHEET_FILE, render_meshes

    config = RenderConfig(
        size=known.size, samples=known.samples, views=_numbers(known.views), light=known.light, up=known.up
    )
    with logging.bars("view") as advance:
        report = render_meshes(
            known.meshes,
            known.out,
            config,
            processes=known.processes,
            advance=functools.partial(advance, "rendered"),
        )
    if report.variant == "scalar_rgb":
        logging.warn("rendered by Mitsuba's scalar variant: it is faster where LLVM 18 to 21 is installed")
    if report.rejected:
        logging.warn(f"{len(report.rejected)} meshes left out, see {known.out / REJECTED_FILE}")
    if report.rendered + report.finished == 0:
        raise ValueError(
            f"none of the {len(report.rejected)} meshes could be rendered, see {known.out / REJECTED_FILE}"
        )
    command = f"geolrm data build gobjaverse --source {shlex.quote(str(known.out))} --out DIR"
    stored = len({*config.views} - {*DUPLICATE_VIEWS})
    if stored < RIG_VIEWS - len(DUPLICATE_VIEWS):
        command += f" --min-views {stored}"
    logging.summary(
        f"{known.out}: {report.rendered} objects rendered, {report.finished} were there",
        [("pictures", str(known.out / SHEET_FILE)), ("left out", f"{len(report.rejected)} meshes")],
        [("make a set that training reads", command)],
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers and ranges with commas between them."""
    try:
        ends = [[int(number) for number in part.split("-")] for part in text.split(",")]
        return tuple(number for first, *last in ends for number in range(first, (last or [first])[0] + 1))
    except ValueError:
        raise ValueError(f"--views: expected numbers or ranges with commas between them, got {text!r}") from None
