"""Sharding: rules, and the same numbers on one device and on eight simulated ones."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from geolrm_jax.runtime.sharding import MeshConfig, spec_of

PROGRAM = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from geolrm_jax.config import load_config
from geolrm_jax.data.builders.records import build
from geolrm_jax.recipe import make_trainer
from geolrm_jax.runtime.sharding import MeshConfig, put_batch
from geolrm_jax.training import loop

config, data, fsdp = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
experiment = load_config(config)
stage = dataclasses.replace(experiment.proposal, batch=8)
experiment = dataclasses.replace(experiment, proposal=stage, mesh=MeshConfig(fsdp=fsdp))
trainer = make_trainer(experiment, "proposal", data.parent, build(experiment.data, data))
prepared = loop.prepare(trainer)
state, step = prepared.init(), prepared.build(stage.objective)
kernel = state["params"]["proposal"]["transformer"]["blocks"]["mlp"]["w1"]["kernel"]
shard = kernel.addressable_shards[0].data.shape
losses, norms = [], []
for _ in range(3):
    batch = loop.with_inputs(next(trainer.data), (0, 1))
    state, metrics = step(state, prepared.constants, put_batch(batch, prepared.batch_sharding))
    losses.append(float(metrics["loss"])); norms.append(float(metrics["gradient_norm"]))
result = {"programs": step._cache_size(), "devices": jax.device_count(), "shard": shard, "whole": kernel.shape}
result |= {"losses": losses, "norms": norms}
print(json.dumps(result))
"""


def test_rules():
    blocks = "params/proposal/transformer/blocks/"
    assert spec_of(f"{blocks}mlp/w1/kernel", (6, 384, 1024), 4) == P(None, "fsdp", None)
    assert spec_of("opt_state/1/0/mu/proposal/transformer/blocks/mlp/w1/kernel", (6, 384, 1024), 4) == P(
        None, "fsdp", None
    )
    assert spec_of(f"{blocks}mlp/w1/kernel", (6, 385, 1024), 4) == P()  # does not divide
    assert spec_of(f"{blocks}cross_attention/offsets/kernel", (6, 384, 512), 4) == P()
    assert spec_of("params/proposal/encoder/low/kernel", (4, 4, 9, 384), 2) == P(None, None, None, "fsdp")
    assert spec_of("params/proposal/transformer/norm/scale", (384,), 2) == P()
    assert spec_of("step", (), 2) == P()


def test_a_mesh_must_cover_the_devices():
    with pytest.raises(ValueError, match=r"data 3 x fsdp 5 does not cover the 1 devices"):
        MeshConfig(data=3, fsdp=5).make()
    assert MeshConfig().make().shape == {"data": jax.device_count(), "fsdp": 1}


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(request, tmp_path):
    config = str(request.config.rootpath / "tests" / "configs" / "tiny.py")

    def run(devices, fsdp):
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-c", PROGRAM, config, str(tmp_path / "data"), str(fsdp)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    one, eight = run(1, 1), run(8, 2)
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["programs"] == eight["programs"] == 1  # the state keeps its layout: nothing compiles anew
    assert eight["shard"][1] * 2 == eight["whole"][1] and one["shard"] == one["whole"]
    np.testing.assert_allclose(eight["losses"][0], one["losses"][0], rtol=1e-5)
    np.testing.assert_allclose(eight["norms"][0], one["norms"][0], rtol=1e-4)
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-3)
