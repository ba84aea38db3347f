"""The procedural source: objects from integers, rendered on whatever device there is. Nothing is downloaded."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from geolrm_jax.data.procedural_shapes import Distribution, random_object
from geolrm_jax.data.record import PosedImages
from geolrm_jax.data.sdf import Shapes
from geolrm_jax.data.source import Source
from geolrm_jax.data.sphere_tracing import render
from geolrm_jax.geometry.cameras import gobjaverse_rig
from geolrm_jax.scene import Cameras

UNSEEN_SPLIT = "unseen_family"
# Purposes of random numbers, folded into the seed first; training has others.
OBJECT, OBJECT_OF_UNSEEN_FAMILY = 2, 5


@dataclasses.dataclass(frozen=True)
class ProceduralSource(Source):
    """Signed-distance objects with procedural textures, rendered by sphere tracing."""

    train_objects: int = 200
    """Objects to train on."""
    test_objects: int = 16
    """Objects kept for evaluation; no object is in two splits."""
    unseen_family_objects: int = 0
    """Objects of a harder evaluation, the split "unseen_family": each has primitives of a family that is in no other
    split, five-pointed stars."""
    seed: int = 0
    """Another seed gives other objects."""
    size: int = 128
    """Height and width of the pictures, in pixels."""
    view_ids: tuple[int, ...] = tuple(range(24))
    """Views of the GObjaverse rig to render: 0-23 upper ring, 25 top, 26 bottom, 27-38 lower ring."""
    radius: float = 1.9
    """Distance of the cameras from the object's centre, in cube sides."""
    fov: float = 39.6
    """Field of view in degrees."""
    distribution: Distribution = Distribution()
    """What objects are made of."""

    splits: ClassVar = ("train", "test", UNSEEN_SPLIT)
    on_accelerator: ClassVar = True

    def __post_init__(self):
        for name in ("train_objects", "test_objects", "unseen_family_objects"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.view_ids or len({*self.view_ids} & {*range(40)}) < len(self.view_ids):
            raise ValueError(f"view_ids: expected distinct numbers from 0 to 39, got {self.view_ids}")

    def count(self, split: str) -> int:
        """Objects of a split."""
        counts = (self.train_objects, self.test_objects, self.unseen_family_objects)
        return dict(zip(self.splits, counts, strict=True))[split]

    def ids(self, split: str) -> list[str]:
        """Names of the objects of a split: "procedural/SPLIT/NUMBER"."""
        return [object_id(split, index) for index in range(self.count(split))]

    def listing(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Names of the objects of every split, and those that are left out: none."""
        return {split: self.ids(split) for split in self.splits}, {}

    def shapes(self, split: str, index: int) -> Shapes:
        """An object's surface."""
        return random_object(object_key(self.seed, split, index), self.distribution, split == UNSEEN_SPLIT)

    def read(self, split: str, id: str) -> PosedImages:
        """Renders one object of `ids(split)`."""
        return render_views(self.shapes(split, int(id.rsplit("/", 1)[1])), self.cameras(), self.view_ids)

    def cameras(self, places: Sequence[int] | None = None) -> Cameras:
        """The rig's cameras for `view_ids`, or for those in some places of them."""
        rig = gobjaverse_rig(size=self.size, radius=self.radius, fov=self.fov)
        rows = list(self.view_ids) if places is None else [self.view_ids[place] for place in places]
        return Cameras(rig.world_from_camera[rows], rig.intrinsics[rows], rig.height, rig.width)


def object_id(split: str, index: int) -> str:
    """An object's name."""
    return f"procedural/{split}/{index}"


def object_key(seed: int, split: str, index: int) -> jax.Array:
    """The key of one object; numbers of training and test interleave, so that they cannot meet."""
    if split == UNSEEN_SPLIT:
        purpose, number = OBJECT_OF_UNSEEN_FAMILY, index
    else:
        purpose, number = OBJECT, 2 * index + (split == "test")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), number)


def render_views(shapes: Shapes, cameras: Cameras, view_ids: tuple[int, ...]) -> PosedImages:
    """An object seen by `cameras` (V,), colours rounded to 8 bits."""
    rgba, depth, _ = render(shapes, cameras, **_blocks())
    return PosedImages(np.array(view_ids, np.int32), _rounded(rgba), np.asarray(depth), cameras)


def draw_colors(shapes: Shapes, cameras: Cameras) -> UInt8[np.ndarray, "v h w 4"]:
    """The pictures of `render_views` alone."""
    return _rounded(render(shapes, cameras, **_blocks())[0])


def draw_depth(shapes: Shapes, cameras: Cameras) -> Float32[np.ndarray, "v h w"]:
    """The depth of `render_views` alone, at about a third of the cost."""
    return np.asarray(render(shapes, cameras, samples=1, **_blocks())[1])


def _rounded(rgba: Float[Array, "v h w 4"]) -> UInt8[np.ndarray, "v h w 4"]:
    return np.rint(np.asarray(rgba) * 255.0).astype(np.uint8)


def _blocks() -> dict[str, int]:
    """Work at a time: what fits a CPU's cache, or what fills an accelerator."""
    cpu = jax.default_backend() == "cpu"
    return {"chunk": 1024, "block": 4096} if cpu else {"chunk": 8192, "block": 1 << 20}
