"""Attention compiled ahead of time for accelerators that need not be there: memory, and what the compiler estimates.

  python benchmarks/compile_attention.py --targets v5e,v5p,v6e [--json FILE]
  python benchmarks/compile_attention.py --targets v5p --cases self/largest
  python benchmarks/compile_attention.py --targets v5e --cases deformable/training --bundles FOLDER
  python benchmarks/compile_attention.py --targets h200 --cases deformable/training

Deformable and self-attention in bfloat16 at the model's shapes, forward and forward + backward, by each implementation;
what does not fit into the device's memory is said to. cuDNN's call cannot be compiled without a GPU. What has to be
installed: see compile_rasterizer.py.

`estimated_cycles` are XLA's for TPUs, times the trips of the loops around: a compiler's estimate and no measurement.
It has none for gathers, scatters and kernels, whose number is `not_estimated`. Those are counted otherwise: `--bundles`
has libtpu write the machine code there, and reports how many bundles, a cycle each unless one waits for memory, each
loop of gathers, scatters and kernels is long. In it a gather reads 128 rows; the inner loop of a scatter adds 16.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

# Trace on the CPU, whatever the machine has; libtpu must neither look for a TPU nor mind another process.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from compile_rasterizer import TARGETS, versions
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.deformable_attention import multiview_deformable_attention
from kernels_pallas.deformable_attention.shapes import WORKLOADS as DEFORMABLE
from kernels_pallas.self_attention import self_attention
from kernels_pallas.self_attention.shapes import WORKLOADS as SELF

TARGETS = TARGETS | {"v5p": {"platform": "tpu", "topology_name": "v5p:2x2x1"}}
DEFAULT = "deformable/training,deformable/evaluation,self/evaluation,self/largest"
COUNTED = re.compile(r"gather|scatter|deformable|splash")  # instructions whose loops are worth a look


CASES = {f"deformable/{name}": case for name, case in DEFORMABLE.items()}
CASES |= {f"self/{name}": case for name, case in SELF.items()}


def problem(name: str, implementation: str):
    """A function, shapes of the arguments that have a gradient and of the others, and of the result."""
    case, shape = CASES[name], jax.ShapeDtypeStruct
    if name.startswith("self/"):
        array = shape(case, jnp.bfloat16)

        def attend(arguments, lengths):
            return self_attention(*arguments, lengths, implementation=implementation)

        return attend, (array,) * 3, shape((case.scenes,), jnp.int32), array

    # As the model has them: maps and result with heads and channels on one axis.
    lead, width = (case.scenes, case.views), case.heads * case.channels
    samples = (case.scenes, case.queries, case.heads, len(case.maps), case.points)
    maps = tuple(shape((*lead, *size, width), jnp.bfloat16) for size in case.maps)
    places = shape((*lead, case.queries, 2), jnp.float32), shape((*samples, 2), jnp.float32)

    def sample(arguments, valid):
        maps, *rest = arguments
        maps = tuple(m.reshape(*m.shape[:-1], case.heads, case.channels) for m in maps)
        out = multiview_deformable_attention(maps, *rest, valid, implementation=implementation)
        return out.reshape(*out.shape[:3], -1)

    result = shape((*lead, case.queries, width), jnp.bfloat16)
    return sample, (maps, *places, shape(samples, jnp.float32)), shape((*lead, case.queries), bool), result


def with_gradients(forward):
    """It, and the gradients of its first argument."""

    def both(arguments, rest, d_out):
        out, pull = jax.vjp(lambda arguments: forward(arguments, rest), arguments)
        return out, pull(d_out)

    return both


def compile_for(target: str, name: str, implementation: str, gradient: bool, bundles: Path | None) -> dict:
    """Compiles one workload and returns the row of the table."""
    forward, *shapes = problem(name, implementation)
    function, shapes = (with_gradients(forward), shapes) if gradient else (forward, shapes[:2])
    device = topologies.get_topology_desc(**TARGETS[target]).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    # Pallas asks which device it lowers for.
    cores = device.num_cores if device.platform == "tpu" else None
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform=device.platform)
    ambient = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=kind)
    before, begin = set(bundle_files(bundles)), time.perf_counter()
    row = {
        "target": target,
        "case": name,
        **CASES[name]._asdict(),
        "implementation": implementation,
        "gradient": gradient,
    }
    with jax.sharding.use_abstract_mesh(ambient):
        lowered = jax.jit(function).trace(*shapes).lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{target:5s} {name:22s} {implementation:5s} gradient {gradient}: does not fit", flush=True)
        return row | {"does_not_fit": str(error).splitlines()[0]}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    row |= {"kernels": len(re.findall(r"tpu_custom_call|xla\.gpu\.triton", text))}
    row |= {"compile_s": round(time.perf_counter() - begin, 1)}
    for part in ("argument_size", "output_size", "temp_size", "peak_memory"):
        row[f"{part}_bytes"] = getattr(memory, f"{part}_in_bytes", None)
    if device.platform == "tpu":
        row["estimated_cycles"], row["not_estimated"] = estimated_cycles(text)
        row["loops"] = {f.name.split("-")[1]: loops(f) for f in sorted(set(bundle_files(bundles)) - before)}
    print(
        f"{target:5s} {name:22s} {implementation:5s} {'forward + backward' if gradient else 'forward':18s}   "
        f"peak {(row['peak_memory_bytes'] or 0) / 2**30:6.2f} GiB   "
        f"estimated {row.get('estimated_cycles', 0) / 1e6:6.1f} million cycles without "
        f"{row.get('not_estimated', 0)} instructions   compiled in {row['compile_s']:.0f} s",
        *(
            f"\n      {instruction}: loops of {lengths} bundles"
            for instruction, lengths in row.get("loops", {}).items()
        ),
        flush=True,
    )
    return row


def estimated_cycles(text: str) -> tuple[int, int]:
    """XLA's estimates in a compiled program, by the trips of loops, and how many gathers and the like have none."""
    computations, name = {}, ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if start[1] else start[2]
            computations[name] = []
        elif name:
            computations[name].append(line)

    def trips(condition: str) -> int:
        """A loop that counts to a constant compares with it, and with nothing larger."""
        numbers = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition]))
        return max(map(int, numbers), default=1)

    def walk(name: str) -> tuple[int, int]:
        cycles = missing = 0
        for line in computations[name]:
            if found := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                inner = walk(found[2])
                cycles, missing = cycles + trips(found[1]) * inner[0], missing + inner[1]
            elif found := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                inner = walk(found[1])
                cycles, missing = cycles + inner[0], missing + inner[1]
            elif found := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles += int(found[1])
            elif re.search(r"kind=kCustom|tpu_custom_call| sort\(", line):
                missing += 1
        return cycles, missing

    return walk("ENTRY")


