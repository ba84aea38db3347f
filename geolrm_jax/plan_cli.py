"""`geolrm plan`: the command line and the tables of plan.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from geolrm_jax import config, plan
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.sharding import AXES, MeshConfig


def run(arguments: Sequence[str], program: str) -> None:
    """Parses the arguments, plans, prints, writes."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Compiles a stage's train step for accelerators that need not be there, and says what it takes of "
        "memory, computing and communication. For TPUs: pip install 'geolrm-jax[tpu]'.",
        epilog=f"Fields of the config can be overridden; `{program} --config NAME --help` lists them.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="NAME|FILE", help="a config of the project, or a file")
    parser.add_argument(
        "--topology", required=True, metavar="T", help="v5e:16x16, v5p:4x4x4, v6e:16x16, ..., or cpu:N, simulated"
    )
    parser.add_argument("--stage", default="reconstruction", choices=("reconstruction", "proposal"), help="which step")
    parser.add_argument("--inputs", type=int, metavar="N", help="input views (the most that the stage draws)")
    parser.add_argument(
        "--mesh", action="append", type=_mesh, metavar="AXIS=N,...", help="data=16,fsdp=4 (the config's); see --sweep"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="each --mesh, or usual ones, with 1, 2, 4, ... objects per part until they do not fit",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, a list of them for a sweep")
    if not any(a.startswith("--config") for a in arguments) and {"-h", "--help"} & set(arguments):
        parser.print_help()
        return
    known, overrides = parser.parse_known_args(arguments)
    if known.mesh and len(known.mesh) > 1 and not known.sweep:
        parser.error("--mesh: only a sweep tries several")

    experiment = config.apply_overrides(config.load_config(known.config), overrides, program=program)
    if known.stage not in experiment.stages:
        raise ValueError(f"stage {known.stage!r}: this config has {', '.join(experiment.stages)}")
    use_cpu(known.topology)
    stage = experiment.stages[known.stage]
    inputs = known.inputs or max(stage.inputs) + max(stage.other_inputs)
    if known.sweep:
        sweep(experiment, known, inputs)
        return
    [mesh] = known.mesh or [experiment.mesh]
    planned = plan.plan(experiment, known.stage, known.topology, mesh, inputs=inputs)
    show(planned)
    if known.json:
        plan.write(planned, known.json)


def sweep(experiment: config.Experiment, known: argparse.Namespace, inputs: int) -> None:
    """Tells of each plan, and writes it, when it is there: all of them may take hours."""
    planned: list[dict[str, Any]] = []
    meshes = known.mesh or plan.usual_meshes(len(plan.described(known.topology)))
    for found in plan.sweep(experiment, known.stage, known.topology, meshes, inputs=inputs, refused=logging.notice):
        planned.append(found)
        logging.notice(summary(found))
        if known.json:
            plan.write(planned, known.json)
    show_sweep(planned)


def use_cpu(topology: str) -> None:
    """Traces on the CPU whatever the machine has, with as many simulated devices as `cpu:N` says."""
    jax.config.update("jax_platforms", "cpu")
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit() and int(count) > 0:
        jax.config.update("jax_num_cpu_devices", int(count))


def _mesh(text: str) -> MeshConfig:
    """The mesh of `data=16,fsdp=4`."""
    pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
    if not all(axis in AXES and size.lstrip("-").isdigit() for axis, size in pairs.items()):
        raise argparse.ArgumentTypeError(f"expected {'=N,'.join(AXES)}=N or some of them, got {text!r}")
    try:
        return MeshConfig(**{axis: int(size) for axis, size in pairs.items()})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def summary(planned: dict[str, Any]) -> str:
    """One line."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in planned["mesh"].items() if size > 1) or "one device"
    batch = f"{planned['topology']}, {mesh}, {planned['batch']['objects']} objects"
    if "hbm" not in planned:
        return f"{batch}: does not fit"
    return f"{batch}: {'fits' if planned['fits'] else 'does not fit'}, {_giga(planned['hbm_bytes_per_chip'])} GB a chip"


def show(planned: dict[str, Any]) -> None:
    """Prints what `plan.plan` returns."""
    batch = planned["batch"]
    logging.notice(
        f"{planned['config']}, {planned['stage']} in {planned['compute']}: {batch['inputs']} views of "
        f"{batch['input_size']}², {batch['targets']} targets of {batch['render_size']}², {batch['anchors']} anchors, "
        f"{batch['per_chip']:g} objects per chip in {batch['accumulation']} parts\n{summary(planned)}"
    )
    if "hbm" not in planned:
        logging.notice(planned["does_not_fit"])
        return
    of_chip = Table("of one chip", "GB", title="Memory")
    for part, size in planned["hbm"].items():
        of_chip.add_row(part, _giga(size))
    moved = Table("collective", "along", "times", "GB sent by a chip", title="Communication of a step")
    for row in planned["collectives"]:
        moved.add_row(row["kind"], row["axes"], f"{row['times']:,}", _giga(row["bytes_sent"]))
    moved.caption = f"{len(planned['pictures_moved'])} of them move pictures"
    tables = [of_chip, moved] if planned["collectives"] else [of_chip]
    if "model" in planned:
        times = Table("by the chip's published peaks", "", title="A model of the step, not measured")
        for name, value in planned["model"].items():
            seconds = name.endswith("_seconds")
            times.add_row(
                name.replace("_", " ").removesuffix(" seconds"), f"{value * 1e3:.1f} ms" if seconds else f"{value:.3g}"
            )
        times.caption = (
            f"{planned['flops_per_chip'] / 1e12:.2f} TFLOP, {_giga(planned['bytes_per_chip'])} GB read and written; "
            f"{len(planned['loops_counted_once'])} loops, whose rounds depend on the data, count once"
        )
        tables.append(times)
    for table in tables:
        for column in table.columns[1:]:
            column.justify = "right"
        logging.console.print(table)


def show_sweep(planned: Sequence[dict[str, Any]]) -> None:
    """Prints the plans that fit, the fastest first by the model."""
    fitting = [p for p in planned if p["fits"]]
    if not fitting:
        logging.notice("none fits")
        return
    rows = Table("mesh", "objects", "GB a chip", "objects per second (model)", title="What fits")
    for p in sorted(fitting, key=lambda p: -p.get("model", {}).get("objects_per_second", 0)):
        mesh = ",".join(f"{axis}={size}" for axis, size in p["mesh"].items() if size > 1)
        rate = f"{p['model']['objects_per_second']:.1f}" if "model" in p else ""
        rows.add_row(mesh, str(p["batch"]["objects"]), _giga(p["hbm_bytes_per_chip"]), rate)
    logging.console.print(rows)


def _giga(number: float) -> str:
    return f"{round(number / 1e9, 2) + 0.0:,.2f}"  # no -0.00
