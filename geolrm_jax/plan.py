"""Will it fit, and what bounds it: the real train step, compiled ahead of time for devices that need not be there."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from geolrm_jax.config import Experiment
from geolrm_jax.export.files import written_whole
from geolrm_jax.runtime import hlo
from geolrm_jax.runtime.cost import Cost, count_jaxpr
from geolrm_jax.runtime.hardware import CHIPS, Chip
from geolrm_jax.runtime.sharding import ROWS, VIEWS, MeshConfig, batch_shardings, path_of
from geolrm_jax.scene import Batch, Cameras, Views
from geolrm_jax.training.loop import StageConfig, Trainer, prepare
from kernels_pallas.mesh import CONTEXT

PARTS = {"params": "parameters", "ema": "parameters", "batch_stats": "parameters", "opt_state": "optimizer"}
FLOAT32_PASSES = 6  # of bfloat16, that a TPU makes of one float32 product at the highest precision


def plan(experiment: Experiment, stage: str, topology: str, axes: MeshConfig, *, inputs: int) -> dict[str, Any]:
    """Compiles a stage's train step for a topology.

    LPIPS is in it whether or not its weights file is there.

    Args:
      experiment: its mesh is not looked at.
      stage: `"reconstruction"` or `"proposal"`.
      topology: `v5p:4x4x4` and the like, or `cpu:8` for simulated devices.
      axes: of the mesh, which must cover the topology, and over which the stage's batch must divide.
      inputs: views that the networks see; the targets are `stage.views`, or as many.

    Returns:
      What `geolrm plan --json` writes. Bytes and FLOPs are those of one chip and one step; those that only a program
      that fits tells are None for one that the compiler has no memory for.

    Raises:
      ValueError: for a topology that is not known, a mesh or batch that does not divide, or without libtpu.
    """
    config = experiment.stages.get(stage)
    if not config:
        raise ValueError(f"stage {stage!r}: expected one of {', '.join(experiment.stages)}")
    devices = described(topology)
    mesh = axes.make(devices)
    rows = math.prod(mesh.shape[name] for name in ROWS)
    if config.batch // config.accumulation % rows:
        raise ValueError(
            f"{stage}.batch {config.batch} in {config.accumulation} parts: each part must be a multiple of the {rows} "
            f"devices along mesh axes data and fsdp"
        )
    everywhere = NamedSharding(mesh, P())
    constants = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        config.objective.abstract_constants(experiment.precision),
    )
    trainer = Trainer(
        name=stage,
        stage=config,
        model=experiment.model,
        precision=experiment.precision,
        mesh=axes,
        seed=experiment.seed,
        directory=Path(),
        batches=iter,
    )
    prepared = prepare(trainer, mesh, constants)
    arguments = prepared.abstract_state, constants, abstract_batch(experiment, config, inputs, mesh)
    traced = prepared.build(config.objective).trace(*arguments)
    cost, chip = count_jaxpr(traced.jaxpr), CHIPS.get(topology.split(":")[0])
    result = {
        "config": experiment.name,
        "stage": stage,
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "batch": {
            "objects": config.batch,
            "per_chip": config.batch / len(devices),
            "accumulation": config.accumulation,
            "inputs": inputs,
            "targets": max(config.views, inputs),
            "input_size": experiment.input_size,
            "render_size": experiment.render_size,
            "anchors": getattr(config.objective, "max_anchors", None),
        },
        "compute": experiment.precision.compute,
        "versions": versions(),
        "flops_per_chip": cost.total / len(devices),
        "flops": {kind: getattr(cost, kind) / len(devices) for kind in ("matmul", "convolution", "other")},
        "parameters": parameters(prepared.abstract_state),
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        unknown = dict.fromkeys(("hbm_bytes_per_chip", "collectives", "pictures_moved"))
        return result | unknown | {"fits": False, "does_not_fit": readable(str(error))}
    hbm = memory(compiled.memory_analysis(), arguments)
    result |= {"hbm": hbm, "hbm_bytes_per_chip": hbm["total"], "fits": not chip or hbm["total"] <= chip.hbm}
    program = hlo.parse(compiled.as_text())
    result |= communication(program, mesh, picture_test(experiment, result["parameters"]))
    return result | ({"model": modelled(chip, topology, cost, result, program)} if chip else {})


def described(topology: str) -> Sequence[jax.Device]:
    """The devices of `v5e:16x16`, `v5p:4x4x4`, `v6e:16x16`, or of `cpu:8`.

    Raises:
      ValueError: for another name, without libtpu, or if this process was started with fewer simulated devices.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        devices = jax.devices("cpu")
        if len(devices) < int(shape):
            raise ValueError(
                f"{topology}: there are {len(devices)} CPU devices: set XLA_FLAGS="
                f"--xla_force_host_platform_device_count={shape} before the first use of jax"
            )
        return devices[: int(shape)]
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ValueError(f"topology {topology!r}: expected one of {', '.join(CHIPS)} with its shape, or cpu:N")
    if not importlib.util.find_spec("libtpu"):
        raise ValueError(f"{topology}: compiling for TPUs needs libtpu: pip install 'geolrm-jax[tpu]'")
    # libtpu must neither look for a TPU, nor mind another process, nor complain that nobody says which TPU this is.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: libtpu knows none of this shape: {readable(str(error))}") from error


