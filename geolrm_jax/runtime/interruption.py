"""What may come between two steps: notice that the machine is taken away, a hang, a trace of the profiler."""

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from geolrm_jax.runtime import distributed, logging

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, the same command again goes on
NOT_SAVED = 76  # the same, but from the checkpoint before
HUNG = 70  # EX_SOFTWARE
POLL = 1.0  # seconds between looks for a notice
DUMPING = 60.0  # seconds that a dump of stacks may take before a process that is to end does so


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """How a training process is watched. It changes no number, so it belongs to a command, not to a config."""

    hang_seconds: float = 1800.0
    """Without a step for so long, the stacks of all threads are written down; compilation counts as no step. Processes
    wait nine tenths of it for each other before the first, and then end with an error that names who is missing."""
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
    stop behind the same step. Outside of `with`, `ending_when_told` says what SIGTERM does.

    Args:
      save_seconds: so long after the notice the process ends with code 76 if it has not saved.

    Raises:
      Preempted: from `with`, if the notice came behind the last question: what is in it is then complete.
    """

    listening = False  # whether any of this process is in `with`, or has left it because of a notice
    _calls = 0  # of `due` in this process, all stages together: JAX compares these numbers between processes

    def __init__(self, save_seconds: float):
        self.save_seconds = save_seconds
        self._told, self._before, self._ended = False, None, threading.Event()

    def __enter__(self) -> "Preemption":
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        Preemption.listening = True
        self._limiter = threading.Thread(target=self._limit, name="preemption", daemon=True)
        self._limiter.start()
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        self._ended.set()
        self._limiter.join()
        Preemption.listening = self._told  # then the run ends by itself, as JAX wants it
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._told and kind is None:
            raise Preempted("told to stop behind the last step, which is saved")

    def due(self) -> bool:
        """Whether to save and stop now: the same answer on all processes, which all ask once behind every step."""
        Preemption._calls += 1
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(Preemption._calls):
            self._told = True  # JAX says so once; a stage that goes back at this very step asks again
        return self._told

    def _notice(self, number: int, frame: object) -> None:
        self._told = True  # and nothing else: a handler that took a lock might wait for the code it interrupts

    def _limit(self) -> None:
        """Ends the process when it was told and has not saved in time."""
        while not (self._told or distributed.told()):
            if self._ended.wait(POLL):
                return
        if self._ended.wait(self.save_seconds):
            return
        _end(f"told to stop, not saved within {self.save_seconds:g} seconds: ending without", NOT_SAVED)


@contextlib.contextmanager
def ending_when_told() -> Iterator[None]:
    """While in `with`, but not in `Preemption`, SIGTERM ends the process at once with code 75.

    For what is not training: a set that is being built and an evaluation go on, or begin anew, with the same command.
    Of several processes all end, whichever was told: JAX's coordination service, which has taken the signal, tells.
    """
    if jax.distributed.is_initialized():
        ended = threading.Event()
        listener = threading.Thread(target=_end_when_told, args=(ended,), name="notices", daemon=True)
        listener.start()
        try:
            yield
        finally:
            ended.set()
            listener.join()
    elif threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
    else:
        yield


def _leave(number: int, frame: object) -> None:
    raise SystemExit(PREEMPTED)  # which what tries again, or goes on without one object, does not catch


def _end_when_told(ended: threading.Event) -> None:
    while not ended.wait(POLL):
        if not Preemption.listening and distributed.told():
            # Process 0 holds the service: the others hear from it, and abort when it is gone.
            if jax.process_index() == 0 and ended.wait(5 * POLL):
                return
            _end("told to stop outside of training: ending at once", PREEMPTED)


def _end(why: str, code: int) -> None:
    print(f"process {jax.process_index()}: {why}", file=sys.stderr, flush=True)
    os._exit(code)


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
        """Says that step `done` has ended, or is what the next one goes on from."""
        self._beaten, self._done = time.monotonic(), done

    def _watch(self) -> None:
        dumped = None
        while not self._ended.wait(min(self.config.hang_seconds / 4, 10.0)):
            beaten = self._beaten
            if beaten != dumped and time.monotonic() - beaten > self.config.hang_seconds:
                self._dump()
                dumped = beaten

    def _dump(self) -> None:
        if self.config.hang_exit:  # whatever becomes of the file: what hangs may be the file system
            last = threading.Timer(DUMPING, os._exit, (HUNG,))
            last.daemon = True
            last.start()
        print(
            f"process {jax.process_index()}: no step for {self.config.hang_seconds:g} seconds, the last was "
            f"{self._done}: the stacks of all threads follow, and are in {self.path}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: nothing since step {self._done}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"process {jax.process_index()}: {self.path} could not be written: {error}", file=sys.stderr)
        if self.config.hang_exit:
            os._exit(HUNG)


class Profile:
    """Writes a trace of the profiler, on process 0, from before the first to behind the last of some steps."""

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self.directory, self.steps, self._running, self._written = Path(directory), steps, False, False

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

    def __exit__(self, kind: type | None, *error) -> None:
        if self._running:
            self._stop()
        if kind is None and self.steps and not self._written and jax.process_index() == 0:
            logging.notice(f"no profile: none of the steps {self.steps[0]} to {self.steps[1]} came by")

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._written = False, True
        logging.notice(f"profile written: tensorboard --logdir {self.directory}")
