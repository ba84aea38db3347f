"""The GObjaverse layout on disk: a folder for each object, in it a folder NNNNN for each view.

`ROOT/<dict>/<inst>/campos_512_v4/NNNNN/NNNNN{.png,.json,_nd.exr}`, or the same without `campos_512_v4/`, or objects
directly below ROOT. PNG: RGBA, straight alpha. JSON: `x`, `y`, `z`, `origin`, the columns of the camera-to-world matrix
(OpenCV axes, z up), `x_fov` and `y_fov` in radians. EXR: channel A is the camera z in cube sides, 0 where nothing is.
"""

import dataclasses
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import OpenEXR
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from geolrm_jax.data.record import PosedImages, check_camera, check_views
from geolrm_jax.data.source import Source
from geolrm_jax.scene import Cameras

CAMPOS = "campos_512_v4"
# In GObjaverse's 40 views these two repeat others.
DUPLICATE_VIEWS = (24, 39)
# The paper's loader leaves out objects whose caption has one of these.
LEFT_OUT_CAPTIONS = ("box", "cube")
# What a file may have: one that claims more is refused before it is decoded.
MAX_PIXELS, MAX_BYTES, MAX_CHANNELS = 4096**2, 1 << 28, 16
MAX_CAMERA_BYTES = 1 << 24  # JSON takes about 20 times as much when it is read
MAX_OBJECT_PIXELS = 1 << 28  # of all views of an object: they are in memory together
_FORMATS = ("PNG", "JPEG", "WEBP")
_SKY = 6e4  # a half float ends at 65504


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """Objects in the GObjaverse layout."""

    root: str
    """Folder that holds the objects, at any depth."""
    test: tuple[str, ...] | None = ()
    """Objects for evaluation, by their path below `root`: "basket" or "dict/inst"; None: all."""
    train: tuple[str, ...] | None = None
    """Objects to train on; None: all that are not in `test`."""
    train_views: tuple[int, ...] | None = None
    """View numbers stored of training objects; None: all but the duplicates 24 and 39."""
    test_views: tuple[int, ...] | None = None
    """The same for evaluation objects."""
    index: str | None = None
    """JSON list of objects, or object whose keys they are; None: `root` is searched, slowly where it is large."""
    captions: str | None = None
    """JSON object from names to captions: training objects whose caption has "box" or "cube" in it are left out."""
    min_views: int = 1
    """Objects with fewer stored views are refused."""

    def listing(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Names of the objects of every split, and those that captions keep from training, with the reason.

        Raises:
          FileNotFoundError, ValueError: if there are no objects, one that was asked for is not there, or there is a
            file of captions without one of an object.
        """
        found = read_names(self.index) if self.index else find_objects(self.root)
        splits = split_names(found, self.train, self.test, self.index or self.root)
        left_out = self._left_out(found, splits["train"])
        return {**splits, "train": [name for name in splits["train"] if name not in left_out]}, left_out

    def _left_out(self, found: list[str], train: list[str]) -> dict[str, str]:
        """Objects that their captions keep from training, with the reason."""
        if self.captions is None:
            return {}
        captions = read_captions(self.captions)
        if captions.keys().isdisjoint(found):
            raise ValueError(
                f"{self.captions}: none of its {len(captions)} keys is the name of an object, such as {found[:1]}"
            )
        words = {name: [word for word in LEFT_OUT_CAPTIONS if word in captions.get(name, "").lower()] for name in train}
        return {name: f"its caption has {first[0]!r} in it" for name, first in words.items() if first}

    def read(self, split: str, id: str) -> PosedImages:
        """The stored views of one object of `ids(split)`; raises as `read_views` does."""
        check_name(id)
        views = read_views(Path(self.root) / id, self.test_views if split == "test" else self.train_views)
        if len(views.view_ids) < self.min_views:
            raise ValueError(f"{id} has {len(views.view_ids)} views, at least {self.min_views} are asked for")
        return views


def split_names(
    found: list[str], train: Sequence[str] | None, test: Sequence[str] | None, place: str
) -> dict[str, list[str]]:
    """Names of "train", None for all but test's, and of "test", None for all; ValueError where one is not found."""
    evaluated = found if test is None else list(test)
    if train is None:
        kept = {*evaluated}
        train = [name for name in found if name not in kept]
    missing = sorted({*train, *evaluated} - {*found})
    if missing:
        raise ValueError(f"{place} has no objects {', '.join(missing[:20])}; it has {', '.join(found[:20])}")
    return {"train": list(train), "test": evaluated}


def check_name(name: str) -> None:
    """Raises a ValueError unless `name` is a path below a folder that cannot lead out of it, in its shortest form."""
    path = PurePosixPath(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts
    if not inside or str(path) != name or "\\" in name or not name.isprintable():
        raise ValueError(
            f"{name!r} is no name of an object: expected a path below the source's folder, written like dict/inst"
        )


def read_text(path: str | Path, what: str, most: int = MAX_BYTES) -> str:
    """The content of a file in UTF-8, with or without a byte order mark.

    Raises:
      FileNotFoundError, ValueError: if there is none, it has more than `most` bytes or is no UTF-8; they name the file.
    """
    _expect_file(Path(path), what, most)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: expected {what} ({error})") from error


def _read_json(path: str | Path, what: str) -> object:
    """The content of a JSON file; ValueError where it is none."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no {what.removeprefix('a ')}: {error}") from error


def read_names(path: str | Path) -> list[str]:
    """Names of objects from a JSON list, from the keys of a JSON object, or else from a text file's lines.

    An entry of a list that is no text stays, as what it is in JSON behind "no name:", to be refused when it is read.
    """
    if Path(path).suffix != ".json":
        return [line.strip() for line in read_text(path, "a list of objects").splitlines() if line.strip()]
    content = _read_json(path, "a list of objects")
    if not isinstance(content, list | dict):
        raise ValueError(f"{path}: expected a JSON list of objects, or a JSON object whose keys they are")
    return [name if isinstance(name, str) else f"no name: {json.dumps(name)}" for name in content]


def read_captions(path: str | Path) -> dict[str, str]:
    """Captions by name; ValueError where the file is no JSON object of texts."""
    content = _read_json(path, "a file of captions")
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ValueError(f"{path}: expected a JSON object from names of objects to captions")
    return content


def _view_folders(folder: Path) -> dict[int, Path]:
    """Folder of every view number of an object, in order; empty where there are none."""
    inner = folder / CAMPOS if (folder / CAMPOS).is_dir() else folder
    return {int(name): inner / name for name in sorted(_folders(inner)) if _is_number(name)}


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but for hidden ones: what is unfinished is hidden."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; asks the disk about links alone, which may lead to themselves."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _is_number(name: str) -> bool:
    return len(name) == 5 and name.isascii() and name.isdigit()


def find_folders(root: Path, holds_object: Callable[[Path, list[str]], bool]) -> list[Path]:
    """`root`, or all folders below it, that hold an object as told by a function of a folder and the names in it.

    Not searched are folders of objects, hidden ones, and what is reached again through links.
    """

    def search(folder: Path, above: frozenset[tuple[int, int]]) -> list[Path]:
        inner = sorted(_folders(folder))
        if holds_object(folder, inner):
            return [folder]
        status = folder.stat()
        place = status.st_dev, status.st_ino
        if place in above:
            return []
        return [found for name in inner for found in search(folder / name, above | {place})]

    return search(root, frozenset())


def find_objects(root: str | Path) -> list[str]:
    """Paths of all objects below `root`, relative to it, sorted.

    An object is a folder with `campos_512_v4/` in it, or with views NNNNN/NNNNN.json or .png: GObjaverse has objects
    whose own names are five digits.

    Raises:
      FileNotFoundError: if `root` is no folder, or there is no object in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected objects in the GObjaverse layout")

    def holds_views(folder: Path, inner: list[str]) -> bool:
        if folder == root:
            return False
        files = (
            folder / name / f"{name}{suffix}" for name in inner if _is_number(name) for suffix in (".json", ".png")
        )
        return CAMPOS in inner or any(file.is_file() for file in files)

    objects = [str(folder.relative_to(root)) for folder in find_folders(root, holds_views)]
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
        check_pixels(len(ids), *image.shape[:2], str(folder))
        pose, k = read_camera(stem.with_suffix(".json"), *image.shape[:2])
        images.append(image)
        depths.append(read_depth(Path(f"{stem}_nd.exr"), *image.shape[:2]))
        poses.append(pose)
        intrinsics.append(k)
    cameras = Cameras(np.stack(poses), np.stack(intrinsics), *images[0].shape[:2])
    return check_views(PosedImages(np.array(ids, np.int32), np.stack(images), np.stack(depths), cameras), str(folder))


def check_pixels(views: int, height: int, width: int, origin: str) -> None:
    """Raises a ValueError if so many views are too much for one object."""
    if views * height * width > MAX_OBJECT_PIXELS:
        raise ValueError(f"{origin}: {views} views of {height} x {width}, at most {MAX_OBJECT_PIXELS} pixels expected")


def read_image(path: Path) -> UInt8[np.ndarray, "h w 4"]:
    """A PNG, JPEG or WebP with straight alpha; alpha is 255 where the file has none.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: if it is damaged (a PNG's checksums are compared), larger than MAX_PIXELS or MAX_BYTES, or holds
        integers of more than 8 bits or floats, whose range nobody states.
    """
    _expect_file(path, "an image")
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} expected")
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are of Pillow's mode {image.mode}, 8 bits a channel expected")
            image.verify()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return np.array(image.convert("RGBA"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no readable image: neither {' nor '.join(_FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


def read_camera(path: Path, height: int, width: int) -> tuple[Float32[np.ndarray, "4 4"], Float32[np.ndarray, "3 3"]]:
    """OpenCV pose and intrinsics of a GObjaverse camera file, for an image of the given size.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: if a key is missing or no number, the axes are no rotation, an angle is not between 0 and pi.
    """
    try:
        camera = json.loads(read_text(path, "a camera", MAX_CAMERA_BYTES))
        columns = [np.array(camera[key], np.float64).reshape(3) for key in ("x", "y", "z", "origin")]
        fov_x, fov_y = float(camera["x_fov"]), float(camera["y_fov"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path} is no camera: JSON with x, y, z, origin (3 numbers each), x_fov and y_fov expected ({error!r})"
        ) from error
    if not (0.0 < fov_x < np.pi and 0.0 < fov_y < np.pi):
        raise ValueError(f"{path}: x_fov and y_fov must lie between 0 and pi, got {fov_x} and {fov_y}")
    pose = np.eye(4)
    pose[:3] = np.stack(columns, axis=-1)
    focal_x, focal_y = 0.5 * width / np.tan(0.5 * fov_x), 0.5 * height / np.tan(0.5 * fov_y)
    intrinsics = np.array([[focal_x, 0.0, 0.5 * width], [0.0, focal_y, 0.5 * height], [0.0, 0.0, 1.0]])
    check_camera(pose, intrinsics, str(path))
    return pose.astype(np.float32), intrinsics.astype(np.float32)


def read_channels(path: Path, names: Sequence[str], height: int, width: int) -> Float32[np.ndarray, "h w c"]:
    """Channels of an OpenEXR file by name, half or float, of a picture of the given size.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: if it is no OpenEXR file, lacks a channel, is of another size, deep, or has more parts than one or
        more channels than MAX_CHANNELS: that is known from the header, before anything is decoded.
    """
    _expect_file(path, f"an OpenEXR file with the channels {', '.join(names)}")
    data = path.read_bytes()
    try:
        _check_header(OpenEXR.File(io.BytesIO(data), header_only=True), height, width)
        channels = OpenEXR.File(io.BytesIO(data), separate_channels=True, num_threads=0).channels()
        planes = [channels[name].pixels for name in names]
    except (RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no OpenEXR file with channels {', '.join(names)}: {error!r}") from error
    for plane in planes:
        if plane.shape != (height, width) or plane.dtype not in (np.float16, np.float32):
            raise ValueError(f"{path}: channels are {plane.dtype} {plane.shape}, expected floats {(height, width)}")
    return np.stack(planes, axis=-1).astype(np.float32)


def _check_header(file: OpenEXR.File, height: int, width: int) -> None:
    """Raises a ValueError unless decoding the file makes one picture of a size, with few channels."""
    header = file.header()
    low, high = header["dataWindow"]
    if low.tolist() != [0, 0] or high.tolist() != [width - 1, height - 1]:
        raise ValueError(f"its window is {low.tolist()} to {high.tolist()}, its image is {width} x {height}")
    if len(file.parts) != 1 or header["type"] not in (OpenEXR.scanlineimage, OpenEXR.tiledimage):
        raise ValueError(f"it has {len(file.parts)} parts, the first of type {header['type']}")
    if len(header["channels"]) > MAX_CHANNELS:
        raise ValueError(f"it has {len(header['channels'])} channels, at most {MAX_CHANNELS} expected")


def read_depth(path: Path, height: int, width: int) -> Float32[np.ndarray, "h w"]:
    """Channel A of a GObjaverse `_nd.exr`: camera z in cube sides, 0 where there is no surface."""
    depth = read_channels(path, ("A",), height, width)[..., 0]
    if np.isnan(depth).any() or depth.min() < 0.0:
        raise ValueError(f"{path}: depth must be a number and not negative (0 = missing)")
    return np.where(depth < _SKY, depth, 0.0).astype(np.float32)


def _expect_file(path: Path, what: str, most: int = MAX_BYTES) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected {what}")
    if path.stat().st_size > most:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: expected {what} of at most {most}")
