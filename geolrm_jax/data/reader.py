"""Random access to the records of a built set."""

from pathlib import Path

import tensorflow_datasets as tfds

from geolrm_jax.data.builders.records import from_features, read_config
from geolrm_jax.data.record import DamagedRecord, Record

__all__ = ["DamagedRecord", "RecordSource", "open_split"]


class RecordSource:
    """Random access to the records of one split; picklable."""

    def __init__(self, directory: Path | str, split: str):
        read_config(directory)
        [features_file] = Path(directory).glob("*/*/features.json")
        self.directory, self.split = Path(directory), split
        builder = tfds.builder_from_directory(features_file.parent)
        if split not in builder.info.splits:
            raise ValueError(f"{directory} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        self._records = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """The record in a position; its views are decoded when asked for.

        Raises:
          IndexError: if there is no such record.
          DamagedRecord: if it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r} has {len(self)} records, no record {index}")
        try:
            return from_features(self._records[int(index)])
        except (ValueError, OSError, RuntimeError) as error:
            raise DamagedRecord(f"{self.split}[{index}]", str(error)) from error

    def __repr__(self) -> str:
        return f"RecordSource({self.directory}, {self.split})"

    def __reduce__(self):
        return RecordSource, (self.directory, self.split)


def open_split(directory: Path | str, split: str) -> RecordSource:
    """The records of a split ("train" or "test") of a built set.

    Raises:
      FileNotFoundError: if the directory holds no finished set.
      ValueError: if the set has no such split or another format version.
    """
    return RecordSource(directory, split)
