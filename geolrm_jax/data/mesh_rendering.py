"""Renders a mesh with Mitsuba: colour with straight alpha, camera z and world normals (extra `mesh`).

Colour is path-traced linear light, sRGB-encoded; alpha is the share of a pixel's samples that meet the object. Depth
and normal are those of the surface at the pixel's centre, not averages, so that no depth lies between two surfaces.
"""

import ctypes
import os
from typing import Literal, NamedTuple

import drjit
import mitsuba as mi
import numpy as np
from jaxtyping import Float, Float32, UInt8

from geolrm_jax.data.mesh_files import Material, MeshPart, linear_to_srgb, srgb_to_linear

Light = Literal["studio", "uniform"]
Variant = Literal["llvm_ad_rgb", "scalar_rgb"]

LLVM_VERSIONS = (21, 20, 19, 18)
# Radiance from direction d: mean + slope * d . key. A diffuse surface with normal n and nothing around it then shows
# albedo * (mean + 2/3 slope * n . key): lighter on top and on one side, dark below, never black.
STUDIO_MEAN, STUDIO_SLOPE, STUDIO_KEY = 0.7, 0.5, (0.48, 0.36, 0.8)
_BOUNCES = 6
_LAYERS = 32  # of holes that a ray passes on its way to a surface
_MITSUBA_AXES = np.diag([-1.0, -1.0, 1.0, 1.0])  # Mitsuba's camera looks along z with x left and y up


class RenderedView(NamedTuple):
    """One view of an object.

    Attributes:
      rgba: sRGB-encoded, straight alpha.
      depth: camera z at the pixel centres in cube sides, 0 where there is no surface.
      normal: shading normal there, in the world, turned to the camera; 0 where there is no surface.
    """

    rgba: UInt8[np.ndarray, "h w 4"]
    depth: Float32[np.ndarray, "h w"]
    normal: Float32[np.ndarray, "h w 3"]


def choose_variant() -> Variant:
    """Mitsuba's variant: "llvm_ad_rgb" where an LLVM that it can use is found, else "scalar_rgb", several times slower.

    `DRJIT_LIBLLVM_PATH` names the library; unset, the system's LLVM 21 to 18 are tried and the variable is set. Older
    ones are not: Dr.Jit refuses 14 and aborts with 15.
    """
    named = os.environ.get("DRJIT_LIBLLVM_PATH")
    candidates = [f"libLLVM{name}" for v in LLVM_VERSIONS for name in (f".so.{v}.1", f"-{v}.so", f"-{v}.so.1")]
    for library in [named] if named else candidates:
        if _llvm_version(library) in LLVM_VERSIONS:
            os.environ["DRJIT_LIBLLVM_PATH"] = library
            return "llvm_ad_rgb"
    return "scalar_rgb"


def _llvm_version(library: str) -> int | None:
    """Major version of an LLVM library; None where there is none, or it is too old to say."""
    try:
        get_version = ctypes.CDLL(library).LLVMGetVersion
    except (OSError, AttributeError):
        return None
    numbers = [ctypes.c_uint() for _ in range(3)]
    get_version(*map(ctypes.byref, numbers))
    return numbers[0].value


