"""Sizes and checksums of a folder's files: TensorStore's chunks carry none, and a flipped bit gives other weights."""

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"
CHUNK = 8 << 20
THREADS = 8  # zlib lets go of the interpreter's lock


def write_checksums(folder: Path, *, leaving_out: Sequence[str] = ()) -> None:
    """Writes `checksums.json` with the size and CRC-32 of every other file below `folder`.

    Args:
      folder: complete; what is added later is not covered.
      leaving_out: names of files that change later.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in leaving_out)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(_size_and_crc, files))
    table = {path.relative_to(folder).as_posix(): found for path, found in zip(files, sums, strict=True)}
    (folder / FILE).write_text(json.dumps({"crc32": table}))


def fingerprint(folder: Path) -> int | None:
    """CRC-32 of a folder's checksums, another for other content; None where there are none, or no folder."""
    try:
        return zlib.crc32((folder / FILE).read_bytes())
    except FileNotFoundError:
        return None


def find_damage(folder: Path, items: Sequence[str] | None = None) -> str | None:
    """What is wrong with a folder that `write_checksums` has seen, in words; None if all is as it was.

    Args:
      folder: sizes are compared first: a truncated file is found without reading any.
      items: subfolders to look at; None for all.

    Raises:
      OSError: if a file cannot be read for another reason than its absence.
    """
    if not (folder / FILE).is_file():
        return f"no {FILE} in it"
    try:
        table = json.loads((folder / FILE).read_bytes())["crc32"]
        wanted = {name: (size, crc) for name, (size, crc) in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{FILE} is unreadable"
    if items is not None:
        wanted = {name: found for name, found in wanted.items() if name.split("/")[0] in items}
    for name, (size, _) in wanted.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (there := (folder / name).stat().st_size) != size:
            return f"{name} has {there:,} bytes, {size:,} were written"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_size_and_crc, (folder / name for name in wanted))
        for (name, written), there in zip(wanted.items(), found, strict=True):
            if there != written:
                return f"{name} has other bytes than were written (CRC-32)"
    return None


def _size_and_crc(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
