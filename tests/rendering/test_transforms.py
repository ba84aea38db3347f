"""Scenes and views as axes: loops, vmap, shard_map, and meshes of eight simulated devices."""

import inspect
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from geolrm_jax.rendering import rasterize, rasterize_sharded
from geolrm_jax.rendering.drawing import Options

PROGRAM = """
import functools, json, math, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.rendering import count_pairs, rasterize, rasterize_sharded
from geolrm_jax.scene import Cameras, Gaussians

SCENES, VIEWS, COUNT, SIZE = 4, 2, 24, 24
rng, shape = np.random.default_rng(0), (SCENES, COUNT)
drawn = rng.uniform(-0.5, 0.5, (*shape, 3)), rng.uniform(0.01, 0.1, (*shape, 3)), rng.normal(size=(*shape, 4))
drawn += rng.uniform(0.1, 0.9, shape), rng.uniform(size=(*shape, 3))
gaussians = Gaussians(*(jnp.asarray(a, jnp.float32) for a in drawn), mask=jnp.ones(shape, bool))
rig = turntable(VIEWS, size=SIZE)
poses, intrinsics = (jnp.tile(a, (SCENES, 1, 1, 1)) for a in (rig.world_from_camera, rig.intrinsics))
cameras, background = Cameras(poses, intrinsics, SIZE, SIZE), jnp.ones(3)
weights = jnp.asarray(rng.normal(size=(SCENES, VIEWS, SIZE, SIZE)), jnp.float32)
CAPACITY = 8 * 256

def loss(render, gaussians, cameras, background, weights):
    r = render(gaussians, cameras, background=background, normals=True, capacity=CAPACITY)
    return jnp.sum(weights[..., None] * (r.rgb + r.normal)) + jnp.sum(weights * r.depth), r

def gradients(render):
    total = functools.partial(loss, render)
    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True, allow_int=True))

def numbers(tree):
    return [np.asarray(x).tolist() for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]

def largest_gathered(compiled):
    "Numbers in the largest array that moves between devices other than in a sum."
    moved = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\\(", compiled.as_text())
    shapes = [dims.split(",") for types in moved for dims in re.findall(r"\\[([0-9,]+)\\]", types)]
    return max((math.prod(map(int, dims)) for dims in shapes), default=0)

def on_mesh(kind, render):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    put = lambda tree, *spec: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec))), tree)
    inputs = put(gaussians, "a"), put(cameras, "a", "b"), put(background), put(weights, "a", "b")
    with jax.set_mesh(mesh):
        compiled = gradients(render).lower(*inputs).compile()
        return compiled(*inputs), largest_gathered(compiled), inputs

def split_over_both():
    "jit, grad, vmap over scenes and shard_map over scenes and views, with its checks on."
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("a"), P("a", "b"), P(), P("a", "b")), out_specs=P())
    def total(gaussians, cameras, background, weights):
        one_scene = lambda g, c, w: loss(rasterize, g, c, background, w)[0]
        return jax.lax.psum(jnp.sum(jax.vmap(one_scene)(gaussians, cameras, weights)), ("a", "b"))

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), allow_int=True))(gaussians, cameras, background, weights)

if sys.argv[1] == "auto":
    plain, pictures = gradients(rasterize)(gaussians, cameras, background, weights)
    sharded = functools.partial(rasterize_sharded, scene_axes=("a",), view_axes=("b",))
    on_auto, gathered, _ = on_mesh(AxisType.Auto, sharded)
    result = {"plain": numbers((plain, pictures)), "sharded": numbers(on_auto), "gathered": gathered}
    result |= {"composed": numbers(split_over_both()), "gradients": len(numbers(plain))}
else:
    plain = gradients(rasterize)(gaussians, cameras, background, weights)
    on_explicit, gathered, inputs = on_mesh(AxisType.Explicit, rasterize)
    result = {"plain": numbers(plain), "sharded": numbers(on_explicit), "gathered": gathered}
    result |= {"pairs": [count_pairs(*i[:2]) for i in ((gaussians, cameras), inputs)]}
    result |= {"overflow": int(rasterize(*inputs[:2]).overflow)}
    result |= {"partial": int(rasterize(*inputs[:2], capacity=8).overflow)}
print(json.dumps(result | {"smallest": COUNT * 3, "devices": jax.device_count()}))
"""


def run(kind):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", PROGRAM, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8
    return result


def assert_equal_up_to_summation(ours, expected):
    """The order in which devices add gradients is not that of one device."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.slow
def test_leading_axes_equal_a_loop(rng, make_inputs, draw):
    """Scenes and views as array axes, vmap, and one call after the other: the same bits."""
    size, options = (24, 40), {"capacity": 2048, "normals": True, "antialias": True}
    inputs = make_inputs(rng, 40, 2, *size, scenes=(3,))
    scenes = [{key: value if key == "background" else value[i] for key, value in inputs.items()} for i in range(3)]
    together = draw(inputs, size, **options)
    one_by_one = [draw(scene, size, **options) for scene in scenes]
    axes = ({key: None if key == "background" else 0 for key in inputs},)
    mapped = jax.vmap(lambda inputs: draw(inputs, size, **options), in_axes=axes)(inputs)
    for name in ("rgb", "alpha", "depth", "normal"):
        loop = np.stack([getattr(rendering, name) for rendering in one_by_one])
        np.testing.assert_array_equal(getattr(together, name), loop)
        np.testing.assert_array_equal(getattr(mapped, name), loop)


@pytest.mark.slow
def test_eight_devices_draw_their_own_scenes_and_views():
    """On a 4 x 2 mesh: the numbers of one device, nothing of an image's or a scene's size gathered; and jit, grad,
    vmap and shard_map composed by hand.
    """
    result = run("auto")
    assert_equal_up_to_summation(result["sharded"], result["plain"])
    assert_equal_up_to_summation(result["composed"], result["plain"][: result["gradients"]])
    assert result["gathered"] < result["smallest"]


@pytest.mark.slow
def test_explicit_axes_are_read_from_the_types():
    """`rasterize` itself on a mesh of type Explicit; "auto" makes room for the fullest shard."""
    result = run("explicit")
    assert_equal_up_to_summation(result["sharded"], result["plain"])
    assert result["gathered"] < result["smallest"]
    assert result["pairs"][1] % 8 == 0 and result["pairs"][1] >= result["pairs"][0]
    assert result["overflow"] == 0
    assert result["partial"] == result["pairs"][0] - 8


def test_both_functions_have_the_same_defaults():
    """`rasterize_sharded` hands its options on by name."""
    signature = inspect.signature(rasterize).parameters
    defaults = {name: signature[name].default for name in Options._fields if name != "capacity"}
    assert defaults == {name: value for name, value in Options._field_defaults.items() if name != "capacity"}


def test_sharding_needs_axes_that_exist(rng, make_inputs, objects_of):
    scene = objects_of(make_inputs(rng, 4, 1, 16, 16), (16, 16))
    plain = rasterize(*scene, capacity=64)
    without_mesh = rasterize_sharded(*scene, view_axes=("data",), capacity=64)
    jax.tree.map(np.testing.assert_array_equal, without_mesh, plain)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        jax.tree.map(np.testing.assert_array_equal, rasterize_sharded(*scene, view_axes=("data",), capacity=64), plain)
        with pytest.raises(ValueError, match=r"axes \('data',\) and no 'views'"):
            rasterize_sharded(*scene, view_axes=("views",), capacity=64)
        with pytest.raises(ValueError, match="no axis of scenes"):
            rasterize_sharded(*scene, scene_axes=("data",), capacity=64)
