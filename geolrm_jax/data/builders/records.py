"""Writes a source's objects as records into ArrayRecord files that TFDS opens, without TensorFlow.

The set is written under another name, DIR.unfinished, shard after shard, and renamed when it is complete: a folder of
its own name is whole. A build that was interrupted goes on from the shards that it had finished.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from geolrm_jax.data.builders.config import DataConfig, check_same, read_config, stored_config
from geolrm_jax.data.builders.layout import CONFIG_FILE, KINDS, MANIFEST_FILE, REJECTED_FILE, write_metadata
from geolrm_jax.data.builders.shards import MARKERS, Shard, read_marker, split_into_shards, write_shard
from geolrm_jax.data.builders.workers import check_main_guard, count_workers, run_tasks
from geolrm_jax.data.record import FORMAT_VERSION
from geolrm_jax.export.files import written_whole

PLAN_FILE = "plan.json"
MAX_REJECTED = 0.1
# What is lost when a build is interrupted is a shard for each core; a reader holds two files open for each.
_FEWEST, _MOST, _OBJECTS, _LIMIT = 16, 512, 64, 10_000

Advance = Callable[[str, int, int], None]


def build(
    config: DataConfig,
    directory: Path | str,
    *,
    advance: Advance = lambda *_: None,
    processes: int | None = None,
    max_rejected: float = MAX_REJECTED,
    objects_per_shard: int | None = None,
) -> Path:
    """Builds the set of `config` in `directory`, goes on with it, or finds it complete there.

    Args:
      config: all but `root` and `built` decides the set's content. The same source gives the same bytes.
      directory: made by this function. It gets its name when all is written. What is unfinished lies in the folder
        DIRECTORY.unfinished, from which the same call goes on; one process works on it, others wait, with a warning.
      advance: called as (split, objects done, objects in all) after each object.
      processes: that build shards at a time; None: one for each core. Procedural objects are rendered by threads of
        this process, which share its accelerator.
      max_rejected: share of the objects that may be unsound. They are listed in `rejected.jsonl`.
      objects_per_shard: at most; None: such that a split has 16 to 512 shards.

    Returns:
      The directory.

    Raises:
      ValueError: if the directory holds something else or a set of another config (both are named), if the source has
        no objects, or if too many of them are unsound.
      OSError: if the disk is full, the source's folder is gone, or a process was ended from outside.
    """
    check_main_guard()
    directory, content = Path(directory), stored_config(config)
    workers = count_workers(processes)
    if not 0.0 <= max_rejected <= 1.0 or (objects_per_shard is not None and objects_per_shard < 1):
        raise ValueError(
            "expected max_rejected in [0, 1] and objects_per_shard of at least 1, got "
            f"{max_rejected} and {objects_per_shard}"
        )
    if config.built or (directory.exists() and any(directory.iterdir())):
        _check_complete(config, directory)
        return directory
    with _alone(directory.with_name(f".{directory.name}.lock")):
        if directory.exists() and any(directory.iterdir()):  # another process has finished it meanwhile
            _check_complete(config, directory)
            return directory
        unfinished = directory.with_name(f"{directory.name}.unfinished")
        with _removed_if_empty(unfinished):
            if (unfinished / CONFIG_FILE).is_file():  # killed when all was written
                check_same(read_config(unfinished), content, unfinished)
            else:
                plan = _plan(config, content, unfinished, objects_per_shard)
                shards = [
                    shard
                    for split, ids in plan["splits"].items()
                    for shard in split_into_shards(split, ids, plan["shards"][split])
                ]
                markers = _write_shards(config, unfinished, shards, advance, workers, max_rejected)
                _finish(unfinished, plan, markers)
            shutil.rmtree(unfinished / MARKERS, ignore_errors=True)
            (unfinished / PLAN_FILE).unlink(missing_ok=True)
            unfinished.rename(directory)
    return directory


def _check_complete(config: DataConfig, directory: Path) -> None:
    """Raises a ValueError unless the finished set in `directory` serves for `config`."""
    found, wanted = read_config(directory), stored_config(config)
    if config.built:
        names = ("occupancy_grid", "occupancy_rounding")
        found, wanted = ({name: content[name] for name in names} for content in (found, wanted))
    try:
        check_same(found, wanted, directory)
    except ValueError as error:
        grid = f"--grid {config.occupancy_grid} --rounding {config.occupancy_rounding}"
        raise ValueError(f"{error}" + (f": build one with {grid}" if config.built else "")) from None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process holds the file, which is made and removed; what is held ends with its process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warnings.warn(f"another process builds there, waiting for it ({lock})", stacklevel=4)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The file may have been removed by the one that held it: then it keeps nobody out any more.
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Makes the folder; one that holds no sound object in the end is removed: there is nothing to go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        markers = (read_marker(path) for path in folder.glob(f"{MARKERS}/*.json"))
        whole = (folder / CONFIG_FILE).is_file()
        if folder.is_dir() and not whole and not any(marker and marker["objects"] for marker in markers):
            shutil.rmtree(folder)


def _plan(
    config: DataConfig, content: dict[str, Any], unfinished: Path, objects_per_shard: int | None
) -> dict[str, Any]:
    """Which objects go into which shards: decided once, when the build begins."""
    file = unfinished / PLAN_FILE
    if file.is_file():
        try:
            plan = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): delete {unfinished} and begin anew") from error
        try:
            check_same(plan["config"], content, unfinished)
        except ValueError as error:
            raise ValueError(f"{error}: delete {unfinished}, or build elsewhere") from None
        for leftover in unfinished.rglob(".*"):  # of a process that was killed while it wrote
            leftover.unlink()
        return plan
    listed, left_out = config.source.listing()
    ids = {split: list(dict.fromkeys(names)) for split, names in listed.items() if names}
    if not ids:
        raise ValueError(f"an empty data set: {config.source} has no objects")
    twice = [
        {"split": split, "id": id, "reason": f"listed {count} times, stored once"}
        for split, names in listed.items()
        for id, count in Counter(names).items()
        if count > 1
    ]
    plan = {
        "config": content,
        "shards": {split: _shards(len(names), objects_per_shard) for split, names in ids.items()},
        "splits": ids,
        "left_out": [*twice, *({"split": "train", "id": id, "reason": why} for id, why in left_out.items())],
    }
    with written_whole(file) as path:
        path.write_text(json.dumps(plan) + "\n")
    return plan


def _shards(objects: int, objects_per_shard: int | None) -> int:
    """How many shards a split is dealt to."""
    if objects_per_shard is None:
        return min(_MOST, max(-(-objects // _OBJECTS), min(objects, _FEWEST)))
    shards = -(-objects // objects_per_shard)
    if shards > _LIMIT:
        raise ValueError(f"{objects_per_shard} objects a shard make {shards} shards of {objects}, more than {_LIMIT}")
    return shards


def _write_shards(
    config: DataConfig, unfinished: Path, shards: list[Shard], advance: Advance, processes: int, max_rejected: float
) -> list[dict[str, Any]]:
    """Writes the shards that are not there yet; returns what the markers of all of them say, in order."""
    splits = dict.fromkeys(shard.split for shard in shards)
    totals = Counter({split: sum(len(s.ids) for s in shards if s.split == split) for split in splits})
    markers = {s: marker for s in shards if (marker := read_marker(unfinished / s.marker))}
    counts = Counter({split: sum(len(s.ids) for s in markers if s.split == split) for split in totals})
    for split, count in counts.items():
        if count:
            advance(split, count, totals[split])

    def done(split: str) -> None:
        counts[split] += 1
        advance(split, counts[split], totals[split])

    _check_rejected(list(markers.values()), sum(totals.values()), max_rejected, unfinished)
    missing = [shard for shard in shards if shard not in markers]
    results = run_tasks(
        write_shard,
        [(config, unfinished, shard) for shard in missing],
        workers=min(processes, len(missing) or 1),
        threads=config.source.on_accelerator,
        done=done,
    )
    by_name = {(shard.split, shard.number): shard for shard in missing}
    with contextlib.closing(results):
        for marker in results:
            markers[by_name[marker["split"], marker["shard"]]] = marker
            _check_rejected(list(markers.values()), sum(totals.values()), max_rejected, unfinished)
    return [markers[shard] for shard in shards]


def _check_rejected(markers: list[dict[str, Any]], objects: int, max_rejected: float, unfinished: Path) -> None:
    """Raises a ValueError that names some, and the list, once more objects were rejected than may be."""
    rejected = [entry for marker in markers for entry in marker["rejected"]]
    if len(rejected) <= max_rejected * objects:
        return
    some = "; ".join(f"{entry['split']} {entry['reason']}" for entry in rejected[:5])
    text = f"{len(rejected)} of {objects} objects were rejected, more than {max_rejected:.0%} (max_rejected): {some}"
    text += "; …" if len(rejected) > 5 else ""
    if any(marker["objects"] for marker in markers):
        _write_lines(unfinished / REJECTED_FILE, rejected)
        text += (
            f"; all of them in {unfinished / REJECTED_FILE}. Finished shards stay: a higher share goes on from them, "
            f"and once the source is mended, deleting {unfinished} begins anew"
        )
    raise ValueError(text)


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _finish(unfinished: Path, plan: dict[str, Any], markers: list[dict[str, Any]]) -> None:
    """Writes everything beside the shards."""
    by_split = {split: [marker for marker in markers if marker["split"] == split] for split in plan["splits"]}
    empty = [split for split, parts in by_split.items() if not sum(part["objects"] for part in parts)]
    if empty:
        reasons = [entry["reason"] for split in empty for part in by_split[split] for entry in part["rejected"]]
        raise ValueError(f"no object of {', '.join(empty)} is sound: {'; '.join(reasons[:5])}")
    write_metadata(
        unfinished,
        {kind: {split: [part[kind] for part in parts] for split, parts in by_split.items()} for kind in KINDS},
    )
    rejected = [{**entry, "kind": "rejected"} for entry in itertools.chain(*(m["rejected"] for m in markers))]
    left_out = [{**entry, "kind": "left out"} for entry in plan["left_out"]]
    _write_lines(unfinished / REJECTED_FILE, [*rejected, *left_out])
    manifest = {
        "format_version": FORMAT_VERSION,
        "shards": [{**marker, "rejected": len(marker["rejected"])} for marker in markers],
    }
    (unfinished / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
    with written_whole(unfinished / CONFIG_FILE) as path:  # the last: it says that the set is whole
        path.write_text(json.dumps(plan["config"], indent=2) + "\n")
