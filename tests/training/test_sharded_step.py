"""The train step of both stages on eight simulated devices: the numbers of one, and no picture is moved."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import dataclasses, json, re, sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from geolrm_jax.config import load_config
from geolrm_jax.data.builders.records import build
from geolrm_jax.losses.lpips import Lpips
from geolrm_jax.recipe import make_trainer
from geolrm_jax.runtime.sharding import MeshConfig, put_batch
from geolrm_jax.training import loop

config, data, name, *meshes = sys.argv[1:]
experiment, data, replace = load_config(config), Path(data), dataclasses.replace
stage = replace(experiment.stages[name], batch=8)
vit = replace(experiment.model.proposal.encoder.vit, width=16, heads=4)
encoder = replace(experiment.model.proposal.encoder, vit=vit)
transformer = replace(experiment.model.proposal.transformer, width=24, heads=4, depth=2)
networks = {
    part: replace(getattr(experiment.model, part), encoder=encoder, transformer=transformer)
    for part in ("proposal", "reconstruction")
}
experiment = replace(experiment, model=replace(experiment.model, **networks), **{name: stage})
trainer = replace(make_trainer(experiment, name, data.parent, build(experiment.data, data)), start=lambda target: {})
read = loop.with_inputs(next(iter(trainer.batches(0))), (0, 1))
lpips = Lpips(rngs=nnx.Rngs(0), precision=experiment.precision) if name == "reconstruction" else None
kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
moved = re.compile(rf"= ([^=]*) (?:{kinds})(?:-start)?\\((?!.*groups=\\{{\\{{0\\}})")  # not of single devices
values = expected = None
for text in ("data=1", *meshes):
    mesh = MeshConfig(**{axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))})
    mesh = mesh.make(jax.devices()[:1] if text == "data=1" else None)
    prepared = loop.prepare(trainer, mesh, jax.device_put(lpips, NamedSharding(mesh, PartitionSpec())))
    values = jax.tree.map(np.asarray, prepared.init()) if values is None else values
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), values, prepared.abstract_state)
    step = prepared.build(stage.objective)
    try:
        lowered = step.lower(state, prepared.constants, put_batch(read, prepared.batch_sharding))
    except ValueError as error:
        print(json.dumps({"mesh": text, "error": str(error)}), flush=True)
        continue
    compiled = lowered.compile()
    kernel = state["params"][name]["transformer"]["blocks"]["mlp"]["w1"]["kernel"]
    share = [n / m for n, m in zip(kernel.shape, kernel.addressable_shards[0].data.shape)]
    state, metrics = compiled(state, prepared.constants, put_batch(read, prepared.batch_sharding))
    (adam,) = [s for s in jax.tree.leaves(state["opt_state"], is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    found = float(metrics["loss"]), [np.asarray(x, np.float64) for x in jax.tree.leaves(adam.mu)]
    expected = expected or found
    norm = np.sqrt(sum((x**2).sum() for x in expected[1]))
    largest = max(np.abs(x).max() for x in expected[1])
    pairs = [(x, y) for x, y in zip(found[1], expected[1]) if np.abs(y).max() > 1e-4 * largest]
    result = {
        "mesh": text,
        "loss": abs(found[0] / expected[0] - 1),
        "gradients": np.sqrt(sum(((x - y) ** 2).sum() for x, y in zip(found[1], expected[1]))) / norm,
        "worst": max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs),
        "compared": len(pairs) / len(found[1]),
        "share": share,
        "moved": moved.findall(compiled.as_text()),
        "overflow": float(metrics.get("overflow", 0)),
    }
    print(json.dumps(result), flush=True)
"""
MESHES = ("fsdp=2", "context=4", "tensor=2", "context=8")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["proposal", "reconstruction"])
def test_eight_devices_give_the_numbers_of_one_and_move_no_pictures(stage, request, tmp_path):
    config = str(request.config.rootpath / "tests" / "configs" / "tiny.py")
    # The second flag: else XLA's CPU client may begin independent collectives in any order, and then wait for ever.
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
    environment = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", PROGRAM, config, str(tmp_path / "data"), stage, *MESHES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["mesh"]: row for row in map(json.loads, done.stdout.splitlines()) if "mesh" in row}
    assert "'context' of 8 and 'tensor' of 1 devices must together divide the 4 heads" in rows["context=8"]["error"]
    assert not rows["data=1"]["moved"]
    shares = {"fsdp=2": [1, 2, 1], "context=4": [1, 1, 1], "tensor=2": [1, 1, 2]}
    for mesh, share in shares.items():
        row = rows[mesh]
        assert row["share"] == share
        assert row["compared"] > 0.8
        assert row["loss"] < 1e-5 and row["gradients"] < 1e-5 and row["worst"] < 1e-4, row
        assert row["overflow"] == 0
        # Pictures have axes before their sides; a kernel of 28 x 28 has none.
        assert row["moved"] and not any(",28,28" in shape for shape in row["moved"]), row["moved"]
