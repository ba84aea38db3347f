"""Which implementation is taken: by name, by the platform of the lowering, and what is said when none fits."""

import contextlib
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas.platforms import warn_once
from kernels_pallas.rasterization import api
from kernels_pallas.rasterization.api import Splats, blend
from kernels_pallas.rasterization.shapes import WORKLOADS, Grid, Pairs

KERNEL = "xla.gpu.triton"
H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


def lowered(function, *arguments, platform):
    """The program's text for a platform that need not be there; newer jax versions want to know which GPU it is."""
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H200)
    with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def call(workload, features=4, dtype="float32"):
    """Shapes of a call of `blend` with five pairs per splat."""
    grid = Grid(workload.scenes * workload.views, workload.size, workload.size)
    n = grid.images * workload.gaussians
    splats = Splats(*(jax.ShapeDtypeStruct(s, dtype) for s in ((n, 2), (n, 3), (n,), (n, features))))
    pairs = Pairs(*(jax.ShapeDtypeStruct((size,), "int32") for size in (5 * n, 5 * n, grid.tiles + 1, n + 1)))

    def forward(splats, pairs):
        return blend(splats, pairs, grid)

    def gradient(splats, pairs):
        return jax.grad(lambda splats: sum(jnp.sum(output**2) for output in forward(splats, pairs)))(splats)

    return forward, gradient, (splats, pairs)


@pytest.mark.parametrize(("workload", "features"), [*((name, 4) for name in WORKLOADS), ("training", 36)])
def test_lowering_for_cuda_takes_the_kernel(workload, features):
    forward, gradient, arguments = call(WORKLOADS[workload], features)
    text = lowered(forward, *arguments, platform="cuda")
    assert text.count(KERNEL) == 1
    assert 'name = "blend_forward"' in text
    text = lowered(gradient, *arguments, platform="cuda")
    assert text.count(KERNEL) == 3
    assert all(f'name = "{kernel}"' in text for kernel in ("blend_forward", "blend_backward", "sum_by_splat"))
    assert "scatter" not in text  # which the GPU would carry out with atomic additions, in any order


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_lowering_for_others_takes_xla(platform):
    _, gradient, arguments = call(WORKLOADS["quickstart"])
    assert KERNEL not in lowered(gradient, *arguments, platform=platform)


def test_float64_is_left_to_xla():
    with jax.enable_x64(True):
        forward, _, arguments = call(WORKLOADS["quickstart"], dtype="float64")
        assert KERNEL not in lowered(forward, *arguments, platform="cuda")


@pytest.mark.parametrize("transform", ["vmap", "shard_map"])
def test_the_kernel_is_taken_inside_transformations(transform):
    _, gradient, arguments = call(WORKLOADS["quickstart"])
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), arguments)
    if transform == "vmap":
        mapped = jax.vmap(gradient)
    else:

        def local(*arguments):
            return jax.tree.map(lambda a: a[None], gradient(*jax.tree.map(lambda a: a[0], arguments)))

        spec = jax.sharding.PartitionSpec("x")
        mapped = jax.shard_map(local, in_specs=spec, out_specs=spec)
    assert lowered(mapped, *stacked, platform="cuda").count(KERNEL) == 3


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_kernel_without_its_device_is_an_error():
    *_, (splats, pairs) = call(WORKLOADS["quickstart"])
    for name, message in (("pallas_gpu", "cannot run here: it needs an NVIDIA GPU"), ("cuda", "expected one of")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(blend, grid=Grid(12, 112, 112), implementation=name), splats, pairs)


def device(platform, kind, **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("first", "dtype", "expected", "warning"),
    [
        (device("gpu", "NVIDIA H200", compute_capability="9.0"), "float32", "auto", None),
        (device("gpu", "NVIDIA H200", compute_capability="9.0"), "float64", "xla", "they are float64"),
        (device("gpu", "Tesla T4", compute_capability="7.5"), "float32", "xla", "'Tesla T4' has 7.5"),
        (device("gpu", "AMD MI300", compute_capability="gfx942"), "float32", "xla", "needs an NVIDIA GPU"),
        (device("tpu", "TPU v6e"), "float32", "xla", "needs an NVIDIA GPU"),
        (device("cpu", "cpu"), "float32", "auto", None),
        (device("cpu", "cpu"), "float64", "xla", None),
    ],
)
def test_an_accelerator_that_is_not_served_warns_once(monkeypatch, first, dtype, expected, warning):
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [api._choose("auto", jnp.dtype(dtype)) for _ in range(2)] == [expected] * 2
    assert [str(w.message) for w in caught if not (warning and warning in str(w.message))] == []
    assert len(caught) == (warning is not None)
