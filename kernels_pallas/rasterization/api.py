"""Front-to-back blending of 2D Gaussians in tiles: the operation that hardware kernels implement.

An implementation is a module with `forward` and `backward`, as reference.py; what is common to all is here: the choice,
the derivative, the order under vmap, and the images made of tiles.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.mesh import varying_alike
from kernels_pallas.platforms import obstacle_of_gpu, warn_once
from kernels_pallas.rasterization import pallas_gpu, reference
from kernels_pallas.rasterization.shapes import TILE, Grid, Pairs

Implementation = Literal["auto", "xla", "pallas_gpu", "pallas_gpu_interpret"]


class Steps(NamedTuple):
    """What an implementation provides; the arguments and results are explained in reference.py."""

    forward: Callable
    backward: Callable


XLA = Steps(reference.forward, reference.backward)
PALLAS_GPU = Steps(pallas_gpu.forward, pallas_gpu.backward)
IMPLEMENTATIONS = {
    "xla": XLA,
    "pallas_gpu": PALLAS_GPU,
    "pallas_gpu_interpret": Steps(*(functools.partial(step, interpret=True) for step in PALLAS_GPU)),
}


class Splats(NamedTuple):
    """Projected Gaussians.

    Attributes:
      means: x, y in pixels of the splat's own image.
      conics: (a, b, c) of the inverse covariance [[a, b], [b, c]].
      opacities: in [0, 1]; a splat that stands in a pair has at least 1/255.
      features: what is blended.
    """

    means: Float[Array, "n 2"]
    conics: Float[Array, "n 3"]
    opacities: Float[Array, "n"]
    features: Float[Array, "n c"]


def blend(
    splats: Splats, pairs: Pairs, grid: Grid, *, max_alpha: float = 0.999, implementation: str = "auto"
) -> tuple[Float[Array, "m h w c"], Float[Array, "m h w"]]:
    """Blends splats front to back in every pixel (Kerbl et al. 2023, Eq. 2-3).

    At a pixel centre p splat i of the tile has alpha_i = min(max_alpha, o_i exp(-(p - m_i)^T Q_i (p - m_i) / 2)), or
    none below 1/255; its weight is alpha_i T_i with the transmittance T_i = prod_{j<i} (1 - alpha_j). A pixel is
    finished before the splat that would bring its transmittance to 1e-4 or below.

    Args:
      splats: N of them, float32 or float64, all of one dtype.
      pairs: which splats stand in which tile, in which order.
      grid: the images and tiles.
      max_alpha: clamp of alpha, below one.
      implementation: "auto" is "pallas_gpu" where the program is lowered for CUDA and the splats are float32, and
        "xla" elsewhere, with one warning on an accelerator. "pallas_gpu_interpret" runs the GPU kernel's steps on any
        device, for tests: very slowly.

    Returns:
      Weighted sums of the features (M, H, W, C) and the transmittance that remains (M, H, W). Differentiable once, in
      all fields of `splats`. Gradients are summed in a fixed order, so that the same input gives the same bits; but
      for "xla" on a GPU, where XLA adds them atomically unless XLA_FLAGS has --xla_gpu_deterministic_ops=true.

    Raises:
      ValueError: for an unknown implementation, and for "pallas_gpu" without a GPU that can run it.
    """
    name = _choose(implementation, splats.means.dtype)
    drawn = splats.opacities > 0
    log_opacity = jnp.log(jnp.where(drawn, splats.opacities, 1))
    table = jnp.concatenate([splats.means, splats.conics, log_opacity[:, None], splats.features], axis=-1)
    sums, transmittance = _blend(grid, max_alpha, name, *varying_alike((table, pairs)))
    return _untile(sums, grid), _untile(transmittance[:, None], grid)[..., 0]


def _choose(implementation: str, dtype) -> str:
    """The implementation's name; "auto" remains where the platform of the lowering decides."""
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; expected one of {get_args(Implementation)}")
    device = jax.local_devices()[0]
    obstacle = obstacle_of_gpu(device)
    if implementation == "pallas_gpu" and obstacle:
        raise ValueError(
            f"implementation 'pallas_gpu' cannot run here: {obstacle}; 'auto' takes what can, 'pallas_gpu_interpret' "
            "interprets the kernel, slowly, for tests"
        )
    if implementation != "auto":
        return implementation
    served = dtype == jnp.float32
    if device.platform != "cpu" and (obstacle or not served):
        warn_once(f"Gaussians are blended in plain XLA, not by the kernel for GPUs: {obstacle or f'they are {dtype}'}")
        served = False
    return "auto" if served else "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blend(grid, max_alpha, name, table, pairs):
    """(sums, transmittance) in tiles."""
    blended = _forward(grid, max_alpha, name)(table, pairs)
    return blended.sums, blended.transmittance


def _blend_forward(grid, max_alpha, name, table, pairs):
    blended = _forward(grid, max_alpha, name)(table, pairs)
    return (blended.sums, blended.transmittance), (table, pairs, blended.transmittance, blended.last)


def _blend_backward(grid, max_alpha, name, residuals, cotangents):
    return _backward(grid, max_alpha, name)(*residuals, *cotangents), None


_blend.defvjp(_blend_forward, _blend_backward)


# A loop whose trip count depends on the data would, if batched, carry every element to the end of the longest: under
# vmap the elements are blended one after the other instead.


def _forward(grid, max_alpha, name):
    def run(steps, table, pairs):
        return steps.forward(table, pairs, grid, max_alpha)

    return jax.custom_batching.sequential_vmap(_dispatch(name, run))


def _backward(grid, max_alpha, name):
    def run(steps, table, pairs, *rest):
        return steps.backward(table, pairs, grid, max_alpha, *rest)

    return jax.custom_batching.sequential_vmap(_dispatch(name, run))


def _dispatch(name: str, run: Callable) -> Callable:
    """`run` with the named implementation, or with the best for the platform that the program is lowered for."""
    if name != "auto":
        return functools.partial(run, IMPLEMENTATIONS[name])
    cuda, default = functools.partial(run, PALLAS_GPU), functools.partial(run, XLA)
    return lambda *arrays: lax.platform_dependent(*arrays, cuda=cuda, default=default)


def _untile(tiles: Float[Array, "tiles c px"], grid: Grid) -> Float[Array, "m h w c"]:
    """Images of tiles, without the pixels that pad the last row and column."""
    images = rearrange(
        tiles, "(m r q) c (y x) -> m (r y) (q x) c", m=grid.images, r=grid.rows, q=grid.columns, y=TILE, x=TILE
    )
    return images[:, : grid.height, : grid.width]
