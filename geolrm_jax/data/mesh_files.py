"""Meshes from GLB, glTF, OBJ and PLY files: triangles in the unit cube with what colours them (extra `mesh`)."""

import dataclasses
import json
import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import trimesh
from jaxtyping import Float32, Float64, UInt8, UInt32
from PIL import Image
from trimesh.resolvers import FilePathResolver
from trimesh.visual.material import PBRMaterial, SimpleMaterial

UpAxis = Literal["file", "y", "z"]

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
_GLTF = (".glb", ".gltf")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tga", ".tif", ".tiff", ".webp")
_TRIANGLES = (4, 5)  # glTF's modes TRIANGLES, TRIANGLE_STRIP
_EXTENSIONS = ("EXT_texture_webp", "KHR_draco_mesh_compression", "KHR_lights_punctual")
_Z_UP_FROM_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
_GREY = 0.8


@dataclasses.dataclass(frozen=True)
class Material:
    """How a part reflects light. A texture is multiplied by its factor.

    Attributes:
      color: linear base colour.
      texture: sRGB-encoded base colour, first row on top.
      opacity: of the texture, 0 where a hole is; None: opaque.
      glossy: None for a surface that only scatters, else (roughness, metalness), glTF's factors.
      glossy_texture: glTF's metallic-roughness picture: green is roughness, blue is metalness, linear.
    """

    color: tuple[float, float, float] = (_GREY,) * 3
    texture: UInt8[np.ndarray, "h w 3"] | None = None
    opacity: Float32[np.ndarray, "h w"] | None = None
    glossy: tuple[float, float] | None = None
    glossy_texture: UInt8[np.ndarray, "mr_h mr_w 3"] | None = None


class MeshPart(NamedTuple):
    """Triangles of one material.

    Attributes:
      normals: of the vertices, unit length, as the file has them; None: flat triangles.
      uv: texture coordinates, (0, 0) the lower left corner.
      colors: linear colours of the vertices, which multiply the material's.
    """

    vertices: Float64[np.ndarray, "n 3"]
    faces: UInt32[np.ndarray, "m 3"]
    normals: Float64[np.ndarray, "n 3"] | None
    uv: Float64[np.ndarray, "n 2"] | None
    colors: Float32[np.ndarray, "n 3"] | None
    material: Material


def read_mesh(path: str | Path, up: UpAxis = "file") -> list[MeshPart]:
    """The parts of a mesh file, z up, the middle of their bounding box at the origin, its longest side 1.

    Vertices that no triangle uses do not count. `up="file"`: y for glTF, as its specification says, z for OBJ and PLY,
    which do not say; "y" and "z" say so for all.

    Raises:
      ValueError: naming the file, if it cannot be read, lacks a material or texture that it names, holds no triangle,
        a number that is not finite or a triangle of vertices that do not exist, or has no extent.
    """
    path = Path(path)
    y_up = up == "y" or (up == "file" and path.suffix.lower() in _GLTF)
    parts = [_with_axes(part, y_up) for part in _read_parts(path)]
    if not parts:
        raise ValueError(f"{path} holds no triangle")
    used = used_vertices(parts)
    low, high = used.min(axis=0), used.max(axis=0)
    side = (high - low).max()
    if side <= 0.0 or not np.isfinite(side):
        raise ValueError(f"{path} has no extent: all its triangles are in one point, or too far out")
    return [part._replace(vertices=(part.vertices - 0.5 * (low + high)) / side) for part in parts]


def used_vertices(parts: Sequence[MeshPart]) -> Float64[np.ndarray, "n 3"]:
    """All vertices that a triangle uses."""
    return np.concatenate([part.vertices[np.unique(part.faces)] for part in parts])