class MeshScene:
    """A mesh under a light, ready to be seen by any number of cameras of one size and field of view.

    Args:
      parts: of one object, as `mesh_files.read_mesh` gives them.
      size: height and width of the pictures in pixels.
      fov: horizontal field of view in radians.
      samples: per pixel, rounded up by Mitsuba to what its `multijitter` sampler can lay out.
      light: "uniform" is radiance 1 from everywhere; "studio" is lighter above and on one side (STUDIO_KEY).
      variant: of Mitsuba, see `choose_variant`; it is set for the whole process.

    Raises:
      ValueError: if the object has holes by its texture and the variant is scalar, which cannot look through them.
    """

    def __init__(
        self,
        parts: list[MeshPart],
        *,
        size: int,
        fov: float,
        samples: int = 64,
        light: Light = "studio",
        variant: Variant = "llvm_ad_rgb",
    ):
        mi.set_variant(variant)
        mi.set_log_level(mi.LogLevel.Error)  # it warns of every number of samples that it rounds up
        self._holes = any(part.material.opacity is not None for part in parts)
        if self._holes and variant == "scalar_rgb":
            raise ValueError("its textures have holes, whose depth needs Mitsuba's LLVM variant: install LLVM 18 to 21")
        meshes = {f"part_{i}": _mesh(f"part_{i}", part) for i, part in enumerate(parts)}
        self._scene = mi.load_dict({"type": "scene", "light": _light(light), **meshes})
        self._path = mi.load_dict({"type": "path", "max_depth": _BOUNCES, "hide_emitters": True})
        self._surface = mi.load_dict({"type": "aov", "aovs": "p:position,g:geo_normal,s:sh_normal"})
        self._color_sensor = _sensor(size, fov, {"type": "multijitter", "sample_count": samples})
        # One sample without jitter is the pixel's centre.
        self._centre_sensor = _sensor(size, fov, {"type": "multijitter", "sample_count": 1, "jitter": False})

    def render(self, world_from_camera: Float[np.ndarray, "4 4"], seed: int) -> RenderedView:
        """The view of a camera (OpenCV axes, z up); ValueError where light comes out as no number."""
        pose = np.asarray(world_from_camera, np.float64)
        to_world = mi.ScalarTransform4f(pose @ _MITSUBA_AXES)
        for sensor in (self._color_sensor, self._centre_sensor):
            parameters = mi.traverse(sensor)
            parameters["to_world"] = mi.Transform4f(to_world)
            parameters.update()
        light = np.array(mi.render(self._scene, sensor=self._color_sensor, integrator=self._path, seed=seed))
        if not np.isfinite(light).all():
            raise ValueError(f"{(~np.isfinite(light)).any(axis=-1).sum()} pixels have light that is no finite number")
        depth, normal = _facing(pose, *self._surfaces())
        return RenderedView(_straight(light.astype(np.float32)), depth, normal)

    def _surfaces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position, geometric normal and shading normal (H, W, 3) at the pixel centres; all 0 where there is none."""
        if self._holes:
            return self._surfaces_behind_holes()
        buffers = np.array(mi.render(self._scene, sensor=self._centre_sensor, integrator=self._surface), np.float64)
        return buffers[..., :3], buffers[..., 3:6], buffers[..., 6:9]

    def _surfaces_behind_holes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same where a ray goes on through what lets more than half of the light pass."""
        width, height = self._centre_sensor.film().size()
        index = drjit.arange(mi.UInt, width * height)
        place = (mi.Point2f(index % width, index // width) + 0.5) / mi.Point2f(width, height)
        ray, _ = self._centre_sensor.sample_ray(0.0, 0.5, place, mi.Point2f(0.5))
        seen = self._scene.ray_intersect(ray)
        for _ in range(_LAYERS):
            passed = seen.bsdf(ray).eval_null_transmission(seen, seen.is_valid())
            through = seen.is_valid() & (drjit.mean(passed) > 0.5)
            if not drjit.any(through):
                break
            seen = drjit.select(through, self._scene.ray_intersect(seen.spawn_ray(ray.d), through), seen)
        vectors = (seen.p, seen.n, seen.sh_frame.n)
        return tuple(
            np.array(drjit.select(seen.is_valid(), vector, 0.0), np.float64).T.reshape(height, width, 3)
            for vector in vectors
        )


def _facing(pose: np.ndarray, position: np.ndarray, geometric: np.ndarray, shading: np.ndarray):
    """Camera z, and the shading normals on the side of the surface that the camera sees, never turned away from it."""
    solid = (geometric != 0.0).any(axis=-1)
    ray = position - pose[:3, 3]
    depth = np.where(solid, ray @ pose[:3, 2], 0.0)
    toward = -ray / np.maximum(np.linalg.norm(ray, axis=-1, keepdims=True), 1e-12)
    side = geometric * np.where((geometric * toward).sum(-1, keepdims=True) < 0.0, -1.0, 1.0)
    normal = shading * np.where((shading * side).sum(-1, keepdims=True) < 0.0, -1.0, 1.0)
    normal = normal - np.minimum((normal * toward).sum(-1, keepdims=True), 0.0) * toward
    normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    return depth.astype(np.float32), np.where(solid[..., None], normal, 0.0).astype(np.float32)


def _straight(light: Float32[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 4"]:
    """8-bit sRGB with straight alpha of linear light that is multiplied by alpha; black where alpha is 0."""
    alpha = np.clip(light[..., 3:], 0.0, 1.0)
    color = linear_to_srgb(light[..., :3] / np.maximum(alpha, 1e-6))
    rgba = np.rint(np.concatenate([color, alpha], axis=-1) * 255.0).astype(np.uint8)
    return np.where(rgba[..., 3:] > 0, rgba, np.uint8(0))


def _sensor(size: int, fov: float, sampler: dict):
    """A camera; annotated with no type, because Mitsuba has none before a variant is set."""
    return mi.load_dict(
        {
            "type": "perspective",
            "fov": float(np.degrees(fov)),
            "fov_axis": "x",
            "near_clip": 0.01,
            "far_clip": 100.0,
            "sampler": sampler,
            # A pixel is the mean of its own samples: alpha is coverage, and colour divides by it without a fringe.
            "film": {
                "type": "hdrfilm",
                "width": size,
                "height": size,
                "pixel_format": "rgba",
                "component_format": "float32",
                "rfilter": {"type": "box"},
            },
        }
    )


def _light(light: Light) -> dict:
    if light == "uniform":
        return {"type": "constant", "radiance": {"type": "rgb", "value": 1.0}}
    height, width = 64, 128
    theta, phi = np.meshgrid(
        (np.arange(height) + 0.5) * np.pi / height, (np.arange(width) + 0.5) * 2.0 * np.pi / width, indexing="ij"
    )
    # Mitsuba's map has y up and u = atan2(x, -z): turned to z up, that is atan2(x, y) and the angle from +z.
    direction = np.stack([np.sin(theta) * np.sin(phi), np.sin(theta) * np.cos(phi), np.cos(theta)], axis=-1)
    radiance = STUDIO_MEAN + STUDIO_SLOPE * (direction @ np.array(STUDIO_KEY))
    bitmap = mi.Bitmap(np.repeat(radiance[..., None], 3, axis=-1).astype(np.float32))
    return {"type": "envmap", "bitmap": bitmap, "to_world": mi.ScalarTransform4f().rotate([1, 0, 0], 90)}


def _mesh(name: str, part: MeshPart):
    """Mitsuba's mesh of a part."""
    properties = mi.Properties()
    properties["mesh_bsdf"] = mi.load_dict(_bsdf(part))
    mesh = mi.Mesh(
        name,
        len(part.vertices),
        len(part.faces),
        has_vertex_normals=part.normals is not None,
        has_vertex_texcoords=part.uv is not None,
        props=properties,
    )
    parameters = mi.traverse(mesh)
    parameters["vertex_positions"] = part.vertices.astype(np.float32).ravel()
    parameters["faces"] = part.faces.ravel()
    if part.normals is not None:
        parameters["vertex_normals"] = part.normals.astype(np.float32).ravel()
    if part.uv is not None:
        # Mitsuba's pictures begin at the top; a coordinate that is no number reads the corner.
        uv = np.nan_to_num(part.uv, nan=0.0, posinf=0.0, neginf=0.0) * (1.0, -1.0) + (0.0, 1.0)
        parameters["vertex_texcoords"] = uv.astype(np.float32).ravel()
    parameters.update()
    if part.colors is not None:
        colors = part.colors * np.array(part.material.color, np.float32)
        mesh.add_attribute("vertex_color", 3, colors.astype(np.float32).ravel())
    return mesh


def _bsdf(part: MeshPart) -> dict:
    """A part's material seen alike from both sides."""
    material = part.material
    base = {"type": "mesh_attribute", "name": "vertex_color"} if part.colors is not None else _base_color(material)
    if material.glossy is None:
        surface = {"type": "diffuse", "reflectance": base}
    else:
        surface = {"type": "principled", "base_color": base, "specular": 0.5}
        for name, channel, factor in zip(("roughness", "metallic"), (1, 2), material.glossy, strict=True):
            picture = material.glossy_texture
            surface[name] = factor if picture is None else _bitmap(picture[..., channel] * np.float32(factor / 255.0))
    both_sides = {"type": "twosided", "surface": surface}
    if material.opacity is None:
        return both_sides
    return {"type": "mask", "opacity": _bitmap(material.opacity), "surface": both_sides}


def _base_color(material: Material) -> dict:
    """The base colour as a texture of linear values."""
    if material.texture is None:
        return {"type": "rgb", "value": list(material.color)}
    if material.color == (1.0, 1.0, 1.0):
        return {"type": "bitmap", "bitmap": mi.Bitmap(material.texture)}  # decoded there
    return _bitmap(srgb_to_linear(material.texture / np.float32(255.0)) * np.array(material.color))


def _bitmap(values: np.ndarray) -> dict:
    """A texture of linear values (H, W) or (H, W, 3)."""
    values = values if values.ndim == 3 else values[..., None]
    return {"type": "bitmap", "raw": True, "bitmap": mi.Bitmap(np.ascontiguousarray(values, np.float32))}
