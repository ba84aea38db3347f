"""Drawing on a device mesh: every device bins, sorts and blends the scenes and views that it has, and no others.

The sorts and loops of the rasterizer run over all pairs of a call. Left to the compiler on a mesh they would gather
everything on every device; `shard_map` makes of one call as many small ones as there are shards.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from geolrm_jax.rendering.drawing import Options, Pictures, count, draw
from geolrm_jax.scene import Cameras, Gaussians


class Layout(NamedTuple):
    """The axes of a mesh over which the first axis of the scenes is split, and those over which the views are."""

    mesh: AbstractMesh
    scenes: tuple[str, ...] = ()
    views: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """All that split something."""
        return self.scenes + self.views

    @property
    def shards(self) -> int:
        """How many parts a call has."""
        return math.prod(self.mesh.shape[name] for name in self.axes)


def typed_layout(gaussians: Gaussians, cameras: Cameras) -> Layout:
    """The layout that the arrays' types tell: axes of type Explicit; others are not known while tracing.

    Raises:
      ValueError: if the Gaussians of a scene are split.
    """
    sharding = jax.typeof(cameras.intrinsics).sharding
    if (split := jax.typeof(gaussians.means).sharding.spec[-2]) is not None:
        raise ValueError(f"the Gaussians of a scene are split over mesh axis {split!r}; only scenes and views may be")
    scenes, views = (_names(sharding.spec[i]) for i in (0, -3))
    return Layout(sharding.mesh, scenes if gaussians.means.ndim > 2 else (), views)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def ambient_layout(gaussians: Gaussians, cameras: Cameras, scenes: Sequence[str], views: Sequence[str]) -> Layout:
    """The layout over these axes of the ambient mesh, without those that do not divide their scenes or views.

    Raises:
      ValueError: for a name that is not an axis of the ambient mesh, and for scene axes where there are no scenes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Layout(mesh)
    if unknown := [name for name in (*scenes, *views) if name not in mesh.axis_names]:
        raise ValueError(f"the ambient mesh has the axes {mesh.axis_names} and no {unknown[0]!r}")
    if scenes and gaussians.means.ndim == 2:
        raise ValueError(f"scene_axes is {tuple(scenes)}, but means {gaussians.means.shape} have no axis of scenes")

    def dividing(names: Sequence[str], length: int) -> tuple[str, ...]:
        kept: tuple[str, ...] = ()
        for name in names:
            if length % math.prod(mesh.shape[n] for n in (*kept, name)) == 0:
                kept += (name,)
        return kept

    return Layout(mesh, dividing(scenes, gaussians.means.shape[0]), dividing(views, cameras.intrinsics.shape[-3]))


def draw_sharded(
    gaussians: Gaussians, cameras: Cameras, background: Array | None, options: Options, layout: Layout
) -> Pictures:
    """`draw`, every shard with an equal share of the capacity; overflow is the sum of the shards'."""
    if layout.shards == 1:
        return draw(gaussians, cameras, background, options)
    share = options._replace(capacity=-(-options.capacity // layout.shards))
    most = jnp.iinfo(jnp.int32).max // layout.shards  # the sum must not wrap around

    def draw_share(*inputs):
        pictures = draw(*inputs, share)
        return pictures._replace(overflow=lax.psum(jnp.minimum(pictures.overflow, most), layout.axes))

    views = _view_spec(layout, gaussians)
    out_specs = Pictures(views, views, views, views if options.normals else None, P())
    return _on_shards(draw_share, layout, gaussians, cameras, background, out_specs)


def count_sharded(
    gaussians: Gaussians, cameras: Cameras, options: Options, layout: Layout
) -> tuple[Int[Array, "shards"], Bool[Array, "shards"]]:
    """`count` of every shard."""

    def count_share(gaussians, cameras, _):
        return jax.tree.map(jnp.atleast_1d, count(gaussians, cameras, options))

    if layout.shards == 1:
        return count_share(gaussians, cameras, None)
    return _on_shards(count_share, layout, gaussians, cameras, None, P(layout.axes))


def _view_spec(layout: Layout, gaussians: Gaussians) -> P:
    """Where arrays (..., V, ...) lie."""
    scenes = gaussians.means.ndim - 2
    return P(*(layout.scenes if axis == 0 else None for axis in range(scenes)), layout.views)


def _on_shards(function: Callable, layout: Layout, gaussians, cameras, background, out_specs: Any):
    """`function` of every shard's inputs."""
    per_scene, per_view = P(layout.scenes) if layout.scenes else P(), _view_spec(layout, gaussians)
    colors_per_view = gaussians.colors.ndim > gaussians.means.ndim
    specs = jax.tree.map(lambda x: per_view if x is gaussians.colors and colors_per_view else per_scene, gaussians)

    # Gaussians vary over the axes of the views from here on: their gradients are summed over the devices once, and
    # not wherever one of them meets a view, which is in several times as many arrays.
    def vary(x, spec):
        return lax.pcast(x, layout.views, to="varying") if spec is per_scene else x

    def local(gaussians, cameras, background):
        return function(jax.tree.map(vary, gaussians, specs), cameras, background)

    inputs = (gaussians, cameras, background)
    in_specs = (specs, *jax.tree.map(lambda x: per_view, (cameras, background)))
    if layout.mesh.explicit_axes:
        inputs = jax.reshard(inputs, jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), in_specs))
    free = set(layout.mesh.axis_names) - set(layout.mesh.manual_axes)
    return jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free)(*inputs)
