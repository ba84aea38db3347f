"""The pytrees that travel between the parts: cameras, views, batches, anchors, Gaussians, renderings.

Axis letters, used in every shape of the project: B scenes, V views, H W pixels, N anchors, G Gaussians,
D model width, K heads, L feature levels, P sampling points, T tiles, C channels.

Conventions, without exception: OpenCV camera axes (x right, y down, z forward); a z-up world whose object lies in
[-0.5, 0.5]^3; pixel centres at +0.5; depth is the camera's z; quaternions are wxyz; colours are sRGB-encoded in [0, 1].
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

AnyArray = Array | np.ndarray


def static_field() -> Any:
    """A dataclass field that is part of the pytree's structure, not a leaf."""
    return dataclasses.field(metadata={"static": True})


def pytree(cls: type) -> type:
    """Makes `cls` a frozen dataclass and a JAX pytree.

    Unlike `jax.tree_util.register_dataclass`, rebuilding from leaves skips `__init__`, so that leaves may be specs,
    shapes or `None` while a direct construction is still checked against the annotated shapes in the tests.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    leaves = tuple(f.name for f in fields if not f.metadata.get("static"))
    static = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten_with_keys(tree):
        children = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in leaves]
        return children, tuple(getattr(tree, name) for name in static)

    def unflatten(aux, children):
        tree = object.__new__(cls)
        for name, value in (*zip(leaves, children, strict=True), *zip(static, aux, strict=True)):
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


@pytree
class Cameras:
    """Pinhole cameras with any leading axes.

    Attributes:
      world_from_camera: rigid poses, OpenCV camera axes, lengths in cube sides.
      intrinsics: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of a `height` x `width` image.
    """

    world_from_camera: Float[AnyArray, "*batch 4 4"]
    intrinsics: Float[AnyArray, "*batch 3 3"]
    height: int = static_field()
    width: int = static_field()


@pytree
class Views:
    """Posed images.

    Attributes:
      rgb: colour times alpha (premultiplied): over a background b the picture is `rgb + (1 - alpha) b`.
      alpha: coverage in [0, 1].
      depth: camera z in cube sides; 0 where there is no surface or no measurement.
      valid: False marks a view that only pads the array.
    """

    cameras: Cameras
    rgb: Float[AnyArray, "*batch h w 3"]
    alpha: Float[AnyArray, "*batch h w"]
    depth: Float[AnyArray, "*batch h w"]
    valid: Bool[AnyArray, "*batch"]

    def over(self, background: Float[AnyArray, "..."] | float) -> Float[AnyArray, "*batch h w 3"]:
        """The picture composited once over `background`, a number or anything that broadcasts to (..., H, W, 3)."""
        return self.rgb + (1.0 - self.alpha[..., None]) * background


@pytree
class Batch:
    """What a training step or an evaluation gets of each object.

    Attributes:
      inputs: views the network may see, at the input size; a step may use only the first few.
      targets: views that supervise, at the render size.
      occupancy: ground truth, C order over (x, y, z).
      index: the record's number in the data set: the seed of everything random about it.
    """

    inputs: Views
    targets: Views
    occupancy: Bool[AnyArray, "b gx gy gz"]
    index: Int[AnyArray, "b"]


@pytree
class Anchors:
    """Sparse voxels, valid ones first.

    Attributes:
      positions: voxel positions in the world.
      voxels: integer (x, y, z) indices on the fine grid.
      mask: False marks padding.
    """

    positions: Float[AnyArray, "*batch n 3"]
    voxels: Int[AnyArray, "*batch n 3"]
    mask: Bool[AnyArray, "*batch n"]


@pytree
class Gaussians:
    """3D Gaussians, activated values.

    Attributes:
      means: centres in the world.
      scales: standard deviations along the Gaussian's own axes, in cube sides.
      quats: wxyz, world from Gaussian; normalised where consumed.
      opacities: in [0, 1].
      colors: any number of channels; an axis of views may stand before G.
      mask: False marks padding, which is never drawn and gets no gradient.
    """

    means: Float[AnyArray, "*batch g 3"]
    scales: Float[AnyArray, "*batch g 3"]
    quats: Float[AnyArray, "*batch g 4"]
    opacities: Float[AnyArray, "*batch g"]
    colors: Float[AnyArray, "*any g c"]
    mask: Bool[AnyArray, "*batch g"]


@pytree
class Rendering:
    """What the rasterizer returns for cameras (..., V).

    Attributes:
      rgb: colour over the background.
      alpha: accumulated opacity.
      depth: sum of weight times z, or that divided by alpha, as asked.
      normal: sum of weight times the Gaussians' normals in the world, turned to the camera, or None.
      overflow: (Gaussian, tile) pairs that did not fit the capacity, over the whole call; 0 in a complete picture.
      invalid: Gaussians left out because a value was not finite, and views left blank because of their camera.
    """

    rgb: Float[AnyArray, "*batch h w c"]
    alpha: Float[AnyArray, "*batch h w"]
    depth: Float[AnyArray, "*batch h w"]
    normal: Float[AnyArray, "*batch h w 3"] | None
    overflow: Int[AnyArray, ""]
    invalid: Int[AnyArray, ""]
