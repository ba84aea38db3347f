"""On eight simulated devices: the numbers of one, and no token leaves its device."""

import os
import subprocess
import sys

PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from kernels_pallas.self_attention import self_attention, splash

splash.BLOCK = 128
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)

def run(implementation, *inputs):
    def total(q, k, v, lengths):
        return jnp.sum(self_attention(q, k, v, lengths, implementation=implementation) ** 2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.grad(total, (0, 1, 2))(*inputs)

for scenes, spec in ((8, P(("data", "fsdp"))), (4, P("data", None, "fsdp"))):
    arrays = [rng.normal(size=(scenes, 140, 2, 8)).astype(np.float32) for _ in range(3)]
    lengths = np.array([140, 130, 99, 0] * (scenes // 4), np.int32)
    alone = jax.jit(lambda *a: jax.grad(lambda *b: jnp.sum(self_attention(*b, a[3]) ** 2), (0, 1, 2))(*a[:3]))
    expected = alone(*arrays, lengths)
    inputs = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    inputs.append(jax.device_put(lengths, NamedSharding(mesh, P(spec[0]))))
    for implementation in ("auto", "splash_interpret"):
        compiled = jax.jit(lambda *a: run(implementation, *a)).lower(*inputs).compile()
        moves = re.findall(r" (all-gather|all-to-all|collective-permute|all-reduce)[-(]", compiled.as_text())
        assert not moves, (scenes, implementation, moves)
        for ours, theirs in zip(compiled(*inputs), expected):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
print("same on", jax.device_count())
"""


def test_eight_devices_give_the_numbers_of_one_and_move_nothing():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same on 8"
