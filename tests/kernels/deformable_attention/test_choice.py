"""Which implementation is taken: by name, by the platform of the lowering, and what is said when none fits."""

import contextlib
import functools
import os
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas.deformable_attention import api, deformable_attention, multiview_deformable_attention, pallas_gpu
from kernels_pallas.deformable_attention.shapes import WORKLOADS
from kernels_pallas.platforms import warn_once

KERNEL = "xla.gpu.triton"
H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


def lowered(function, *arguments, platform):
    """The program's text for a platform that need not be there; newer jax versions want to know which GPU it is."""
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H200)
    with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def shapes(workload, dtype="bfloat16", wide="float32"):
    """Arguments of a call."""
    scenes, views, queries, heads, channels, points, maps = workload
    features = tuple(jax.ShapeDtypeStruct((scenes, views, *size, heads, channels), dtype) for size in maps)
    samples = (scenes, queries, heads, len(maps), points)
    others = [jax.ShapeDtypeStruct(s, wide) for s in ((scenes, views, queries, 2), (*samples, 2), samples)]
    return features, *others, jax.ShapeDtypeStruct((scenes, views, queries), bool)


def gradient(*arrays):
    """Of a loss, by everything that has one."""

    def loss(*moved):
        return jnp.sum(multiview_deformable_attention(*moved, arrays[-1]).astype(jnp.float32) ** 2)

    return jax.grad(loss, tuple(range(4)))(*arrays[:-1])


@pytest.mark.parametrize(
    ("workload", "dtype"),
    [*((name, "bfloat16") for name in WORKLOADS), ("training", "float32"), ("proposal", "float16")],
)
def test_lowering_for_cuda_takes_the_kernels(workload, dtype):
    arguments = shapes(WORKLOADS[workload], dtype)
    text = lowered(multiview_deformable_attention, *arguments, platform="cuda")
    assert text.count(KERNEL) == 1
    assert 'name = "deformable_forward"' in text
    text = lowered(gradient, *arguments, platform="cuda")
    kernels = ("deformable_forward", "deformable_backward", "deformable_sum_by_cell")
    assert text.count(KERNEL) == 4  # the last once for each level
    assert all(f'name = "{kernel}"' in text for kernel in kernels)
    assert "scatter" not in text  # which the GPU would carry out with atomic additions, in any order


@pytest.mark.parametrize("channels", [1, 20, 24, 32, 48, 64])
def test_every_head_width_can_be_lowered(channels):
    arguments = shapes(WORKLOADS["quickstart"]._replace(channels=channels))
    assert lowered(gradient, *arguments, platform="cuda").count(KERNEL) == 4


def test_one_view_is_served_by_the_same_kernel():
    (features, _, locations, weights, _) = shapes(WORKLOADS["quickstart"])
    features = tuple(jax.ShapeDtypeStruct(m.shape[:1] + m.shape[2:], m.dtype) for m in features)
    assert lowered(deformable_attention, features, locations, weights, platform="cuda").count(KERNEL) == 1


def test_lowering_for_a_tpu_takes_its_kernels():
    assert lowered(gradient, *shapes(WORKLOADS["quickstart"]), platform="tpu").count("tpu_custom_call") == 2


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_lowering_for_others_takes_no_kernel_for_gpus(platform):
    assert KERNEL not in lowered(gradient, *shapes(WORKLOADS["quickstart"]), platform=platform)


EIGHT = """
import functools
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from kernels_pallas.deformable_attention import multiview_deformable_attention
from kernels_pallas.self_attention import self_attention

keys = jax.random.split(jax.random.key(0), 4)
features = (jax.random.normal(keys[0], (4, 2, 5, 6, 2, 8)),)
rest = jax.random.uniform(keys[1], (4, 2, 7, 2)), jax.random.normal(keys[2], (4, 7, 2, 1, 3, 2))
arguments = (features, *rest, jax.random.normal(keys[3], (4, 7, 2, 1, 3)), jnp.ones((4, 2, 7), bool))
tokens = jax.random.normal(keys[0], (4, 6, 2, 8), jnp.bfloat16), jnp.array([6, 4, 0, 1])

def both(arguments, tokens):
    loss = lambda *a: jnp.sum(multiview_deformable_attention(*a, arguments[-1]) ** 2)
    attend = lambda x: jnp.sum(self_attention(x, x, x, tokens[1]).astype(jnp.float32) ** 2)
    return jax.grad(loss, (0, 1, 2, 3))(*arguments[:-1]), jax.grad(attend)(tokens[0])

wanted = jax.jit(both)(arguments, tokens)
for types in ((AxisType.Explicit,) * 2, (AxisType.Auto,) * 2):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    split = jax.device_put((arguments, tokens), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        found = [jax.jit(both)(*split)]
        if types[0] == AxisType.Auto:  # a part of the mesh
            part = jax.shard_map(both, axis_names={"data"}, in_specs=P("data"), out_specs=P("data"))
            found.append(jax.jit(part)(*split))
    for ours in found:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
            assert jnp.abs(jnp.asarray(a, jnp.float32) - b).max() < 2e-2 * jnp.abs(b).max()
"""


