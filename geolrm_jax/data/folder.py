"""The GObjaverse layout on disk: a folder for each object, in it a folder NNNNN for each view.

`ROOT/<dict>/<inst>/campos_512_v4/NNNNN/NNNNN{.png,.json,_nd.exr}`, or the same without `campos_512_v4/`, or objects
directly below ROOT. PNG: RGBA, straight alpha. JSON: `x`, `y`, `z`, `origin`, the columns of the camera-to-world matrix
(OpenCV axes, z up), `x_fov` and `y_fov` in radians. EXR: channel A is the camera z in cube sides, 0 where nothing is.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import OpenEXR
from jaxtyping import Float32, UInt8
from PIL import Image

from geolrm_jax.data.record import PosedImages, check_camera, check_views
from geolrm_jax.scene import Cameras

CAMPOS = "campos_512_v4"
# In GObjaverse's 40 views these two repeat others.
DUPLICATE_VIEWS = (24, 39)
_SKY = 1e9


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Objects in the GObjaverse layout."""

    root: str
    """Folder that holds the objects, at any depth."""
    test: tuple[str, ...] = ()
    """Objects for evaluation, by their path below `root`: "basket" or "dict/inst"."""
    train: tuple[str, ...] | None = None
    """Objects to train on; None: all that are not in `test`."""
    train_views: tuple[int, ...] | None = None
    """View numbers stored of training objects; None: all but the duplicates 24 and 39."""
    test_views: tuple[int, ...] | None = None
    """The same for evaluation objects."""

    def ids(self, split: str) -> list[str]:
        """Names of the objects of a split; ValueError where one that was asked for is not there."""
        found = find_objects(self.root)
        wanted = self.test if split == "test" else self.train
        if wanted is None:
            return [name for name in found if name not in self.test]
        missing = sorted({*wanted} - {*found})
        if missing:
            raise ValueError(f"{self.root} has no objects {', '.join(missing)}; it has {', '.join(found[:20])}")
        return list(wanted)

    def read(self, split: str, id: str) -> PosedImages:
        """The stored views of one object of `ids(split)`."""
        return read_views(Path(self.root) / id, self.test_views if split == "test" else self.train_views)


def _view_folders(folder: Path) -> dict[int, Path]:
    """Folder of every view number of an object, in order; empty where there are none."""
    inner = folder / CAMPOS if (folder / CAMPOS).is_dir() else folder
    numbered = sorted(f for f in inner.iterdir() if f.is_dir() and len(f.name) == 5 and f.name.isdigit())
    return {int(f.name): f for f in numbered}


def find_objects(root: str | Path) -> list[str]:
    """Paths of all objects below `root`, relative to it, sorted.

    Raises:
      FileNotFoundError: if `root` is no folder, or there is no object in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected objects in the GObjaverse layout")

    def search(folder: Path) -> list[Path]:
        if folder != root and _view_folders(folder):
            return [folder]
        return [found for inner in sorted(folder.iterdir()) if inner.is_dir() for found in search(inner)]

    objects = [str(folder.relative_to(root)) for folder in search(root)]
    if not objects:
        raise FileNotFoundError(f"an empty data set: no OBJECT/NNNNN/NNNNN.json anywhere below {root}")
    return objects


def read_views(folder: str | Path, ids: Sequence[int] | None = None) -> PosedImages:
    """The views of one object in the GObjaverse layout.

    Args:
      folder: of the object, with or without `campos_512_v4/` in it.
      ids: view numbers, in the order wanted; None for all but the duplicates 24 and 39.

    Raises:
      FileNotFoundError, ValueError: a missing or unreadable PNG, JSON or EXR, a camera that is no rotation, NaN in
        depth, sizes that disagree; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected an object in the GObjaverse layout")
    found = _view_folders(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no views: expected NNNNN/NNNNN.json, .png and _nd.exr in it")
    ids = [view for view in found if view not in DUPLICATE_VIEWS] if ids is None else [int(view) for view in ids]
    missing = [view for view in ids if view not in found]
    if missing:
        raise FileNotFoundError(f"{folder} has no views {missing}: expected {missing[0]:05d}/{missing[0]:05d}.json")
    images, depths, poses, intrinsics = [], [], [], []
    for view in ids:
        stem = found[view] / f"{view:05d}"
        image = read_image(stem.with_suffix(".png"))
        if images and image.shape != images[0].shape:
            raise ValueError(f"{stem}.png is {image.shape[:2]}, the other views are {images[0].shape[:2]}")
        pose, k = read_camera(stem.with_suffix(".json"), *image.shape[:2])
        images.append(image)
        depths.append(read_depth(Path(f"{stem}_nd.exr"), *image.shape[:2]))
        poses.append(pose)
        intrinsics.append(k)
    cameras = Cameras(np.stack(poses), np.stack(intrinsics), *images[0].shape[:2])
    return check_views(PosedImages(np.array(ids, np.int32), np.stack(images), np.stack(depths), cameras), str(folder))


def read_image(path: Path) -> UInt8[np.ndarray, "h w 4"]:
    """A picture with straight alpha; alpha is 255 where the file has none."""
    _expect_file(path, "an image")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


def read_camera(path: Path, height: int, width: int) -> tuple[Float32[np.ndarray, "4 4"], Float32[np.ndarray, "3 3"]]:
    """OpenCV pose and intrinsics of a GObjaverse camera file, for an image of the given size."""
    _expect_file(path, "a camera")
    try:
        camera = json.loads(path.read_text())
        columns = [np.array(camera[key], np.float64).reshape(3) for key in ("x", "y", "z", "origin")]
        fov_x, fov_y = float(camera["x_fov"]), float(camera["y_fov"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no camera: JSON with x, y, z, origin (3 numbers each), x_fov and y_fov expected ({error!r})"
        ) from error
    pose = np.eye(4)
    pose[:3] = np.stack(columns, axis=-1)
    focal_x, focal_y = 0.5 * width / np.tan(0.5 * fov_x), 0.5 * height / np.tan(0.5 * fov_y)
    intrinsics = np.array([[focal_x, 0.0, 0.5 * width], [0.0, focal_y, 0.5 * height], [0.0, 0.0, 1.0]])
    check_camera(pose, intrinsics, str(path))
    return pose.astype(np.float32), intrinsics.astype(np.float32)


def read_depth(path: Path, height: int, width: int) -> Float32[np.ndarray, "h w"]:
    """Channel A of a GObjaverse `_nd.exr`: camera z in cube sides, 0 where there is no surface."""
    _expect_file(path, "an OpenEXR file with the depth in channel A")
    try:
        with OpenEXR.File(str(path), separate_channels=True) as file:
            depth = np.array(file.channels()["A"].pixels, np.float32)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no OpenEXR file with a channel A: {error!r}") from error
    if depth.shape != (height, width):
        raise ValueError(f"{path} is {depth.shape}, its image is {(height, width)}")
    if np.isnan(depth).any() or depth.min() < 0.0:
        raise ValueError(f"{path}: depth must be a number and not negative (0 = missing)")
    return np.where(depth < _SKY, depth, 0.0).astype(np.float32)


def _expect_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected {what}")
