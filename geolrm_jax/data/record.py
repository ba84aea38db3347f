"""The one record layout: an object as every source gives it, the builder writes it and the pipeline reads it.

Layout, version 2. A set holds two kinds of records, in files of their own: one for each object, and one for each view,
so that drawing 8 of 40 views reads and decodes 8. V views, all H x W; G voxels a side.

An object:

| field              | type, shape        | meaning                                                                    |
|--------------------|--------------------|----------------------------------------------------------------------------|
| id                 | str                | unique in its split: "dict/inst", a folder, "procedural/train/7"           |
| view_ids           | int32 (V,)         | numbers of the views at the source, distinct                               |
| first_view         | int64              | place of its first view among the views of its shard; the others follow    |
| depth_range        | float32 (V, 2)     | (near, far), cube sides: of a view's `depth`                               |
| world_from_camera  | float32 (V, 4, 4)  | rigid poses, OpenCV axes, cube sides, z up                                 |
| intrinsics         | float32 (V, 3, 3)  | pixels of the H x W image, pixel centres at +0.5                           |
| size               | int32 (2,)         | (H, W)                                                                     |
| occupancy_bits     | bytes, ceil(G^3/8) | bits of (G, G, G) over x, y, z, C order, first voxel in the highest bit    |
| grid               | int32              | G                                                                          |
| occupancy_from     | str                | what it was made from: "depth", or "silhouettes" where no view has depth   |
| occupancy_rounding | str                | rule by which points became voxels: "voxel" or "released"                  |
| encoding           | str                | of `image` and `depth`: "raw" or "png"                                     |

A view:

| field              | type, shape        | meaning                                                                    |
|--------------------|--------------------|----------------------------------------------------------------------------|
| id                 | str                | its object                                                                 |
| view_id            | int32              | its number at the source                                                   |
| image              | bytes              | uint8 (H, W, 4), sRGB-encoded colour, straight alpha: raw C order or PNG   |
| depth              | bytes              | uint16 (H, W), raw little-endian or PNG: 0 = missing, and q > 0 means      |
|                    |                    | near + (q - 1)(far - near)/65534                                           |

Depth is camera z; its error is at most half a step, (far - near) / 131068: 1.4e-5 cube sides for an object that fills
the cube, whose diagonal is 1.73.
"""

import dataclasses
import errno
import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8, UInt16
from PIL import Image

from geolrm_jax.geometry.voxels import Rounding
from geolrm_jax.scene import Cameras

FORMAT_VERSION = 2
Encoding = Literal["raw", "png"]
OccupancyFrom = Literal["depth", "silhouettes"]
_DEPTH_STEPS = 65534
# Of open files and memory; ArrayRecord raises them as RuntimeErrors.
_SHORTAGES = tuple(os.strerror(code) for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))
_PNG_LEVEL = 1  # of 9: higher ones cost far more time than they save bytes


class PosedImages(NamedTuple):
    """Decoded views of one object, NumPy throughout: what every source reads and inference takes.

    Attributes:
      view_ids: (V,) int32, distinct numbers of the views at the source.
      rgba: (V, H, W, 4) uint8, straight alpha.
      depth: (V, H, W) float32, camera z in cube sides, 0 where missing.
      cameras: (V,) with the images' height and width.
    """

    view_ids: Int32[np.ndarray, "v"]
    rgba: UInt8[np.ndarray, "v h w 4"]
    depth: Float32[np.ndarray, "v h w"]
    cameras: Cameras


class DamagedRecord(ValueError):
    """A stored record that cannot be read: `id` names it, `reason` says what was found."""

    def __init__(self, id: str, reason: str):
        super().__init__(f"{id}: {reason}")
        self.id, self.reason = id, reason

    def __reduce__(self):
        return DamagedRecord, (self.id, self.reason)


def reading_error(id: str, error: Exception) -> DamagedRecord | OSError:
    """What to raise for an error while the record `id` was read: an OSError where the machine is short of something."""
    if any(text in str(error) for text in _SHORTAGES):
        return OSError(f"{id}: {error}")
    return DamagedRecord(id, str(error))


