"""Which implementation is taken: by name, by the platform of the lowering, on a mesh; memory; what is said."""

import contextlib
import functools
import re
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.platforms import warn_once
from kernels_pallas.self_attention import api, self_attention
from kernels_pallas.self_attention.shapes import WORKLOADS, even_split

KERNEL = "tpu_custom_call"
H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


def device(platform, kind, **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


GPU = device("gpu", "NVIDIA H200", compute_capability="9.0")


def inputs(workload, dtype="bfloat16"):
    scenes, *rest = workload
    return *[jax.ShapeDtypeStruct((scenes, *rest), dtype)] * 3, jax.ShapeDtypeStruct((scenes,), "int32")


def gradient(queries, keys, values, lengths):
    def total(*arrays):
        return jnp.sum(self_attention(*arrays, lengths).astype(jnp.float32))

    return jax.grad(total, (0, 1, 2))(queries, keys, values)


def lowered(function, *arguments, platform):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("workload", ["dinov2", "proposal", "largest"])
def test_lowering_for_tpu_takes_splash(workload):
    arguments = inputs(WORKLOADS[workload])
    assert lowered(self_attention, *arguments, platform="tpu").count(KERNEL) == 1
    text = lowered(gradient, *arguments, platform="tpu")
    assert text.count(KERNEL) == 3
    tokens = WORKLOADS[workload].tokens
    assert f"x{tokens}x{tokens}x" not in text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_lowering_for_others_takes_xla(platform):
    text = lowered(gradient, *inputs(WORKLOADS["training"]), platform=platform)
    assert KERNEL not in text and "cudnn" not in text  # which without a GPU cannot be lowered


@pytest.mark.parametrize("workload", ["dinov2", "evaluation"])
def test_lowering_for_cuda_where_there_is_a_gpu_takes_cudnn(monkeypatch, workload):
    # jax asks the GPU before it writes down the call: here it is told what it would hear.
    internal = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(internal + "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(internal + "check_compute_capability", lambda _: True)
    monkeypatch.setattr(internal + "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(jax, "local_devices", lambda: [GPU])
    arguments = inputs(WORKLOADS[workload])
    anew = functools.partial(gradient)  # not what other tests have traced
    text = lowered(anew, *arguments, platform="cuda")
    assert re.findall(r"__cudnn\$\w+", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert "PADDING" in text  # lengths
    tokens = WORKLOADS[workload].tokens
    assert f"x{tokens}x{tokens}x" not in text
    assert "cudnn" not in lowered(anew, *arguments, platform="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_splash_leaves_other_types_to_xla(dtype):
    with jax.enable_x64(dtype == "float64"):
        assert KERNEL not in lowered(gradient, *inputs(WORKLOADS["proposal"], dtype), platform="tpu")


@pytest.mark.parametrize(("check", "kernels"), [(True, 0), (False, 3)])
def test_inside_shard_map(check, kernels):
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check)
    assert lowered(mapped, *inputs(WORKLOADS["proposal"]), platform="tpu").count(KERNEL) == kernels


@pytest.mark.parametrize(
    ("scenes", "per_device"),
    # Scenes over both axes; over one, and heads over the other; heads over both.
    [(16, "2x16x4096x24"), (8, "16x4096x24"), (4, "8x4096x24"), (3, "3x2x4096x24")],
)
def test_on_a_mesh_every_device_has_its_scenes_and_heads(scenes, per_device):
    mesh = AbstractMesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered(gradient, *inputs(WORKLOADS["proposal"]._replace(scenes=scenes)), platform="tpu")
    calls = [line for line in text.splitlines() if KERNEL in line]
    assert len(calls) == 3 and all(re.search(f"tensor<(1x)?{per_device}xbf16>", line) for line in calls)


def test_memory_is_linear_in_the_number_of_tokens():
    def temporaries(tokens):
        compiled = jax.jit(gradient).lower(*inputs(WORKLOADS["training"]._replace(tokens=tokens, heads=2))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)  # with all scores it would be 16 times


@pytest.mark.parametrize(
    ("count", "largest", "size"), [(13, 4, 4), (13, 5, 5), (12, 5, 4), (4, 9, 4), (1025, 1024, 513)]
)
def test_even_split(count, largest, size):
    assert even_split(count, largest) == size


@pytest.mark.parametrize(
    ("name", "message"),
    [("cudnn", "cannot run here: it needs an NVIDIA GPU"), ("splash", "it needs a TPU"), ("flash", "expected one of")],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
def test_a_kernel_without_its_device_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(self_attention, implementation=name), *inputs(WORKLOADS["training"]))


@pytest.mark.parametrize(
    ("first", "dtype", "width", "platforms", "warning"),
    [
        (GPU, "bfloat16", 48, {"cuda", "tpu"}, None),
        (GPU, "float16", 24, {"cuda"}, None),
        (GPU, "float32", 48, set(), "this is float32"),
        (GPU, "bfloat16", 36, {"tpu"}, "these have 36"),
        (GPU, "bfloat16", 136, {"tpu"}, "these have 136"),
        (device("gpu", "Tesla T4", compute_capability="7.5"), "bfloat16", 48, {"tpu"}, "'Tesla T4' has 7.5"),
        (device("gpu", "AMD MI300", compute_capability="gfx942"), "bfloat16", 48, {"tpu"}, "needs an NVIDIA GPU"),
        (device("tpu", "TPU v6e"), "bfloat16", 48, {"tpu"}, None),
        (device("tpu", "TPU v6e"), "float32", 48, set(), "this is float32"),
        (device("cpu", "cpu"), "bfloat16", 48, {"tpu"}, None),
        (device("cpu", "cpu"), "float64", 48, set(), None),
    ],
)
def test_an_accelerator_that_is_not_served_warns_once(monkeypatch, first, dtype, width, platforms, warning):
    taken = []
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **kernels: taken.append(set(kernels)))
    with recorded() as caught:
        for _ in range(2):
            api._choose("auto", jnp.dtype(dtype), width)()
    assert taken == [platforms] * 2
    assert_warned(caught, warning)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
def test_lowering_for_a_described_gpu_warns_once_that_there_is_none():
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H200)
    with recorded() as caught, jax.sharding.use_abstract_mesh(mesh):
        for function in (self_attention, gradient):
            lowered(function, *inputs(WORKLOADS["training"]), platform="cuda")
    assert_warned(caught, "not in cuDNN: it needs an NVIDIA GPU")


@contextlib.contextmanager
def recorded():
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def assert_warned(caught, message):
    said = [str(w.message) for w in caught if "Self-attention" in str(w.message)]
    assert len(said) == (message is not None)
    assert all(message in text for text in said)
