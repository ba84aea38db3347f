"""The Pallas kernel on a real NVIDIA GPU: right, deterministic, and how fast beside plain XLA.

  python benchmarks/gpu_check_rasterizer.py [--cases quickstart,training,evaluation] [--json FILE] [--trace FOLDER]
  python -m pytest tests/kernels/rasterization      # where there is a GPU, the suite runs on the compiled kernel too

For each case, the scene of rasterizer.py: picture and gradients of "pallas_gpu" against "xla", all gradients twice bit
by bit, then both timed in turns. What is wrong is listed in the case's row, and the exit code is 1. `--trace` writes
one call of each step for a profiler: the kernels are blend_forward, blend_backward and sum_by_splat; docs/kernels.md
has their floors.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from measuring import environment
from rasterizer import CASES, FLIPS, compare, make_inputs, ours, race, scene_of

from geolrm_jax.rendering import count_pairs

PICTURE, GRADIENT = 5e-3, 1e-4  # the largest difference of a pixel in which a threshold flipped; relative L2


def check(name: str, repeats: int, trace: Path | None) -> dict:
    """One case's row; what is wrong is listed under "failures"."""
    case = CASES[name]
    inputs = make_inputs(case)
    pairs = count_pairs(*scene_of(inputs, case.size))
    programs = {which: ours(inputs, case.size, pairs, which) for which in ("pallas_gpu", "xla")}
    kernel = programs["pallas_gpu"]
    difference = compare(kernel, programs["xla"])
    (_, first), (_, again) = kernel.both(), kernel.both()

    worst = max(difference[key] for key in ("rgb", "alpha", "depth"))
    failures = {
        f"pixels that differ by more than 1e-4: {difference['share_beyond_1e-4']:.2%}": (
            difference["share_beyond_1e-4"] > FLIPS
        ),
        f"a pixel differs by {worst:.1e}": worst > PICTURE,
        "the same input gave other bits": any(
            np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(first.values(), again.values(), strict=True)
        ),
    }
    failures |= {f"gradient of {k} differs by {v:.1e}": v > GRADIENT for k, v in difference["gradients"].items()}
    row = {"case": name, **case._asdict(), "pairs": pairs, "difference": difference}
    row |= race(programs, repeats) | {
        "memory": kernel.memory(),
        "failures": [text for text, bad in failures.items() if bad],
    }
    with jax.profiler.trace(str(trace / name)) if trace else contextlib.nullcontext():
        kernel.forward()
        kernel.both()
    return row


def main() -> int:
    """Checks the cases, prints each row, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="quickstart,training,evaluation", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--trace", type=Path, help="where to write profiles")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"this needs an NVIDIA GPU; JAX runs on {jax.devices()[0].device_kind}")
    rows = []
    for name in arguments.cases.split(","):
        rows.append(check(name, arguments.repeats, arguments.trace))
        print(json.dumps(rows[-1], indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(environment(0) | {"rows": rows}, indent=2) + "\n")
    return 1 if any(row["failures"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
