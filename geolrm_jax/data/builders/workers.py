"""Tasks on all cores: processes that end with the one that started them, and tell how far they are."""

import concurrent.futures
import functools
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_news: Any = None  # of a worker process: the queue to the one that started it, and whether that one gave up
_stop: Any = None


class _GivenUp(Exception):
    """Ends a task whose result nobody waits for any more."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers(processes: int | None) -> int:
    """How many processes to start: as many as there are cores for None; ValueError for fewer than 1."""
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    return processes or cores()


def check_main_guard() -> None:
    """Raises a RuntimeError where a worker process, at its start, runs the program's main file and comes back here."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("this starts processes: call it from below `if __name__ == '__main__':`")


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple],
    *,
    workers: int,
    threads: bool,
    done: Callable[[Any], None],
) -> Iterator[Any]:
    """Results of `function(*task, done)` for each task, in the order in which they end.

    Args:
      function: of the module's top level; calls `done(value)` as often as it likes.
      tasks: arguments; sent to other processes, unless `threads`.
      workers: at most so many tasks run at a time.
      threads: run them in threads of this process: for functions that use the accelerator.
      done: called in this process's main thread with each value.

    A task that fails, or a caller that closes the iterator, ends the others at their next `done`.

    Raises:
      OSError: if a worker process died.
    """
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            yield function(*task, done)
        return
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork does not survive
    # Simple ones: what a task told is there before its result is.
    news = queue.SimpleQueue() if threads else context.SimpleQueue()
    stop = threading.Event() if threads else context.Event()
    if threads:
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        call = functools.partial(_call, function, news, stop)
    else:
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (news, stop))
        call = functools.partial(_call_in_process, function)
    try:
        pending = {pool.submit(call, task) for task in tasks}
        while pending:
            ended, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
            _tell(news, done)
            for future in ended:
                yield future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was ended from outside or ran out of memory; the same command goes on from the "
            "finished shards, with fewer --processes if memory was short"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _tell(news: Any, done: Callable[[Any], None]) -> None:
    while not news.empty():
        done(news.get())


def _call(function: Callable[..., Any], news: Any, stop: Any, task: tuple) -> Any:
    def done(value: Any) -> None:
        if stop.is_set():
            raise _GivenUp
        news.put(value)

    return function(*task, done)


def _call_in_process(function: Callable[..., Any], task: tuple) -> Any:
    return _call(function, _news, _stop, task)


def _begin(news: Any, stop: Any) -> None:
    """Start of a worker process: it must not go on writing when the one that started it was killed."""
    global _news, _stop
    _news, _stop = news, stop

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
