"""The public functions: Gaussians and cameras in, pictures out."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geolrm_jax.rendering.drawing import Options, finite, widened
from geolrm_jax.rendering.sharded import Layout, ambient_layout, count_sharded, draw_sharded, typed_layout
from geolrm_jax.scene import AnyArray, Cameras, Gaussians, Rendering

Depth = Literal["accumulated", "expected"]


def rasterize(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    background: Float[AnyArray, "..."] | None = None,
    depth: Depth = "accumulated",
    normals: bool = False,
    near: float | int = 0.01,
    far: float | int = 1e10,
    eps2d: float | int = 0.3,
    max_alpha: float = 0.999,
    antialias: bool = False,
    capacity: int | Literal["auto"] = "auto",
    implementation: str = "auto",
) -> Rendering:
    """Renders Gaussians by tile-based splatting (Kerbl et al. 2023), differentiably.

    Works under jit, grad, vmap and shard_map; scenes and views are array axes. Gradients reach means, scales, quats,
    opacities, colors, background, `cameras.world_from_camera` (any invertible matrix) and `cameras.intrinsics`; they
    are zero for what is not drawn, and the same input gives the same bits.

    Conventions: OpenCV cameras, pixel centres at +0.5, depth is camera z; a Gaussian is dilated by `eps2d`, its alpha
    clamped at `max_alpha` and cut below 1/255; a pixel is finished before the Gaussian that would bring its
    transmittance to 1e-4 or below.

    On a mesh whose axes are of type Explicit the arrays' types tell how scenes and views are split: each device draws
    its own. On one with axes of type Auto use `rasterize_sharded`, or call this inside `shard_map`: left alone, the
    compiler gathers all scenes on all devices.

    Args:
      gaussians: leading axes (...), G of them in each scene; colors (..., G, C), or (..., V, G, C) for one set per
        view. Values of masked Gaussians are never looked at.
      cameras: leading axes (..., V).
      background: (C,) or anything that broadcasts to (..., V, C); None is black.
      depth: "accumulated" is the sum of weight times z; "expected" is that divided by alpha, 0 where alpha is 0.
      normals: also blend, with the colours' weights, every Gaussian's normal in the world: its shortest axis (of equal
        ones the first), turned towards the camera's centre. The sum is not normalised: its length is at most alpha,
        and it is 0 where nothing is drawn. Its gradient reaches `quats` and what the weights depend on.
      near, far: only Gaussians whose centre lies strictly between are drawn; 0 <= near.
      eps2d: variance added to each Gaussian in the picture, in pixels squared.
      max_alpha: below one.
      antialias: multiply opacities by sqrt(det / det dilated) of the covariance in the picture, so that the dilation
        adds no light (Yu et al. 2024, Mip-Splatting; gsplat's "antialiased"). The product is what is cut at 1/255.
      capacity: the number of (Gaussian, 16 x 16 tile) pairs to hold, over all scenes and views. "auto" counts them
        first, which cannot be done inside jit, grad or vmap; `count_pairs` tells what to put there.
      implementation: of the blending, see `kernels_pallas.rasterization.api.blend`.

    Returns:
      A `Rendering`; `overflow` is the number of pairs beyond the capacity, which are missing from the picture (in the
      last views, or at the back of the last view), and `invalid` that of unmasked Gaussians left out because one of
      their values is not finite.

    Raises:
      ValueError: if shapes disagree, for "auto" under a transformation, and for a capacity below one.
    """
    gaussians, cameras, background = _checked(gaussians, cameras, background)
    lens = {"near": near, "far": far, "eps2d": eps2d, "antialias": antialias}
    if capacity == "auto":
        capacity = roomy(count_pairs(gaussians, cameras, **lens))
    rest = {"depth": depth, "normals": normals, "max_alpha": max_alpha, "implementation": implementation}
    options = _options(**lens, **rest, capacity=capacity)
    return _rasterize(gaussians, cameras, background, options, typed_layout(gaussians, cameras))


def rasterize_sharded(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    scene_axes: Sequence[str] = (),
    view_axes: Sequence[str] = (),
    background: Float[AnyArray, "..."] | None = None,
    capacity: int,
    **options: Any,
) -> Rendering:
    """`rasterize` on the ambient mesh, without gathering Gaussians or pictures.

    The ambient mesh is that of `jax.set_mesh` or, inside jit, of `jax.sharding.use_abstract_mesh`; without one this is
    `rasterize`. The result is the same, and so are the gradients; those of Gaussians whose views are split are summed
    over the devices.

    Args:
      gaussians, cameras, background: as for `rasterize`.
      scene_axes: names of mesh axes over which the first axis of the scenes is split. An axis that does not divide
        it is left out: the devices along it draw the same.
      view_axes: the same for the views.
      capacity: of the whole call; every shard holds an equal share. Pairs may therefore overflow on one device while
        there is room on others: `Rendering.overflow` counts them all.
      **options: the other arguments of `rasterize`.

    Raises:
      ValueError: as `rasterize`, and for an axis that the ambient mesh does not have.
    """
    gaussians, cameras, background = _checked(gaussians, cameras, background)
    layout = ambient_layout(gaussians, cameras, scene_axes, view_axes)
    return _rasterize(gaussians, cameras, background, _options(**options, capacity=capacity), layout)


def count_pairs(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    near: float | int = 0.01,
    far: float | int = 1e10,
    eps2d: float | int = 0.3,
    antialias: bool = False,
) -> int:
    """The capacity that holds all (Gaussian, tile) pairs of a call of `rasterize` with the same arguments.

    Raises:
      ValueError: under a transformation, where there is no data to count.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((gaussians, cameras))):
        raise ValueError(
            "the (Gaussian, tile) pairs cannot be counted under jit, grad or vmap: give `rasterize` an integer "
            "`capacity`, for instance from `count_pairs` outside, and watch `Rendering.overflow`"
        )
    gaussians, cameras, _ = _checked(gaussians, cameras, None)
    layout = typed_layout(gaussians, cameras)
    options = _options(near=near, far=far, eps2d=eps2d, antialias=antialias)
    pairs, fits = jax.device_get(_count(gaussians, cameras, options, layout))
    if not np.all(fits):
        raise ValueError("these Gaussians touch more than 2^31 tiles: render fewer views, or smaller images, at a time")
    return int(np.max(pairs)) * layout.shards  # every shard holds an equal share


