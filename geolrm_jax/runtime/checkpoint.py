"""Checkpoints: one module around Orbax. Each holds the model, the optimizer, the step and the data iterator.

Layout of `directory/STEP`: item `model` (`params`, `batch_stats` and, if kept, `ema`) is all that inference needs;
item `optimizer` (`opt_state`, `step`) and `iterator` are for going on.  Saving is asynchronous and atomic: a step's
folder has its final name only when all of it is on disk.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

FORMAT_VERSION = 2  # 1 had no batch counts and no mask token
MODEL, OPTIMIZER = ("params", "batch_stats", "ema"), ("opt_state", "step")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Latest checkpoints kept."""
    best: str = "loss"
    """Training metric, the mean since the last checkpoint, whose lowest value `best` stands for; it is kept too."""


class Checkpoints:
    """The checkpoints of one stage.

    Args:
      directory: made for writing; for reading it must exist.
      config: the stage's.
      write: False opens for reading only, also while another process writes.

    Raises:
      FileNotFoundError: if there is nothing to read.
      ValueError: if the checkpoints there are of another format version.
    """

    def __init__(self, directory: Path | str, config: CheckpointConfig, *, write: bool):
        self.directory = Path(directory).absolute()
        self.config = config
        if not write and not self.directory.is_dir():
            raise FileNotFoundError(f"no checkpoints at {self.directory}: expected a folder that training has written")
        managers = ocp.checkpoint_managers
        lowest = managers.BestN(get_metric_fn=self._metric, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        keep = managers.AnyPreservationPolicy([managers.LatestN(n=config.keep), lowest])
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=write,
                read_only=not write,
                save_interval_steps=int(write),
                best_fn=self._metric,
                best_mode="min",
                preservation_policy=keep,
                enable_async_checkpointing=write,
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                # Not Grain's handler, which writes a file per process and finds none when their number has changed.
                "iterator": ocp.JsonCheckpointHandler(),
            },
            metadata={"format_version": FORMAT_VERSION} if write else None,
        )
        self._check_version()

    def _check_version(self) -> None:
        saved = self._manager.metadata().custom_metadata or {}
        if self.steps and saved.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.directory}: checkpoints of format version {saved.get('format_version')}, "
                f"this program reads {FORMAT_VERSION} and no other: use the program that wrote them"
            )

    def _metric(self, metrics: Mapping[str, float]) -> float:
        return metrics[self.config.best]

    @property
    def steps(self) -> list[int]:
        """Steps of complete checkpoints, in order, those another process has written since included."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def resolve(self, which: str | int) -> int:
        """The step that `"latest"`, `"best"` or a number means.

        Raises:
          FileNotFoundError: if there is no such checkpoint; the message lists those there are.
        """
        steps = self.steps
        found = {"latest": self._manager.latest_step, "best": self._manager.best_step}.get(str(which))
        step = found() if found else int(which) if str(which).isdigit() else None
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(
                f"no checkpoint {which!r} in {self.directory}: expected latest, best or one of the steps {there}"
            )
        return step

    def metrics(self, step: int) -> dict[str, float]:
        """What `save` was given beside the state."""
        return self._manager.metrics(step)

    def save(self, step: int, state: Mapping[str, Any], iterator: Any, metrics: Mapping[str, float]) -> None:
        """Starts saving; `state` may be donated as soon as this returns.

        Of `iterator` the state is saved, a JSON value that must be the same on every process.

        Raises:
          ValueError: if `metrics` lacks the one that `best` is judged by.
        """
        if self.config.best not in metrics:
            raise ValueError(f"checkpoint.best is {self.config.best!r}: expected one of {', '.join(sorted(metrics))}")
        state = serialization.to_state_dict(state)
        items = {
            "model": ocp.args.StandardSave({name: state[name] for name in MODEL if name in state}),
            "optimizer": ocp.args.StandardSave({name: state[name] for name in OPTIMIZER}),
            "iterator": ocp.args.JsonSave(iterator.get_state()),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=dict(metrics))

    def restore(self, step: int, abstract_state: Mapping[str, Any], iterator: Any) -> dict[str, Any]:
        """The state at `step`, laid out as `abstract_state` (shapes with shardings); `iterator` is set in place."""
        abstract = serialization.to_state_dict(abstract_state)
        items = {
            "model": ocp.args.StandardRestore({name: abstract[name] for name in MODEL if name in abstract}),
            "optimizer": ocp.args.StandardRestore({name: abstract[name] for name in OPTIMIZER}),
            "iterator": ocp.args.JsonRestore(),
        }
        restored = self._restore(step, items)
        iterator.set_state(restored["iterator"])
        return serialization.from_state_dict(abstract_state, {**restored["model"], **restored["optimizer"]})

    def restore_model(self, step: int, abstract_model: Mapping[str, Any]) -> dict[str, Any]:
        """`params` and `batch_stats` at `step`; the averaged parameters take the place of the raw where they exist."""
        wanted = dict(abstract_model)
        averaged = self._saved_tree(step).get("ema", {})
        if averaged:
            wanted["ema"] = {name: wanted["params"][name] for name in averaged}
        model = self._restore(step, {"model": ocp.args.StandardRestore(wanted)})["model"]
        params = {**model["params"], **model.get("ema", {})}
        return {"params": params, "batch_stats": model["batch_stats"]}

    def open_arrays(self, step: int) -> Callable[[str, str], np.ndarray]:
        """Reads a saved model one array at a time: `read("params", "proposal.transformer.query")`.

        As in `restore_model`, averaged parameters take the place of the raw where they exist.
        """
        saved = self._saved_tree(step)
        names, averaged = set(traverse_util.flatten_dict(saved)), saved.get("ema", {})
        checkpointer, folder = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()), self.directory / str(step) / "model"

        def read(collection: str, path: str) -> np.ndarray:
            keys = path.split(".")
            keys.insert(0, "ema" if collection == "params" and keys[0] in averaged else collection)
            if tuple(keys) not in names:
                raise self._incomplete(step, f"no {path} among its {keys[0]}")
            item, as_numpy = 0, ocp.RestoreArgs(restore_type=np.ndarray)
            for key in reversed(keys):
                item, as_numpy = {key: item}, {key: as_numpy}
            try:
                wanted = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
                found = checkpointer.restore(folder, args=wanted)
            except (ValueError, KeyError, OSError) as error:
                checkpointer.close()
                raise self._incomplete(step, error) from error
            for key in keys:
                found = found[key]
            return found

        return read

    def _saved_tree(self, step: int) -> Mapping[str, Any]:
        """The saved model's names, without its arrays."""
        self._check_items(step, ("model",))
        try:
            metadata = self._manager.item_metadata(step)["model"]
        except (KeyError, ValueError, OSError) as error:
            raise self._incomplete(step, error) from error
        if metadata is None:
            raise self._incomplete(step, "no metadata of the model in it")
        return metadata.tree

    def _restore(self, step: int, items: Mapping[str, Any]) -> Any:
        self._check_items(step, items)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise self._incomplete(step, error) from error

    def _check_items(self, step: int, names: Iterable[str]) -> None:
        missing = [name for name in names if not (self.directory / str(step) / name).is_dir()]
        if missing:
            raise self._incomplete(step, f"no {' and no '.join(missing)} in it")

    def _incomplete(self, step: int, why: object) -> ValueError:
        first = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
        first = first.split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
        return ValueError(f"checkpoint {self.directory / str(step)} is incomplete or does not fit: {first}")

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


def abstract_with_sharding(tree: Any, shardings: Any) -> Any:
    """Shapes of `tree` with the shardings to restore onto."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