@pytest.mark.slow
def test_any_kind_of_mesh_will_do():
    """Axes of type Explicit, and a shard_map over some axes, where a kernel's call cannot be split."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_float64_is_left_to_xla():
    with jax.enable_x64(True):
        for dtypes in (("float64", "float32"), ("float32", "float64")):
            arguments = shapes(WORKLOADS["quickstart"], *dtypes)
            assert KERNEL not in lowered(multiview_deformable_attention, *arguments, platform="cuda")


@pytest.mark.parametrize("transform", ["vmap", "shard_map"])
def test_the_kernels_are_taken_inside_transformations(transform):
    arguments = shapes(WORKLOADS["quickstart"])
    if transform == "vmap":
        arguments = jax.tree.map(lambda s: jax.ShapeDtypeStruct((3, *s.shape), s.dtype), arguments)
        mapped = jax.vmap(gradient)
    else:
        spec = jax.sharding.PartitionSpec("x")
        mapped = jax.shard_map(gradient, in_specs=spec, out_specs=spec)
    assert lowered(mapped, *arguments, platform="cuda").count(KERNEL) == 4


def test_on_a_mesh_every_device_has_its_scenes_and_heads():
    mesh = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, abstract_device=H200)
    scenes, *_, heads, channels, _, maps = case = WORKLOADS["quickstart"]
    assert (scenes, heads) == (2, 4)  # scenes over one axis, heads over the other
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(gradient).trace(*shapes(case)).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if KERNEL in line]
    (height, width), views = maps[0], case.views
    assert len(calls) == 4
    assert all(f"{views}x{height * width}x{channels}xbf16" in call for call in calls if "sum_by_cell" not in call)


def test_too_many_cells_are_an_error():
    arguments = shapes(WORKLOADS["quickstart"]._replace(scenes=2**18, heads=2**5, queries=1))
    d_out = jax.ShapeDtypeStruct((2**18, 4, 1, 2**5, 24), "bfloat16")
    with pytest.raises(ValueError, match=r"below 2\^31, got 262144 x 32 x 841"):
        jax.eval_shape(functools.partial(pallas_gpu.backward, deterministic=True), *arguments, d_out)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pallas_gpu", "cannot run here: it needs an NVIDIA GPU"),
        ("pallas_tpu", "cannot run here: it needs a TPU"),
        ("cuda", "expected one of"),
    ],
)
def test_a_kernel_without_its_device_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        attend = functools.partial(multiview_deformable_attention, implementation=name)
        jax.eval_shape(attend, *shapes(WORKLOADS["quickstart"]))


def device(platform, kind, **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("first", "dtype", "expected", "warning"),
    [
        (device("gpu", "NVIDIA H200", compute_capability="9.0"), "float32", "auto", None),
        (device("gpu", "NVIDIA H200", compute_capability="9.0"), "float64", "xla", "float64 is for 'xla'"),
        (device("gpu", "Tesla T4", compute_capability="7.5"), "float32", "xla", "'Tesla T4' has 7.5"),
        (device("gpu", "AMD MI300", compute_capability="gfx942"), "float32", "xla", "needs an NVIDIA GPU"),
        (device("tpu", "TPU v5p"), "float32", "auto", None),
        (device("tpu", "TPU v5p"), "float64", "xla", "not by the kernel 'pallas_tpu': float64"),
        (device("cpu", "cpu"), "float32", "auto", None),
        (device("cpu", "cpu"), "float64", "xla", None),
    ],
)
def test_an_accelerator_that_is_not_served_warns_once(monkeypatch, first, dtype, expected, warning):
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [api._choose("auto", False, jnp.dtype("bfloat16"), jnp.dtype(dtype)) for _ in range(2)] == [expected] * 2
    assert [str(w.message) for w in caught if not (warning and warning in str(w.message))] == []
    assert len(caught) == (warning is not None)


def test_a_fixed_order_is_not_promised_where_xla_adds_in_any(monkeypatch):
    h200 = device("gpu", "NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [h200])
    assert api._choose("auto", True, jnp.dtype("float32")) == "auto"
    with pytest.raises(ValueError, match="deterministic: on a GPU 'xla' adds in any order"):
        api._choose("xla", True, jnp.dtype("float32"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert api._choose("xla", True, jnp.dtype("float32")) == "xla"
    with pytest.raises(ValueError, match="'pallas_gpu' cannot run here: float64"):
        api._choose("pallas_gpu", False, jnp.dtype("float64"))