class _Resolver(FilePathResolver):
    """Finds the files that a mesh names, and keeps what was wrong with them: trimesh loads without them in silence."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.faults: list[str] = []

    def get(self, name: str) -> bytes:
        try:
            data = self._find(name)
        except (OSError, ValueError):
            self.faults.append(f"{name.strip()!r} is not there")
            raise
        if Path(name.strip()).suffix.lower() in _IMAGES and not _is_image(data):
            self.faults.append(f"{name.strip()!r} is no readable image")
        return data

    def _find(self, name: str) -> bytes:
        # Google Scanned Objects keep the mesh in meshes/ and its picture in materials/textures/.
        beside = Path(self.parent).parent / "materials" / "textures" / Path(name.strip()).name
        try:
            return super().get(name)
        except (OSError, ValueError):
            if beside.is_file():
                return beside.read_bytes()
            raise


def _is_image(data: bytes) -> bool:
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def _read_parts(path: Path) -> Iterator[MeshPart]:
    """The parts where they stand in the file."""
    if not path.is_file():
        raise ValueError(f"no file {path}: expected a mesh ({', '.join(SUFFIXES)})")
    resolver = _Resolver(path)
    try:
        scene = trimesh.load_scene(str(path), resolver=resolver, process=False)
        parts = [
            part
            for node in scene.graph.nodes_geometry
            for part in _placed(scene.geometry[scene.graph[node][1]], scene.graph[node][0], path)
        ]
    except Exception as error:  # whatever a damaged file does to a parser
        raise ValueError(f"{path} is no readable mesh: {'; '.join([*resolver.faults, repr(error)])}") from error
    if resolver.faults:
        raise ValueError(f"{path} names a file that cannot be used: {', '.join(sorted({*resolver.faults}))}")
    if path.suffix.lower() in _GLTF:
        _check_gltf(path, scene)
    yield from parts


def _placed(mesh: trimesh.parent.Geometry, pose: np.ndarray, path: Path) -> Iterator[MeshPart]:
    """A mesh where its node puts it; nothing for points, curves and meshes without triangles."""
    if not isinstance(mesh, trimesh.Trimesh) or len(mesh.faces) == 0:
        return
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"a triangle names vertex {faces.max()} of {len(vertices)}")
    vertices = vertices @ pose[:3, :3].T + pose[:3, 3]
    if not np.isfinite(vertices[faces]).all():
        raise ValueError("a vertex is not finite")
    normals = None
    if "vertex_normals" in mesh._cache:  # loaded, not made up
        normals = _unit_normals(np.asarray(mesh.vertex_normals) @ np.linalg.pinv(pose[:3, :3]), faces)
    uv, colors, material = _appearance(mesh, linear=path.suffix.lower() in _GLTF)
    if colors is not None and len(colors) == len(faces) != len(vertices):  # one colour a face
        vertices, colors, normals, uv = vertices[faces].reshape(-1, 3), np.repeat(colors, 3, axis=0), None, None
        faces = np.arange(len(vertices)).reshape(-1, 3)
    yield MeshPart(vertices, faces.astype(np.uint32), normals, uv, colors, material)


def _unit_normals(normals: np.ndarray, faces: np.ndarray) -> np.ndarray | None:
    """Normals of length one; None where one that is used has no direction."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    usable = np.isfinite(length) & (length > 1e-12)
    return np.where(usable, normals / np.where(usable, length, 1.0), 0.0) if usable[faces].all() else None


def _with_axes(part: MeshPart, y_up: bool) -> MeshPart:
    """The part in a z-up world."""
    if not y_up:
        return part
    normals = None if part.normals is None else part.normals @ _Z_UP_FROM_Y_UP.T
    return part._replace(vertices=part.vertices @ _Z_UP_FROM_Y_UP.T, normals=normals)


def _appearance(mesh: trimesh.Trimesh, linear: bool) -> tuple[np.ndarray | None, np.ndarray | None, Material]:
    """Texture coordinates, colours of the vertices (or faces) and the material of a mesh; `linear`: glTF's colours."""
    visual = mesh.visual
    if visual.kind in ("vertex", "face"):
        return None, _linear_colors(getattr(visual, f"{visual.kind}_colors"), linear), Material(color=(1.0,) * 3)
    if visual.kind != "texture":
        return None, None, Material()
    uv = None if visual.uv is None or len(visual.uv) != len(mesh.vertices) else np.asarray(visual.uv, np.float64)
    material = _material(visual.material, textured=uv is not None)
    color = visual.vertex_attributes.get("color")
    if color is None or material.texture is not None:
        return uv, None, material
    return uv, _linear_colors(color, linear), material