def check_views(views: PosedImages, origin: str) -> PosedImages:
    """The views themselves, once they are known to be sound.

    Raises:
      ValueError: naming `origin`, the view and what was expected: shapes that disagree, repeated view numbers, depth
        that is not finite or negative, a camera whose matrix is no rotation or no finite number.
    """
    ids, rgba, depth, cameras = views
    count = len(ids)
    size = (cameras.height, cameras.width)
    expected = {
        "rgba": (rgba, (count, *size, 4)),
        "depth": (depth, (count, *size)),
        "world_from_camera": (cameras.world_from_camera, (count, 4, 4)),
        "intrinsics": (cameras.intrinsics, (count, 3, 3)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{origin}: {name} has shape {array.shape}, expected {shape}")
    if count == 0 or len(set(ids.tolist())) != count:
        raise ValueError(f"{origin}: expected at least one view and distinct view numbers, got {ids.tolist()}")
    for i, view in enumerate(ids.tolist()):
        check_camera(cameras.world_from_camera[i], cameras.intrinsics[i], f"{origin}, view {view}")
        if not np.isfinite(depth[i]).all() or depth[i].min() < 0.0:
            raise ValueError(f"{origin}, view {view}: depth must be finite and not negative (0 = missing)")
    return views


def check_camera(world_from_camera: np.ndarray, intrinsics: np.ndarray, origin: str) -> None:
    """Raises a ValueError naming `origin` unless the pose is rigid and the intrinsics describe a pinhole camera."""
    if not (np.isfinite(world_from_camera).all() and np.isfinite(intrinsics).all()):
        raise ValueError(f"{origin}: the camera holds a number that is not finite")
    rotation = world_from_camera[:3, :3].astype(np.float64)
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0.0:
        raise ValueError(f"{origin}: the camera matrix is no rotation: orthonormal axes, determinant +1 expected")
    if np.abs(world_from_camera[3] - (0.0, 0.0, 0.0, 1.0)).max() > 1e-6:
        raise ValueError(f"{origin}: the last row of the camera matrix must be 0 0 0 1")
    if intrinsics[0, 0] <= 0.0 or intrinsics[1, 1] <= 0.0:
        raise ValueError(f"{origin}: focal lengths must be positive, got {intrinsics[0, 0]} and {intrinsics[1, 1]}")


def select_views(views: PosedImages, ids: Sequence[int], origin: str) -> PosedImages:
    """The views with the given numbers, in that order; a ValueError names the missing ones."""
    rows = find_rows(views.view_ids, ids, origin)
    cameras = views.cameras
    chosen = Cameras(cameras.world_from_camera[rows], cameras.intrinsics[rows], cameras.height, cameras.width)
    return PosedImages(views.view_ids[rows], views.rgba[rows], views.depth[rows], chosen)


def find_rows(view_ids: np.ndarray, wanted: Sequence[int], origin: str) -> list[int]:
    """Positions of the wanted view numbers in `view_ids`; a ValueError names the missing ones."""
    row_of = {view: row for row, view in enumerate(view_ids.tolist())}
    missing = [int(view) for view in wanted if int(view) not in row_of]
    if missing:
        raise ValueError(f"{origin}: no views {missing}; it has {view_ids.tolist()}")
    return [row_of[int(view)] for view in wanted]


def _to_png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _encode(array: np.ndarray, encoding: Encoding) -> bytes:
    if encoding == "png":
        return _to_png(array)
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _decode(data: bytes, dtype: str, shape: tuple[int, ...], encoding: str) -> np.ndarray:
    if encoding == "raw":
        return np.frombuffer(data, dtype).reshape(shape)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.size != (shape[1], shape[0]):
            raise ValueError(f"a picture of {image.size[::-1]}, expected {shape[:2]}")
        return np.asarray(image, dtype).reshape(shape)


def quantize_depth(depth: Float32[np.ndarray, "h w"]) -> tuple[UInt16[np.ndarray, "h w"], tuple[float, float]]:
    """Depth as steps, 0 where missing, with its (near, far)."""
    present = depth > 0.0
    if not present.any():
        return np.zeros(depth.shape, np.uint16), (0.0, 0.0)
    near, far = float(depth[present].min()), float(depth[present].max())
    steps = np.rint((depth - np.float32(near)) * np.float32(_DEPTH_STEPS / max(far - near, 1e-9))).clip(0, _DEPTH_STEPS)
    return np.where(present, 1 + steps, 0).astype(np.uint16), (near, far)


def _dequantize(
    steps: UInt16[np.ndarray, "h w"], limits: Float32[np.ndarray, "2"], out: Float32[np.ndarray, "h w"]
) -> None:
    """Depth of steps, written to `out`."""
    near, far = limits
    np.multiply(steps, (far - near) / np.float32(_DEPTH_STEPS), out=out, casting="unsafe")
    out += near - (far - near) / np.float32(_DEPTH_STEPS)
    out[steps == 0] = 0.0


class StoredView(NamedTuple):
    """One view as it is stored; the module's docstring has the layout."""

    id: str
    view_id: int
    image: bytes
    depth: bytes


def _pick(views: Sequence[StoredView], rows: Sequence[int]) -> list[StoredView]:
    return [views[row] for row in rows]


@dataclasses.dataclass(frozen=True)
class Record:
    """One object; the module's docstring has the layout. Its views are read and decoded when asked for.

    `read_views` gives the stored views in the positions asked for.
    """

    id: str
    view_ids: Int32[np.ndarray, "v"]
    depth_range: Float32[np.ndarray, "v 2"]
    world_from_camera: Float32[np.ndarray, "v 4 4"]
    intrinsics: Float32[np.ndarray, "v 3 3"]
    size: tuple[int, int]
    occupancy_bits: bytes
    grid: int
    occupancy_from: OccupancyFrom
    occupancy_rounding: Rounding
    encoding: Encoding
    read_views: Callable[[Sequence[int]], list[StoredView]] = dataclasses.field(repr=False, compare=False)

    def __post_init__(self):
        count, bits = len(self.view_ids), -(-(self.grid**3) // 8)
        shapes = {"depth_range": (count, 2), "world_from_camera": (count, 4, 4), "intrinsics": (count, 3, 3)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise DamagedRecord(self.id, f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if len(self.occupancy_bits) != bits:
            raise DamagedRecord(self.id, f"occupancy_bits has {len(self.occupancy_bits)} bytes, expected {bits}")

    @classmethod
    def encode(
        cls,
        id: str,
        views: PosedImages,
        occupancy: Bool[np.ndarray, "g g g"],
        *,
        occupancy_rounding: Rounding,
        encoding: Encoding,
        occupancy_from: OccupancyFrom = "depth",
    ) -> "Record":
        """The record of decoded views and their occupancy; raises ValueError as `check_views` does."""
        check_views(views, id)
        stored, limits = [], []
        for view, image, depth in zip(views.view_ids.tolist(), views.rgba, views.depth, strict=True):
            steps, near_far = quantize_depth(depth)
            stored.append(StoredView(id, view, _encode(image, encoding), _encode(steps, encoding)))
            limits.append(near_far)
        return cls(
            id=id,
            view_ids=views.view_ids.astype(np.int32),
            depth_range=np.array(limits, np.float32),
            world_from_camera=views.cameras.world_from_camera.astype(np.float32),
            intrinsics=views.cameras.intrinsics.astype(np.float32),
            size=(views.cameras.height, views.cameras.width),
            occupancy_bits=np.packbits(occupancy).tobytes(),
            grid=len(occupancy),
            occupancy_from=occupancy_from,
            occupancy_rounding=occupancy_rounding,
            encoding=encoding,
            read_views=functools.partial(_pick, tuple(stored)),
        )

    @property
    def occupancy(self) -> Bool[np.ndarray, "g g g"]:
        """Ground truth over (x, y, z), C order."""
        bits = np.unpackbits(np.frombuffer(self.occupancy_bits, np.uint8), count=self.grid**3)
        return bits.reshape((self.grid,) * 3).astype(bool)

    def cameras(self, rows: Sequence[int]) -> Cameras:
        """Cameras of the views in positions `rows`."""
        rows = list(rows)
        return Cameras(self.world_from_camera[rows], self.intrinsics[rows], *self.size)

    def views(self, ids: Sequence[int] | None = None) -> PosedImages:
        """Decoded views with the given numbers, all of them by default; no other view is read.

        Raises:
          ValueError: if the record has no such view.
          DamagedRecord: if a view cannot be read.
          OSError: if the machine is short of open files or memory.
        """
        rows = list(range(len(self.view_ids))) if ids is None else find_rows(self.view_ids, ids, self.id)
        rgba, depth = np.empty((len(rows), *self.size, 4), np.uint8), np.empty((len(rows), *self.size), np.float32)
        try:
            for place, (row, view) in enumerate(zip(rows, self.read_views(rows), strict=True)):
                if (view.id, view.view_id) != (self.id, int(self.view_ids[row])):
                    raise ValueError(f"view {self.view_ids[row]} is stored as view {view.view_id} of {view.id}")
                rgba[place] = _decode(view.image, "u1", (*self.size, 4), self.encoding)
                steps = _decode(view.depth, "<u2", self.size, self.encoding)
                _dequantize(steps, self.depth_range[row], depth[place])
        except (ValueError, IndexError, OSError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
            raise reading_error(self.id, error) from error
        return PosedImages(self.view_ids[rows], rgba, depth, self.cameras(rows))
