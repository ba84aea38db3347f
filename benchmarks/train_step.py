"""The train step of a stage: samples a second, memory, MFU, and where the time of the reconstruction's goes.

  python benchmarks/train_step.py --json FILE                       # full size, on a GPU or TPU
  python benchmarks/train_step.py --remat none dots full --no-parts # rematerialisation policies take turns
  python benchmarks/train_step.py --config quickstart --repeats 3   # small, on a CPU
  python benchmarks/train_step.py --profile FOLDER                  # and a trace of three steps of each

Fields of the config are overridden as in training: `--reconstruction.objective.max-anchors 16384`.
JAX_COMPILATION_CACHE_DIR saves compiling again.

It is the step that training runs: forward, all losses, backward, guard, optimizer; its state donated, its batch on the
device already, the host waiting for every step. The batch is `--batch` procedural objects per device, in one part
whatever the config accumulates, seen from around. Weights are fresh ones, LPIPS's random numbers:
a fresh proposal finds about half of all voxels occupied, so that all anchors are used, spread over the cube. The
rasterizer's capacity is doubled until nothing overflows, as in training. The programs named by `--compute` and
`--remat` take turns where the device holds their states at once, else they run one after the other; the row says which.

MFU: operations of forward and backward counted from the jaxpr (runtime/cost.py) without the rematerialisation that the
config chooses (LPIPS's own counts), over the device's dense bfloat16 peak, in float32 too. Memory: `compiled` is what
the compiler plans, `peak` what the device reports less what other programs held, where it tells.

The parts are compiled apart, each on what the one before gives. With backward means forward and the gradients of its
parameters and of what it got from the part before; the frozen proposal has none. The optimizer's row is the real step
whose gradients are given. What a sum of parts leaves of the step, "unexplained", is what fusing them saves (negative)
or what lies between them. There is no other implementation of this model to stand beside it.
"""

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any, get_args

import jax
from measuring import environment, free_memory, take_turns
from step_parts import PASSES, time_parts
from step_setup import Step, configured, device_memory, make_batch

from geolrm_jax.config import apply_overrides, load_config
from geolrm_jax.models.layers import Remat
from geolrm_jax.training.objectives import ReconstructionObjective


def fit_together(programs: list[jax.stages.Compiled]) -> bool:
    """Whether the device, on a CPU the machine, holds the arguments of all and the largest rest."""
    found = [program.memory_analysis() for program in programs]
    held = sum(m.argument_size_in_bytes for m in found)
    rest = max(m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes for m in found)
    return held + rest < 0.9 * (device_memory("bytes_limit") or free_memory())


def in_the_sum(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the parts that make up a step."""
    return {r["part"]: (r["with_backward"] or r["forward"])["median"] for r in rows if not r["of"]}


def show(name: str, row: dict[str, Any]) -> None:
    """One program's line."""
    memory = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in row["memory"].items() if size)
    used = f", MFU {row['mfu']:.3f}" if row["mfu"] else ""
    seconds, flops = row["seconds"], row["flops_per_sample"]
    print(
        f"{name}: {seconds['median']:.4f} s a step (least {seconds['least']:.4f}), "
        f"{row['samples_per_second']:.2f} samples/s, {flops / 1e12:.3f} TFLOP a sample{used}; {memory}",
        flush=True,
    )


def show_parts(row: dict[str, Any]) -> None:
    """The table of one program's parts."""
    step = row["seconds"]["median"]
    print(
        f"{'part':28s}{'forward ms':>12s}{'with backward':>15s}{'of the step':>13s}{'TFLOP':>9s}{'MFU':>8s}{'GB':>8s}"
    )
    for part in row["parts"]:
        forward, both = (f"{part[k]['median'] * 1e3:.2f}" if part[k] else "" for k in PASSES)
        share = f"{(part['with_backward'] or part['forward'])['median'] / step:.1%}"
        name, used = ("  " if part["of"] else "") + part["part"], f"{part['mfu']:.3f}" if part["mfu"] else ""
        figures = f"{part['flops'] / 1e12:9.3f}{used:>8s}{part['memory'] / 1e9:8.2f}"
        print(f"{name:28s}{forward:>12s}{both:>15s}{share:>13s}{figures}")
    print(f"{'unexplained':28s}{'':12s}{row['unexplained'] * 1e3:15.2f}{row['unexplained'] / step:13.1%}", flush=True)


def run(steps: dict[str, Step], arguments: argparse.Namespace, together: bool) -> list[dict[str, Any]]:
    """Rows of programs whose states are on the device at once."""
    rows = {}
    for step in steps.values():
        step.start()
    times = take_turns(steps, arguments.repeats)
    for name, step in steps.items():
        rows[name] = step.row(times[name], together)
        show(name, rows[name])
    for name, step in steps.items():
        if arguments.profile:
            with jax.profiler.trace(str(arguments.profile / name.replace(" ", "_"))):
                for _ in range(3):
                    step()
        if arguments.parts and isinstance(step.objective, ReconstructionObjective):
            rows[name]["parts"] = time_parts(step, arguments.repeats)
            rows[name]["unexplained"] = times[name]["median"] - sum(in_the_sum(rows[name]["parts"]).values())
            print(f"\n{name}")
            show_parts(rows[name])
        step.state = None
    return [*rows.values()]


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="geolrm")
    parser.add_argument("--stage", default="reconstruction", choices=("reconstruction", "proposal"))
    parser.add_argument("--inputs", type=int, default=7, help="views that the networks see")
    parser.add_argument("--batch", type=int, default=1, help="objects per device")
    parser.add_argument("--compute", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32"))
    parser.add_argument("--remat", nargs="+", default=[None], choices=get_args(Remat), help="the config's if not given")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="leave out the table of parts")
    parser.add_argument("--profile", type=Path, help="where to write traces")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments, overrides = parser.parse_known_args()
    experiment = apply_overrides(load_config(arguments.config), overrides, program=parser.prog)

    if arguments.stage not in experiment.stages:
        parser.error(f"--stage {arguments.stage}: this config has {', '.join(experiment.stages)}")

    steps, batch = {}, None
    for compute, remat in itertools.product(arguments.compute, arguments.remat):
        changed = configured(experiment, arguments.stage, arguments.inputs, arguments.batch, compute, remat)
        batch = batch or make_batch(changed, arguments.stage)
        name = f"{compute} {remat}" if remat else compute
        steps[name] = Step(changed, arguments.stage, batch)
        print(f"{name}: compiled in {steps[name].seconds_compiling:.0f} s", flush=True)
    together = fit_together([step.compiled for step in steps.values()])
    groups = [steps] if together else [{name: step} for name, step in steps.items()]
    result = environment(os.cpu_count(), "flax", "optax", "libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    result |= {"config": arguments.config, "overrides": overrides, "stage": arguments.stage}
    result |= {"xla_flags": os.environ.get("XLA_FLAGS", ""), "steps": []}
    for group in groups:
        result["steps"] += run(group, arguments, together)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
