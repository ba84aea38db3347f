"""Import and export of a checkpoint of the released size: time and peak memory, each in a process of its own.

    python benchmarks/import_weights.py [--config released] [--folder DIR]

Writes a synthetic checkpoint (random numbers under the released names) with torch.save, nested under `state_dict`,
imports it, exports it to safetensors, imports that, exports again, and compares the two exports byte by byte. Prints
one JSON line: seconds, peak resident memory and its share of the checkpoint's size, interpreter and libraries included.
Needs the extra `torch` and 6 GB of disk.
"""

import argparse
import filecmp
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

# Nothing large is imported or made in this process: a child's peak memory counts its parent's at the fork.


def make_checkpoint(config: str, path: Path) -> None:
    """Random weights under the released names, with an entry of each kind that is ignored."""
    import numpy as np
    import torch

    from geolrm_jax.config import load_config
    from geolrm_jax.weights.released import released_leaves

    rng = np.random.default_rng(0)
    state = {"lpips.net.weight": torch.zeros(8, 8)}
    for leaf in released_leaves(load_config(config).model):
        for key in leaf.keys:
            values = rng.standard_normal(leaf.there_shape, dtype=np.float32) * np.float32(0.02)
            state[key] = torch.tensor(7) if leaf.dtype.kind == "i" else torch.from_numpy(values)
    torch.save({"state_dict": state, "epoch": 11}, path)


def measured(*command: str) -> dict[str, float]:
    """Seconds and peak memory of `geolrm weights ...` in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "geolrm_jax.cli", "weights", *command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"geolrm weights {' '.join(command)} failed")
    return {"seconds": time.perf_counter() - start, "peak_bytes": used.ru_maxrss * 1024}


def libraries() -> int:
    """Peak memory of a process that imports what an import does, and nothing else."""
    code = "import torch, geolrm_jax.recipe"
    process = subprocess.Popen([sys.executable, "-c", code])
    return os.wait4(process.pid, 0)[2].ru_maxrss * 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="released")
    parser.add_argument("--folder", help="where the files go, on a disk with room")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        checkpoint, first, second = folder / "synthetic.ckpt", folder / "1.safetensors", folder / "2.safetensors"
        making = multiprocessing.get_context("spawn").Process(
            target=make_checkpoint, args=(arguments.config, checkpoint)
        )
        making.start()
        making.join()
        config = ("--config", arguments.config)
        runs = {
            "import_torch": measured("import", "--from", str(checkpoint), "--to", str(folder / "a"), *config),
            "export": measured("export", "--workdir", str(folder / "a"), "--to", str(first)),
            "import_safetensors": measured("import", "--from", str(first), "--to", str(folder / "b"), *config),
            "export_again": measured("export", "--workdir", str(folder / "b"), "--to", str(second)),
        }
        size = checkpoint.stat().st_size
        for run in runs.values():
            run["share_of_checkpoint"] = run["peak_bytes"] / size
        print(
            json.dumps(
                {
                    "config": arguments.config,
                    "checkpoint_bytes": size,
                    "libraries_alone_bytes": libraries(),
                    **runs,
                    "exports_equal": filecmp.cmp(first, second, shallow=False),
                    "load": os.getloadavg()[0],
                    "versions": {
                        name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "torch")
                    },
                    "date": date.today().isoformat(),
                }
            )
        )


if __name__ == "__main__":
    main()
