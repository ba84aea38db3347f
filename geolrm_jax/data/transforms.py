"""Folders of images with a NeRF-style `transforms.json`: a source of objects, and what inference takes.

`frames`: a list of {"file_path", "transform_matrix"}, the matrix camera-to-world with OpenGL axes, z up, lengths in
cube sides. Focal lengths: `fl_x` (and `fl_y`, `cx`, `cy`, with `w` and `h`, the size they refer to) in pixels, or
`camera_angle_x` in radians; at the top, or in a frame for that frame alone.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from geolrm_jax.data.folder import check_name, read_image
from geolrm_jax.data.record import PosedImages, check_camera, check_views
from geolrm_jax.geometry.cameras import from_opengl
from geolrm_jax.scene import Cameras

TRANSFORMS_FILE = "transforms.json"


@dataclasses.dataclass(frozen=True)
class TransformsSource:
    """Objects as folders with a `transforms.json` each: ROOT/lego/transforms.json, or ROOT/transforms.json alone."""

    root: str
    """Folder that holds the objects, at any depth."""
    test: tuple[str, ...] = ()
    """Objects for evaluation, by their path below `root`; all others are trained on."""
    file: str = TRANSFORMS_FILE
    """Name of the cameras' file; NeRF-synthetic has "transforms_train.json"."""
    scale: float = 1.0
    """Cube sides per length of the files: the object must fit [-0.5, 0.5]^3. NeRF-synthetic needs about 0.3."""
    min_views: int = 1
    """Objects with fewer views are refused."""

    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def ids(self, split: str) -> list[str]:
        """Names of the objects of a split; ValueError where one that was asked for is not there."""
        found = find_objects(self.root, self.file)
        missing = sorted({*self.test} - {*found})
        if missing:
            raise ValueError(f"{self.root} has no objects {', '.join(missing)}; it has {', '.join(found[:20])}")
        return list(self.test) if split == "test" else [name for name in found if name not in self.test]

    def read(self, split: str, id: str) -> PosedImages:
        """All views of one object; raises as `read_views` does."""
        check_name(id)
        views = read_views(Path(self.root) / id, file=self.file, scale=self.scale)
        if len(views.view_ids) < self.min_views:
            raise ValueError(f"{id} has {len(views.view_ids)} views, at least {self.min_views} are asked for")
        return views


def find_objects(root: str | Path, file: str = TRANSFORMS_FILE) -> list[str]:
    """Paths of all folders with such a file, relative to `root` ("." for itself), sorted.

    Raises:
      FileNotFoundError: if `root` is no folder, or there is no such file in it.
    """
    root = Path(root)
    objects = sorted(str(found.parent.relative_to(root)) for found in root.rglob(file) if found.is_file())
    if not objects:
        raise FileNotFoundError(f"an empty data set: no {file} anywhere below {root}")
    return objects


def read_views(
    folder: str | Path, ids: Sequence[int] | None = None, *, file: str = TRANSFORMS_FILE, scale: float = 1.0
) -> PosedImages:
    """The images of a folder with a `transforms.json`; a view's number is its place among the frames.

    Args:
      folder: holds the cameras' file; images are named relative to it, with or without ".png".
      ids: view numbers, in the order wanted; None for all.
      file: name of the cameras' file.
      scale: cube sides per length of the file.

    Returns:
      Views with zero depth, and alpha 255 where an image has none.

    Raises:
      FileNotFoundError, ValueError: a missing or unreadable file, a missing key, an image outside the folder, a matrix
        that is no rotation, sizes that disagree; the message names the file.
    """
    path = Path(folder) / file
    transforms = _read_transforms(path)
    frames = transforms["frames"]
    ids = range(len(frames)) if ids is None else [int(view) for view in ids]
    missing = [view for view in ids if not 0 <= view < len(frames)]
    if missing or not frames:
        raise ValueError(f"{path} has {len(frames)} frames: no views {missing}")
    images, poses, intrinsics = [], [], []
    for view in ids:
        origin = f"{path}, frame {view}"
        image = read_image(_image_path(Path(folder), frames[view], origin))
        if images and image.shape != images[0].shape:
            raise ValueError(f"{origin}: its image is {image.shape[:2]}, the others are {images[0].shape[:2]}")
        images.append(image)
        poses.append(_pose(frames[view], scale, origin))
        intrinsics.append(_intrinsics({**transforms, **frames[view]}, *image.shape[:2], origin))
        check_camera(poses[-1], intrinsics[-1], origin)
    cameras = Cameras(np.stack(poses), np.stack(intrinsics), *images[0].shape[:2])
    depth = np.zeros((len(images), *images[0].shape[:2]), np.float32)
    return check_views(PosedImages(np.array(ids, np.int32), np.stack(images), depth, cameras), str(folder))


def _read_transforms(path: Path) -> dict[str, Any]:
    """The file's content, whose `frames` is a list of JSON objects."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected cameras and names of images")
    try:
        transforms = json.loads(path.read_text())
        sound = isinstance(transforms["frames"], list) and all(isinstance(f, dict) for f in transforms["frames"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no list of cameras: JSON with `frames` expected ({error!r})") from error
    if not sound:
        raise ValueError(f"{path} is no list of cameras: `frames` must be a list of JSON objects")
    return transforms


def _image_path(folder: Path, frame: dict[str, Any], origin: str) -> Path:
    """The image of a frame; NeRF-synthetic leaves ".png" out."""
    if not isinstance(frame.get("file_path"), str):
        raise ValueError(f"{origin}: `file_path` expected")
    if PurePosixPath(frame["file_path"]).is_absolute() or ".." in PurePosixPath(frame["file_path"]).parts:
        raise ValueError(f"{origin}: `file_path` {frame['file_path']!r} leads out of the folder")
    path = folder / frame["file_path"]
    return path if path.suffix else path.with_suffix(".png")


def _pose(frame: dict[str, Any], scale: float, origin: str) -> Float32[np.ndarray, "4 4"]:
    """OpenCV pose of a frame, in cube sides."""
    try:
        pose = from_opengl(np.array(frame["transform_matrix"], np.float64).reshape(4, 4))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{origin}: `transform_matrix` of 4 x 4 numbers expected ({error!r})") from error
    pose[:3, 3] *= scale
    return pose.astype(np.float32)


def _intrinsics(values: dict[str, Any], height: int, width: int, origin: str) -> Float32[np.ndarray, "3 3"]:
    """Intrinsics in pixels of a `height` x `width` image, from pixels of the size that the file states or an angle."""
    try:
        stated_width, stated_height = float(values.get("w", width)), float(values.get("h", height))
        if "fl_x" in values:
            focal_x = float(values["fl_x"])
        else:
            focal_x = 0.5 * stated_width / np.tan(0.5 * float(values["camera_angle_x"]))
        focal_y = float(values.get("fl_y", focal_x))
        center = float(values.get("cx", 0.5 * stated_width)), float(values.get("cy", 0.5 * stated_height))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{origin}: `camera_angle_x` or `fl_x`, in numbers, expected ({error!r})") from error
    if not (stated_width > 0.0 and stated_height > 0.0):
        raise ValueError(f"{origin}: `w` and `h` must be positive, got {stated_width} and {stated_height}")
    scale_x, scale_y = width / stated_width, height / stated_height
    matrix = [[focal_x * scale_x, 0.0, center[0] * scale_x], [0.0, focal_y * scale_y, center[1] * scale_y], [0, 0, 1.0]]
    return np.array(matrix, np.float32)
