"""What a built set looks like on disk, in TFDS's terms: names, features, serialization, metadata.

    DIR/data_config.json      what it was built from, and the format version
    DIR/manifest.json         every shard: its files, their SHA-256, how many objects and views they hold
    DIR/rejected.jsonl        a line for each object of the source that is not in the set, with the reason
    DIR/objects/2.0.0/        a TFDS data set with one record for each object
    DIR/views/2.0.0/          a TFDS data set with one record for each view

Shard k of a split holds the same objects in both. Both open with `tfds.builder_from_directory(...).as_data_source()`.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from geolrm_jax.data.record import FORMAT_VERSION, Record, StoredView

CONFIG_FILE, MANIFEST_FILE, REJECTED_FILE = "data_config.json", "manifest.json", "rejected.jsonl"
VERSION = f"{FORMAT_VERSION}.0.0"
KINDS = ("objects", "views")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def _tensor(shape: tuple[int | None, ...], dtype: type) -> tfds.features.Tensor:
    """As bytes: TFDS's default writes every number as a varint of its own."""
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


@functools.cache
def features(kind: str) -> tfds.features.FeaturesDict:
    """The layout of "objects" or "views"; field names and meanings are those of `data.record`."""
    string = tfds.features.Tensor(shape=(), dtype=np.object_)
    if kind == "views":
        return tfds.features.FeaturesDict(
            {"id": tfds.features.Text(), "view_id": _tensor((), np.int32), "image": string, "depth": string}
        )
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "view_ids": _tensor((None,), np.int32),
            "first_view": _tensor((), np.int64),
            "depth_range": _tensor((None, 2), np.float32),
            "world_from_camera": _tensor((None, 4, 4), np.float32),
            "intrinsics": _tensor((None, 3, 3), np.float32),
            "size": _tensor((2,), np.int32),
            "occupancy_bits": string,
            "grid": _tensor((), np.int32),
            "occupancy_from": tfds.features.Text(),
            "occupancy_rounding": tfds.features.Text(),
            "encoding": tfds.features.Text(),
        }
    )


@functools.cache
def _serializer(kind: str) -> tfds.core.example_serializer.ExampleSerializer:
    return tfds.core.example_serializer.ExampleSerializer(features(kind).get_serialized_info())


def _serialize(kind: str, values: Mapping[str, Any]) -> bytes:
    """The bytes of an example; the same values give the same bytes."""
    example = _serializer(kind).get_tf_example(features(kind).encode_example(values))
    return example.SerializeToString(deterministic=True)


def serialize_object(record: Record, first_view: int) -> bytes:
    """An object's record, its views standing from `first_view` on in their shard."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    del fields["read_views"]
    numbers = {"size": np.array(record.size, np.int32), "grid": np.array(record.grid, np.int32)}
    return _serialize("objects", {**fields, **numbers, "first_view": np.array(first_view, np.int64)})


def serialize_view(view: StoredView) -> bytes:
    """A view's record."""
    return _serialize("views", {**view._asdict(), "view_id": np.array(view.view_id, np.int32)})


def object_fields(values: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Fields of a `Record`, all but `read_views`, from the dictionary that TFDS read, and `first_view`."""
    fields = dict(values)
    texts = {name: fields[name].decode() for name in ("id", "occupancy_from", "occupancy_rounding", "encoding")}
    first_view = int(fields.pop("first_view"))
    return {**fields, **texts, "size": tuple(fields["size"].tolist()), "grid": int(fields["grid"])}, first_view


def stored_view(values: Mapping[str, Any]) -> StoredView:
    """The view of a dictionary that TFDS read."""
    return StoredView(values["id"].decode(), int(values["view_id"]), bytes(values["image"]), bytes(values["depth"]))


def shard_file(kind: str, split: str, shard: int, shards: int) -> str:
    """Path of a shard's file inside the set."""
    return f"{kind}/{VERSION}/{kind}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def count_objects(directory: Path | str) -> Counter[str]:
    """Objects of each split of a finished set."""
    counts: Counter[str] = Counter()
    for shard in json.loads((Path(directory) / MANIFEST_FILE).read_text())["shards"]:
        counts[shard["split"]] += shard["objects"]
    return counts


def read_rejected(directory: Path | str) -> list[dict[str, str]]:
    """The source's objects that are not in a set: {"split", "id", "reason", "kind"} of each."""
    file = Path(directory) / REJECTED_FILE
    try:
        with file.open() as lines:
            entries = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or missing: {error}") from error
    for line, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
            raise ValueError(f"{file} is damaged: line {line}: a JSON object with kind expected")
    return entries


def write_metadata(directory: Path, shard_lengths: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Writes TFDS's `features.json` and `dataset_info.json` beside finished shards.

    Args:
      directory: of the set.
      shard_lengths: by kind and split, the number of records in each shard.
    """
    for kind, splits in shard_lengths.items():
        folder = directory / kind / VERSION
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, template=_TEMPLATE, dataset_name=kind, filetype_suffix="array_record"
        )
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(lengths),
                num_bytes=sum(
                    (directory / shard_file(kind, split, i, len(lengths))).stat().st_size for i in range(len(lengths))
                ),
                filename_template=template,
            )
            for split, lengths in splits.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features(kind), split_infos=infos, version=VERSION, check_data=False
        )
