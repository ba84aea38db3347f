"""What may come between two steps: notice that the machine is taken away, a hang, a trace of the profiler."""

import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from geolrm_jax.runtime import logging

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on
HUNG = 70  # EX_SOFTWARE


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """How a training process is watched. It changes no number, so it belongs to a command, not to a config."""

    hang_seconds: float = 1800.0
    """Without a step for so long, the stacks of all threads are written down; compilation counts as no step."""
    hang_exit: bool = False
    """Whether the process then ends, with code 70."""
    save_seconds: float = 300.0
    """Time for saving after a notice; past it the process ends with what was saved before."""
    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace, of every stage that comes by them."""

    def __post_init__(self):
        for name in ("hang_seconds", "save_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile: expected 1 <= START <= STOP, got {self.profile[0]}:{self.profile[1]}")


WATCH = WatchConfig()  # unless a command says otherwise


class Preempted(Exception):
    """Training was told to stop, has saved, and goes on when the same command is run again."""


class Preemption:
    """Listens for SIGTERM, which clouds and schedulers send before they take a machine, while in `with`.

    Of several processes JAX's coordination service listens instead: it needs one of them to be told, and lets all
    stop behind the same step. Outside of `with`, SIGTERM ends a single process as always.

    Args:
      save_seconds: after so long the process ends with code 75, whether or not it has saved: from the signal on in a
        single process, from the step at which all stop where there are several.
    """

    _calls = 0  # of `due` in this process, all stages together: JAX compares these numbers between processes

    def __init__(self, save_seconds: float):
        self.save_seconds = save_seconds
        self._told, self._before, self._timer = False, None, None

    def __enter__(self) -> "Preemption":
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if self._timer:
            self._timer.cancel()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self._told and kind is None:  # it came behind the last question
                os.kill(os.getpid(), signal.SIGTERM)

    def due(self) -> bool:
        """Whether to save and stop now: the same answer on all processes, which all ask once behind every step."""
        Preemption._calls += 1
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(Preemption._calls):
            self._told = True  # JAX says so once; a stage that goes back at this very step asks again
            self._start_timer()
        return self._told

    def _notice(self, number: int, frame: object) -> None:
        self._told = True
        self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(self.save_seconds, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self) -> None:
        print(f"told to stop, not saved within {self.save_seconds:g} seconds: ending without", file=sys.stderr)
        sys.stderr.flush()
        os._exit(PREEMPTED)


class Watchdog:
    """While in `with`, writes the stacks of all threads to a file when `beat` was not called for too long.

    Args:
      directory: gets `stacks-<process>.txt`, a dump behind the other; each pause gives one.
      config: how long, and whether the process ends then.
    """

    def __init__(self, directory: Path, config: WatchConfig):
        self.path = Path(directory) / f"stacks-{jax.process_index()}.txt"
        self.config = config
        self._beaten, self._done, self._ended = time.monotonic(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat(0)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, done: int) -> None:
        """Says that step `done` has ended."""
        self._beaten, self._done = time.monotonic(), done

    def _watch(self) -> None:
        dumped = None
        while not self._ended.wait(min(self.config.hang_seconds / 4, 10.0)):
            beaten = self._beaten
            if beaten != dumped and time.monotonic() - beaten > self.config.hang_seconds:
                self._dump()
                dumped = beaten

    def _dump(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: nothing since step {self._done}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"process {jax.process_index()}: no step for {self.config.hang_seconds:g} seconds, the last was "
            f"{self._done}: the stacks of all threads are in {self.path}",
            file=sys.stderr,
            flush=True,
        )
        if self.config.hang_exit:
            os._exit(HUNG)


class Profile:
    """Writes a trace of the profiler, on process 0, from before the first to behind the last of some steps."""

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self.directory, self.steps, self._running = Path(directory), steps, False

    def __enter__(self) -> "Profile":
        return self

    def before(self, step: int) -> None:
        """To be called before every step."""
        if self.steps and self.steps[0] <= step <= self.steps[1] and not self._running and jax.process_index() == 0:
            jax.profiler.start_trace(str(self.directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """To be called behind every step with what it gives, which the last step of a trace waits for."""
        if self._running and step >= self.steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def __exit__(self, *error) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        logging.notice(f"profile written: tensorboard --logdir {self.directory}")
