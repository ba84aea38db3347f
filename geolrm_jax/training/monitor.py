"""What a stage's metrics say, and what follows from them: lines of the log, a larger capacity, a rollback."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from geolrm_jax.runtime import distributed, hardware, logging
from geolrm_jax.scene import Batch
from geolrm_jax.training.objectives import Objective

DOUBLINGS = "capacity_doublings"
RECENT = "skipped_recently"
SUM, COUNT = "sum_of/", "steps_of/"  # before a metric's name: what a checkpoint between two intervals' ends carries on
SHOWN = ("loss", "psnr", "iou", "anchors")  # beside the progress bar


class Diverged(Exception):
    """Too many of the last steps were skipped.

    Attributes:
      step: the last of them.
      skipped: their number.
      file: a line for each.
    """

    def __init__(self, step: int, skipped: int, file: Path):
        super().__init__(f"{skipped} steps skipped by step {step}, see {file}")
        self.step, self.skipped, self.file = step, skipped, file


class Monitor:
    """Averages the steps' metrics between log lines and acts on what they say.

    Metrics of a step are fetched after the next one is dispatched: the device never waits for the host. All processes
    see the same metrics at the same step, and do the same about them.

    Args:
      name: of the stage.
      stage: its StageConfig.
      build: step(state, constants, batch) for an objective.
      flops: operations of an objective's step on a batch; asked for where the device's peak is known.
      log, bar: where lines and progress go.
      directory: of the stage; gets `skipped.jsonl`.
      saved: what `since_save` gave to the checkpoint that the stage goes on from; empty at its beginning.
    """

    def __init__(
        self,
        name: str,
        stage: Any,
        build: Callable[[Objective], Callable],
        flops: Callable[[Objective, Batch], int],
        log: logging.RunLogger,
        bar: logging.Progress,
        directory: Path,
        saved: Mapping[str, float],
    ):
        self.name, self.stage, self.build, self.flops, self.log, self.bar = name, stage, build, flops, log, bar
        self.peak = hardware.peak_flops(jax.devices()[0].device_kind)
        self.skipped_file = Path(directory) / "skipped.jsonl"
        self.doublings, self.recent = int(saved.get(DOUBLINGS, 0)), 0
        self.objective = stage.objective
        for _ in range(self.doublings):
            self.objective = self.objective.grown()
        self.compiled = build(self.objective)
        self.seen: dict[int, int] = {}  # operations of a step by its number of inputs
        self.dispatched = 0  # operations of the step in flight
        self.in_flight: tuple | None = None
        self.since_line = defaultdict(list)
        begun = [name.removeprefix(SUM) for name in saved if name.startswith(SUM)]
        self.interval = {name: (saved[SUM + name], saved[COUNT + name]) for name in begun}  # sums and numbers of steps
        self.line_started = time.perf_counter()

    def step(self, state: Any, constants: Any, batch: Batch) -> tuple[Any, Mapping[str, jax.Array]]:
        """Dispatches one step; says so before the first of each number of inputs, which compiles."""
        inputs = batch.inputs.valid.shape[1]
        if inputs not in self.seen:
            self.seen[inputs] = self.flops(self.objective, batch) if self.peak else 0
            logging.notice(f"{self.name}: compiling the step for {inputs} input views")
        self.dispatched = self.seen[inputs]
        return self.compiled(state, constants, batch)

    def add(
        self, done: int, metrics: Mapping[str, jax.Array], host: Mapping[str, float], *, damaged: int, flush: bool
    ) -> None:
        """Takes the metrics of a dispatched step; writes a line where one is due.

        Args:
          done: the step's number.
          metrics: what it gives.
          host: what this process knows of the step: `inputs`, and seconds.
          damaged: records that this process has met damaged in the epoch.
          flush: wait for the step and write a line.

        Raises:
          Diverged: if too many of the window's steps were skipped.
          ValueError: if the rasterizer's capacity was doubled as often as it may be.
        """
        host = {**host, "flops": float(self.dispatched)}
        before, self.in_flight = self.in_flight, (done, metrics, host, self.objective)
        if before:
            self._take(*before)
        if flush or done % self.stage.log_every == 0:
            self._take(*self.in_flight)
            self.in_flight = None
            self._write(done, damaged)

    def since_save(self, whole: bool) -> dict[str, float]:
        """What a checkpoint says: what a restart needs of this object and, at the end of an interval, its means.

        Args:
          whole: whether an interval between checkpoints of the schedule ends here. Else, at a notice or a last step in
            one, there are no means, which few steps would make a chance best, but sums: a restart goes on with it.
        """
        of_restart = {DOUBLINGS: float(self.doublings), RECENT: float(self.recent)}
        if not whole:
            sums = {SUM + name: total for name, (total, _) in self.interval.items()}
            return of_restart | sums | {COUNT + name: steps for name, (_, steps) in self.interval.items()}
        means = {name: total / steps for name, (total, steps) in self.interval.items()}
        self.interval.clear()
        return of_restart | means

    def _take(self, done: int, metrics: Mapping[str, jax.Array], host: Mapping[str, float], ran: Objective) -> None:
        begun = time.perf_counter()
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        host = {**host, "seconds_waiting_for_device": time.perf_counter() - begun}
        self.recent = int(values.pop(RECENT))
        median = values.pop("gradient_norm_median")
        if values["skipped"]:
            self._skip(done, values, median)
            # The rest says nothing about training; an overflow, which may be why, must still raise the capacity.
            values = {name: values[name] for name in ("skipped", "overflow") if name in values}
        if values.get("overflow"):
            self._grow(done, round(self.stage.accumulation * values["overflow"]), ran)  # it is the parts' mean
        for name, value in {**values, **host}.items():
            self.since_line[name].append(value)
            total, steps = self.interval.get(name, (0.0, 0.0))
            self.interval[name] = total + value, steps + 1.0

    def _skip(self, done: int, values: Mapping[str, float], median: float) -> None:
        norm, loss = values["gradient_norm"], values["loss"]
        finite = np.isfinite(norm) and np.isfinite(loss)
        why = (
            f"its gradient's norm {norm:.4g} is {norm / median:.3g} times the median"
            if finite
            else (f"not finite: loss {loss:g}, gradient's norm {norm:g}")
        )
        logging.warn(f"{self.name}: step {done} skipped, {why}")
        if logging.is_writer():
            self.skipped_file.parent.mkdir(parents=True, exist_ok=True)
            line = {"step": done, "loss": str(loss), "gradient_norm": str(norm), "median": str(median)}
            with self.skipped_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.recent >= self.stage.max_skipped:
            raise Diverged(done, self.recent, self.skipped_file)

    def _grow(self, done: int, overflow: int, ran: Objective) -> None:
        logging.warn(f"{self.name}: step {done} left out {overflow} (Gaussian, tile) pairs, its capacity was too small")
        if ran is self.objective:  # else it was dispatched before the capacity grew
            self.doublings += 1
            if self.doublings > self.stage.max_growth:
                raise ValueError(
                    f"{self.name}: the capacity was doubled {self.stage.max_growth} times and overflows still"
                )
            self.objective = self.objective.grown()
            self.compiled, self.seen = self.build(self.objective), {}
            logging.notice(f"{self.name}: capacity doubled, set it so in the config: {self.objective}")

    def _write(self, done: int, damaged: int) -> None:
        now = time.perf_counter()
        steps = len(self.since_line["skipped"])
        seconds = (now - self.line_started) / steps
        flops = sum(self.since_line.pop("flops"))
        means = {name: float(np.mean(values)) for name, values in self.since_line.items()}
        means["skipped"] = float(np.sum(self.since_line["skipped"]))
        means |= {"seconds_per_step": seconds, "samples_per_second": self.stage.batch / seconds}
        if self.peak:
            means["mfu"] = flops / (now - self.line_started) / (self.peak * jax.device_count())
        means |= hardware.memory()
        of_hosts = {name: means[name] for name in means if name.startswith("seconds_") or name.endswith("_memory")}
        gathered = distributed.per_host({**of_hosts, "damaged_records": float(damaged)})
        means["damaged_records"] = float(gathered.pop("damaged_records").sum())
        self.log.log(done, means, distributed.extremes(gathered) if jax.process_count() > 1 else None)
        self.bar.update(done, {name: means[name] for name in SHOWN if name in means})
        self.since_line.clear()
        self.line_started = now
