"""Folders of images with a NeRF-style `transforms.json`: a source of objects, and what inference takes.

`frames`: a list of {"file_path", "transform_matrix"}, the matrix camera-to-world with OpenGL axes, z up, lengths in
cube sides. Focal lengths: `fl_x` (and `fl_y`, `cx`, `cy`, with `w` and `h`, the size they refer to) in pixels, or
`camera_angle_x` in radians; at the top, or in a frame for that frame alone. Cameras are pinholes: pictures with a
lens's distortion must be undistorted first.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from geolrm_jax.data.folder import (
    MAX_CAMERA_BYTES,
    check_name,
    check_pixels,
    find_folders,
    read_image,
    read_text,
    split_names,
)
from geolrm_jax.data.record import PosedImages, check_camera, check_views
from geolrm_jax.data.source import Source
from geolrm_jax.geometry.cameras import from_opengl
from geolrm_jax.scene import Cameras

TRANSFORMS_FILE = "transforms.json"
_DISTORTIONS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
# Names of models that are a pinhole where all distortions are 0.
_PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")


@dataclasses.dataclass(frozen=True)
class TransformsSource(Source):
    """Objects as folders with a `transforms.json` each: ROOT/lego/transforms.json, or ROOT/transforms.json alone.

    ROOT alone is an object with the folder's own name.
    """

    root: str
    """Folder that holds the objects, at any depth."""
    test: tuple[str, ...] | None = ()
    """Objects for evaluation, by their path below `root`, None: all; all others are trained on."""
    file: str = TRANSFORMS_FILE
    """Name of the cameras' file; NeRF-synthetic has "transforms_train.json"."""
    scale: float = 1.0
    """Cube sides per length of the files: the object must fit [-0.5, 0.5]^3. NeRF-synthetic needs about 0.3."""
    min_views: int = 1
    """Objects with fewer views are refused."""

    occupancy_from: ClassVar = "silhouettes"

    def __post_init__(self):
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"scale must be a positive number of cube sides per length, got {self.scale}")

    def listing(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Names of the objects of every split, and those that are left out: none.

        Raises:
          FileNotFoundError, ValueError: if there are no objects, or one that was asked for is not there.
        """
        return split_names(find_objects(self.root, self.file), None, self.test, self.root), {}

    def read(self, split: str, id: str) -> PosedImages:
        """All views of one object; raises as `read_views` does."""
        check_name(id)
        root = Path(self.root)
        alone = id == root.resolve().name and (root / self.file).is_file()
        views = read_views(root if alone else root / id, file=self.file, scale=self.scale)
        if len(views.view_ids) < self.min_views:
            raise ValueError(f"{id} has {len(views.view_ids)} views, at least {self.min_views} are asked for")
        return views


def find_objects(root: str | Path, file: str = TRANSFORMS_FILE) -> list[str]:
    """Paths of all folders with such a file, relative to `root`, sorted; of `root` itself, if it has one, its name.

    Raises:
      FileNotFoundError: if `root` is no folder, or there is no such file in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected objects with a {file} each")
    folders = find_folders(root, lambda folder, _: (folder / file).is_file())
    objects = sorted(root.resolve().name if folder == root else str(folder.relative_to(root)) for folder in folders)
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
        check_pixels(len(ids), *image.shape[:2], str(path))
        images.append(image)
        poses.append(_pose(frames[view], scale, origin))
        values = {**transforms, **frames[view]}
        _check_pinhole(values, origin)
        intrinsics.append(_intrinsics(values, *image.shape[:2], origin))
        check_camera(poses[-1], intrinsics[-1], origin)
    cameras = Cameras(np.stack(poses), np.stack(intrinsics), *images[0].shape[:2])
    depth = np.zeros((len(images), *images[0].shape[:2]), np.float32)
    return check_views(PosedImages(np.array(ids, np.int32), np.stack(images), depth, cameras), str(folder))


def _read_transforms(path: Path) -> dict[str, Any]:
    """The file's content, whose `frames` is a list of JSON objects."""
    text = read_text(path, "cameras and names of images", MAX_CAMERA_BYTES)
    try:
        transforms = json.loads(text)
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


def _check_pinhole(values: dict[str, Any], origin: str) -> None:
    """Raises a ValueError if the pictures are those of a lens that bends lines."""
    bent = [f"{name} = {values[name]}" for name in _DISTORTIONS if values.get(name) not in (None, 0)]
    model = values.get("camera_model")
    if model is not None and str(model).upper() not in _PINHOLES:
        bent.append(f"camera_model = {model}")
    if values.get("is_fisheye"):
        bent.append("is_fisheye")
    if bent:
        raise ValueError(f"{origin}: a pinhole camera expected, got {', '.join(bent)}: undistort the pictures first")


def _focal_length(values: dict[str, Any], width: float) -> float:
    """Along x, in pixels of a picture that wide."""
    if "fl_x" in values:
        return float(values["fl_x"])
    angle = float(values["camera_angle_x"])
    if not 0.0 < angle < np.pi:
        raise ValueError(f"camera_angle_x must lie between 0 and pi radians, got {angle}")
    return 0.5 * width / np.tan(0.5 * angle)


def _intrinsics(values: dict[str, Any], height: int, width: int, origin: str) -> Float32[np.ndarray, "3 3"]:
    """Intrinsics in pixels of a `height` x `width` image, from pixels of the size that the file states or an angle."""
    try:
        stated_width, stated_height = float(values.get("w", width)), float(values.get("h", height))
        focal_x = _focal_length(values, stated_width)
        focal_y = float(values.get("fl_y", focal_x))
        center = float(values.get("cx", 0.5 * stated_width)), float(values.get("cy", 0.5 * stated_height))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{origin}: `camera_angle_x` or `fl_x`, in numbers, expected ({error!r})") from error
    if not (stated_width > 0.0 and stated_height > 0.0):
        raise ValueError(f"{origin}: `w` and `h` must be positive, got {stated_width} and {stated_height}")
    scale_x, scale_y = width / stated_width, height / stated_height
    matrix = [[focal_x * scale_x, 0.0, center[0] * scale_x], [0.0, focal_y * scale_y, center[1] * scale_y], [0, 0, 1.0]]
    return np.array(matrix, np.float32)
