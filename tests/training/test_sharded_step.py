"""The reconstruction's train step on eight simulated devices: the numbers of one, and nothing drawn is gathered."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import dataclasses, json, re, sys
import jax
from pathlib import Path
from geolrm_jax.config import load_config
from geolrm_jax.data.builders.records import build
from geolrm_jax.recipe import make_trainer
from geolrm_jax.runtime.sharding import put_batch
from geolrm_jax.training import loop

experiment, data = load_config(sys.argv[1]), Path(sys.argv[2])
stage = dataclasses.replace(experiment.reconstruction, batch=8)
experiment = dataclasses.replace(experiment, reconstruction=stage)
trainer = make_trainer(experiment, "reconstruction", data.parent, build(experiment.data, data))
prepared = loop.prepare(dataclasses.replace(trainer, start=dict))
state, step = prepared.init(), prepared.build(stage.objective)
batch = put_batch(loop.with_inputs(next(trainer.data), (0, 1)), prepared.batch_sharding)
compiled = step.lower(state, prepared.constants, batch).compile()
moves = re.compile(r" (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\\(.*op_name=\\"([^\\"]*)\\"")
metrics = compiled(state, prepared.constants, batch)[1]
result = {"moved": moves.findall(compiled.as_text()), "devices": jax.device_count()}
print(json.dumps(result | {name: float(value) for name, value in metrics.items()}))
"""


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one_and_gather_no_pictures(request, tmp_path):
    config = str(request.config.rootpath / "tests" / "configs" / "tiny.py")

    def run(devices):
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-c", PROGRAM, config, str(tmp_path / "data")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    one, eight = run(1), run(8)
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert not one["moved"]
    assert any(kind == "all-reduce" for kind, _ in eight["moved"])
    moved = [name for kind, name in eight["moved"] if kind != "all-reduce"]
    assert all(name.endswith("top_k") for name in moved)  # the choice of anchors, before anything is drawn
    for name in ("loss", "image", "alpha", "depth", "gradient_norm"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4)
    assert eight["overflow"] == one["overflow"] == 0
