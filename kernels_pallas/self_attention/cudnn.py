"""Self-attention on NVIDIA GPUs by cuDNN's flash attention."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.platforms import obstacle_of_gpu

WIDEST = 128  # channels of a head, of which there must be a multiple of
STEP = 8


def attend(
    queries: Float[Array, "b n k c"],
    keys: Float[Array, "b m k c"],
    values: Float[Array, "b m k c"],
    query_lengths: Int[Array, "b"],
    key_lengths: Int[Array, "b"],
) -> Float[Array, "b n k c"]:
    """softmax(q · k / sqrt(c)) v over the first keys of each scene; rows from `query_lengths` on are not computed.

    Lengths, never an (N, N) mask. cuDNN says nothing of sequences of length 0, so it is never given one, and jax
    refuses the gradient of an odd number of tokens, so there is one more.
    """
    out = jax.nn.dot_product_attention(
        *(_even(x) for x in (queries, keys, values)),
        query_seq_lengths=jnp.maximum(query_lengths, 1),
        key_value_seq_lengths=jnp.maximum(key_lengths, 1),
        implementation="cudnn",
    )
    return out[:, : queries.shape[1]]


def _even(x):
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def obstacle(device: Any, dtype: jnp.dtype, width: int) -> str:
    """Why cuDNN cannot attend on this device with heads of this kind; empty if it can."""
    if of_device := obstacle_of_gpu(device):
        return of_device
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, and this is {dtype}"
    if width % STEP or width > WIDEST:
        return f"a head must have a multiple of {STEP} channels, at most {WIDEST}, and these have {width}"
    return ""
