"""Evaluation beside training: each new checkpoint once, the best kept in mind, until training has ended."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geolrm_jax.config import Experiment, read_config
from geolrm_jax.export.files import written_whole
from geolrm_jax.recipe import EVALUATED, evaluate, evaluated_split, open_records, report_suffix
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import Checkpoints
from geolrm_jax.runtime.checksums import find_damage, fingerprint

METRICS = {"psnr": 1, "ssim": 1, "lpips": -1, "chamfer": -1}  # of a report's summary; 1: the highest is the best
STAGE = "reconstruction"


@dataclass(frozen=True)
class FollowConfig:
    """What is followed and for how long."""

    metric: str = "psnr"
    """What the best is judged by, one of METRICS."""
    idle_timeout: float = math.inf
    """Seconds without a new checkpoint after which it ends with an error."""
    poll: float = 10.0
    """Seconds between looks at the folder."""
    data: Path | None = None
    """A built set or a folder in the GObjaverse layout instead of the objects kept from training."""
    split: str | None = None
    """Of the set; by default the protocol's, and "test" of `data`."""
    objects: int | None = None
    """Only the first so many objects."""
    lpips_weights: str | None = None
    """Of the metric; by default the file that the config names."""

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r}: expected one of {', '.join(METRICS)}")
        if not (self.idle_timeout > 0 and self.poll > 0):
            raise ValueError(f"expected positive seconds, got idle_timeout {self.idle_timeout}, poll {self.poll}")


def follow(workdir: Path, config: FollowConfig) -> Path:
    """Evaluates the checkpoints of the reconstruction stage as they appear, each into `workdir/eval/STEP`.

    What has a complete report of the same objects is not evaluated again, so that this may be stopped and called again
    at any time. Checkpoints that are damaged, or that training deletes meanwhile, are passed over with a notice. Ends
    when the last step of the stage has been evaluated or passed over.

    Args:
      workdir: of a training that runs, has ended, or has not begun.
      config: what is followed and for how long.

    Returns:
      The path of best.json: the metric, its best step and value, and the value of every step evaluated.

    Raises:
      TimeoutError: if no new checkpoint came for `idle_timeout` seconds.
      ValueError: if the config trains no reconstruction, or the metric was not measured.
    """
    patience = _Patience(workdir, config)
    while not (workdir / "config.json").is_file():
        patience.wait()
    experiment = read_config(workdir)
    if not experiment.reconstruction:
        raise ValueError(f"{workdir}: its config {experiment.name!r} trains no reconstruction network")
    while not (folder := workdir / STAGE / "checkpoints").is_dir():
        patience.wait()
    reports = _Reports(experiment, workdir, config)
    with contextlib.closing(Checkpoints(folder, experiment.reconstruction.checkpoint, write=False)) as checkpoints:
        for step in _new_steps(checkpoints, experiment.reconstruction.steps, patience):
            if reports.value(step) is None:
                _evaluate_one(reports, checkpoints, step)
            reports.write_best()
    return reports.best_file


def _new_steps(checkpoints: Checkpoints, last: int, patience: "_Patience") -> Iterator[int]:
    """Steps in order, each checkpoint once, up to the last; the oldest first, which will be deleted first."""
    seen: set[tuple[int, int | None]] = set()
    while True:
        there = [(step, fingerprint(checkpoints.directory / str(step))) for step in checkpoints.steps]
        seen &= {*there}  # training that went back saves a step anew
        new = next((found for found in there if found not in seen), None)
        if new is not None:
            seen.add(new)
            yield new[0]
            patience.restart()
        elif any(step == last for step, _ in seen):
            return
        else:
            patience.wait()


def _evaluate_one(reports: "_Reports", checkpoints: Checkpoints, step: int) -> None:
    """Evaluates a checkpoint, or says why not."""
    folder = checkpoints.directory / str(step)
    before = fingerprint(folder)
    try:
        reports.make(step)
    except (ValueError, OSError):
        damage = None
        with contextlib.suppress(OSError):  # deleted while it is looked at, or unreadable, which was the first error
            damage = find_damage(folder, ("model",))
        if not folder.is_dir() or fingerprint(folder) != before:  # replaced: its step comes again
            logging.notice(f"checkpoint {folder} was deleted before it could be evaluated")
        elif damage:
            logging.warn(f"checkpoint {folder} is damaged and passed over: {damage}")
        else:
            raise