def readable(message: str) -> str:
    """The first lines of a compiler's message."""
    return " ".join(line.strip() for line in message.splitlines()[:12] if line.strip())[:1200]


def abstract_batch(experiment: Experiment, stage: StageConfig, inputs: int, mesh: Mesh) -> Batch:
    """Shapes of a step's batch, with where they lie; views padded as `put_batch` does."""
    grid, rows = experiment.model.proposal.fine_grid, stage.batch

    def views(number: int, multiple: int, size: int) -> Views:
        lead = (rows, -(-number // multiple) * multiple)
        cameras = Cameras(jnp.zeros((*lead, 4, 4)), jnp.zeros((*lead, 3, 3)), size, size)
        image = jnp.zeros((*lead, size, size))
        return Views(cameras, jnp.zeros((*image.shape, 3)), image, image, jnp.ones(lead, bool))

    def make() -> Batch:
        drawn = math.prod(mesh.shape[name] for name in VIEWS)
        return Batch(
            views(inputs, mesh.shape[CONTEXT], experiment.input_size),
            views(max(stage.views, inputs), drawn, experiment.render_size),
            jnp.zeros((rows, grid, grid, grid), bool),
            jnp.zeros(rows, jnp.int32),
        )

    shapes = jax.eval_shape(make)
    place = batch_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place)


def parameters(state: Any) -> list[dict[str, Any]]:
    """Every parameter: name, shape, PartitionSpec, bytes on each device."""
    return [
        {
            "name": path_of(keys),
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "spec": [list(axis) if isinstance(axis, tuple) else axis for axis in x.sharding.spec],
            "bytes_per_chip": shard_bytes(x),
        }
        for keys, x in jax.tree_util.tree_leaves_with_path(state["params"])
    ]


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def memory(found: Any, arguments: tuple) -> dict[str, int]:
    """Bytes of one chip by category. The state is donated: its new values take the place of the old."""
    state, constants, batch = arguments
    parts = dict.fromkeys(("parameters", "optimizer"), 0)
    for name, tree in state.items():
        parts[PARTS.get(name, "optimizer")] += shard_bytes(tree)
    parts |= {"constants": shard_bytes(constants), "batch": shard_bytes(batch)}
    # Arrays are padded to whole tiles; what no result depends on is not kept.
    parts["padding of arguments"] = found.argument_size_in_bytes - sum(parts.values())
    parts["temporaries"] = found.temp_size_in_bytes
    parts["output"] = found.output_size_in_bytes - found.alias_size_in_bytes
    parts["program"] = found.generated_code_size_in_bytes
    return parts | {"total": sum(parts.values())}


def communication(program: hlo.Program, mesh: Mesh, of_pictures: Callable[[str], bool]) -> dict[str, Any]:
    """Collectives by kind and mesh axes, the largest of them, and those that move pictures."""
    found = [c for c in program.collectives() if len(c.group) > 1]
    rows: dict[tuple, dict[str, Any]] = {}
    for c in found:
        kind = (c.kind, " x ".join(c.axes(mesh.shape)))
        row = rows.setdefault(kind, {"kind": kind[0], "axes": kind[1], "times": 0, "bytes_sent": 0.0})
        row["times"] += c.times
        row["bytes_sent"] += c.sent
    largest = sorted(found, key=lambda c: -c.sent)[:20]
    return {
        "collectives": sorted(rows.values(), key=lambda row: -row["bytes_sent"]),
        "largest_collectives": [
            {"kind": c.kind, "shape": c.shape, "times": c.times, "bytes_sent": c.sent, "source": c.source}
            for c in largest
        ],
        "pictures_moved": [
            {"kind": c.kind, "shape": c.shape, "source": c.source}
            for c in found
            if of_pictures(c.shape)  # sums too: a gather may be written as one, of zeros but for the own part
        ],
        "bytes_per_chip": program.memory_traffic(),
        "loops_counted_once": program.unknown(),
    }


def picture_test(experiment: Experiment, known: Sequence[dict[str, Any]]) -> Callable[[str], bool]:
    """Whether text of shapes names one with a picture's height and width, and not a parameter that has such sides."""
    sides = {experiment.input_size, experiment.render_size}
    shapes = [[n for n in row["shape"] if n > 1] for row in known]
    shapes += [shape[1:] for shape in shapes]  # one layer of those that are stacked

    def is_picture(dims: str) -> bool:
        lengths = [int(n) for n in dims.split(",") if n not in ("", "1")]
        return lengths not in shapes and any(a == b and a in sides for a, b in itertools.pairwise(lengths))

    return lambda text: any(map(is_picture, re.findall(r"\[([\d,]*)\]", text)))


def modelled(chip: Chip, topology: str, cost: Cost, result: dict, program: hlo.Program) -> dict[str, float]:
    """Seconds of a step by the chip's published peaks: a model and no measurement.

    `step` is the longest of computing, memory traffic and exchange, as if they overlapped; `step_apart` is their sum
    without overlap of exchange. The efficiencies compare with a chip that exchanges nothing.
    """
    passes = 1 if result["compute"] == "bfloat16" else FLOAT32_PASSES
    sides = sorted(map(int, topology.split(":")[1].split("x")), reverse=True)
    compute = ((cost.matmul + cost.convolution) * passes + cost.other) / result["chips"] / chip.flops
    traffic = result["bytes_per_chip"] / chip.hbm_bandwidth
    exchange = 0.0
    for c in program.collectives():
        spanned = next((n for n in range(1, len(sides)) if math.prod(sides[:n]) >= len(c.group)), len(sides))
        exchange += c.sent / (chip.ici / 2 * spanned / chip.dimensions)
    alone = max(compute, traffic)
    return {
        "compute_seconds": compute,
        "memory_seconds": traffic,
        "exchange_seconds": exchange,
        "step_seconds": max(alone, exchange),
        "efficiency_overlapped": alone / max(alone, exchange),
        "efficiency_apart": alone / (alone + exchange),
        "objects_per_second": result["batch"]["objects"] / max(alone, exchange),
    }


def usual_meshes(chips: int) -> list[MeshConfig]:
    """Meshes worth a look on so many chips: parameters and anchors of an object on one chip, or split."""
    choices = [MeshConfig(fsdp=fsdp, context=context) for context in (1, 4) for fsdp in (1, 4, 16)]
    return [mesh for mesh in choices if chips % (mesh.fsdp * mesh.context) == 0]


def sweep(
    experiment: Experiment,
    stage: str,
    topology: str,
    meshes: Sequence[MeshConfig],
    *,
    inputs: int,
    refused: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Plans each mesh with 1, 2, 4, ... objects for each of its parts of a batch, until they do not fit.

    Args:
      refused: called with a line for each mesh that the networks cannot be split over.

    Yields:
      What `plan` returns, one after the other.
    """
    if topology.split(":")[0] not in CHIPS:
        raise ValueError(f"{topology}: a sweep needs a memory to fill: expected one of {', '.join(CHIPS)}")
    chips = len(described(topology))
    for mesh, objects in zip(meshes, [mesh.rows(chips) for mesh in meshes], strict=True):
        fits = True
        while fits:
            config = dataclasses.replace(experiment.stages[stage], batch=objects, accumulation=1)
            tried = dataclasses.replace(experiment, **{stage: config})
            try:
                found = plan(tried, stage, topology, mesh, inputs=inputs)
            except ValueError as error:
                refused(f"{', '.join(f'{axis} {size}' for axis, size in mesh.shape(chips).items())}: {error}")
                break
            yield found
            objects, fits = 2 * objects, found["fits"]


def versions() -> dict[str, str]:
    """Of what takes part in compiling."""
    found = {}
    for package in ("geolrm-jax", "jax", "jaxlib", "libtpu", "flax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(planned: Any, path: Path) -> None:
    """Writes it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(planned, indent=2) + "\n")
