"""Time of the rasterizer, forward and forward + backward of all inputs.

  python benchmarks/rasterizer.py [--cases object_50000_256,quickstart] [--repeats 10] [--json FILE]

The scene: numpy `default_rng(0)`, means uniform in the cube, quats normal, scales sigmoid(normal) * 0.02, opacities
sigmoid(normal), colours uniform, cameras at distance 1.75 with a field of view of 50 degrees, white background.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from geolrm_jax.geometry.cameras import orbit
from geolrm_jax.rendering import count_pairs, rasterize
from geolrm_jax.scene import Cameras, Gaussians
from kernels_pallas.rasterization.shapes import WORKLOADS, Workload

CASES = {
    f"object_{gaussians}_{size}": Workload(scenes=1, views=1, gaussians=gaussians, size=size)
    for gaussians in (2_000, 10_000, 50_000)
    for size in (128, 256)
} | WORKLOADS
DEFAULT = [*(name for name in CASES if name.startswith("object_")), "quickstart"]


def make_scene(case: Workload) -> tuple[Gaussians, Cameras]:
    """Gaussians (B, G) and cameras (B, V) of the benchmark's scene."""
    rng, shape = np.random.default_rng(0), (case.scenes, case.gaussians)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    means, quats = rng.uniform(-0.5, 0.5, (*shape, 3)), rng.normal(size=(*shape, 4))
    scales, opacities = sigmoid(rng.normal(size=(*shape, 3))) * 0.02, sigmoid(rng.normal(size=shape))
    arrays = (means, scales, quats, opacities, rng.uniform(size=(*shape, 3)))
    gaussians = Gaussians(*(jnp.asarray(a, jnp.float32) for a in arrays), mask=jnp.ones(shape, bool))
    rig = orbit(np.arange(case.views) * 360.0 / case.views, 20.0, 1.75, 50.0, case.size)
    poses, intrinsics = (jnp.tile(a, (case.scenes, 1, 1, 1)) for a in (rig.world_from_camera, rig.intrinsics))
    return gaussians, Cameras(poses, intrinsics, case.size, case.size)


def programs(case: Workload, mask, capacity: int):
    """Compiled-on-call `forward(inputs)` and `forward_and_backward(inputs)`; the gradient is that of all inputs."""

    def forward(inputs):
        fields = (inputs[key] for key in ("means", "scales", "quats", "opacities", "colors"))
        cameras = Cameras(inputs["world_from_camera"], inputs["intrinsics"], case.size, case.size)
        return rasterize(Gaussians(*fields, mask=mask), cameras, background=inputs["background"], capacity=capacity)

    def loss(inputs):
        rendering = forward(inputs)
        return jnp.mean(rendering.rgb**2) + jnp.mean(rendering.alpha) + jnp.mean(rendering.depth)

    return jax.jit(forward), jax.jit(jax.value_and_grad(loss))


def measure(function, inputs, repeats: int) -> dict[str, float]:
    """Seconds of the first call, which compiles, and of the following ones."""

    def seconds():
        begin = time.perf_counter()
        jax.block_until_ready(function(inputs))
        return time.perf_counter() - begin

    first, times = seconds(), [seconds() for _ in range(repeats)]
    return {"first": first, "median": statistics.median(times), "least": min(times)}


def run(name: str, repeats: int) -> dict:
    """One case's row."""
    case = CASES[name]
    gaussians, cameras = make_scene(case)
    pairs = count_pairs(gaussians, cameras)
    inputs = {key: getattr(gaussians, key) for key in ("means", "scales", "quats", "opacities", "colors")}
    inputs |= {"world_from_camera": cameras.world_from_camera, "intrinsics": cameras.intrinsics}
    inputs["background"] = jnp.ones(3)
    forward, both = programs(case, gaussians.mask, pairs)
    row = {"case": name, **case._asdict(), "pairs": pairs}
    row |= {"forward": measure(forward, inputs, repeats), "forward_backward": measure(both, inputs, repeats)}
    print(
        f"{name:20s} {pairs:9d} pairs   forward {row['forward']['median']:8.4f} s   "
        f"forward + backward {row['forward_backward']['median']:8.4f} s   "
        f"(first calls {row['forward']['first']:.1f}, {row['forward_backward']['first']:.1f} s)",
        flush=True,
    )
    return row


def environment() -> dict:
    """What the numbers were measured on."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    return {
        "hardware": {"devices": [d.device_kind for d in jax.devices()], "cpu": cpu, "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    """Runs the cases, prints a line for each, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(DEFAULT), help=f"comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    names = arguments.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}; known: {', '.join(CASES)}")
    result = environment() | {"rows": [run(name, arguments.repeats) for name in names]}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
