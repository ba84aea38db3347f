"""The procedural source: objects from integers, rendered on whatever device there is. Nothing is downloaded."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from geolrm_jax.data.procedural_shapes import Distribution, random_object
from geolrm_jax.data.record import PosedImages
from geolrm_jax.data.sdf import Shapes
from geolrm_jax.data.source import Source
from geolrm_jax.data.sphere_tracing import render
from geolrm_jax.geometry.cameras import gobjaverse_rig
from geolrm_jax.scene import Cameras

UNSEEN_FAMILY = "unseen_family"
SPLITS = ("train", "test", UNSEEN_FAMILY)
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

    on_accelerator: ClassVar = True

    def count(self, split: str) -> int:
        """Objects of a split."""
        return {"train": self.train_objects, "test": self.test_objects, UNSEEN_FAMILY: self.unseen_family_objects}[
            split
        ]

    def ids(self, split: str) -> list[str]:
        """Names of the objects of a split: "procedural/SPLIT/NUMBER"."""
        return [object_id(split, index) for index in range(self.count(split))]

    def shapes(self, split: str, index: int) -> Shapes:
        """An object's surface."""
        return random_object(object_key(self.seed, split, index), self.distribution, split == UNSEEN_FAMILY)

    def read(self, split: str, id: str) -> PosedImages:
        """Renders one object of `ids(split)`."""
        return render_views(self.shapes(split, int(id.rsplit("/", 1)[1])), self.cameras(), self.view_ids)

    def cameras(self) -> Cameras:
        """The rig's cameras for `view_ids`."""
        rig, rows = gobjaverse_rig(size=self.size, radius=self.radius, fov=self.fov), list(self.view_ids)
        return Cameras(rig.world_from_camera[rows], rig.intrinsics[rows], rig.height, rig.width)


def object_id(split: str, index: int) -> str:
    """An object's name."""
    return f"procedural/{split}/{index}"


def object_key(seed: int, split: str, index: int) -> jax.Array:
    """The key of one object; numbers of training and test interleave, so that they cannot meet."""
    if split == UNSEEN_FAMILY:
        purpose, number = OBJECT_OF_UNSEEN_FAMILY, index
    else:
        purpose, number = OBJECT, 2 * index + ("train", "test").index(split)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), number)


def render_views(shapes: Shapes, cameras: Cameras, view_ids: tuple[int, ...]) -> PosedImages:
    """An object seen by `cameras` (V,), colours rounded to 8 bits."""
    chunk, block = (256, 4096) if jax.default_backend() == "cpu" else (8192, 1 << 20)
    rgba, depth, _ = render(shapes, cameras, chunk=chunk, block=block)
    quantized = np.rint(np.asarray(rgba) * 255.0).astype(np.uint8)
    return PosedImages(np.array(view_ids, np.int32), quantized, np.asarray(depth), cameras)
