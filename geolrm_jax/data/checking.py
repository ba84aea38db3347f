"""Whether a built set is what its manifest says, and its records what their layout says; and a page to look at."""

import dataclasses
import html
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from geolrm_jax.data.builders.agreement import check_agreement
from geolrm_jax.data.builders.config import read_config
from geolrm_jax.data.builders.layout import (
    CONFIG_FILE,
    KINDS,
    MANIFEST_FILE,
    VERSION,
    read_rejected,
    shard_file,
)
from geolrm_jax.data.builders.shards import describe_file
from geolrm_jax.data.builders.workers import count_workers, run_tasks
from geolrm_jax.data.occupancy import check_hull, drop_edges, occupancy_from_depth, occupancy_from_silhouettes
from geolrm_jax.data.reader import RecordSource, open_split
from geolrm_jax.data.record import DamagedRecord, Record, check_views
from geolrm_jax.export.pages import contact_sheet, depth_map, figure, table, to_uint8, write_page

PAGE_FILE = "check.html"
OCCUPANCY_DIFFERS = 1e-3  # share of voxels with no counterpart within one voxel: depth lost bits since they were made
_PICTURED_VIEWS, _SIDE = 6, 160
# A record's fields that the set's config states too, under another name.
_CONFIG_OF_FIELD = {
    "grid": "occupancy_grid",
    "occupancy_rounding": "occupancy_rounding",
    "encoding": "image_encoding",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
      findings: what is wrong, a line each; empty for a sound set.
      rows: (what, how much) pairs of the summary.
      page: the page of pictures; None where it could not be written.
      page_error: why not.
    """

    findings: list[str]
    rows: list[tuple[str, str]]
    page: Path | None
    page_error: str = ""


def check(
    directory: Path | str,
    *,
    every: int = 1,
    pictured: int = 12,
    processes: int | None = None,
    page: Path | str | None = None,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """Compares every file with its checksum, reads and judges records, and writes a page of pictures.

    Args:
      directory: of a finished set.
      every: judge each `every`-th object of a shard; checksums are of all files.
      pictured: objects on the page, evenly spaced over the splits.
      processes: that check shards at a time; None: one for each core.
      page: the file of pictures; None: `check.html` in the set.
      advance: called as (split, objects done, objects in all) after each object.

    Raises:
      FileNotFoundError, ValueError: if the directory is no set of this format at all.
    """
    directory = Path(directory)
    if every < 1 or pictured < 0:
        raise ValueError(f"every must be at least 1 and pictured at least 0, got {every} and {pictured}")
    workers = count_workers(processes)
    config, rejected = _read_config(directory), Counter(entry["kind"] for entry in read_rejected(directory))
    shards, findings = _read_manifest(directory)
    totals, counts = Counter(), Counter()
    for shard in shards:
        totals[shard["split"]] += shard["objects"]
    sources = {split: open_split(directory, split) for split in totals if totals[split]}
    findings += _check_counts(sources, shards, directory)

    def done(news: tuple[str, int]) -> None:
        counts[news[0]] += news[1]
        advance(news[0], counts[news[0]], totals[news[0]])

    tasks = [(directory, config, shard, every) for shard in shards if _is_there(directory, shard)]
    workers = min(workers, len(tasks) or 1)
    results = list(run_tasks(check_shard, tasks, workers=workers, threads=False, done=done)) if tasks else []
    results.sort(key=lambda result: (result["split"], result["shard"]))
    findings += [finding for result in results for finding in result["findings"]]
    seen = Counter((result["split"], id) for result in results for id in result["ids"])
    findings += [f"{split}: {id} is stored {count} times" for (split, id), count in seen.items() if count > 1]
    rows = _summary(shards, results, rejected, every)
    page = Path(page or directory / PAGE_FILE)
    try:
        _write_page(page, directory.resolve().name, sources, rows, findings, pictured)
    except OSError as error:  # a set may be checked by those who cannot write there
        return Report(findings, rows, None, str(error))
    return Report(findings, rows, page)


def _read_config(directory: Path) -> dict[str, Any]:
    """The set's config; a ValueError names the file and what it lacks of all that `judge` compares."""
    config = read_config(directory)
    missing = [name for name in _CONFIG_OF_FIELD.values() if name not in config]
    if missing:
        raise ValueError(f"{directory / CONFIG_FILE} is damaged: {missing[0]} expected in it")
    return config


def _read_manifest(directory: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The manifest's shards, and which files are missing, of another size, or not its own."""
    file = directory / MANIFEST_FILE
    try:
        shards = json.loads(file.read_text())["shards"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or missing: {error!r}") from error
    _check_manifest(shards, file)
    expected = {name: stated["bytes"] for shard in shards for name, stated in shard["files"].items()}
    findings = []
    for name, size in expected.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            findings.append(f"{name}: " + ("missing" if found is None else f"{found} bytes, {size} in the manifest"))
    stored = (path for kind in KINDS for path in (directory / kind / VERSION).glob("*array_record*"))
    findings += [
        f"{path.name}: not in the manifest" for path in stored if str(path.relative_to(directory)) not in expected
    ]
    return shards, findings


def _check_manifest(shards: Any, file: Path) -> None:
    """Raises a ValueError that names the file and the key unless the entries are such as a build writes."""

    def expect(sound: bool, key: str, what: str) -> None:
        if not sound:
            raise ValueError(f"{file} is damaged: {key}: expected {what}")

    expect(isinstance(shards, list), "shards", "a list")
    for i, shard in enumerate(shards):
        expect(isinstance(shard, dict), f"shards[{i}]", "a JSON object")
        expect(isinstance(shard.get("split"), str), f"shards[{i}].split", "the name of a split")
        for key in ("shard", "objects", "views"):
            expect(type(shard.get(key)) is int and shard[key] >= 0, f"shards[{i}].{key}", "a count")
    totals, numbers = Counter(shard["split"] for shard in shards), Counter()
    for i, shard in enumerate(shards):
        split, number = shard["split"], numbers[shard["split"]]
        numbers[split] += 1
        expect(shard["shard"] == number, f"shards[{i}].shard", f"{number}: those of a split stand in order")
        names = [shard_file(kind, split, number, totals[split]) for kind in KINDS]
        files = shard.get("files")
        expect(isinstance(files, dict) and {*files} == {*names}, f"shards[{i}].files", " and ".join(names))
        for name, stated in files.items():
            sound = isinstance(stated, dict) and type(stated.get("bytes")) is int and "sha256" in stated
            expect(sound, f"shards[{i}].files[{name!r}]", "sha256, and bytes, a count")


def _is_there(directory: Path, shard: dict[str, Any]) -> bool:
    return all((directory / name).is_file() for name in shard["files"])


def _check_counts(sources: dict[str, RecordSource], shards: list[dict[str, Any]], directory: Path) -> list[str]:
    """Where TFDS's metadata and the manifest disagree on how many records a shard has."""
    findings = []
    for split, source in sources.items():
        for kind, lengths in zip(KINDS, source.shard_lengths, strict=True):
            stated = [shard[kind] for shard in shards if shard["split"] == split]
            if list(lengths) != stated:
                findings.append(
                    f"{directory}: {split} {kind}: {list(lengths)} records a shard, {stated} in the manifest"
                )
    return findings


def check_shard(
    directory: Path, config: dict[str, Any], shard: dict[str, Any], every: int, done: Callable[[Any], None]
) -> dict[str, Any]:
    """What is wrong with one shard, and what the summary needs of it."""
    findings = [
        f"{name}: SHA-256 is not that of the manifest"
        for name, stated in shard["files"].items()
        if describe_file(directory / name)["sha256"] != stated["sha256"]
    ]
    result = {"split": shard["split"], "shard": shard["shard"], "findings": findings, "ids": [], "judged": 0}
    result |= {"voxels": [], "depth_error": [0.0], "sizes": [], "views": []}
    if not shard["objects"]:
        return result
    source = open_split(directory, shard["split"])
    lengths = source.shard_lengths[0]
    start = sum(lengths[: shard["shard"]])
    for number in range(min(shard["objects"], sum(lengths[shard["shard"] : shard["shard"] + 1]))):
        try:
            record = source[start + number]
            result["ids"].append(record.id)
            if (start + number) % every == 0:
                result["judged"] += 1
                judge(record, config)
                result["voxels"].append(int(record.occupancy.sum()))
                result["views"].append(len(record.view_ids))
                result["sizes"].append(f"{record.size[0]} x {record.size[1]}")
                result["depth_error"].append(float(np.ptp(record.depth_range, axis=1).max()) / 131068)
        except ValueError as error:
            findings.append(f"{shard['split']}: {error}")
        done((shard["split"], 1))
    return result


def judge(record: Record, config: dict[str, Any]) -> None:
    """Raises a ValueError that names the record unless it is sound: all of its views are decoded.

    Looked at: the layout against the set's config, depth's range, cameras, the agreement of views with each other
    (`agreement.check_agreement`), and the stored occupancy against one made again.
    """
    for field, name in _CONFIG_OF_FIELD.items():
        if getattr(record, field) != config[name]:
            raise DamagedRecord(record.id, f"{field} is {getattr(record, field)}, the set's {name} is {config[name]}")
    limits = record.depth_range
    if not np.isfinite(limits).all() or limits.min() < 0.0 or (limits[:, 0] > limits[:, 1]).any():
        raise DamagedRecord(record.id, f"depth_range must hold 0 <= near <= far, got {limits.tolist()}")
    views = check_views(record.views(), record.id)
    if record.occupancy_from == "depth":
        check_agreement(views, record.id)
        depth = drop_edges(views.depth, views.cameras)
        again = occupancy_from_depth(depth, views.cameras, record.grid, record.occupancy_rounding)
    else:
        check_hull(views.rgba[..., 3], views.cameras, record.id)
        again = occupancy_from_silhouettes(views.rgba[..., 3], views.cameras, record.grid)
    stored = record.occupancy
    if not stored.any():
        raise DamagedRecord(record.id, "no voxel is occupied")
    alone = (stored & ~_thickened(again)).sum() + (again & ~_thickened(stored)).sum()
    if alone > OCCUPANCY_DIFFERS * (stored.sum() + again.sum()):
        raise DamagedRecord(record.id, f"{alone} voxels of its occupancy have no counterpart in that of its views")


def _thickened(occupancy: Bool[np.ndarray, "g g g"]) -> Bool[np.ndarray, "g g g"]:
    """Each voxel with its 26 neighbours."""
    for axis in range(3):
        padded = np.pad(occupancy, [(1, 1) if a == axis else (0, 0) for a in range(3)])
        before, same, after = (np.take(padded, range(i, i + len(occupancy)), axis) for i in range(3))
        occupancy = before | same | after
    return occupancy


def _summary(
    shards: list[dict[str, Any]], results: list[dict[str, Any]], rejected: Counter[str], every: int
) -> list[tuple[str, str]]:
    objects = Counter()
    for shard in shards:
        objects[shard["split"]] += shard["objects"]
    size = sum(stated["bytes"] for shard in shards for stated in shard["files"].values())
    voxels = [count for result in results for count in result["voxels"]]
    views = [count for result in results for count in result["views"]]
    rows = [
        ("objects", ", ".join(f"{count:,} {split}" for split, count in objects.items())),
        ("views", f"{sum(shard['views'] for shard in shards):,}"),
        ("shards", f"{len(shards)}"),
        ("on disk", f"{size / 1e6:,.1f} MB, {size / 1e6 / max(objects.total(), 1):.2f} MB an object"),
        ("not in the set", ", ".join(f"{n} {kind}" for kind, n in rejected.items()) or "none"),
        ("judged", f"{sum(result['judged'] for result in results):,} objects" + (f", 1 of {every}" * (every > 1))),
    ]
    if voxels:
        error = max(max(result["depth_error"]) for result in results)
        rows += [
            ("sizes", ", ".join(sorted({size for result in results for size in result["sizes"]}))),
            ("views an object", f"{min(views)} to {max(views)}"),
            ("occupied voxels", f"{min(voxels):,} to {max(voxels):,}, median {int(np.median(voxels)):,}"),
            ("depth", f"stored to within {error:.1e} cube sides"),
        ]
    return rows


def _write_page(
    path: Path,
    title: str,
    sources: dict[str, RecordSource],
    rows: list[tuple[str, str]],
    findings: list[str],
    pictured: int,
) -> None:
    """The summary, what is wrong, and objects with some views, their depth, and occupancy along the three axes."""
    body = table((), rows, text_columns=2)
    if findings:
        body += "<h2>What is wrong</h2><ul>" + "".join(f"<li>{html.escape(f)}</li>" for f in findings) + "</ul>"
    places = [(split, index) for split, source in sources.items() for index in range(len(source))]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(pictured, len(places))).astype(int)) if places else []
    body += "<h2>Objects</h2>"
    for place in chosen:
        split, index = places[place]
        try:
            record = sources[split][index]
            caption = f"{split}: {record.id}, {len(record.view_ids)} views, {int(record.occupancy.sum()):,} voxels"
            body += figure(_picture(record), caption)
        except DamagedRecord as error:
            body += f"<p>{html.escape(f'{split}: {error}')}</p>"
    write_page(path, title, body)


def _picture(record: Record) -> UInt8[np.ndarray, "h w 3"]:
    rows = np.unique(np.linspace(0, len(record.view_ids) - 1, _PICTURED_VIEWS).astype(int))
    views = record.views(record.view_ids[rows].tolist())
    alpha = views.rgba[..., 3:] / 255.0
    colors = to_uint8(views.rgba[..., :3] / 255.0 * alpha + 1.0 - alpha)
    depths = depth_map(views.depth, (views.depth > 0.0).astype(np.float32))
    # Seen along x, y and z, the later axis to the right or upward.
    shadows = [np.repeat(record.occupancy.mean(axis=a).T[::-1, :, None], 3, axis=-1) for a in range(3)]
    shadows = [to_uint8(1.0 - np.sqrt(shadow / max(shadow.max(), 1e-9))) for shadow in shadows]
    return contact_sheet([[_small(p) for p in row] for row in ([*colors, *shadows], list(depths))])


def _small(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    return np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
