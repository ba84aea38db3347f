"""Writes a source's objects as records into ArrayRecord files, by a TFDS builder without TensorFlow.

A finished set is a folder with `data_config.json` (what it was built from, and the format version) and TFDS's files
below it. It is written under another name and renamed when complete: a folder of that name is whole.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.occupancy import drop_edges, occupancy_from_depth
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.data.record import FORMAT_VERSION, Encoding, Record, check_views
from geolrm_jax.geometry.voxels import Rounding

CONFIG_FILE = "data_config.json"
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set: where its objects come from and how they are stored."""

    source: ProceduralSource | FolderSource = ProceduralSource()
    """Where objects come from."""
    occupancy_grid: int = 64
    """Voxels a side of the ground-truth occupancy; the proposal network's fine grid."""
    occupancy_rounding: Rounding = "voxel"
    """Rule by which surface points become voxels: "voxel", the nearest, or "released", the paper's code."""
    image_encoding: Encoding = "raw"
    """"raw" bytes are fast to read, "png" is smaller."""
    root: str | None = None
    """Folder of the built set, which several runs may share; None: `data` inside the work directory."""


Advance = Callable[[str, int, int], None]


def build(config: DataConfig, directory: Path | str, *, advance: Advance = lambda *_: None) -> Path:
    """Builds the set of `config` in `directory`, or finds it complete there.

    Args:
      config: all but `root` decides the set's content.
      directory: made by this function. It gets its name when all is written; a build that fails leaves nothing, one
        that is killed a hidden folder beside it.
      advance: called as (split, objects done, objects in all) after each object.

    Returns:
      The directory.

    Raises:
      ValueError: if the directory holds something else or a set of another config (both are named), or if an object
        of the source is not sound (the object, and what was expected, are named).
    """
    directory = Path(directory)
    content = stored_config(config)
    if directory.exists() and any(directory.iterdir()):
        found = read_config(directory)
        if found != content:
            changed = sorted(key for key in {*found, *content} if found.get(key) != content.get(key))
            raise ValueError(
                f"{directory} holds a data set of another config: "
                + "; ".join(f"{key} is {found.get(key)} there, {content.get(key)} here" for key in changed)
            )
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with _quiet_tfds():
            builder = RecordBuilder(config, advance, data_dir=unfinished, file_format="array_record")
            builder.download_and_prepare(download_dir=unfinished / "downloads")
        shutil.rmtree(unfinished / "downloads", ignore_errors=True)
        (unfinished / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def stored_config(config: DataConfig) -> dict[str, Any]:
    """What decides a set's content, as the JSON that stands beside it."""
    content = dataclasses.asdict(config)
    del content["root"]
    content["source"] = {"kind": type(config.source).__name__, **content["source"]}
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, **content}))


def read_config(directory: Path | str) -> dict[str, Any]:
    """The config of a finished set; raises FileNotFoundError where there is none, ValueError for another version."""
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is no built data set: {CONFIG_FILE} expected in it")
    content = json.loads(file.read_text())
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{file}: format version {content['format_version']}, this program reads {FORMAT_VERSION}")
    return content


def features() -> tfds.features.FeaturesDict:
    """The record layout in TFDS's terms; field names are those of `record.Record`."""

    def tensor(shape, dtype):
        # As bytes: TFDS's default writes every number as a varint of its own.
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    string = tfds.features.Tensor(shape=(), dtype=np.object_)
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "view_ids": tensor((None,), np.int32),
            "images": tfds.features.Sequence(string),
            "depths": tfds.features.Sequence(string),
            "depth_range": tensor((None, 2), np.float32),
            "world_from_camera": tensor((None, 4, 4), np.float32),
            "intrinsics": tensor((None, 3, 3), np.float32),
            "size": tensor((2,), np.int32),
            "occupancy_bits": string,
            "grid": tensor((), np.int32),
            "occupancy_rounding": tfds.features.Text(),
            "encoding": tfds.features.Text(),
        }
    )


def to_features(record: Record) -> dict[str, Any]:
    """A record as the dictionary that TFDS writes."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        **values,
        "images": list(record.images),
        "depths": list(record.depths),
        "size": np.array(record.size, np.int32),
        "grid": np.array(record.grid, np.int32),
    }


def from_features(values: dict[str, Any]) -> Record:
    """The record of a dictionary that TFDS read."""
    return Record(
        **{
            **values,
            **{name: values[name].decode() for name in ("id", "occupancy_rounding", "encoding")},
            "images": tuple(values["images"]),
            "depths": tuple(values["depths"]),
            "size": tuple(values["size"].tolist()),
            "grid": int(values["grid"]),
        }
    )


def make_record(config: DataConfig, split: str, id: str) -> Record:
    """One object of the config's source as a record, its occupancy made from the depth of its views."""
    views = check_views(config.source.read(split, id), id)
    depth = drop_edges(views.depth, views.cameras)
    occupancy = occupancy_from_depth(depth, views.cameras, config.occupancy_grid, config.occupancy_rounding)
    if not occupancy.any():
        raise ValueError(f"{id}: no usable depth in any of its views; occupancy cannot be made")
    return Record.encode(
        id, views, occupancy, occupancy_rounding=config.occupancy_rounding, encoding=config.image_encoding
    )


class RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of any source's records; splits without objects are left out."""

    VERSION = tfds.core.Version(f"{FORMAT_VERSION}.0.0")
    # TFDS looks for checksums of downloads beside a builder's code, with a package it does not depend on. None here.
    code_path = None

    def __init__(self, config: DataConfig, advance: Advance, **arguments):
        self._data_config, self._advance = config, advance
        super().__init__(**arguments)

    def _log_download_bytes(self) -> None:
        """Nothing: TFDS would print that it downloads."""

    def _log_download_done(self) -> None:
        """Nothing, as above."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features(), disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        ids = {split: self._data_config.source.ids(split) for split in SPLITS}
        if not any(ids.values()):
            raise ValueError(f"an empty data set: {self._data_config.source} has no objects")
        return {split: self._generate_examples(split, names) for split, names in ids.items() if names}

    def _generate_examples(self, split: str, ids: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        records = _in_order(lambda id: make_record(self._data_config, split, id), ids)
        for index, record in enumerate(records):
            yield index, to_features(record)
            self._advance(split, index + 1, len(ids))


def _in_order(function: Callable[[str], Record], ids: list[str]) -> Iterator[Record]:
    """`map` by a thread for each core, a few items ahead of the reader."""
    workers = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for id in ids:
                pending.append(pool.submit(function, id))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Without TFDS's own bars and log lines."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()
