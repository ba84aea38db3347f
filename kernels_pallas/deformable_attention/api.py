"""Deformable attention: shapes are checked, an implementation is chosen, and the derivative is defined.

An implementation is a module with `forward` and `backward`, as reference.py. What is common to all is here: the
softmax (its result is as small as its argument, and does not depend on the view), the choice, the order under vmap.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels_pallas.deformable_attention import pallas_gpu, pallas_tpu, reference
from kernels_pallas.mesh import obstacle_of_mesh, varying_alike
from kernels_pallas.platforms import obstacle_of_gpu, obstacle_of_tpu, warn_once

Implementation = Literal["auto", "xla", "pallas_gpu", "pallas_gpu_interpret", "pallas_tpu", "pallas_tpu_interpret"]
ON = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}  # what "auto" takes, by platform; elsewhere XLA
ORDERED = "xla_gpu_deterministic_ops"


class Steps(NamedTuple):
    """What an implementation provides; the arguments and results are explained in reference.py."""

    forward: Callable
    backward: Callable


KERNELS = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}
IMPLEMENTATIONS = {"xla": Steps(reference.forward, reference.backward)}
for _name, _module in KERNELS.items():
    _steps = Steps(_module.forward, _module.backward)
    IMPLEMENTATIONS[_name] = _steps
    IMPLEMENTATIONS[f"{_name}_interpret"] = Steps(*(functools.partial(step, interpret=True) for step in _steps))


def deformable_attention(
    features: tuple[Float[Array, "..."], ...],
    locations: Float[Array, "..."],
    weights: Float[Array, "..."],
    *,
    deterministic: bool = False,
    implementation: str = "auto",
) -> Float[Array, "..."]:
    """Weighted bilinear samples of multi-level feature maps (Deformable DETR, Eq. 2, one view per leading index).

    Args:
      features: one (..., H_l, W_l, K, C) map per level, of one dtype: bfloat16, float32 or float64.
      locations: (..., N, K, L, P, 2) x, y in [0, 1]; u reads at u · W_l - 0.5, outside reads zero.
      weights: (..., N, K, L, P), normalised by the caller.
      deterministic: as for `multiview_deformable_attention`.
      implementation: as for `multiview_deformable_attention`, of which this is the case of one view.

    Returns:
      (..., N, K, C) in the features' dtype, accumulated in at least float32.

    Raises:
      ValueError: if levels, heads or leading axes disagree; the message names both shapes. For an implementation that
        does not exist or cannot run here.
    """
    lead, (count, heads, levels, points) = weights.shape[:-4], weights.shape[-4:]
    if locations.shape != (*weights.shape, 2):
        raise ValueError(f"locations {locations.shape} must be those of weights {weights.shape} with a last axis of 2")
    _check_features(features, lead, heads, levels, f"weights {weights.shape}")
    size = math.prod(lead)
    locations = locations.astype(jnp.promote_types(locations.dtype, jnp.float32))
    sizes = jnp.array([(m.shape[-3], m.shape[-4]) for m in features], locations.dtype)
    out = _attend_by_name(
        tuple(m.reshape(size, 1, *m.shape[-4:]) for m in features),
        jnp.zeros((size, 1, count, 2), locations.dtype),
        (locations * sizes[:, None]).reshape(size, count, heads, levels, points, 2),
        weights.reshape(size, count, heads, levels, points),
        jnp.ones((size, 1, count), bool),
        implementation,
        deterministic,
    )
    return out.reshape(*lead, count, heads, out.shape[-1])


def multiview_deformable_attention(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    logits: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
    *,
    deterministic: bool = False,
    implementation: str = "auto",
) -> Float[Array, "b v n k c"]:
    """Deformable attention of N queries into all views, with offsets and logits that do not depend on the view.

    First derivatives reach everything but `view_valid`. Works under jit, grad, vmap (as more scenes) and shard_map.

    Args:
      features: one map per level, of one dtype: bfloat16, float32 or float64.
      reference_points: x, y of each query in each view, as fractions of the image.
      offsets: from the reference point, in cells of each level's map.
      logits: softmax over levels and points, per head.
      view_valid: where False the result is zero and no gradient flows, whatever the reference point holds.
      deterministic: the same input must give the same bits. All implementations sum gradients in a fixed order, but
        for `"xla"` on a GPU, where this is an error unless XLA's own flag for it is set.
      implementation: `"auto"` follows the platform that the program is lowered for: `"pallas_gpu"` on NVIDIA GPUs
        unless something is float64, `"pallas_tpu"` on TPUs for bfloat16 and float32 maps that fit on the chip, else
        `"xla"`, with one warning where it is not the best for an accelerator. `"pallas_gpu_interpret"` and
        `"pallas_tpu_interpret"` run a kernel's steps on any device, for tests: slowly.

    Returns:
      Samples per view in the features' dtype, accumulated in at least float32.

    Raises:
      ValueError: if levels, heads, queries or views disagree; the message names both shapes. For an implementation
        that does not exist or cannot run here.
    """
    batch, views, count = view_valid.shape
    heads, levels = logits.shape[2:4]
    expected = {
        "reference_points": (reference_points.shape, (batch, views, count, 2)),
        "offsets": (offsets.shape, (*logits.shape, 2)),
        "logits": (logits.shape[:2], (batch, count)),
    }
    shapes = f"view_valid {view_valid.shape}, logits {logits.shape}"
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {got} ({shapes})")
    _check_features(features, (batch, views), heads, levels, shapes)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights = jax.nn.softmax(logits, axis=(-2, -1))
    return _attend_by_name(features, reference_points, offsets, weights, view_valid, implementation, deterministic)


def _check_features(features: tuple[Array, ...], lead: tuple[int, ...], heads: int, levels: int, shapes: str) -> None:
    if len(features) != levels:
        raise ValueError(f"features: {len(features)} maps for {levels} levels ({shapes})")
    for maps in features:
        if (maps.shape[:-4], maps.shape[-2]) != (lead, heads):
            raise ValueError(f"features: expected leading axes {lead} and {heads} heads, got {maps.shape} ({shapes})")
    kinds = {(maps.shape[-1], maps.dtype.name) for maps in features}
    if not jnp.issubdtype(features[0].dtype, jnp.floating):
        raise ValueError(f"features: expected a floating dtype, got {features[0].dtype}")
    if len(kinds) > 1:
        raise ValueError(f"features: expected one head width and dtype at all levels, got {sorted(kinds)}")


def _attend_by_name(features, reference_points, offsets, weights, view_valid, implementation, deterministic):
    """Sampling coordinates and weights are never below float32, and of one dtype."""
    dtype = jnp.result_type(features[0], reference_points, offsets, weights, jnp.float32)
    reference_points, offsets, weights = (x.astype(dtype) for x in (reference_points, offsets, weights))
    name = _choose(implementation, deterministic, features[0].dtype, dtype)
    if view_valid.size == 0:  # no blocks to make a grid of
        return jnp.zeros((*view_valid.shape, *features[0].shape[-2:]), features[0].dtype)
    arrays = varying_alike((features, reference_points, offsets, weights, view_valid))
    return _attend(name, deterministic, *arrays)


def _choose(implementation: str, deterministic: bool, *dtypes) -> str:
    """The implementation's name; "auto" remains where the platform of the lowering decides."""
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; expected one of {get_args(Implementation)}")
    device = jax.local_devices()[0]
    unfit = "float64 is for 'xla'" if any(jnp.dtype(dtype).itemsize > 4 for dtype in dtypes) else obstacle_of_mesh()
    if implementation in NEEDS and (obstacle := NEEDS[implementation](device) or unfit):
        raise ValueError(
            f"implementation {implementation!r} cannot run here: {obstacle}; 'auto' takes what can, "
            f"'{implementation}_interpret' interprets the kernel, slowly, for tests"
        )
    name = implementation
    if name == "auto":
        best = ON.get(device.platform, "xla")
        obstacle = best in NEEDS and NEEDS[best](device)
        if best in NEEDS and (obstacle or unfit):
            warn_once(f"features are sampled in plain XLA, not by the kernel {best!r}: {obstacle or unfit}")
        name = "xla" if obstacle or unfit else "auto"
    ordered = device.platform != "gpu" or f"{ORDERED}=true" in os.environ.get("XLA_FLAGS", "")
    if deterministic and name == "xla" and not ordered:
        raise ValueError(f"deterministic: on a GPU 'xla' adds in any order unless XLA_FLAGS contains --{ORDERED}=true")
    return name


