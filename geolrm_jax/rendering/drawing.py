"""From checked Gaussians and cameras to pictures: clean, project, bin, blend. Pure functions of static options."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from geolrm_jax.precision import full
from geolrm_jax.rendering.binning import countable, footprints, make_pairs, tile_counts
from geolrm_jax.rendering.normals import facing_normals
from geolrm_jax.rendering.projection import Projected, antialiasing, project
from geolrm_jax.scene import Cameras, Gaussians
from kernels_pallas.rasterization.api import Splats, blend
from kernels_pallas.rasterization.shapes import Grid

FLATTEST = 1e-6  # volume spanned by a camera's three axes of unit length, below which it counts as singular
SHORTEST_FOCAL = 1e-6  # pixels


class Options(NamedTuple):
    """The arguments of `rasterize` that are part of the compiled program."""

    depth: str = "accumulated"
    normals: bool = False
    near: float = 0.01
    far: float = 1e10
    eps2d: float = 0.3
    max_alpha: float = 0.999
    antialias: bool = False
    capacity: int = 1
    implementation: str = "auto"


class Pictures(NamedTuple):
    """The fields of a `Rendering` that are drawn."""

    rgb: Float[Array, "*batch h w c"]
    alpha: Float[Array, "*batch h w"]
    depth: Float[Array, "*batch h w"]
    normal: Float[Array, "*batch h w 3"] | None
    overflow: Int[Array, ""]


def usable(cameras: Cameras) -> tuple[Cameras, Bool[Array, "*views"]]:
    """The cameras in at least float32, plain ones for those that are singular or not finite, and which are not.

    Replaced and not only skipped: the derivative of their inverse would be NaN, and reach the Gaussians of all views.
    """
    pose, k = full(cameras.world_from_camera), full(cameras.intrinsics)
    rows = lax.stop_gradient(pose[..., :3, :3])
    volume = jnp.abs(jnp.sum(rows[..., 0, :] * jnp.cross(rows[..., 1, :], rows[..., 2, :]), axis=-1))
    invertible = volume > FLATTEST * jnp.prod(jnp.linalg.norm(rows, axis=-1), axis=-1)
    invertible &= jnp.linalg.det(lax.stop_gradient(pose)) != 0
    focal = jnp.minimum(jnp.abs(k[..., 0, 0]), jnp.abs(k[..., 1, 1]))
    finite = jnp.all(jnp.isfinite(pose), axis=(-2, -1)) & jnp.all(jnp.isfinite(k), axis=(-2, -1))
    good = invertible & finite & (focal > SHORTEST_FOCAL)

    def choose(given):
        return jnp.where(good[..., None, None], given, jnp.eye(given.shape[-1], dtype=given.dtype))

    return Cameras(choose(pose), choose(k), cameras.height, cameras.width), good


def finite(gaussians: Gaussians) -> tuple[Gaussians, Int[Array, ""]]:
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


def count(gaussians: Gaussians, cameras: Cameras, options: Options) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The (Gaussian, tile) pairs of finite Gaussians, and whether 32 bits can count them."""
    projected, opacities, grid = _project(gaussians, *usable(cameras), options)
    counts, fits = countable(tile_counts(footprints(*jax.tree.map(jnp.ravel, (projected, opacities)), grid), grid))
    return jnp.sum(counts), fits


def draw(gaussians: Gaussians, cameras: Cameras, background: Array | None, options: Options) -> Pictures:
    """Pictures (..., V, H, W) of finite Gaussians."""
    cameras, good = usable(cameras)
    projected, opacities, grid = _project(gaussians, cameras, good, options)
    pairs, index, overflow = make_pairs(*lax.stop_gradient((projected, opacities)), grid, options.capacity)
    features = _features(gaussians, cameras, projected, grid, normals=options.normals)
    splats = _splats(projected, opacities, features, index)
    sums, transmittance = blend(splats, pairs, grid, max_alpha=options.max_alpha, implementation=options.implementation)

    batch, channels = cameras.intrinsics.shape[:-2], gaussians.colors.shape[-1]
    sums = sums.reshape(*batch, *sums.shape[1:])
    transmittance = transmittance.reshape(*batch, *transmittance.shape[1:])
    rgb, z, normal = sums[..., :channels], sums[..., channels], sums[..., channels + 1 :]
    alpha = 1 - transmittance
    if background is not None:
        rgb = rgb + transmittance[..., None] * background.astype(rgb.dtype)[..., None, None, :]
    if options.depth == "expected":
        z = jnp.where(alpha > 0, z / jnp.where(alpha > 0, alpha, 1), 0)
    return Pictures(rgb, alpha, z, normal if options.normals else None, overflow)


def _project(
    gaussians: Gaussians, cameras: Cameras, good: Bool[Array, "*views"], options: Options
) -> tuple[Projected, Float[Array, "m g"], Grid]:
    """Projections and opacities as (M, G), M all views of all scenes, and the tiles of those M images."""
    o, g = options, gaussians
    projected = project(g.means, g.scales, g.quats, cameras, near=o.near, far=o.far, eps2d=o.eps2d)
    projected = projected._replace(visible=projected.visible & good[..., None])
    opacities = jnp.broadcast_to(g.opacities[..., None, :], projected.x.shape)
    if o.antialias:
        opacities = opacities * antialiasing(projected)
    grid = Grid(math.prod(opacities.shape[:-1]), cameras.height, cameras.width)
    flat = jax.tree.map(lambda a: a.reshape(grid.images, a.shape[-1]), (projected, opacities))
    return *flat, grid


def _features(
    gaussians: Gaussians, cameras: Cameras, projected: Projected, grid: Grid, *, normals: bool
) -> list[Array]:
    """What is blended, each (M, G): colours, depth and, where asked for, normals."""
    colors, views = gaussians.colors, cameras.intrinsics.shape[:-2]
    if colors.ndim == gaussians.means.ndim:
        colors = jnp.broadcast_to(colors[..., None, :, :], (*views, *colors.shape[-2:]))
    colors = colors.reshape(grid.images, *colors.shape[-2:])
    features = [*jnp.moveaxis(colors, -1, 0), projected.depth]
    if normals:
        axes = facing_normals(gaussians.means, gaussians.scales, gaussians.quats, cameras)
        features += [a.reshape(projected.depth.shape) for a in axes]
    return features


def _splats(projected: Projected, opacities: Array, features: list[Array], index: Int[Array, "n"]) -> Splats:
    """Splats view by view, near to far."""
    p = projected
    safe = jnp.where(p.visible, p.determinant, 1)
    table = jnp.stack([p.x, p.y, p.yy / safe, -p.xy / safe, p.xx / safe, opacities, *features], axis=-1)
    table = table.reshape(-1, table.shape[-1]).at[index].get(unique_indices=True, mode="promise_in_bounds")
    return Splats(means=table[:, :2], conics=table[:, 2:5], opacities=table[:, 5], features=table[:, 6:])
