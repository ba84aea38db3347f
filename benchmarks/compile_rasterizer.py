"""The rasterizer compiled ahead of time for accelerators that need not be there: does it compile, in how much memory.

  python benchmarks/compile_rasterizer.py --targets v5e,v6e [--cases training,evaluation] [--json FILE]
  python benchmarks/compile_rasterizer.py --targets h200

For TPUs this needs `pip install 'jax[tpu]'`, for the H200 the two wheels `jax-cuda13-plugin` and `jax-cuda13-pjrt` and,
on the path, `ptxas` of CUDA 13; no device, and no driver. On TPUs blending is plain XLA, on the H200 the Pallas kernel.
What the H200's compiled program uses of registers is in the files that XLA_FLAGS=--xla_dump_to=FOLDER leaves behind:
`ptxas -v -arch=sm_90a` on those whose entry is blend_forward, blend_backward or sum_by_splat.

Capacities are the pairs of the benchmark's scene (see rasterizer.py). The peak is XLA's own figure where it gives one.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Trace on the CPU, whatever the machine has; libtpu must neither look for a TPU nor mind another process.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from rasterizer import loss_of, make_inputs, scene_of

from geolrm_jax.rendering import count_pairs, rasterize
from kernels_pallas.rasterization.shapes import WORKLOADS

# What XLA wants to know of an NVIDIA H200 SXM, from its data sheet and the tables of compute capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
"""
TARGETS = {
    "v5e": {"platform": "tpu", "topology_name": "v5e:2x2"},
    "v6e": {"platform": "tpu", "topology_name": "v6e:2x2"},
    "h200": {"platform": "cuda", "topology_name": "h200", "topology": "1x1x1", "target_config": H200},
}


def compile_for(target: str, name: str, gradient: bool) -> dict:
    """Compiles one workload, forward or forward + backward of all inputs, and returns the row of the table."""
    case = WORKLOADS[name]
    inputs = make_inputs(case)
    pairs = count_pairs(*scene_of(inputs, case.size))
    device = topologies.get_topology_desc(**TARGETS[target]).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())

    def forward(inputs):
        gaussians, cameras = scene_of(inputs, case.size)
        r = rasterize(gaussians, cameras, background=inputs["background"], capacity=pairs)
        return r.rgb, r.alpha, r.depth, r.overflow

    def loss(inputs):
        *picture, overflow = forward(inputs)
        return loss_of(*picture), overflow

    function = jax.value_and_grad(loss, has_aux=True) if gradient else forward
    shapes = {key: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=sharding) for key, a in inputs.items()}
    # Pallas asks which GPU it lowers for, from jax 0.11 on.
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform=device.platform)
    ambient = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=kind)
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(ambient):
        compiled = jax.jit(function).trace(shapes).lower().compile()
    memory = compiled.memory_analysis()
    row = {"target": target, "case": name, **case._asdict(), "pairs": pairs, "gradient": gradient}
    row |= {"kernels": compiled.as_text().count("xla.gpu.triton"), "compile_s": round(time.perf_counter() - begin, 1)}
    for part in ("argument_size", "output_size", "temp_size", "peak_memory"):
        row[f"{part}_bytes"] = getattr(memory, f"{part}_in_bytes", None)
    print(
        f"{target:5s} {name:10s} {'forward + backward' if gradient else 'forward':18s} {pairs:9d} pairs   "
        f"temporaries {row['temp_size_bytes'] / 2**30:6.2f} GiB   compiled in {row['compile_s']:.0f} s",
        flush=True,
    )
    return row


def versions() -> dict[str, str]:
    """Of what takes part in compiling."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # a target that was not asked for
    return found


def main() -> None:
    """Compiles what is asked for, prints a line for each, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="v5e,v6e", help=f"comma-separated, of: {', '.join(TARGETS)}")
    parser.add_argument("--cases", default="training,evaluation", help=f"of: {', '.join(WORKLOADS)}")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    targets, cases = arguments.targets.split(","), arguments.cases.split(",")
    if unknown := (set(targets) - set(TARGETS)) | (set(cases) - set(WORKLOADS)):
        parser.error(f"unknown: {sorted(unknown)}")
    rows = []
    for target, case, gradient in ((t, c, g) for t in targets for c in cases for g in (False, True)):
        rows.append(compile_for(target, case, gradient))
        if arguments.json:  # after each: compiling for a TPU takes minutes
            result = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
