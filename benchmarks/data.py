"""Data: procedural rendering, building a set, reading it back.

    python benchmarks/data.py [--objects 40] [--views 16] [--size 128] [--inputs 4] [--drawn 8]

Prints one JSON line: views/s of rendering (one caller, and one for each core), seconds and bytes of a built set for
both encodings, samples/s of the training pipeline. Other load on the machine counts against it: `load` is given.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from geolrm_jax.data.pipeline import DataConfig, ProceduralSource, build, open_split, training_dataset


def timed(call) -> float:
    """Seconds that `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rendering(source: ProceduralSource) -> dict[str, float]:
    """Compilation in seconds, and views/s once compiled."""
    ids, views = source.ids("train"), len(source.view_ids)

    def read(id):
        return source.read("train", id)

    compile_seconds = timed(lambda: read(ids[0]))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        alone = timed(lambda: [read(id) for id in ids])
        together = timed(lambda: list(pool.map(read, ids)))
    return {
        "compile_s": compile_seconds,
        "views_per_s_one_caller": len(ids) * views / alone,
        "views_per_s_all_cores": len(ids) * views / together,
    }


def building_and_reading(config: DataConfig, arguments: argparse.Namespace) -> dict[str, float]:
    """Build time and size of a set, and samples/s of its training pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "set"
        seconds = timed(lambda: build(config, directory))
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        train = open_split(directory, "train")
        input_size, render_size = (arguments.size // 28 * 28,) * 2, (arguments.size,) * 2
        batches = iter(
            training_dataset(
                train,
                batch=4,
                views=arguments.drawn,
                inputs=arguments.inputs,
                input_size=input_size,
                render_size=render_size,
                seed=0,
            )
        )
        next(batches)
        reading = timed(lambda: list(itertools.islice(batches, 25)))
        return {"build_s": seconds, "kB_per_object": size / len(train) / 1e3, "samples_per_s": 100 / reading}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"objects": 40, "views": 16, "size": 128, "inputs": 4, "drawn": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    view_ids = tuple(np.linspace(0, 23, arguments.views).round().astype(int).tolist())
    source = ProceduralSource(arguments.objects, test_objects=0, size=arguments.size, view_ids=view_ids)
    config = DataConfig(source)
    result = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        **vars(arguments),
        "rendering": rendering(source),
        **{
            encoding: building_and_reading(dataclasses.replace(config, image_encoding=encoding), arguments)
            for encoding in ("raw", "png")
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
