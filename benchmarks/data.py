"""Data: procedural rendering, building a set, reading it for training, memory of a reader.

    python benchmarks/data.py [--parts rendering building reading memory] [--size 448] [--read-size 448] [--out FILE]

Objects are procedural, rendered and written in the GObjaverse layout, then built and read as a user's would be, from
a folder that is removed again (--folder keeps it for another time). Files are in memory: disks are not measured.
Other load counts against wall time: `load` and the processor seconds of each part stand beside it.
"""

import argparse
import collections
import concurrent.futures
import gc
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import measuring
import numpy as np

from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.examples import make_example, premultiply
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.folder_writing import write_view
from geolrm_jax.data.on_demand import RenderedSource
from geolrm_jax.data.pipeline import PipelineConfig, training_dataset
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.data.reader import RecordSource, open_split

VIEWS = tuple(v for v in range(40) if v not in (24, 39))
DISTINCT = 2  # rendered; the other objects are copies of them
DRAWN, INPUTS, BATCH = 8, 7, 4
# (worker processes, threads in each) of the training pipeline
WAYS = ((0, 1), (0, 2), (0, 3), (1, 2), (2, 1))


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cost_of(call, repeats: int = 1) -> dict[str, float]:
    """Wall and processor seconds of one call, the mean over `repeats`, and the load meanwhile."""
    wall, processor = time.perf_counter(), processor_seconds()
    for _ in range(repeats):
        call()
    seconds = {"wall_s": time.perf_counter() - wall, "processor_s": processor_seconds() - processor}
    return {name: value / repeats for name, value in seconds.items()} | {"load": os.getloadavg()[0]}


def rendering(size: int, objects: int) -> dict:
    """Compilation, views/s from one caller and from one for each core, and records rendered for a training example."""
    source = ProceduralSource(objects, test_objects=0, size=size, view_ids=VIEWS)
    ids, drawn = source.ids("train"), RenderedSource(DataConfig(source, on_demand=True), "train")

    def read(id):
        return source.read("train", id)

    def example(index):
        record = drawn[index]
        return record.occupancy, record.views(VIEWS[3 : 3 + DRAWN])

    compile_seconds = measuring.seconds_of(lambda: (read(ids[0]), example(0)))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        ways = {
            "views_one_caller": cost_of(lambda: [read(id) for id in ids]),
            "views_all_cores": cost_of(lambda: list(pool.map(read, ids))),
            "examples_all_cores": cost_of(lambda: list(pool.map(example, range(objects)))),
        }
    counts = {name: objects * (len(VIEWS) if name.startswith("views") else 1) for name in ways}
    return {
        "size": size,
        "objects": objects,
        "compile_s": compile_seconds,
        **{f"{name}_per_s": counts[name] / cost["wall_s"] for name, cost in ways.items()},
        **{f"{name}_per_processor_s": counts[name] / cost["processor_s"] for name, cost in ways.items()},
        "load": ways["views_all_cores"]["load"],
    }


def write_objects(folder: Path, size: int, count: int) -> Path:
    """`count` objects in the GObjaverse layout, all 40 views each; those of an earlier call are used again."""
    if folder.exists():
        return folder
    source = ProceduralSource(DISTINCT, test_objects=0, size=size, view_ids=tuple(range(40)))
    for number, id in enumerate(source.ids("train")):
        views = source.read("train", id)
        for row, view in enumerate(views.view_ids.tolist()):
            write_view(
                folder / f"{number}",
                view,
                rgba=views.rgba[row],
                depth=views.depth[row],
                normal=np.zeros((size, size, 3), np.float32),
                world_from_camera=views.cameras.world_from_camera[row],
                intrinsics=views.cameras.intrinsics[row],
            )
    for number in range(DISTINCT, count):
        shutil.copytree(folder / f"{number % DISTINCT}", folder / f"{number}")
    return folder


def cost_of_building(config: DataConfig, root: Path, processes: int) -> dict[str, float]:
    """Of one set, which is removed again."""
    with tempfile.TemporaryDirectory(dir=root) as out:
        return cost_of(lambda: build(config, Path(out) / "set", processes=processes))


