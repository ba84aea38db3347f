"""Pinhole cameras: rays, Plücker coordinates, projection, resizing, and the camera rigs that data sets use.

OpenCV axes everywhere (x right, y down, z forward); other conventions are turned at the door by `from_opengl`.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geolrm_jax.scene import Cameras

RayLength = Literal["unit", "depth"]
RayIntrinsics = Literal["camera", "centred"]
RigConvention = Literal["geolrm", "generator"]
Zero123PlusVersion = Literal["1.1", "1.2"]


def camera_from_world(cameras: Cameras) -> Float[Array, "*batch 4 4"]:
    """Inverse poses, by the general inverse: a pose that is optimised need not stay rigid."""
    return jnp.linalg.inv(cameras.world_from_camera)


def pixel_centers(height: int, width: int) -> Float[Array, "h w 2"]:
    """(x, y) of every pixel centre, in pixels."""
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    return jnp.stack([x, y], axis=-1)


def _pixel_directions(cameras: Cameras) -> Float[Array, "*batch h w 3"]:
    """World directions of pixel centres whose camera-space z is one."""
    x, y = jnp.moveaxis(pixel_centers(cameras.height, cameras.width), -1, 0)
    k = jnp.asarray(cameras.intrinsics)[..., None, None, :, :]
    local_x, local_y = (x - k[..., 0, 2]) / k[..., 0, 0], (y - k[..., 1, 2]) / k[..., 1, 1]
    local = jnp.stack([local_x, local_y, jnp.ones_like(local_x)], axis=-1)
    rotation = jnp.asarray(cameras.world_from_camera)[..., :3, :3]
    return jnp.einsum("...ij,...hwj->...hwi", rotation, local, precision="highest")


def rays(cameras: Cameras) -> tuple[Float[Array, "*batch 3"], Float[Array, "*batch h w 3"]]:
    """Origins and unit directions of the rays through the pixel centres."""
    directions = _pixel_directions(cameras)
    origins = jnp.asarray(cameras.world_from_camera)[..., :3, 3]
    return origins, directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)


def plucker(
    cameras: Cameras, length: RayLength = "unit", intrinsics: RayIntrinsics = "camera"
) -> Float[Array, "*batch h w 6"]:
    """Plücker coordinates (d, o x d) of the pixel rays.

    Args:
      cameras: of the pixels.
      length: d has unit length, or unit camera z (released).
      intrinsics: the camera's own, or fx for both axes and the principal point at the centre (released).
    """
    if intrinsics == "centred":
        focal = jnp.asarray(cameras.intrinsics)[..., 0, 0, None, None] * jnp.diag(jnp.array([1.0, 1.0, 0.0]))
        center = jnp.array([[0.0, 0.0, 0.5 * cameras.width], [0.0, 0.0, 0.5 * cameras.height], [0.0, 0.0, 1.0]])
        cameras = Cameras(cameras.world_from_camera, focal + center, cameras.height, cameras.width)
    origins, directions = rays(cameras)
    if length == "depth":
        directions = _pixel_directions(cameras)
    moments = jnp.cross(origins[..., None, None, :], directions)
    return jnp.concatenate([directions, moments], axis=-1)


def exact(x: Array) -> Array:
    """As it is: the rounding of camera algebra, where nothing else is asked for."""
    return x


def project(
    cameras: Cameras, points: Float[Array, "*points n 3"], rounded: Callable[[Array], Array] = exact
) -> tuple[Float[Array, "*batch n 2"], Float[Array, "*batch n"]]:
    """Pixel positions and depths of world points in every camera.

    Args:
      cameras: leading axes (..., V).
      points: (..., N, 3), one set for all V views of a scene.
      rounded: what happens to operands and results of every operation.

    Returns:
      Pixels (..., V, N, 2) as x, y, and camera z (..., V, N). Where z is not positive the pixel position is finite,
      the projection through the camera's centre: callers mask by z > 0.
    """
    pose, points = rounded(camera_from_world(cameras)), rounded(points)
    local = jnp.einsum("...vij,...nj->...vni", pose[..., :3, :3], points, precision="highest")
    local = rounded(local + pose[..., None, :3, 3])
    z = local[..., 2]
    xy = rounded(local[..., :2] / jnp.where(jnp.abs(z) > 1e-6, z, 1.0)[..., None])
    k = rounded(jnp.asarray(cameras.intrinsics)[..., None, :, :])
    pixels = jnp.stack([k[..., 0, 0] * xy[..., 0] + k[..., 0, 2], k[..., 1, 1] * xy[..., 1] + k[..., 1, 2]], axis=-1)
    return rounded(pixels), z


def unproject(cameras: Cameras, depth: Float[Array, "*batch h w"]) -> Float[Array, "*batch h w 3"]:
    """World points of the pixel centres at the given camera z."""
    origins = jnp.asarray(cameras.world_from_camera)[..., None, None, :3, 3]
    return origins + _pixel_directions(cameras) * depth[..., None]


def resize(cameras: Cameras, height: int, width: int) -> Cameras:
    """Cameras of the same rays' bundle at another image size; NumPy leaves stay NumPy."""
    scale = np.array([width / cameras.width, height / cameras.height, 1.0], dtype=cameras.intrinsics.dtype)
    return Cameras(cameras.world_from_camera, cameras.intrinsics * scale[:, None], height, width)


# Poses below are made where files are read or rigs are set up: plain NumPy, float64 until the last step.


