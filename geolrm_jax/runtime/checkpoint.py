"""Checkpoints: one module around Orbax. Each holds the model, the optimizer, the step, the data iterator and the run.

Layout of `directory/STEP`: item `model` (`params`, `batch_stats` and, if kept, `ema`) is all that inference needs; item
`optimizer` (`opt_state`, `step`, `guard`) is for going on; `run/run.json` has the iterator's state, the metrics since
the last checkpoint, and what the caller says of the run: seed, config, versions. `checksums.json` covers all of these
files.

Saving is asynchronous and atomic: process 0 reads all files once more for the checksums, and only then the folder gets
its final name. A folder with that name and without checksums is damaged. All processes of a run share one file system.

Orbax's CheckpointManager is not used: its constructor fails on a damaged metrics file, it skips a step that is not
newer than the newest, and it asks JAX's preemption service with numbers of its own, which confuses who else asks.
"""

import contextlib
import dataclasses
import errno
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checksums import find_damage, write_checksums
from geolrm_jax.runtime.exclusive import agreed, by_first
from geolrm_jax.runtime.saved_model import SavedModel, does_not_fit, first_line

FORMAT_VERSION = 3  # 1 had no batch counts and no mask token, 2 no checksums
MODEL, OPTIMIZER = ("params", "batch_stats", "ema"), ("opt_state", "step", "guard")
RUN = "run.json"
UNFINISHED, DELETED, DAMAGED = ".orbax-checkpoint-tmp", ".deleted", ".damaged"  # behind the step in a folder's name
ATTEMPTS = 20  # to delete a folder, half a second apart
UPDATED_LATER = ("_CHECKPOINT_METADATA",)  # by Orbax, with the time of the commit; nothing is read from it


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Latest checkpoints of multiples of `every` that are kept; the newest is, also between them."""
    keep_every: int | None = None
    """Checkpoints of multiples of this step are kept for good; a multiple of `every`."""
    best: str = "loss"
    """Training metric whose best value `best` stands for, which is kept too: the mean of `every` steps, or of the whole
    stage where it has fewer. A checkpoint within such an interval, be it the last, is never the best."""
    higher_is_better: bool = False
    """Whether the highest value of that metric is the best, or the lowest."""

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise ValueError(f"checkpoint.keep_every {self.keep_every} is no multiple of checkpoint.every {self.every}")

    def best_of(self, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
        """The step of the best metrics, the later one of equals; None where no step has the metric as a number."""
        sign = 1 if self.higher_is_better else -1
        scores = {step: sign * found[self.best] for step, found in metrics.items() if self.best in found}
        scores = {step: score for step, score in scores.items() if not math.isnan(score)}
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def kept(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Which of the steps, given with their metrics, stay."""
        scheduled, best = [step for step in sorted(metrics) if step % self.every == 0], self.best_of(metrics)
        for_good = [step for step in metrics if self.keep_every and step % self.keep_every == 0]
        return {*scheduled[-self.keep :], max(metrics), *for_good, *([] if best is None else [best])}


class Checksummed(ocp.CompositeCheckpointHandler):
    """Orbax's items of one checkpoint, with checksums behind them; `finalize` is called on process 0 alone."""

    def finalize(self, directory: Any) -> None:
        """Writes the checksums when every item is on disk, before the folder gets its final name."""
        super().finalize(directory)
        write_checksums(Path(directory), leaving_out=UPDATED_LATER)


@ocp.args.register_with_handler(Checksummed, for_save=True, for_restore=True)
class Items(ocp.args.Composite):
    """What `Checksummed` saves or restores, by item."""


