"""One shard of a set: its objects read, judged, encoded and written, by one process from beginning to end."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from geolrm_jax.data.builders.agreement import check_agreement
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.layout import KINDS, serialize_object, serialize_view, shard_file
from geolrm_jax.data.examples import resize_images
from geolrm_jax.data.occupancy import check_hull, drop_edges, occupancy_from_depth, occupancy_from_silhouettes
from geolrm_jax.data.record import Encoding, PosedImages, Record, check_views
from geolrm_jax.export.files import written_whole

MARKERS = "shards"
# Errors of the system that an object of a folder may cause itself; None: raised by our own code.
_OBJECTS_FAULTS = (
    None,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
)
# PNG is compressed already. Group size 1: a record is read without its neighbours. Every record has a checksum.
_OPTIONS: dict[Encoding, str] = {"raw": "group_size:1,zstd:1", "png": "group_size:1,uncompressed"}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a split: the objects that stand together in one file, and their views in another."""

    split: str
    number: int
    count: int
    ids: tuple[str, ...]

    @property
    def files(self) -> tuple[str, str]:
        """Paths of its two files inside the set."""
        objects, views = (shard_file(kind, self.split, self.number, self.count) for kind in KINDS)
        return objects, views

    @property
    def marker(self) -> str:
        """Path of the file that says that the shard is finished, and what it holds."""
        return f"{MARKERS}/{self.split}-{self.number:05d}.json"


def make_record(config: DataConfig, split: str, id: str) -> Record:
    """One object of the config's source as a record, its occupancy made from its views.

    Raises:
      ValueError, OSError: if the object is not sound; the message says what was found.
    """
    views = resize_images(check_views(config.source.read(split, id), id), config.size)
    grid, rounding = config.occupancy_grid, config.occupancy_rounding
    made_from = config.source.occupancy_from
    if made_from == "depth":
        check_agreement(views, id)
        views = _within_reach(views)
        occupancy = occupancy_from_depth(drop_edges(views.depth, views.cameras), views.cameras, grid, rounding)
    else:
        if (views.rgba[..., 3] == 255).all():
            raise ValueError(f"{id}: no alpha in any of its views; occupancy cannot be made")
        check_hull(views.rgba[..., 3], views.cameras, id)
        occupancy = occupancy_from_silhouettes(views.rgba[..., 3], views.cameras, grid)
    if not occupancy.any():
        raise ValueError(f"{id}: no usable {made_from} in its views; occupancy cannot be made")
    return Record.encode(
        id, views, occupancy, occupancy_rounding=rounding, occupancy_from=made_from, encoding=config.image_encoding
    )


def _within_reach(views: PosedImages) -> PosedImages:
    """Depths that no point of the cube has become missing: one stray pixel would widen the steps of a whole view."""
    distance = np.linalg.norm(views.cameras.world_from_camera[:, :3, 3], axis=-1)[:, None, None]
    inside = np.abs(views.depth - distance) <= 0.5 * np.sqrt(3.0)
    return views._replace(depth=np.where(inside, views.depth, np.float32(0.0)))


def write_shard(config: DataConfig, directory: Path, shard: Shard, done: Callable[[str], None]) -> dict[str, Any]:
    """Writes the shard's files under other names, gives them their own when they are whole, and marks the shard.

    Args:
      config: of the set.
      directory: of the unfinished set.
      shard: which.
      done: called with the split after each object.

    Returns:
      What the marker says: files with SHA-256 and bytes, how many objects and views, and what was rejected and why.
    """
    final = [directory / file for file in shard.files]
    temporary = [path.with_name(f".{path.name}.{os.getpid()}") for path in final]
    for path in final:
        path.parent.mkdir(parents=True, exist_ok=True)
    options = ("group_size:1,zstd:1", _OPTIONS[config.image_encoding])
    counts, rejected = [0, 0], []
    with _removed_on_failure(temporary):
        writers = [ArrayRecordWriter(str(path), option) for path, option in zip(temporary, options, strict=True)]
        for id in shard.ids:
            try:
                record = make_record(config, shard.split, id)
            except (ValueError, OSError) as error:
                _check_blame(error, config.source)
                rejected.append({"split": shard.split, "id": id, "reason": str(error)})
            else:
                stored = record.read_views(range(len(record.view_ids)))
                writers[0].write(serialize_object(record, first_view=counts[1]))
                for view in stored:
                    writers[1].write(serialize_view(view))
                counts = [counts[0] + 1, counts[1] + len(stored)]
            done(shard.split)
        for writer, path, count in zip(writers, temporary, counts, strict=True):
            writer.close()
            _check_written(path, count)
        files = {name: describe_file(path) for name, path in zip(shard.files, temporary, strict=True)}
        for path, name in zip(temporary, final, strict=True):
            path.rename(name)
    content = {
        "split": shard.split,
        "shard": shard.number,
        "objects": counts[0],
        "views": counts[1],
        "files": files,
        "rejected": rejected,
    }
    with written_whole(directory / shard.marker) as path:
        path.write_text(json.dumps(content) + "\n")
    return content


@contextlib.contextmanager
def _removed_on_failure(paths: list[Path]) -> Iterator[None]:
    """Removes the files on an error, so that a full disk is not kept full; ArrayRecord's own is made an OSError."""
    try:
        yield
    except BaseException as error:
        for path in paths:
            path.unlink(missing_ok=True)
        if type(error) is RuntimeError:  # not JAX's, which derive from it
            raise OSError(f"{paths[0].parent}: {error}; is the disk full?") from error
        raise


def _check_blame(error: ValueError | OSError, source: Any) -> None:
    """Raises an OSError where not the object is at fault: the machine, or a source whose folder is gone."""
    if isinstance(error, OSError) and error.errno not in _OBJECTS_FAULTS:
        raise error
    root = getattr(source, "root", None)
    if root and not Path(root).is_dir():
        raise OSError(f"{root} is gone, the folder that objects are read from") from error


def read_marker(path: Path) -> dict[str, Any] | None:
    """What a finished shard's marker says; None where there is none, or one that a power cut has damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _check_written(path: Path, count: int) -> None:
    """Brings a file to disk; raises an OSError if it does not hold the records that were written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    reader = ArrayRecordReader(str(path))
    found = reader.num_records() if reader.ok() else 0
    reader.close()
    if found != count:
        raise OSError(f"{path}: {found} of {count} records were written; is the disk full?")


def describe_file(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def split_into_shards(split: str, ids: list[str], shards: int) -> list[Shard]:
    """Shards of a split, in order, as equal as can be: the same however many processes write them."""
    ends = [len(ids) * (number + 1) // shards for number in range(shards)]
    return [
        Shard(split, number, shards, tuple(ids[start:end]))
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
