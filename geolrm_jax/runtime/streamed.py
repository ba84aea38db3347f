"""Checkpoints written one array at a time: what is imported need not fit in memory."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from geolrm_jax.runtime.checkpoint import FORMAT_VERSION, RUN, Checksummed, Items


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A leaf of a tree that is loaded when it is written, and let go of then."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements; Orbax before 0.12.8 adds them up."""
        return math.prod(self.shape)


class StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Tells Orbax to write such leaves one after the other; read back, they are arrays like any other."""

    async def serialize(
        self, values: Sequence[Streamed], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        """Returns when all of them are written: there is nothing left to wait for."""
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([value.load()], [info], [arg]):
                written.result()
        return []


def save_streamed(directory: Path | str, step: int, model: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Writes a checkpoint that holds a model alone, for `Checkpoints.restore_model` to read.

    It has its final name only when all of it is on disk: an interrupted call leaves no checkpoint.

    Args:
      directory: of the checkpoints.
      step: its number.
      model: `params` and `batch_stats` with a `Streamed` for each array.
      source: where the model is from, in JSON's types; it is kept beside the format version.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, StreamedHandler()))
    handler = Checksummed(
        model=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), run=ocp.JsonCheckpointHandler(RUN)
    )
    items = Items(
        model=ocp.args.PyTreeSave(dict(model)),
        run=ocp.args.JsonSave({"format_version": FORMAT_VERSION, "step": step, "metrics": {}, "source": dict(source)}),
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(directory).absolute() / str(step), args=items)
