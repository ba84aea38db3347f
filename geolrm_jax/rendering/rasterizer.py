"""The public functions: Gaussians and cameras in, pictures out."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geolrm_jax.rendering.drawing import Options, finite, usable
from geolrm_jax.rendering.sharded import Layout, ambient_layout, count_sharded, draw_sharded, typed_layout
from geolrm_jax.scene import AnyArray, Cameras, Gaussians, Rendering

Depth = Literal["accumulated", "expected"]
MOST_PAIRS = 2**31 - 2**20  # that 32 bits number, with room for what pads them


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

    Works under jit, grad, vmap and shard_map; scenes and views are array axes. First derivatives, in reverse mode,
    reach means, scales, quats, opacities, colors, background, `cameras.world_from_camera` (any invertible matrix) and
    `cameras.intrinsics`; they are zero for what is not drawn. The same input gives the same bits (see `blend` for the
    one exception, on GPUs).

    Conventions: OpenCV cameras, pixel centres at +0.5, depth is camera z; a Gaussian is dilated by `eps2d`, its alpha
    clamped at `max_alpha` and cut below 1/255; a pixel is finished before the Gaussian that would bring its
    transmittance to 1e-4 or below. Equal depths are blended in the order of the input. The perspective Jacobian is
    taken at the centre, moved to within 15 % of the picture's size around the picture. A zero quaternion stands for no
    rotation.

    A Gaussian with a value that is not finite is left out of all views, and a view whose camera is singular or not
    finite is blank; both are counted, and neither has a gradient.

    On a mesh whose axes are of type Explicit the arrays' types tell how scenes and views are split: each device draws
    its own. On one with axes of type Auto use `rasterize_sharded`, or call this inside `shard_map`: left alone, the
    compiler gathers all scenes on all devices.

    Args:
      gaussians: leading axes (...), G of them in each scene; colors (..., G, C), or (..., V, G, C) for one set per
        view. Values of masked Gaussians are never looked at.
      cameras: leading axes (..., V).
      background: anything that broadcasts to (..., V, C), such as (C,); None is black.
      depth: "accumulated" is the sum of weight times z; "expected" is that divided by alpha, 0 where alpha is 0.
      normals: also blend, with the colours' weights, every Gaussian's normal in the world: its shortest axis (of equal
        ones the first), turned towards the camera's centre. The sum is not normalised: its length is at most alpha,
        and it is 0 where nothing is drawn. Its gradient reaches `quats` and what the weights depend on.
      near, far: camera z between which the centre of what is drawn lies, strictly; 0 <= near < far.
      eps2d: variance added to each Gaussian in the picture, in pixels squared, at least 0.
      max_alpha: between zero and one.
      antialias: multiply opacities by sqrt(det / det dilated) of the covariance in the picture, so that the dilation
        adds no light (Yu et al. 2024, Mip-Splatting; gsplat's "antialiased"). The product is what is cut at 1/255.
      capacity: the number of (Gaussian, 16 x 16 tile) pairs to hold, over all scenes and views. "auto" counts them
        first, which cannot be done inside jit, grad or vmap; `count_pairs` tells what to put there.
      implementation: of the blending, see `kernels_pallas.rasterization.api.blend`.

    Returns:
      A `Rendering`; `overflow` is the number of pairs beyond the capacity, which are missing from the picture (in the
      last views, or at the back of the last view), and `invalid` that of unmasked Gaussians and of views left out
      because of their values.

    Raises:
      ValueError: if shapes disagree, for options that are no numbers or out of range, and for capacity "auto" under a
        transformation.
    """
    gaussians, cameras, background = _checked(gaussians, cameras, background)
    lens = {"near": near, "far": far, "eps2d": eps2d, "antialias": antialias}
    if capacity == "auto":
        capacity = roomy(count_pairs(gaussians, cameras, **lens))
    rest = {"depth": depth, "normals": normals, "max_alpha": max_alpha, "implementation": implementation}
    layout = typed_layout(gaussians, cameras)
    options = _options(layout.shards, **lens, **rest, capacity=capacity)
    return _rasterize(gaussians, cameras, background, options, layout)


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
    return _rasterize(gaussians, cameras, background, _options(layout.shards, **options, capacity=capacity), layout)


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
    return count_sharded(finite(gaussians)[0], cameras, options, layout)