def bundle_files(folder: Path | None) -> list[Path]:
    """Machine code of what is counted."""
    files = folder.glob("*-final_bundles.txt") if folder else ()
    return [f for f in files if "schedule-analysis" not in f.name and COUNTED.search(f.name)]


def loops(file: Path) -> list[int]:
    """How many bundles long each loop is, outer loops with those inside of them."""
    begin, lengths, address = {}, [], 0
    for line in file.read_text().splitlines():
        if not (bundle := re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", line)):
            continue
        address = int(bundle[1], 16)
        for region in re.findall(r"Start region (\d+)", line):
            begin.setdefault(region, address)
        jump = re.search(r"sbr\.rel .*target = \$region(\d+)", line)
        if jump and begin.get(jump[1], address + 1) <= address:
            lengths.append(address - begin[jump[1]] + 1)
    return lengths


def main() -> None:
    """Compiles what is asked for, prints a line for each, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="v5e,v5p,v6e", help=f"comma-separated, of: {', '.join(TARGETS)}")
    parser.add_argument("--cases", default=DEFAULT, help=f"of: {', '.join(CASES)} ({DEFAULT})")
    parser.add_argument("--implementations", default="auto,xla", help="of: auto, xla")
    parser.add_argument("--bundles", type=Path, help="an empty folder for libtpu's machine code; TPUs only")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    targets, cases, implementations = (
        x.split(",") for x in (arguments.targets, arguments.cases, arguments.implementations)
    )
    if unknown := (set(targets) - set(TARGETS)) | (set(cases) - set(CASES)) | (set(implementations) - {"auto", "xla"}):
        parser.error(f"unknown: {sorted(unknown)}")
    if arguments.bundles:
        arguments.bundles.mkdir(parents=True, exist_ok=True)
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={arguments.bundles} "
            "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
    rows = []
    for row in ((t, c, i, g) for t in targets for c in cases for i in implementations for g in (False, True)):
        rows.append(compile_for(*row, arguments.bundles))
        if arguments.json:  # after each: compiling takes up to minutes
            result = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