def from_opengl(world_from_camera: np.ndarray) -> np.ndarray:
    """OpenCV poses of OpenGL or Blender poses (..., 4, 4), whose camera axes are x right, y up, z backward."""
    return world_from_camera * np.array([1.0, -1.0, -1.0, 1.0], dtype=world_from_camera.dtype)


def look_at(positions: np.ndarray, target=(0.0, 0.0, 0.0), up=(0.0, 0.0, 1.0)) -> np.ndarray:
    """OpenCV poses (..., 4, 4) at `positions` (..., 3) that look at `target`; looking along `up`, image right is +y."""
    forward = np.asarray(target) - positions
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, np.broadcast_to(up, forward.shape))
    length = np.linalg.norm(right, axis=-1, keepdims=True)
    right = np.where(length > 1e-6, right / np.maximum(length, 1e-12), np.array([0.0, 1.0, 0.0]))
    columns = np.stack([right, np.cross(forward, right), forward, positions], axis=-1)
    bottom = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (*columns.shape[:-2], 1, 4))
    return np.concatenate([columns, bottom], axis=-2)


def intrinsics_from_fov(fov: float, height: int, width: int) -> np.ndarray:
    """A (3, 3) matrix with square pixels, centred, whose horizontal field of view is `fov` radians."""
    focal = 0.5 * width / np.tan(0.5 * fov)
    return np.array([[focal, 0.0, 0.5 * width], [0.0, focal, 0.5 * height], [0.0, 0.0, 1.0]])


def orbit(azimuths, elevations, radius, fov: float, size: int) -> Cameras:
    """Square cameras (V,) on a sphere, looking at the origin; angles in degrees, `radius` a number or one per view."""
    azimuths, elevations = np.broadcast_arrays(np.radians(azimuths), np.radians(elevations))
    directions = np.stack(
        [np.cos(elevations) * np.cos(azimuths), np.cos(elevations) * np.sin(azimuths), np.sin(elevations)], axis=-1
    )
    poses = look_at(directions * np.broadcast_to(radius, azimuths.shape)[..., None])
    intrinsics = np.broadcast_to(intrinsics_from_fov(np.radians(fov), size, size), (*azimuths.shape, 3, 3))
    return Cameras(poses.astype(np.float32), intrinsics.astype(np.float32), size, size)


def turntable(views: int, *, size: int, elevation: float = 15.0, radius: float = 1.9, fov: float = 39.6) -> Cameras:
    """Evenly spaced views around the object."""
    return orbit(np.arange(views) * 360.0 / views, elevation, radius, fov, size)


def gobjaverse_rig(*, size: int, radius: float = 1.9, fov: float = 39.6) -> Cameras:
    """The 40 views of the GObjaverse layout.

    0-23: a ring in 15 degree steps, elevations between 5 and 30; 24 repeats view 0; 25 is the top and 26 the bottom;
    27-38: a ring in 30 degree steps, elevations between -5 and 5; 39 repeats view 27.
    """
    upper, lower = np.arange(24), np.arange(12)
    azimuths = [*(15.0 * upper), 0.0, 0.0, 0.0, *(30.0 * lower), 0.0]
    high, low = 17.5 + 12.5 * np.sin(np.radians(105.0 * upper)), 5.0 * np.sin(np.radians(150.0 * lower))
    elevations = [*high, high[0], 90.0, -90.0, *low, low[0]]
    return orbit(np.array(azimuths), np.array(elevations), radius, fov, size)


def sv3d_rig(
    views: int = 21, *, size: int = 560, elevation: float = 10.0, convention: RigConvention = "geolrm"
) -> Cameras:
    """`views` evenly spaced frames of SV3D_p's orbit.

    "geolrm": the values of GeoLRM's scripts. "generator": the generator's own, from public threads and not checked by
    running it: frame i one step further, so that the last is the input view, fov 33.8 degrees, radius 2.
    """
    if convention == "geolrm":
        return turntable(views, size=size, elevation=elevation, radius=1.5, fov=39.6)
    return orbit(np.arange(1, views + 1) * 360.0 / views, elevation, 2.0, 33.8, size)


def zero123plus_rig(
    views: int = 6, *, size: int = 448, version: Zero123PlusVersion = "1.2", convention: RigConvention = "geolrm"
) -> Cameras:
    """The views of Zero123++: azimuths 30, 90, … degrees, elevations that alternate.

    Args:
      views: all 6, or the 4 that GeoLRM's scripts use (0, 2, 4, 5).
      size: of a view in pixels.
      version: elevations 20, -10 and fov 30 degrees, or 30, -20 and about 49 (1.1).
      convention: radius 1.5, as in GeoLRM's scripts, or the generator's own, where a sphere of radius 0.5 just fits
        the field of view (from public threads, not checked by running it). GeoLRM's scripts have no version 1.1.

    Raises:
      ValueError: if there is no such rig.
    """
    chosen = {6: [0, 1, 2, 3, 4, 5], 4: [0, 2, 4, 5]}.get(views)
    if chosen is None or (version, convention) == ("1.1", "geolrm"):
        raise ValueError(
            f"Zero123++ {version}, convention {convention!r}, has no rig of {views} views: expected 4 or 6"
        )
    elevations, fov = {"1.2": ((20.0, -10.0), 30.0), "1.1": ((30.0, -20.0), 49.0)}[version]
    radius = 1.5 if convention == "geolrm" else 0.5 / np.tan(np.radians(0.5 * fov))
    return orbit(np.arange(30.0, 360.0, 60.0)[chosen], np.array(elevations * 3)[chosen], radius, fov, size)
