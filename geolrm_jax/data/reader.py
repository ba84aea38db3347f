"""Random access to the records of a built set: an object is read by its place, its views when they are asked for."""

import bisect
import functools
import itertools
import resource
import weakref
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from google.protobuf import json_format

from geolrm_jax.data.builders.config import read_config
from geolrm_jax.data.builders.layout import KINDS, VERSION, object_fields, stored_view
from geolrm_jax.data.record import DamagedRecord, Record, StoredView, reading_error

__all__ = ["DamagedRecord", "RecordSource", "open_split"]

_OTHER_FILES = 256  # that a process may hold open beside shards
_open_sources: weakref.WeakSet["RecordSource"] = weakref.WeakSet()


def _allow_open_files(shards: int) -> None:
    """Raises this process's limit of open files, where so many shards need it; OSError where it cannot be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OSError(f"{shards} files of shards need `ulimit -n {needed}`; this process may open {hard} files at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class RecordSource:
    """Random access to the records of one split; picklable, and so are its records.

    Attributes:
      directory, split: what is open.
      config: what the set was built from, as `builders.config.read_config` gives it.
      shard_lengths: objects of each shard, and views of each.
    """

    def __init__(self, directory: Path | str, split: str):
        self.config = read_config(directory)
        self.directory, self.split = Path(directory), split
        try:
            objects, views = (tfds.builder_from_directory(self.directory / kind / VERSION) for kind in KINDS)
        except (json_format.Error, ValueError) as error:
            raise ValueError(f"{directory}: TFDS's metadata is damaged: {error}") from error
        if split not in objects.info.splits:
            raise ValueError(
                f"{directory} has no split {split!r}, it has {', '.join(objects.info.splits)}: what goes into which is "
                "said when a set is built (`geolrm data build ... --test`)"
            )
        self._objects, self._views = objects.as_data_source(split), views.as_data_source(split)
        self.shard_lengths = tuple(list(kind.info.splits[split].shard_lengths) for kind in (objects, views))
        # Where each shard's objects end, and where its views begin.
        self._ends = list(itertools.accumulate(self.shard_lengths[0]))
        self._first_views = [0, *itertools.accumulate(self.shard_lengths[1])]
        self._files = sum(map(len, self.shard_lengths))  # opened when they are read, and kept open
        _open_sources.add(self)
        _allow_open_files(sum(source._files for source in _open_sources))

    def __len__(self) -> int:
        return len(self._objects)

    def __getitem__(self, index: int) -> Record:
        """The record in a place; its views are read and decoded when asked for.

        Raises:
          IndexError: if there is no such record.
          DamagedRecord: if it cannot be read.
          OSError: if the machine is short of open files or memory.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r} has {len(self)} records, no record {index}")
        try:
            fields, first_view = object_fields(self._objects[int(index)])
            first_view += self._first_views[bisect.bisect_right(self._ends, int(index))]
            return Record(**fields, read_views=functools.partial(self._read_views, first_view))
        except DamagedRecord:
            raise
        except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:
            raise reading_error(f"{self.split}[{index}]", error) from error

    def _read_views(self, first_view: int, rows: Sequence[int]) -> list[StoredView]:
        """The stored views in positions `rows` of an object.

        One by one: reading them at once starts threads for every call, which took twice the processor time; examples
        are read by several threads anyway.
        """
        return [stored_view(self._views[first_view + row]) for row in rows]

    def __repr__(self) -> str:
        return f"RecordSource({self.directory}, {self.split})"

    def __reduce__(self):
        return RecordSource, (self.directory, self.split)


def open_split(directory: Path | str, split: str) -> RecordSource:
    """The records of a split ("train" or "test") of a built set.

    Raises:
      FileNotFoundError: if the directory holds no finished set.
      ValueError: if the set has no such split or another format version.
      OSError: if its shards are more files than this process may open.
    """
    return RecordSource(directory, split)
