"""The model in a checkpoint, whole or in parts; averaged parameters take the place of the raw where they exist."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

Name = tuple[str, ...]


class SavedModel:
    """The item `model` of a checkpoint that is not damaged.

    Args:
      folder: of the checkpoint.
      processes: which of them read together.
    """

    def __init__(self, folder: Path, processes: ocp.options.MultiprocessingOptions):
        self.folder, self._processes = folder, processes
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=processes)
        saved = flatten_dict(handler.metadata(folder / "model").tree)
        averaged = {("params", *name[1:]): name for name in saved if name[0] == "ema"}
        given = {name: name for name in saved if name[0] != "ema"} | averaged
        self._names: dict[Name, Name] = given  # where each array of `params` and `batch_stats` is in the checkpoint
        self._shapes = {
            path: jax.ShapeDtypeStruct(tuple(saved[name].shape), saved[name].dtype) for path, name in given.items()
        }

    def shapes(self) -> dict[str, Any]:
        """Shapes and types of `params` and `batch_stats`."""
        return unflatten_dict(self._shapes)

    def restore(self, target: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays that `target` names, laid out and typed as it says.

        Raises:
          ValueError: if one of them is missing or has another shape.
        """
        wanted = flatten_dict(dict(target))
        for path, array in wanted.items():
            self._check_there(path)
            if self._shapes[path].shape != array.shape:
                shapes = f"{self._shapes[path].shape} there, {array.shape} here"
                raise does_not_fit(self.folder, f"{'.'.join(path)} is {shapes}")
        as_wanted = {
            path: ocp.ArrayRestoreArgs(dtype=array.dtype, sharding=array.sharding, global_shape=array.shape)
            for path, array in wanted.items()
        }
        return unflatten_dict(self._restore(as_wanted))

    def read(self, collection: str, path: str) -> np.ndarray:
        """One array in NumPy: `read("params", "proposal.transformer.query")`.

        Raises:
          ValueError: if there is none.
        """
        name = (collection, *path.split("."))
        self._check_there(name)
        return self._restore({name: ocp.RestoreArgs(restore_type=np.ndarray)})[name]

    def _check_there(self, path: Name) -> None:
        if path not in self._names:
            raise does_not_fit(self.folder, f"no {'.'.join(path[1:])} among its {path[0]}")

    def _restore(self, arguments: Mapping[Name, ocp.RestoreArgs]) -> dict[Name, Any]:
        by_name = {self._names[path]: argument for path, argument in arguments.items()}
        item = ocp.args.PyTreeRestore(
            item=unflatten_dict(dict.fromkeys(by_name, 0)), restore_args=unflatten_dict(by_name), partial_restore=True
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=self._processes)
        with ocp.Checkpointer(handler, multiprocessing_options=self._processes) as checkpointer:
            found = flatten_dict(checkpointer.restore(self.folder / "model", args=item))
        return {path: found[self._names[path]] for path in arguments}


def does_not_fit(folder: Path, why: object) -> ValueError:
    """The error of a checkpoint that is whole, but of another model."""
    return ValueError(f"checkpoint {folder} does not fit: {first_line(why)}")


def first_line(error: object) -> str:
    """What an error of Orbax or TensorStore says, without their appendices."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return first.split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