def _linear_colors(colors: np.ndarray, linear: bool) -> Float32[np.ndarray, "n 3"]:
    colors = np.asarray(colors)[:, :3]
    if np.issubdtype(colors.dtype, np.integer):
        colors = colors / np.iinfo(colors.dtype).max
    return (colors if linear else srgb_to_linear(colors)).astype(np.float32)


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """Linear light of sRGB-encoded values in [0, 1] (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((np.maximum(values, 0.0) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    """sRGB-encoded values of linear light, clipped to [0, 1]; the inverse of `srgb_to_linear`."""
    values = np.clip(values, 0.0, 1.0)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def _material(material: trimesh.visual.material.Material, textured: bool) -> Material:
    """Base colour, gloss and holes of a material; `textured`: the mesh has coordinates for pictures."""
    if isinstance(material, SimpleMaterial):  # of an OBJ or PLY; where there is a picture, its factor is not used
        if textured and material.image is not None:
            return Material(color=(1.0,) * 3, texture=_rgb(material.image))
        return Material(color=_factor(material.diffuse))
    if not isinstance(material, PBRMaterial):
        raise ValueError(f"a material of kind {type(material).__name__}, expected one for the whole part")
    factor = material.baseColorFactor
    roughness, metalness = (
        1.0 if value is None else float(value) for value in (material.roughnessFactor, material.metallicFactor)
    )
    image, gloss = material.baseColorTexture, material.metallicRoughnessTexture
    return Material(
        color=(1.0,) * 3 if factor is None else _factor(factor),
        texture=_rgb(image) if textured and image is not None else None,
        opacity=_opacity(image, material) if textured and image is not None else None,
        glossy=(roughness, metalness),
        glossy_texture=_rgb(gloss) if textured and gloss is not None else None,
    )


def _factor(color: np.ndarray) -> tuple[float, float, float]:
    """Three linear factors of a colour in numbers of 8 bits, or in [0, 1]."""
    color = np.asarray(color)
    scale = 255.0 if np.issubdtype(color.dtype, np.integer) else 1.0
    return tuple(float(value) / scale for value in color[:3])


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    return np.array(image.convert("RGB"))


def _opacity(image: Image.Image, material: PBRMaterial) -> Float32[np.ndarray, "h w"] | None:
    """Opacity of the picture where the material says that it counts and there is a hole."""
    if material.alphaMode not in ("MASK", "BLEND"):
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3] / np.float32(255.0)
    if material.alphaMode == "MASK":
        cutoff = 0.5 if material.alphaCutoff is None else material.alphaCutoff
        alpha = (alpha >= cutoff).astype(np.float32)
    return None if (alpha == 1.0).all() else alpha.astype(np.float32)


def _check_gltf(path: Path, scene: trimesh.Scene) -> None:
    """Raises a ValueError for what trimesh leaves out without a word: extensions that it does not know and the file
    cannot do without, textures that it cannot read, and those that lie otherwise than by the first coordinates."""
    header = _gltf_header(path)
    unknown = [
        name
        for name in header.get("extensionsRequired", [])
        if name not in _EXTENSIONS and not name.startswith("KHR_materials_")
    ]
    if unknown:
        raise ValueError(f"{path} needs glTF extensions that are not read: {', '.join(unknown)}")
    primitives = [p for mesh in header.get("meshes", []) for p in mesh["primitives"] if p.get("mode", 4) in _TRIANGLES]
    materials = [header["materials"][p["material"]] for p in primitives if "material" in p]
    textures = [m.get("pbrMetallicRoughness", {}).get("baseColorTexture") for m in materials]
    textures = [texture for texture in textures if texture is not None]
    if any(t.get("texCoord", 0) != 0 or "KHR_texture_transform" in t.get("extensions", {}) for t in textures):
        raise ValueError(f"{path} has a base colour texture with second coordinates or a transform: not read")
    loaded = sum(
        getattr(getattr(mesh.visual, "material", None), "baseColorTexture", None) is not None
        for mesh in scene.geometry.values()
        if isinstance(mesh, trimesh.Trimesh)
    )
    if loaded < len(textures):
        raise ValueError(f"{path}: only {loaded} of {len(textures)} base colour textures could be read")


def _gltf_header(path: Path) -> dict:
    """The JSON part of a glTF file."""
    if path.suffix.lower() == ".gltf":
        return json.loads(path.read_text())
    with path.open("rb") as file:
        length = struct.unpack("<5I", file.read(20))[3]
        return json.loads(file.read(length))