NEEDS = {"pallas_gpu": obstacle_of_gpu, "pallas_tpu": obstacle_of_tpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(name, deterministic, features, reference_points, offsets, weights, view_valid):
    return _attend_forward(name, deterministic, features, reference_points, offsets, weights, view_valid)[0]


def _attend_forward(name, deterministic, *arrays):
    return _as_more_scenes(_dispatch(name, lambda steps, *arrays: steps.forward(*arrays)))(*arrays), arrays


def _attend_backward(name, deterministic, arrays, d_out):
    def run(steps, *arrays):
        return steps.backward(*arrays, deterministic=deterministic)

    return *_as_more_scenes(_dispatch(name, run))(*arrays, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)


def _dispatch(name: str, run: Callable) -> Callable:
    """`run` with the named implementation, or with the best for the platform that the program is lowered for."""
    if name != "auto":
        return functools.partial(run, IMPLEMENTATIONS[name])
    gpu, tpu, default = (functools.partial(run, IMPLEMENTATIONS[best]) for best in (ON["gpu"], ON["tpu"], "xla"))
    return lambda *arrays: lax.platform_dependent(*arrays, cuda=gpu, tpu=tpu, default=default)


def _as_more_scenes(function: Callable) -> Callable:
    """`function`, all of whose arrays lead with B scenes, with a rule for vmap: the mapped axis joins the scenes."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, *arrays):
        def fold(x, has_axis):
            x = x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        out = mapped(*jax.tree.map(fold, arrays, tuple(batched)))
        return (
            jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), out),
            jax.tree.map(lambda x: True, out),
        )

    return mapped
