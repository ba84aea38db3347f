"""The precision policy: which numbers are kept and multiplied in which type."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Precision:
    """Parameters and optimizer stay float32; matrix products run in `compute`.

    Camera algebra, projection, sampling coordinates, softmax, norms, Gaussian decoding, rasterization and losses run
    in at least float32 whatever is set here; `full` is the cast that says so.
    """

    compute: Literal["bfloat16", "float32", "float64"] = "float32"

    @property
    def dtype(self) -> jnp.dtype:
        """`compute` as a dtype."""
        return jnp.dtype(self.compute)

    @property
    def products(self) -> jax.lax.Precision:
        """Passes of a matrix product: float32 means float32, not TF32 or the TPU's default of one bfloat16 pass."""
        return jax.lax.Precision.DEFAULT if self.compute == "bfloat16" else jax.lax.Precision.HIGHEST

    @property
    def wide(self) -> jnp.dtype:
        """The dtype of norms and the like: `compute`, but at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)


def full(x: Array) -> Array:
    """`x` in at least float32: bfloat16 and float16 are widened, float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
