"""Files that are whole or not there."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place on success and is removed on an error.

    The temporary name keeps the suffix, by which some writers choose their format. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}.{os.getpid()}"  # in containers many processes have one number
    temporary = path.with_name(f".{path.stem}.{writer}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the name must not be on disk before the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