class Checkpoints:
    """The checkpoints of one stage.

    One that writes is made and called by all processes of a run together. One that reads is a process's own affair.

    Args:
      directory: made for writing; for reading it must exist.
      config: the stage's.
      write: False opens for reading only, also while another process writes. True removes what a killed run has left
        half-written: there must be no other run (`exclusive`).
      run: what every checkpoint shall say of the run beside metrics and iterator, in JSON's types.

    Raises:
      FileNotFoundError: if there is nothing to read.
      OSError: if the directory cannot be written.
      ValueError: if the checkpoints there are of another format version.
    """

    def __init__(
        self, directory: Path | str, config: CheckpointConfig, *, write: bool, run: Mapping[str, Any] | None = None
    ):
        self.directory, self.config, self.run = Path(directory).absolute(), config, dict(run or {})
        self._write, self._saving, self._sound = write, None, set()
        if write:
            by_first(str(self.directory), self._prepare)  # nobody looks before it is done
        elif not self.directory.is_dir():
            raise FileNotFoundError(f"no checkpoints at {self.directory}: expected a folder that training has written")
        self._check_version()
        me = jax.process_index()
        alone = () if write else (me, {me}, f"reader_{me}")
        self._processes = ocp.options.MultiprocessingOptions(*alone)
        self._checkpointer = ocp.AsyncCheckpointer(
            Checksummed(
                model=ocp.StandardCheckpointHandler(multiprocessing_options=self._processes),
                optimizer=ocp.StandardCheckpointHandler(multiprocessing_options=self._processes),
                run=ocp.JsonCheckpointHandler(RUN, multiprocessing_options=self._processes),
            ),
            # Folders are made at once: what is wrong with the directory is an error of `save`.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=self._processes,
        )

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.directory).close()  # what cannot be written is an error now, not at a save
        for suffix in (UNFINISHED, DELETED):
            for folder in self.directory.glob(f"*{suffix}"):
                _remove(folder)

    def _check_version(self) -> None:
        found = {step: self._about(step).get("format_version") for step in self.steps}
        if found and (self.directory / "metadata").is_dir():  # where versions 1 and 2 had it, for all steps together
            found = dict.fromkeys(found, "1 or 2")
        other = [str(version) for version in found.values() if version not in (None, FORMAT_VERSION)]
        if other:
            raise ValueError(
                f"{self.directory}: checkpoints of format version {other[0]}, "
                f"this program reads {FORMAT_VERSION} and no other: use the program that wrote them"
            )

    @property
    def steps(self) -> list[int]:
        """Steps of complete checkpoints, in order, those another process has written since included."""
        return sorted(int(folder.name) for folder in self.directory.iterdir() if folder.name.isdigit())

    def resolve(self, which: str | int) -> int:
        """The step that `"latest"`, `"best"` or a number means; damaged ones are passed over with a warning.

        Raises:
          FileNotFoundError: if there is no such checkpoint; the message lists those there are.
          ValueError: if there are checkpoints, but none is sound.
        """
        there, step = self.steps, None
        if str(which) == "latest":
            step = self._newest_sound(("model",))[0]
        elif str(which) == "best":
            step = self.config.best_of(self._all_metrics())
        elif str(which).isdigit() and int(which) in there:
            step = int(which)
        if step is None:
            listed = ", ".join(map(str, there)) or "none"
            raise FileNotFoundError(
                f"no checkpoint {which!r} in {self.directory}: expected latest, best or one of the steps {listed}"
            )
        return step

    def newest_for_all(self) -> int:
        """As `resolve("latest")`; of several processes, which call it together, process 0 alone reads all files."""
        step = agreed(by_first(str(self.directory), lambda: self.resolve("latest")) or 0)
        self._sound.add((step, "model"))
        return step

    def metrics(self, step: int) -> dict[str, float]:
        """What `save` was given beside the state; empty if that is damaged."""
        return self._about(step).get("metrics", {})

    def _all_metrics(self) -> dict[int, dict[str, float]]:
        return {step: self.metrics(step) for step in self.steps}

    def _about(self, step: int) -> dict[str, Any]:
        """`run.json`, empty where it cannot be read: `find_damage` says why."""
        try:
            found = json.loads((self._folder(step) / "run" / RUN).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def save(self, step: int, state: Mapping[str, Any], iterator: Any, metrics: Mapping[str, float]) -> None:
        """Starts saving, when what was saved before is on disk; `state` may be donated as soon as this returns.

        Of `iterator` the state is saved, a JSON value that must be the same on every process. Metrics without the one
        that `best` is judged by are no error: the checkpoint then is never the best. Checkpoints of the same and of
        later steps, which a run has that was rolled back, give way.

        Raises:
          OSError: if this or the checkpoint before could not be written.
        """
        self.wait()
        about = {"format_version": FORMAT_VERSION, "step": step, "metrics": dict(metrics)}
        about |= {"iterator": iterator.get_state(), "processes": jax.process_count(), "devices": jax.device_count()}
        about = json.loads(json.dumps(about | self.run))  # it is written later, the iterator goes on now
        state = serialization.to_state_dict(state)
        items = {
            "model": ocp.args.StandardSave({name: state[name] for name in MODEL if name in state}),
            "optimizer": ocp.args.StandardSave({name: state[name] for name in OPTIMIZER if name in state}),
            "run": ocp.args.JsonSave(about),
        }
        self._sound = {(other, item) for other, item in self._sound if other != step}
        if jax.process_index() == 0 and self._folder(step).exists():
            self._delete(step)  # Orbax's `force` would delete file by file under the final name
        agreed(step)  # nobody saves before it is gone
        with self._writing(step):
            self._checkpointer.save(self._folder(step), args=Items(**items))
        self._saving = step

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps; all processes call it together."""
        self.wait()
        if jax.process_index() == 0:
            for later in (found for found in self.steps if found > step):
                self._delete(later)
        agreed(step)  # nobody looks before it is done

    def _delete(self, step: int) -> None:
        # A kill while files are deleted must not leave a folder that looks complete.
        shutil.rmtree(self._folder(step).rename(self.directory / f"{step}{DELETED}"))

    def wait(self) -> None:
        """Returns when everything saved so far is on disk and what is not kept is deleted; raises as `save` does."""
        step, self._saving = self._saving, None
        if step is not None:
            with self._writing(step):
                self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                self._delete_old(step)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Whatever fails in Orbax or TensorStore is an OSError that names the folder."""
        try:
            yield
        except Exception as error:
            self._saving = None  # Orbax tells of an error once: the next `wait` would find the checkpoint complete
            raise OSError(
                f"checkpoint {self._folder(step)} could not be written, those before it are as they were: "
                f"{first_line(error)}"
            ) from error

    def check(self) -> None:
        """Raises as `save` does if what is being written has failed on this process; waits for nothing."""
        if self._saving is not None:
            with self._writing(self._saving):
                self._checkpointer.check_for_errors()

    def _delete_old(self, newest: int) -> None:
        metrics = {step: found for step, found in self._all_metrics().items() if step <= newest}
        for step in {*self.steps} - self.config.kept(metrics):
            self._delete(step)

    def restore_newest(self, abstract_state: Mapping[str, Any], iterator: Any) -> tuple[int, dict[str, Any]] | None:
        """The newest sound checkpoint's step and state, as `restore` gives it; None where there is no checkpoint.

        Damaged newer ones are told of and renamed to `STEP.damaged`, so that their steps can be saved again.

        Raises:
          ValueError: if there are checkpoints, but none is sound; nothing is renamed then.
        """
        self.wait()
        step = by_first(f"no checkpoint in {self.directory} is sound", self._newest_moving_others)
        found = agreed(-1 if step is None else step)
        return None if found == -1 else (found, self.restore(found, abstract_state, iterator))

    def _newest_moving_others(self) -> int | None:
        step, damaged = self._newest_sound(("model", "optimizer", "run"))
        for number in damaged:
            self._move_aside(number)
        return step

    def _newest_sound(self, items: Iterable[str]) -> tuple[int | None, list[int]]:
        """The newest step whose items are undamaged, and the newer ones, each with a warning; None without any."""
        damaged = {}
        for step in reversed(self.steps):
            damage = self._damage(step, items)
            if damage is None:
                for number, why in damaged.items():
                    logging.warn(f"checkpoint {self._folder(number)} is damaged and passed over for {step}: {why}")
                return step, list(damaged)
            damaged[step] = damage
        if damaged:
            listed = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise ValueError(f"no checkpoint in {self.directory} is sound ({listed})")
        return None, []

    def _damage(self, step: int, items: Iterable[str]) -> str | None:
        """What is wrong with these items; each is looked at once."""
        unknown = [item for item in items if (step, item) not in self._sound]
        damage = find_damage(self._folder(step), unknown) if unknown else None
        if damage is None:
            self._sound |= {(step, item) for item in unknown}
        return damage

    def _move_aside(self, step: int) -> None:
        names = (f"{step}{DAMAGED}{n}" for n in ("", *map(str, range(2, 1000))))
        free = next(name for name in names if not (self.directory / name).exists())
        self._folder(step).rename(self.directory / free)

    def restore(self, step: int, abstract_state: Mapping[str, Any], iterator: Any) -> dict[str, Any]:
        """The state at `step`, laid out and typed as `abstract_state` says, on any mesh; `iterator` is set in place.

        Raises:
          ValueError: if the checkpoint is damaged, or of another structure or other shapes.
        """
        self._require_sound(step, ("model", "optimizer", "run"))
        abstract = serialization.to_state_dict(abstract_state)
        items = {
            "model": ocp.args.StandardRestore({name: abstract[name] for name in MODEL if name in abstract}),
            "optimizer": ocp.args.StandardRestore({name: abstract[name] for name in OPTIMIZER if name in abstract}),
        }
        try:
            restored = self._checkpointer.restore(self._folder(step), args=Items(**items))
        except Exception as error:  # Orbax has no class of its own for what does not fit
            raise does_not_fit(self._folder(step), error) from error
        iterator.set_state(self._about(step)["iterator"])
        return serialization.from_state_dict(abstract_state, {**restored["model"], **restored["optimizer"]})

    def restore_model(self, step: int, abstract_model: Mapping[str, Any]) -> dict[str, Any]:
        """`params` and `batch_stats` at `step`; the averaged parameters take the place of the raw where they exist.

        Args:
          step: of a checkpoint that is there.
          abstract_model: shapes, types and shardings of `params` and `batch_stats`, or of a part of them.

        Raises:
          ValueError: if the checkpoint is damaged, or lacks an array or has it in another shape.
        """
        return self._model(step).restore(abstract_model)

    def model_arrays(self, step: int) -> dict[str, Any]:
        """Shapes and types of all that `restore_model` can give."""
        return self._model(step).shapes()

    def open_arrays(self, step: int) -> Callable[[str, str], np.ndarray]:
        """Reads a saved model one array at a time: `read("params", "proposal.transformer.query")`.

        As in `restore_model`, averaged parameters take the place of the raw where they exist.
        """
        return self._model(step).read

    def _model(self, step: int) -> SavedModel:
        self._require_sound(step, ("model",))
        return SavedModel(self._folder(step), self._processes)

    def _require_sound(self, step: int, items: Iterable[str]) -> None:
        """Raises a ValueError if these items are damaged; where processes write together, 0 looks for all of them."""
        damage = None if self._write and jax.process_index() else self._damage(step, items)
        if agreed(damage is not None) if self._write else damage:
            raise ValueError(f"checkpoint {self._folder(step)} is damaged: {damage or 'process 0 says why'}")

    def close(self) -> None:
        """Waits and lets go of the folder; raises as `save` does."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def _remove(folder: Path) -> None:
    """Deletes a folder into which the threads of a save that failed may still write for a moment."""
    for _ in range(ATTEMPTS):
        try:
            return shutil.rmtree(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        time.sleep(0.5)
    shutil.rmtree(folder)


def abstract_with_sharding(tree: Any, shardings: Any) -> Any:
    """Shapes of `tree` with the shardings to restore onto."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