@functools.partial(jax.jit, static_argnames=("options", "layout"))
def _count(gaussians: Gaussians, cameras: Cameras, options: Options, layout: Layout) -> tuple[Array, Array]:
    return count_sharded(finite(gaussians)[0], widened(cameras), options, layout)


@functools.partial(jax.jit, static_argnames=("options", "layout"))
def _rasterize(gaussians, cameras, background, options: Options, layout: Layout) -> Rendering:
    gaussians, invalid = finite(gaussians)
    pictures = draw_sharded(gaussians, widened(cameras), background, options, layout)
    return Rendering(**pictures._asdict(), invalid=invalid)


def roomy(pairs: int) -> int:
    """A capacity for so many pairs, in steps of an eighth, so that nearby scenes share a compiled program.

    A few more than counted: another program may round a tile at the edge of an ellipse the other way.
    """
    pairs += pairs // 1024 + 16
    step = 1 << max(pairs.bit_length() - 4, 10)
    return -(-pairs // step) * step


def _checked(gaussians: Gaussians, cameras: Cameras, background) -> tuple[Gaussians, Cameras, Array | None]:
    """The arguments as JAX arrays whose shapes agree."""
    gaussians, cameras = jax.tree.map(jnp.asarray, (gaussians, cameras))
    background = None if background is None else jnp.asarray(background)
    means, colors, views = gaussians.means.shape, gaussians.colors.shape, cameras.intrinsics.shape[:-2]
    if views[:-1] != means[:-2] or math.prod(views) == 0 or not views:
        raise ValueError(
            "cameras must have the Gaussians' leading axes and one more, of at least one view: "
            f"means are {means}, intrinsics {cameras.intrinsics.shape}"
        )
    if colors[:-1] not in (means[:-1], (*views, means[-2])):
        raise ValueError(f"colors are {colors}; expected {means[:-1]} or {(*views, means[-2])}, then channels")
    if background is not None and (background.ndim == 0 or background.shape[-1] != colors[-1]):
        raise ValueError(f"background is {background.shape}; its last axis must be the {colors[-1]} channels of colors")
    return gaussians, cameras, background


def _options(**given: Any) -> Options:
    """Options whose values are allowed."""
    o = Options(**given)
    if o.depth not in get_args(Depth):
        raise ValueError(f"depth is {o.depth!r}; expected one of {get_args(Depth)}")
    if o.near < 0:
        raise ValueError(f"near is {o.near}; expected a camera z of at least 0")
    if not 0 < o.max_alpha < 1:
        raise ValueError(f"max_alpha is {o.max_alpha}; expected a number between 0 and 1")
    if not isinstance(o.capacity, int) or o.capacity < 1:
        raise ValueError(f"capacity is {o.capacity!r}; expected a positive integer (`rasterize` takes 'auto' too)")
    return o
