"""Renderers in processes of their own: what ends one of them costs its object, not the run (extra `mesh`)."""

import collections
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, NamedTuple

from geolrm_jax.data.mesh_objects import RenderConfig, render_object
from geolrm_jax.data.mesh_rendering import Variant


class Task(NamedTuple):
    """A mesh file to be rendered as the object `id`."""

    id: str
    mesh: Path


class Event(NamedTuple):
    """What became of a task: one more view, the whole object, or nothing, for the reason given."""

    task: Task
    kind: Literal["view", "rendered", "rejected"]
    reason: str = ""


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


def render_all(
    tasks: Sequence[Task], out: Path, config: RenderConfig, variant: Variant, processes: int
) -> Iterator[Event]:
    """Renders tasks on so many processes, in whatever order they end.

    A process that dies, killed for its memory or by an error in native code, has its task rejected and is replaced.

    Raises:
      OSError: if a process dies before it has anything to do: Mitsuba does not start.
    """
    waiting = collections.deque(tasks)
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, Task | None]] = {}  # None: it starts
    try:
        while waiting or any(task for _, task in busy.values()):
            while waiting and idle:
                worker, task = idle.pop(), waiting.popleft()
                worker.connection.send(task)
                busy[worker.connection] = worker, task
            starting = sum(task is None for _, task in busy.values())
            for _ in range(min(processes - len(busy), len(waiting) - starting)):
                worker = _start(out, config, variant)
                busy[worker.connection] = worker, None
            for connection in multiprocessing.connection.wait(list(busy)):
                worker, task = busy[connection]
                try:
                    kind, reason = connection.recv()
                except (EOFError, ConnectionResetError):
                    del busy[connection]
                    if task is None:
                        raise OSError(
                            f"Mitsuba ({variant}) does not start: its process ended, {_exit(worker.process)}; see "
                            "above, and the variable DRJIT_LIBLLVM_PATH"
                        ) from None
                    kind, reason = "rejected", f"its renderer ended, {_exit(worker.process)}"
                else:
                    if kind != "view":
                        idle.append(busy.pop(connection)[0])
                if task is not None:
                    yield Event(task, kind, reason)
    finally:
        workers = [*idle, *(worker for worker, _ in busy.values())]
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _start(out: Path, config: RenderConfig, variant: Variant) -> _Worker:
    # Spawned, not forked: the parent may hold threads of JAX.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, out, config, variant), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return _Worker(process, ours)


def _exit(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _work(connection: Connection, out: Path, config: RenderConfig, variant: Variant) -> None:
    """Renders what comes in until the other end is closed, on one core."""
    import drjit
    import mitsuba

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    mitsuba.set_variant(variant)
    drjit.set_thread_count(1)
    connection.send(("ready", ""))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            render_object(task.mesh, out, task.id, config, variant, lambda: connection.send(("view", "")))
        except BrokenPipeError:
            return  # nobody waits for the object
        except (ValueError, OSError, MemoryError) as error:
            connection.send(("rejected", str(error) or repr(error)))
        else:
            connection.send(("rendered", ""))
