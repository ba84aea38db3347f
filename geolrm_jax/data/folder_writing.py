"""Writes views in the GObjaverse layout that `folder` reads: NNNNN/NNNNN.png, .json and _nd.exr."""

import json
from pathlib import Path

import numpy as np
import OpenEXR
from jaxtyping import Float, Float32, UInt8
from PIL import Image


def write_view(
    folder: Path,
    view: int,
    *,
    rgba: UInt8[np.ndarray, "h w 4"],
    depth: Float32[np.ndarray, "h w"],
    normal: Float32[np.ndarray, "h w 3"],
    world_from_camera: Float[np.ndarray, "4 4"],
    intrinsics: Float[np.ndarray, "3 3"],
) -> None:
    """Writes one view of the object in `folder`.

    Args:
      view: its number, 0 to 99999.
      rgba: sRGB-encoded, straight alpha.
      depth: camera z in cube sides, 0 where there is no surface; stored in 32-bit floats as channel A.
      normal: in the z-up world, 0 where there is no surface; stored in 16-bit floats, R, G, B = (-nx, nz, -ny).
      world_from_camera: rigid, OpenCV axes.
      intrinsics: principal point at the centre, which the layout takes for granted.
    """
    stem = folder / f"{view:05d}" / f"{view:05d}"
    stem.parent.mkdir(parents=True)
    Image.fromarray(rgba).save(f"{stem}.png")
    write_normals_and_depth(Path(f"{stem}_nd.exr"), depth, normal)
    columns = np.asarray(world_from_camera, np.float64)[:3].T.tolist()
    fov = 2.0 * np.arctan(0.5 * np.array(rgba.shape[1::-1]) / np.diag(intrinsics)[:2].astype(np.float64))
    names = ("x", "y", "z", "origin", "x_fov", "y_fov")
    camera = dict(zip(names, [*columns, *fov.tolist()], strict=True))
    Path(f"{stem}.json").write_text(json.dumps(camera))


def write_normals_and_depth(path: Path, depth: Float32[np.ndarray, "h w"], normal: Float32[np.ndarray, "h w 3"]):
    """Writes the `_nd.exr` of a view; see `write_view`."""
    x, y, z = np.moveaxis(normal, -1, 0)
    channels = {name: np.ascontiguousarray(c, np.float16) for name, c in {"R": -x, "G": z, "B": -y}.items()}
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {**channels, "A": np.ascontiguousarray(depth)}).write(str(path))