@functools.partial(jax.jit, static_argnames=("options", "layout"))
def _rasterize(gaussians, cameras, background, options: Options, layout: Layout) -> Rendering:
    gaussians, invalid = finite(gaussians)
    invalid += jnp.sum(~usable(cameras)[1], dtype=jnp.int32)
    return Rendering(**draw_sharded(gaussians, cameras, background, options, layout)._asdict(), invalid=invalid)


def roomy(pairs: int) -> int:
    """A capacity for so many pairs, in steps of an eighth, so that nearby scenes share a compiled program.

    A few more than counted: another program may round a tile at the edge of an ellipse the other way.
    """
    pairs += pairs // 1024 + 16
    step = 1 << max(pairs.bit_length() - 4, 10)
    return -(-pairs // step) * step


def _checked(gaussians: Gaussians, cameras: Cameras, background) -> tuple[Gaussians, Cameras, Array | None]:
    """The arguments as JAX arrays whose shapes agree, the background broadcast."""
    gaussians, cameras = jax.tree.map(jnp.asarray, (gaussians, cameras))
    means, colors, views = gaussians.means.shape, gaussians.colors.shape, cameras.intrinsics.shape[:-2]
    lead = means[:-1]
    if len(views) != len(lead) or views[:-1] != lead[:-1] or math.prod(views) == 0:
        raise ValueError(
            "cameras must have the Gaussians' leading axes and one more, of at least one view: "
            f"means are {means}, intrinsics {cameras.intrinsics.shape}"
        )
    expected = dict(means=(*lead, 3), scales=(*lead, 3), quats=(*lead, 4), opacities=lead, mask=lead)
    given = {name: np.shape(getattr(gaussians, name)) for name in expected}
    for name, square in (("world_from_camera", (4, 4)), ("intrinsics", (3, 3))):
        expected[name], given[name] = (*views, *square), np.shape(getattr(cameras, name))
    for name, shape in given.items():
        if shape != expected[name]:
            raise ValueError(f"{name} is {shape}; expected {expected[name]}, as means are {means} and views {views}")
    if colors[:-1] not in (lead, (*views, means[-2])):
        raise ValueError(f"colors are {colors}; expected {lead} or {(*views, means[-2])}, then channels")
    if gaussians.mask.dtype != bool:
        raise ValueError(f"mask is of type {gaussians.mask.dtype}; expected bool")
    if min(cameras.height, cameras.width) < 1:
        raise ValueError(f"pictures are {cameras.height} x {cameras.width}; expected at least one pixel")
    if background is not None:
        background, wanted = jnp.asarray(background), (*views, colors[-1])
        fits = all(n in (1, m) for n, m in zip(background.shape[::-1], wanted[::-1], strict=False))
        if background.ndim > len(wanted) or not fits:
            raise ValueError(f"background is {background.shape}; expected what broadcasts to {wanted}: views, channels")
        background = jnp.broadcast_to(background, wanted)
    return gaussians, cameras, background


def _options(shards: int = 1, **given: Any) -> Options:
    """Options whose values are allowed, for a call of so many shards that each number their own pairs."""
    o = Options(**given)
    numbers = {name: _number(name, getattr(o, name)) for name in ("near", "far", "eps2d", "max_alpha")}
    o = o._replace(**numbers, capacity=_number("capacity", o.capacity, operator.index))
    if o.depth not in get_args(Depth):
        raise ValueError(f"depth is {o.depth!r}; expected one of {get_args(Depth)}")
    if not 0 <= o.near < o.far:
        raise ValueError(f"near is {o.near} and far {o.far}; expected camera z with 0 <= near < far")
    if not o.eps2d >= 0:
        raise ValueError(f"eps2d is {o.eps2d}; expected a variance of at least 0")
    if not 0 < o.max_alpha < 1:
        raise ValueError(f"max_alpha is {o.max_alpha}; expected a number between 0 and 1")
    if not 1 <= o.capacity <= MOST_PAIRS * shards:
        raise ValueError(f"capacity is {o.capacity}; expected 1 to {MOST_PAIRS * shards} pairs")
    return o


def _number(name: str, value: Any, convert: Callable[[Any], Any] = float) -> Any:
    """A number that is part of the compiled program."""
    try:
        return convert(value)
    except (TypeError, ValueError) as error:  # those of JAX for traced values are both
        expected = "an integer" if convert is operator.index else "a number"
        raise ValueError(f"{name} is {value!r}; expected {expected} that is known while tracing") from error
