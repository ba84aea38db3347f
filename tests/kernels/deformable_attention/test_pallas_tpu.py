"""The kernels for TPUs, interpreted on the CPU and lowered for a TPU that need not be there."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas.deformable_attention import pallas_tpu, reference
from kernels_pallas.deformable_attention.shapes import WORKLOADS

SIZES = (33, 19), (7, 24)  # neither a multiple of a tile, some smaller than one


def make(rng, batch=1, views=2, count=130, heads=2, channels=24, points=2, sizes=SIZES, spread=2.0, dtype="float32"):
    """Arguments of `forward`, some views of some queries invalid and not a number there, and d_out."""
    features = tuple(jnp.array(rng.normal(size=(batch, views, *size, heads, channels)), dtype) for size in sizes)
    reference_points = jnp.array(rng.uniform(-0.05, 1.05, (batch, views, count, 2)), "float32")
    valid = jnp.array(rng.uniform(size=(batch, views, count)) < 0.8)
    shape = (batch, count, heads, len(sizes), points)
    offsets = jnp.array(rng.normal(size=(*shape, 2)) * spread, "float32")
    weights = jnp.array(rng.uniform(size=shape), "float32")
    arrays = features, jnp.where(valid[..., None], reference_points, jnp.nan), offsets, weights, valid
    return arrays, jnp.array(rng.normal(size=(batch, views, count, heads, channels)), dtype)


@jax.jit
def interpreted(arrays, d_out):
    """Result and gradients."""
    out = pallas_tpu.forward(*arrays, interpret=True)
    return out, pallas_tpu.backward(*arrays, d_out, deterministic=True, interpret=True)


@jax.jit
def expected(arrays, d_out):
    """The same by the reference, features in float32."""
    features, *rest = arrays
    arrays, d_out = (tuple(m.astype("float32") for m in features), *rest), d_out.astype("float32")
    return reference.forward(*arrays), reference.backward(*arrays, d_out, deterministic=True)


def compare(ours, theirs, values, gradients):
    """Relative distance of the result, and of each gradient."""
    for limit, *pair in zip((values, gradients), ours, theirs, strict=True):
        for arrays in zip(*map(jax.tree.leaves, pair), strict=True):
            a, b = (np.asarray(x, np.float64) for x in arrays)
            assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b)


@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(points=1, channels=32, count=1, batch=2, views=1),
        dict(points=4, channels=64, heads=1, sizes=((40, 40),), spread=30.0),  # a block looks at the whole map
        pytest.param(dict(points=8, channels=48, views=5), marks=pytest.mark.slow),
        pytest.param(dict(points=16, channels=24, heads=1, count=300), marks=pytest.mark.slow),
    ],
    ids=lambda case: "-".join(f"{name}={value}" for name, value in case.items()) or "plain",
)
def test_values_and_gradients_are_those_of_the_reference(rng, case):
    arguments = make(rng, **case)
    compare(interpreted(*arguments), expected(*arguments), values=1e-6, gradients=1e-6)


def test_bfloat16_features_are_as_good_as_rounded(rng):
    arguments = make(rng, channels=48, count=20, dtype="bfloat16")
    compare(interpreted(*arguments), expected(*arguments), values=4e-3, gradients=4e-3)


def test_samples_on_cells_have_the_gradient_of_the_reference(rng):
    """At the corners of a hat the derivative jumps; there, and on the border, both choose the same side."""
    (features, points, offsets, weights, valid), d_out = make(rng, sizes=((8, 16), (8, 16)))
    whole = jnp.array(rng.integers(-3, 20, offsets.shape), "float32") + 0.5
    arguments = (features, jnp.zeros_like(points), whole, weights, jnp.ones_like(valid)), d_out
    compare(interpreted(*arguments), expected(*arguments), values=1e-6, gradients=1e-6)


@pytest.mark.parametrize("far", [np.nan, np.inf, 1e9, -50.0])
def test_samples_that_are_nowhere_read_nothing(rng, far):
    (features, points, offsets, weights, valid), d_out = make(rng)
    offsets = offsets.at[:, 1::2].set(far)
    out, (d_features, *d_rest) = interpreted((features, points, offsets, weights, valid), d_out)
    assert not np.asarray(out[:, :, 1::2]).any()
    assert np.asarray(out[:, :, ::2]).any()
    for d, axis in zip(d_rest, (2, 1, 1), strict=True):
        assert not np.asarray(d.take(np.arange(1, 130, 2), axis)).any()
    without = (features, points, offsets, weights.at[:, 1::2].set(0.0), valid)
    jax.tree.map(np.testing.assert_array_equal, d_features, interpreted(without, d_out)[1][0])


@pytest.mark.slow
def test_many_queries_are_taken_in_turns(rng, monkeypatch):
    arguments = make(rng, heads=1, sizes=SIZES[1:])
    monkeypatch.setattr(pallas_tpu, "MEMORY", 2 * 128 * 2 * 3 * 4 * 2)  # one block at a time
    ours = pallas_tpu._backward_in_turns((), *arguments[0], arguments[1], interpret=True)
    compare((0.0, ours), (0.0, expected(*arguments)[1]), values=0, gradients=1e-6)


def test_maps_that_do_not_fit_go_to_the_reference(rng, monkeypatch):
    arguments = make(rng)
    monkeypatch.setattr(pallas_tpu, "MEMORY", 2**10)
    text = str(jax.make_jaxpr(functools.partial(pallas_tpu.backward, deterministic=True))(*arguments[0], arguments[1]))
    assert "pallas_call" not in text


ON_FOUR_DEVICES = """
import functools, sys
import jax
import numpy as np
from jax.sharding import AxisType

