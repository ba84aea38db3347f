"""The public function: Gaussians and cameras in, pictures out."""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from geolrm_jax.precision import full
from geolrm_jax.rendering.binning import countable, footprints, make_pairs, tile_counts
from geolrm_jax.rendering.projection import Projected, project
from geolrm_jax.scene import AnyArray, Cameras, Gaussians, Rendering
from kernels_pallas.rasterization.api import Splats, blend
from kernels_pallas.rasterization.shapes import Grid

Depth = Literal["accumulated", "expected"]


def rasterize(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    background: Float[AnyArray, "..."] | None = None,
    depth: Depth = "accumulated",
    near: float | int = 0.01,
    far: float | int = 1e10,
    eps2d: float | int = 0.3,
    max_alpha: float = 0.999,
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

    Args:
      gaussians: leading axes (...), G of them in each scene; colors (..., G, C), or (..., V, G, C) for one set per
        view. Values of masked Gaussians are never looked at.
      cameras: leading axes (..., V).
      background: (C,) or anything that broadcasts to (..., V, C); None is black.
      depth: "accumulated" is the sum of weight times z; "expected" is that divided by alpha, 0 where alpha is 0.
      near, far: only Gaussians whose centre lies strictly between are drawn; 0 <= near.
      eps2d: variance added to each Gaussian in the picture, in pixels squared.
      max_alpha: below one.
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
    gaussians, cameras = jax.tree.map(jnp.asarray, (gaussians, cameras))
    background = None if background is None else jnp.asarray(background)
    _check_shapes(gaussians, cameras, background)
    _check_options(depth, near, max_alpha, capacity)
    lens = {"near": float(near), "far": float(far), "eps2d": float(eps2d)}
    if capacity == "auto":
        capacity = _roomy(count_pairs(gaussians, cameras, **lens))
    return _rasterize(
        gaussians,
        cameras,
        background,
        **lens,
        depth=depth,
        max_alpha=float(max_alpha),
        capacity=capacity,
        implementation=implementation,
    )


def count_pairs(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    near: float | int = 0.01,
    far: float | int = 1e10,
    eps2d: float | int = 0.3,
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
    gaussians, cameras = jax.tree.map(jnp.asarray, (gaussians, cameras))
    _check_shapes(gaussians, cameras, None)
    pairs, fits = _count(gaussians, cameras, near=float(near), far=float(far), eps2d=float(eps2d))
    if not fits:
        raise ValueError("these Gaussians touch more than 2^31 tiles: render fewer views, or smaller images, at a time")
    return int(pairs)


@functools.partial(jax.jit, static_argnames=("near", "far", "eps2d"))
def _count(gaussians: Gaussians, cameras: Cameras, *, near, far, eps2d) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    gaussians, _ = _finite(gaussians)
    projected, grid = _project(gaussians, cameras, near, far, eps2d)
    footprint = footprints(*jax.tree.map(jnp.ravel, (projected, _opacities(gaussians, grid))), grid)
    counts, fits = countable(tile_counts(footprint, grid))
    return jnp.sum(counts), fits


@functools.partial(
    jax.jit, static_argnames=("depth", "near", "far", "eps2d", "max_alpha", "capacity", "implementation")
)
def _rasterize(gaussians, cameras, background, *, depth, near, far, eps2d, max_alpha, capacity, implementation):
    gaussians, invalid = _finite(gaussians)
    projected, grid = _project(gaussians, cameras, near, far, eps2d)
    opacities = _opacities(gaussians, grid)
    pairs, index, overflow = make_pairs(*lax.stop_gradient((projected, opacities)), grid, capacity)
    splats = _splats(projected, opacities, _per_view(gaussians.colors, cameras, grid), index)
    sums, transmittance = blend(splats, pairs, grid, max_alpha=max_alpha, implementation=implementation)

    batch = cameras.intrinsics.shape[:-2]
    sums = sums.reshape(*batch, *sums.shape[1:])
    transmittance = transmittance.reshape(*batch, *transmittance.shape[1:])
    rgb, z, alpha = sums[..., :-1], sums[..., -1], 1 - transmittance
    if background is not None:
        rgb = rgb + transmittance[..., None] * jnp.asarray(background, rgb.dtype)[..., None, None, :]
    if depth == "expected":
        z = jnp.where(alpha > 0, z / jnp.where(alpha > 0, alpha, 1), 0)
    return Rendering(rgb=rgb, alpha=alpha, depth=z, normal=None, overflow=overflow, invalid=invalid)


def _finite(gaussians: Gaussians) -> tuple[Gaussians, Int[Array, ""]]:
    """Gaussians with zeros for masked and non-finite ones, so that no NaN meets a gradient; how many are the latter."""
    g = gaussians if gaussians.means.shape[-2] else _one_masked(gaussians)
    finite = jnp.isfinite(g.opacities)
    for values in (g.means, g.scales, g.quats):
        finite &= jnp.all(jnp.isfinite(values), axis=-1)
    colored = jnp.all(jnp.isfinite(g.colors), axis=-1)
    per_view = g.colors.ndim > g.means.ndim
    finite &= jnp.all(colored, axis=-2) if per_view else colored
    kept = g.mask & finite

    def clean(values, kept):
        return full(jnp.where(kept.reshape(*kept.shape, *(1,) * (values.ndim - kept.ndim)), values, 0))

    colors = clean(g.colors, jnp.broadcast_to(kept[..., None, :] if per_view else kept, g.colors.shape[:-1]))
    means, scales, quats, opacities = (clean(v, kept) for v in (g.means, g.scales, g.quats, g.opacities))
    return Gaussians(means, scales, quats, opacities, colors, kept), jnp.sum(g.mask & ~finite, dtype=jnp.int32)


def _one_masked(gaussians: Gaussians) -> Gaussians:
    """One masked Gaussian in place of none: an array needs a row to be gathered from."""

    def pad(values, axis):
        widths = [(0, 0)] * values.ndim
        widths[axis] = (0, 1)
        return jnp.pad(values, widths)

    g = gaussians
    rows = (pad(values, -2) for values in (g.means, g.scales, g.quats))
    return Gaussians(*rows, pad(g.opacities, -1), pad(g.colors, -2), pad(g.mask, -1))


def _project(gaussians, cameras, near, far, eps2d) -> tuple[Projected, Grid]:
    """Projections as (M, G), M all views of all scenes, and the tiles of those M images."""
    cameras = Cameras(full(cameras.world_from_camera), full(cameras.intrinsics), cameras.height, cameras.width)
    projected = project(gaussians.means, gaussians.scales, gaussians.quats, cameras, near=near, far=far, eps2d=eps2d)
    images, count = math.prod(projected.x.shape[:-1]), projected.x.shape[-1]
    flat = jax.tree.map(lambda a: a.reshape(images, count), projected)
    return flat, Grid(images, cameras.height, cameras.width)


def _opacities(gaussians: Gaussians, grid: Grid) -> Float[Array, "m g"]:
    """Opacities of every view; those of masked Gaussians are zero already."""
    views = grid.images // math.prod(gaussians.opacities.shape[:-1])
    return jnp.repeat(gaussians.opacities.reshape(-1, gaussians.opacities.shape[-1]), views, axis=0)


def _per_view(colors, cameras: Cameras, grid: Grid) -> Float[Array, "m g c"]:
    """Colours of every view."""
    if colors.ndim < cameras.intrinsics.ndim:
        colors = jnp.broadcast_to(colors[..., None, :, :], (*cameras.intrinsics.shape[:-2], *colors.shape[-2:]))
    return colors.reshape(grid.images, *colors.shape[-2:])


def _splats(projected: Projected, opacities, colors, index: Int[Array, "n"]) -> Splats:
    """Splats view by view, near to far; depth is their last feature."""
    p = projected
    seen = p.visible
    safe = jnp.where(seen, p.determinant, 1)
    columns = [p.x, p.y, p.yy / safe, -p.xy / safe, p.xx / safe, opacities, *jnp.moveaxis(colors, -1, 0), p.depth]
    table = jnp.stack(columns, axis=-1)
    table = table.reshape(-1, table.shape[-1]).at[index].get(unique_indices=True, mode="promise_in_bounds")
    return Splats(means=table[:, :2], conics=table[:, 2:5], opacities=table[:, 5], features=table[:, 6:])


def _roomy(pairs: int) -> int:
    """A capacity for so many pairs, in steps of an eighth, so that nearby scenes share a compiled program."""
    step = 1 << max(max(pairs, 1).bit_length() - 4, 10)
    return -(-max(pairs, 1) // step) * step


def _check_shapes(gaussians: Gaussians, cameras: Cameras, background: Array | None) -> None:
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


def _check_options(depth: str, near: float, max_alpha: float, capacity: int | str) -> None:
    if depth not in get_args(Depth):
        raise ValueError(f"depth is {depth!r}; expected one of {get_args(Depth)}")
    if near < 0:
        raise ValueError(f"near is {near}; expected a camera z of at least 0")
    if not 0 < max_alpha < 1:
        raise ValueError(f"max_alpha is {max_alpha}; expected a number between 0 and 1")
    if capacity != "auto" and (not isinstance(capacity, int) or capacity < 1):
        raise ValueError(f"capacity is {capacity!r}; expected 'auto' or a positive integer")
