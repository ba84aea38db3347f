"""Layers that every network shares: torch's default initialisation, batch statistics with a mask, stacks that scan."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from geolrm_jax.models.splitting import whole
from geolrm_jax.precision import Precision, full

Remat = Literal["none", "dots", "full"]
# What is kept of a block for its backward pass; products with parameters are those without batch axes.
_KEPT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# torch's default for linear and convolution weights: uniform within 1 / sqrt(fan_in).
torch_default = jax.nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def torch_bias(fan_in: int) -> jax.nn.initializers.Initializer:
    """torch's default for biases: uniform within 1 / sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / jnp.sqrt(jnp.asarray(fan_in, dtype))

    return init


def linear(
    inputs: int,
    outputs: int,
    *,
    rngs: nnx.Rngs,
    precision: Precision,
    bias: bool = True,
    kernel_init=torch_default,
    bias_init=None,
) -> nnx.Linear:
    """A linear layer in the compute dtype, initialised as torch does unless told otherwise."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=bias_init or torch_bias(inputs),
        dtype=precision.dtype,
        precision=precision.products,
        rngs=rngs,
    )


def rms_norm(width: int, *, rngs: nnx.Rngs, precision: Precision) -> nnx.RMSNorm:
    """RMSNorm (Zhang and Sennrich 2019), eps 1e-5, never below float32."""
    return nnx.RMSNorm(width, epsilon=1e-5, dtype=precision.wide, rngs=rngs)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, with torch's conventions (eps 1e-5, momentum 0.1).

    In training the statistics are those of the valid elements only; the running variance is the unbiased one.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))  # training-mode calls so far

    def __call__(
        self, x: Float[Array, "*batch h w c"], valid: Bool[Array, "*batch"], *, train: bool
    ) -> Float[Array, "*batch h w c"]:
        x = full(x)
        if train:
            axes = tuple(range(x.ndim - 1))
            weight = jnp.broadcast_to(valid[..., None, None, None], (*x.shape[:-1], 1)).astype(x.dtype)
            count = jnp.maximum(weight.sum(), 1.0)
            mean = (weight * x).sum(axes) / count
            var = (weight * (x - mean) ** 2).sum(axes) / count
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
            self.var[...] = 0.9 * self.var[...] + 0.1 * var * count / jnp.maximum(count - 1.0, 1.0)
            self.count[...] = self.count[...] + 1
        else:
            mean, var = self.mean[...], self.var[...]
        return (x - mean) * (self.scale[...] * jax.lax.rsqrt(var + 1e-5)) + self.bias[...]


class SwiGLU(nnx.Module):
    """w2(silu(w1 x) * w3 x) without biases (Shazeer 2020); the hidden width is two thirds of 4 D, rounded up to 256."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, precision: Precision):
        hidden = -(-(8 * width // 3) // 256) * 256
        self.w1 = linear(width, hidden, bias=False, rngs=rngs, precision=precision)
        self.w2 = linear(hidden, width, bias=False, rngs=rngs, precision=precision)
        self.w3 = linear(width, hidden, bias=False, rngs=rngs, precision=precision)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))


def dropout(x: Float[Array, "*any"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*any"]:
    """Zeroes a share `rate` of the elements and scales the rest to keep the mean; without a key `x` as it is."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules of the same kind whose parameters carry a leading layer axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))


def scan_blocks(
    blocks: nnx.Module, x: Float[Array, "..."], *context: Any, remat: Remat, keys: Key[Array, "depth"] | None = None
) -> Float[Array, "..."]:
    """Applies stacked blocks one after the other: one compiled body, any depth.

    Args:
      blocks: made by `stack`.
      x: the residual stream.
      *context: what every block gets besides `x`.
      remat: what the backward pass computes again of each block: nothing, all but products with parameters ("dots"),
        or all of it.
      keys: one for each block, its last argument; None for blocks that take none.
    """

    def body(x, block_and_key):
        block, key = whole(block_and_key[0]), block_and_key[1]
        return block(x, *context) if key is None else block(x, *context, key), None

    if remat != "none":
        body = jax.checkpoint(body, policy=_KEPT[remat])
    return jax.lax.scan(body, x, (blocks, keys))[0]
