"""One trainer in a work directory."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from geolrm_jax.runtime import logging

T = TypeVar("T")
FILE = ".lock"
UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # file systems without locks


@contextlib.contextmanager
def exclusive(directory: Path | str) -> Iterator[None]:
    """Keeps other runs out of `directory` while in `with`; the kernel lets go however the process ends.

    Process 0 of a run holds a POSIX record lock, which network file systems share between hosts and which, unlike one
    by `flock`, forked workers that outlive a killed run do not keep. On a file system that has none there is a warning
    and no lock. All processes of a run call this together.

    Raises:
      BlockingIOError: an OSError, on all processes, if another run holds it; the message says which.
      OSError: on all processes, if the directory cannot be written.
    """
    directory = Path(directory)
    file, holder = by_first(str(directory), lambda: _take(directory)) or (None, None)
    if agreed(holder is not None):
        raise BlockingIOError(
            f"{directory}: another run works there ({holder or 'process 0 says which'}): wait for its end, stop it, or "
            "choose another --workdir"
        )
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def agreed(value: int) -> int:
    """Process 0's value, on all processes; all must call this together."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else int(value)


def by_first(what: str, work: Callable[[], T]) -> T | None:
    """What `work()` gives on process 0, None on the others; all must call this together.

    Args:
      what: it is about, for the error on the others.
      work: called on process 0.

    Raises:
      OSError, ValueError: on all processes, if `work` raises it.
    """
    result = error = None
    if jax.process_index() == 0:
        try:
            result = work()
        except (OSError, ValueError) as caught:
            error = caught
    kind = agreed(0 if error is None else 1 if isinstance(error, OSError) else 2)
    if kind:
        raise error or (OSError if kind == 1 else ValueError)(f"{what}: process 0 says what is wrong")
    return result


def _take(directory: Path) -> tuple[int, str | None]:
    """The open lock file and, if it could not be had, who holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    file = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
        os.close(file)
        return -1, holder or "it has not said its name"
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            os.close(file)
            raise
        logging.warn(f"{directory}: this file system has no locks, so a second run there would not be noticed")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return file, None