def on_cores(count: int, function, *arguments):
    """What a function of this file returns in a fresh process that has `count` cores, for its own processes too."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:count])
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(function, *arguments).result()
    os.sched_setaffinity(0, every)
    return result


def building(root: Path, size: int, objects: int) -> dict:
    """Seconds per object of 40 views on one core and on all, both encodings; MB of its source files."""
    folder = write_objects(root / f"objects_{size}", size, objects)
    source_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    result = {"size": size, "objects": objects, "source_MB_per_object": source_bytes / objects / 1e6}
    for encoding, cores in itertools.product(("raw", "png"), (1, os.cpu_count())):
        config = DataConfig(FolderSource(str(folder)), occupancy_grid=128, image_encoding=encoding)
        cost = on_cores(cores, cost_of_building, config, root, cores)
        cost["wall_s"], cost["processor_s"] = cost["wall_s"] / objects, cost["processor_s"] / objects
        result[f"{encoding}, {cores} cores, per object"] = cost
    return result


def reading(root: Path, size: int, read_size: int, objects: int) -> dict:
    """Samples/s of the training pipeline, and where the time of a sample goes, both encodings."""
    folder = write_objects(root / f"objects_{size}", size, objects)
    result = {"size": size, "read_size": read_size, "drawn": DRAWN, "of": len(VIEWS)}
    for encoding in ("raw", "png"):
        config = DataConfig(FolderSource(str(folder)), occupancy_grid=128, image_encoding=encoding)
        built = build(config, root / f"built_{encoding}")
        train = open_split(built, "train")
        stored = sum(file.stat().st_size for file in built.rglob("*") if file.is_file())
        result[encoding] = {
            "MB_per_object": stored / objects / 1e6,
            "ms_per_sample": parts_of_a_sample(train, read_size),
            **{f"{p} processes, {t} threads": samples_per_second(train, read_size, p, t) for p, t in WAYS},
        }
    return result


def parts_of_a_sample(train: RecordSource, size: int, repeats: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds in one thread; decoding includes reading, the whole example all but the copy into its batch."""
    record, ids = train[0], list(VIEWS[3 : 3 + DRAWN])
    rows = [record.view_ids.tolist().index(view) for view in ids]
    views = record.views(ids)
    calls = {
        "open the record": lambda: train[0],
        "read 8 views, undecoded": lambda: record.read_views(rows),
        "read and decode 8 views": lambda: record.views(ids),
        "premultiply": lambda: premultiply(views.rgba),
        "occupancy": lambda: record.occupancy,
        "the whole example": lambda: make_example(record, ids[:INPUTS], ids, (size, size), (size, size)),
    }
    return {
        name: {k: 1e3 * v for k, v in cost_of(call, repeats).items() if k != "load"} for name, call in calls.items()
    }


def samples_per_second(train: RecordSource, size: int, processes: int, threads: int, steps: int = 25) -> dict:
    """Of the training pipeline, once it runs; the consumer does nothing."""
    batches = iter(
        training_dataset(
            train,
            batch=BATCH,
            views=DRAWN,
            inputs=INPUTS,
            input_size=(size, size),
            render_size=(size, size),
            seed=0,
            config=PipelineConfig(threads=threads, processes=processes),
        )
    )
    for _ in range(2 * threads * max(processes, 1) + 1):  # what was decoded ahead does not count
        next(batches)
    cost = cost_of(lambda: next(batches), steps)
    batches.close()
    result = {"samples_per_s": BATCH / cost["wall_s"], "load": cost["load"]}
    return result if processes else result | {"processor_ms_per_sample": 1e3 * cost["processor_s"] / BATCH}


def memory(root: Path, records: int) -> dict:
    """Resident MB of a reader over many small records, at every tenth of the way."""
    source = ProceduralSource(64, test_objects=0, size=16, view_ids=VIEWS[::4])
    train = open_split(build(DataConfig(source, occupancy_grid=16), root / "small"), "train")
    sizes = dict(input_size=(28, 28), render_size=(16, 16))
    batches = iter(training_dataset(train, batch=50, views=DRAWN, inputs=INPUTS, seed=0, **sizes))
    resident, page = [], os.sysconf("SC_PAGE_SIZE")
    for _ in range(10):
        collections.deque(itertools.islice(batches, records // 500), maxlen=0)
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6)
    return {"records": records, "resident_MB": resident}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("rendering", "building", "reading", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--size", type=int, default=448, help="of stored views that are read")
    parser.add_argument("--read-size", type=int, default=448, help="of the inputs and targets made of them")
    parser.add_argument("--build-size", type=int, default=512, help="of views in the building part")
    parser.add_argument("--render-size", type=int, default=128, help="of rendered views")
    # Grain's shuffle takes milliseconds for the next of a few numbers, and microseconds for that of thousands.
    parser.add_argument("--objects", type=int, default=32, help="that are read")
    parser.add_argument("--built", type=int, default=32, help="objects of the building part")
    parser.add_argument("--rendered", type=int, default=32, help="objects of the rendering part")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="an empty folder for the sets, or that of another time")
    parser.add_argument("--out", type=Path, help="also written there")
    arguments = parser.parse_args()
    result = measuring.environment(os.cpu_count(), "grain", "array_record", "tensorflow_datasets")
    result["versions"]["pillow"] = version("pillow")
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        calls = {
            "rendering": lambda: rendering(arguments.render_size, arguments.rendered),
            "building": lambda: building(root, arguments.build_size, arguments.built),
            "reading": lambda: reading(root, arguments.size, arguments.read_size, arguments.objects),
            "memory": lambda: memory(root, arguments.records),
        }
        result |= {name: calls[name]() for name in arguments.parts}
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
