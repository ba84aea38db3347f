"""Self-attention of many tokens: what goes in and out whatever the implementation, and which one it is."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.mesh import in_checked_shard_map, obstacle_of_mesh
from kernels_pallas.platforms import obstacle_of_tpu, warn_once
from kernels_pallas.self_attention import cudnn, reference, splash

Implementation = Literal["auto", "xla", "cudnn", "splash", "splash_interpret"]
IMPLEMENTATIONS = {
    "xla": reference.attend,
    "cudnn": cudnn.attend,
    "splash": splash.attend,
    "splash_interpret": functools.partial(splash.attend, interpret=True),
}


def self_attention(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b m k c"],
    values: Float[Array, "b m k c"],
    key_lengths: Int[Array, "b"],
    *,
    implementation: str = "auto",
) -> Float[Array, "b n k c"]:
    """softmax(q · k / sqrt(c)) v over the first `key_lengths` keys of each scene (Vaswani et al. 2017, Eq. 1).

    Scores and softmax are computed in float32 or better; memory grows with N, never with its square (Dao et al.
    2022).

    Args:
      queries: one per token and head, of any floating dtype.
      keys: of all tokens, valid ones first, in the queries' dtype.
      values: like the keys.
      key_lengths: valid tokens of each scene. With as many queries as keys (N = M) they are the same tokens, and
        queries from there on are padding too. Whatever padding holds, NaN included, changes nothing, bit for bit.
      implementation: "auto" is, where the program is lowered for CUDA, "cudnn" if there is a GPU that can run it and
        the heads suit it (bfloat16 or float16; a multiple of 8 channels, at most 128); where it is lowered for TPU,
        "splash" in bfloat16; and "xla" everywhere else, with one warning on an accelerator.
        "splash_interpret" runs the TPU's kernels on any device, for tests: very slowly.

    Returns:
      (B, N, K, C) in the values' dtype; zero rows for padding and where there is no key at all. Differentiable;
      gradients of padding are zero.

    Raises:
      ValueError: for shapes or dtypes that do not fit together, for an unknown implementation, and for one that
        cannot run here.
    """
    key_lengths = jnp.asarray(key_lengths)
    _check(queries, keys, values, key_lengths)
    rows, columns = queries.shape[1], keys.shape[1]
    if 0 in queries.shape + keys.shape:
        return jnp.zeros_like(queries)
    key_lengths = key_lengths.astype(jnp.int32).clip(0, columns)
    query_lengths = key_lengths if rows == columns else jnp.where(key_lengths > 0, rows, 0).astype(jnp.int32)
    # No implementation gets to see what padding holds, and no gradient enters or leaves it.
    queries = _without_padding(queries, query_lengths)
    keys, values = (_without_padding(x, key_lengths) for x in (keys, values))
    run = _choose(implementation, queries.dtype, queries.shape[-1])
    return _without_padding(run(queries, keys, values, query_lengths, key_lengths), query_lengths)


def _check(queries, keys, values, key_lengths) -> None:
    if not queries.dtype == keys.dtype == values.dtype or not jnp.issubdtype(queries.dtype, jnp.floating):
        found = f"{queries.dtype}, {keys.dtype} and {values.dtype}"
        raise ValueError(f"queries, keys and values must be of one floating dtype, got {found}")
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes, of scenes, tokens, heads and channels, got {x.shape}")
    (scenes, _, *per_token), expected = queries.shape, keys.shape[:2]
    if keys.shape != values.shape or keys.shape != (scenes, expected[1], *per_token):
        shapes = f"queries {queries.shape}, keys {keys.shape}, values {values.shape}"
        raise ValueError(f"expected queries (B, N, K, C) and keys and values (B, M, K, C), got {shapes}")
    if key_lengths.shape != (scenes,) or not jnp.issubdtype(key_lengths.dtype, jnp.integer):
        found = f"{key_lengths.dtype}{key_lengths.shape}"
        raise ValueError(f"key_lengths must be {scenes} integers, one for each scene, got {found}")


def _without_padding(x, lengths):
    there = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(there[..., None, None], x, 0)


def _choose(implementation: str, dtype, width: int) -> Callable:
    """The implementation; "auto" is one that the platform of the lowering decides on."""
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; expected one of {get_args(Implementation)}")
    device = jax.local_devices()[0]
    obstacles = {
        "cudnn": cudnn.obstacle(device, dtype, width),
        "splash": _splash_obstacle(dtype) or obstacle_of_tpu(device),
    }
    if obstacle := obstacles.get(implementation):
        raise ValueError(f"implementation {implementation!r} cannot run here: {obstacle}; 'auto' takes what can")
    if implementation != "auto":
        return IMPLEMENTATIONS[implementation]

    kernels = {}
    if not obstacles["cudnn"]:
        kernels["cuda"] = cudnn.attend
    elif _lowers_for_gpu(device):
        warn_once(f"Self-attention runs in plain XLA, not in cuDNN: {obstacles['cudnn']}")
    if not (obstacle := _splash_obstacle(dtype)):
        kernels["tpu"] = splash.attend
    elif device.platform == "tpu":
        warn_once(f"Self-attention runs in plain XLA, not in splash attention: {obstacle}")
    return lambda *arrays: lax.platform_dependent(*arrays, **kernels, default=reference.attend)


def _splash_obstacle(dtype) -> str:
    """Why splash attention cannot be called here, be there a TPU or not; empty if it can."""
    if dtype != jnp.bfloat16:  # its float32 products are not float32's, or take longer than XLA's
        return f"it takes bfloat16, and this is {dtype}"
    if in_checked_shard_map():
        return "inside shard_map it needs check_vma=False"
    return obstacle_of_mesh()


def _lowers_for_gpu(device: Any) -> bool:
    """Whether the program is for a GPU: the one that is there, or one that only the ambient mesh describes."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return "gpu" in (device.platform, getattr(described, "platform", None))