sys.path.insert(0, {folder!r})
from test_pallas_tpu import compare, expected, make
from kernels_pallas.deformable_attention import pallas_tpu

# Two devices share the scenes, two the heads; the gradient of reference points is a sum over both.
arrays, d_out = make(np.random.default_rng(0), batch=2, count=20, heads=2, channels=8, sizes=((5, 9),))

@jax.jit
def both(arrays, d_out):
    out = pallas_tpu.forward(*arrays, interpret=True)
    return out, pallas_tpu.backward(*arrays, d_out, deterministic=True, interpret=True)

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    ours = both(*jax.device_put((arrays, d_out), jax.NamedSharding(mesh, jax.P())))
assert ours[0].sharding.shard_shape(ours[0].shape) == (1, 2, 20, 1, 8), ours[0].sharding
compare(ours, expected(arrays, d_out), values=1e-6, gradients=1e-6)
"""


@pytest.mark.slow
def test_on_a_mesh_every_device_has_its_scenes_and_heads():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    program = ON_FOUR_DEVICES.format(folder=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lowering_for_a_tpu(name):
    case = WORKLOADS[name]
    shape = jax.ShapeDtypeStruct
    lead, samples = (case.scenes, case.views), (case.heads, len(case.maps), case.points)
    features = tuple(shape((*lead, *size, case.heads, case.channels), "bfloat16") for size in case.maps)
    arrays = (
        features,
        shape((*lead, case.queries, 2), "float32"),
        shape((case.scenes, case.queries, *samples, 2), "float32"),
        shape((case.scenes, case.queries, *samples), "float32"),
        shape((*lead, case.queries), "bool"),
    )
    d_out = shape((*lead, case.queries, case.heads, case.channels), "bfloat16")
    v5e = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=v5e)
    backward = functools.partial(pallas_tpu.backward, deterministic=True)
    with jax.sharding.use_abstract_mesh(mesh):
        for function, arguments in ((pallas_tpu.forward, arrays), (backward, (*arrays, d_out))):
            text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
            assert text.count("tpu_custom_call") == 1