class _Patience:
    """Waits between two looks, until nothing new has come for too long."""

    def __init__(self, workdir: Path, config: FollowConfig):
        self.workdir, self.config = workdir, config
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def wait(self) -> None:
        left = self.since + self.config.idle_timeout - time.monotonic()
        if left <= 0:
            raise TimeoutError(
                f"{self.workdir}: no new checkpoint of stage {STAGE} for {self.config.idle_timeout:g} seconds, and its "
                "last step is not there: has training stopped?"
            )
        time.sleep(min(self.config.poll, left))


class _Reports:
    """The reports of one set of objects in a work directory."""

    def __init__(self, experiment: Experiment, workdir: Path, config: FollowConfig):
        self.workdir, self.config, self.data = workdir, config, config.data
        if config.metric == "lpips" and not (config.lpips_weights or experiment.reconstruction.objective.lpips_weights):
            raise ValueError("metric lpips needs its weights: name them with --lpips")
        self.suffix = report_suffix(config.data, config.split)
        self.best_file = workdir / "eval" / f"best{self.suffix}.json"
        built = workdir / "eval" / f"built{self.suffix}"
        split = evaluated_split(experiment, config.data, config.split)
        records = open_records(experiment, workdir, config.data, split, built)
        if config.data and not (config.data / "data_config.json").is_file():
            self.data = built / "data"  # made of a folder: once, not for every checkpoint
        self.objects = min(len(records), config.objects or len(records))

    def folder(self, step: int) -> Path:
        return self.workdir / "eval" / f"{step}{self.suffix}"

    def checkpoint(self, step: int) -> Path:
        return self.workdir / STAGE / "checkpoints" / str(step)

    def make(self, step: int) -> None:
        # A report of a checkpoint that was replaced goes; one without a mark may be training's, that is just written.
        if self._read(step, EVALUATED).get("crc32") not in (None, fingerprint(self.checkpoint(step))):
            for stale in ("report.json", EVALUATED):
                (self.folder(step) / stale).unlink(missing_ok=True)
        evaluate(
            self.workdir,
            step=step,
            data=self.data,
            split=self.config.split,
            objects=self.config.objects,
            lpips_weights=self.config.lpips_weights,
            out=self.folder(step),
        )
        if self.value(step) is None:
            raise ValueError(f"{self.folder(step)}: {self.config.metric} was not measured, choose another --metric")
        logging.notice(f"{self.folder(step)}: {self.config.metric} {self.value(step):.4f}")

    def value(self, step: int) -> float | None:
        """The metric in the step's report; None without a report of all the objects, or of the metric.

        The checkpoint, where it is there still, must be the one that was evaluated.
        """
        found, report = fingerprint(self.checkpoint(step)), self._read(step, "report.json")
        if found is not None and found != self._read(step, EVALUATED).get("crc32"):
            return None
        same = report.get("checkpoint_step") == step and len(report.get("objects", [])) == self.objects
        return report["summary"].get(self.config.metric) if same else None

    def _read(self, step: int, name: str) -> dict[str, Any]:
        file = self.folder(step) / name
        try:
            return json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            logging.warn(f"{file} is no JSON and is made again")
            return {}

    def write_best(self) -> None:
        """Writes best.json over all reports there are, those of deleted checkpoints too."""
        names = (folder.name.removesuffix(self.suffix) for folder in self.best_file.parent.glob(f"*{self.suffix}"))
        steps = sorted(int(name) for name in names if name.isdigit())
        values = {step: value for step in steps if (value := self.value(step)) is not None}
        if not values:
            return
        sign = METRICS[self.config.metric]
        best = max(values, key=lambda step: (sign * values[step], step))
        content = {"metric": self.config.metric, "step": best, "value": values[best], "steps": values}
        with written_whole(self.best_file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
