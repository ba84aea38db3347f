"""Renders a folder of meshes into the GObjaverse layout on every core, and goes on where it stopped (extra `mesh`).

`OUT/<id>/NNNNN/…` is an object, `<id>` the mesh's path without its suffix. Beside the objects: `render_config.json`,
how they were rendered; `rejected.json`, a JSON object of the meshes left out and why; `contact_sheet.png`.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from geolrm_jax.data.builders.workers import count_workers
from geolrm_jax.data.folder import CAMPOS, check_name, read_image
from geolrm_jax.data.mesh_files import SUFFIXES
from geolrm_jax.data.mesh_objects import UNFINISHED, RenderConfig
from geolrm_jax.data.mesh_rendering import Variant, choose_variant
from geolrm_jax.data.mesh_workers import Task, render_all
from geolrm_jax.export.files import written_whole
from geolrm_jax.export.pages import contact_sheet

FORMAT_VERSION = 1
CONFIG_FILE, REJECTED_FILE, SHEET_FILE = "render_config.json", "rejected.json", "contact_sheet.png"
_SHEET_OBJECTS, _SHEET_VIEWS, _SHEET_SIZE = 24, 6, 128

Advance = Callable[[int, int], None]


class RenderReport(NamedTuple):
    """What a run did.

    Attributes:
      rendered: objects made by this run.
      finished: objects that were there before.
      rejected: meshes left out, by their path below the folder, and why.
      variant: Mitsuba's.
    """

    rendered: int
    finished: int
    rejected: dict[str, str]
    variant: Variant


def render_meshes(
    meshes: str | Path,
    out: str | Path,
    config: RenderConfig | None = None,
    *,
    processes: int | None = None,
    advance: Advance = lambda *_: None,
) -> RenderReport:
    """Renders all meshes below a folder; finished objects are skipped, meshes rejected before are tried again.

    Args:
      meshes: folder with .glb, .gltf, .obj and .ply files at any depth.
      out: folder of the objects; an object gets its name when it is whole.
      config: None for the defaults; must be that of the objects that are there.
      processes: renderers at work, each on one core; None: one for each core.
      advance: called as (views done, views in all that this run has to do); those of a rejected mesh count as done.

    Raises:
      ValueError: if there is no mesh, `out` holds objects of another config, or another run writes there.
      OSError: if Mitsuba does not start.
    """
    meshes, out, config = Path(meshes), Path(out), config or RenderConfig()
    processes = count_workers(processes)
    found, rejected = find_meshes(meshes)
    if not found:
        raise ValueError(f"no mesh below {meshes}: expected files that end in {', '.join(SUFFIXES)}")
    variant = choose_variant()
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _keep_config(out, config)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        taken = {task: reason for task in found if (reason := _taken(out, task.id, config))}
        rejected |= {str(task.mesh.relative_to(meshes)): reason for task, reason in taken.items()}
        found = [task for task in found if task not in taken]
        tasks = [task for task in found if not _is_finished(out / task.id, config)]
        _write_json(out / REJECTED_FILE, rejected)
        views, total = collections.Counter(), len(tasks) * len(config.views)
        advance(0, total)
        for task, kind, reason in render_all(tasks, out, config, variant, processes):
            views[task] += kind == "view"
            if kind == "rejected":
                views[task] = len(config.views)
                rejected[str(task.mesh.relative_to(meshes))] = reason
                _write_json(out / REJECTED_FILE, rejected)
            advance(views.total(), total)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        objects = [task.id for task in found if _is_finished(out / task.id, config)]
        if objects:
            with written_whole(out / SHEET_FILE) as temporary:
                Image.fromarray(draw_sheet(out, objects, config.views)).save(temporary)
    finished = len(found) - len(tasks)
    return RenderReport(len(objects) - finished, finished, rejected, variant)


def _is_finished(folder: Path, config: RenderConfig) -> bool:
    """Whether the folder is an object: it gets its name with all its views in it."""
    return (folder / f"{config.views[0]:05d}").is_dir()


def _taken(out: Path, id: str, config: RenderConfig) -> str | None:
    """Why an object of that name would lie around or within others that were rendered before, if it would."""
    if (out / id).exists() and not _is_finished(out / id, config):
        return f"{out / id} is there and holds something else: remove it"
    above = [out / parent for parent in PurePosixPath(id).parents[:-1] if _is_finished(out / parent, config)]
    return f"its object would lie within {above[0]}, which is another: remove that" if above else None


def find_meshes(folder: Path) -> tuple[list[Task], dict[str, str]]:
    """All mesh files at any depth, by name, and those whose object would have no usable name, with the reason.

    Names are hidden, odd (see `folder.check_name`), or another's: of files that differ by their suffix alone, the first
    in the order of SUFFIXES stays.

    Raises:
      FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one with meshes")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    files.sort(key=lambda path: SUFFIXES.index(path.suffix.lower()))
    found: dict[str, Path] = {}
    rejected = {}
    for path in files:
        id = path.relative_to(folder).with_suffix("").as_posix()
        if odd := _odd(id):
            rejected[str(path.relative_to(folder))] = odd
        elif id in found:
            rejected[str(path.relative_to(folder))] = f"{found[id].relative_to(folder)} has the same name"
        else:
            found[id] = path
    for id in sorted(found):
        above = next((str(parent) for parent in PurePosixPath(id).parents if str(parent) in found), None)
        if above:
            path = found.pop(id)
            rejected[str(path.relative_to(folder))] = f"its object would lie within that of {above}"
    return [Task(id, found[id]) for id in sorted(found)], rejected


def _odd(id: str) -> str | None:
    """Why no object can have that name, if none can."""
    if any(part.startswith(".") for part in PurePosixPath(id).parts):
        return "its name is hidden, and hidden objects are not found"
    if CAMPOS in PurePosixPath(id).parts:
        return f"{CAMPOS} holds an object's views"
    try:
        check_name(id)
    except ValueError as error:
        return str(error)
    return None


def draw_sheet(folder: Path, objects: Sequence[str], views: Sequence[int]) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of up to 6 views over white, of up to 24 objects in the GObjaverse layout, evenly chosen, with names."""

    def picture(id: str, view: int) -> Image.Image:
        rgba = Image.fromarray(read_image(folder / id / f"{view:05d}" / f"{view:05d}.png"))
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB").resize((_SHEET_SIZE, _SHEET_SIZE), Image.Resampling.BOX)

    def row(id: str) -> list[np.ndarray]:
        pictures = [picture(id, view) for view in _spread(views, _SHEET_VIEWS)]
        # The font that Pillow brings along may have no more than ASCII.
        ImageDraw.Draw(pictures[0]).text((2, 1), id.encode("ascii", "replace").decode(), fill="black")
        return [np.array(picture) for picture in pictures]

    return contact_sheet([row(id) for id in _spread(objects, _SHEET_OBJECTS)])


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _keep_config(out: Path, config: RenderConfig) -> None:
    """Writes the config beside the objects, or compares it with the one that is there."""
    content = json.loads(json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}))
    file = out / CONFIG_FILE
    if not file.is_file():
        _write_json(file, content)
        return
    there = json.loads(file.read_text())
    changed = [key for key in {*there, *content} if there.get(key) != content.get(key)]
    if changed:
        differences = "; ".join(f"{key} is {there.get(key)} there, {content.get(key)} here" for key in sorted(changed))
        raise ValueError(f"{out} holds objects rendered otherwise: {differences}")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps other runs out of the folder; the lock ends with the process."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes into {out}") from None
        yield


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
